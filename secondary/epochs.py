"""An epoch in the making: frames in, whole parts out (docs/wire-protocol.md, section 4).

Every frame is checked when it arrives, digest first, then structure and bounds, so that a part that is
whole can be committed without anything left to go wrong.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from checkpointd import native
from checkpointd.errors import StreamError
from checkpointd.stream.records import split_records
from checkpointd.wire.frames import U32_MAX, FrameError, Kind, PartEnd, check_digest
from checkpointd.wire.messages import EVERYTHING, RANGES_MAX
from checkpointd.wire.reduced import unpack

if TYPE_CHECKING:
    from checkpointd.wire.frames import Digester, Header, Octets
    from checkpointd.wire.reduced import Reduced

# Octets counted for each frame beside its payload: header, objects and their places in tables. It keeps
# a peer that sends the smallest frames there are within the budget.
FRAME_OVERHEAD = 512
WORD = 8  # octets of a pfn word
AUDIT_ENTRY = 24  # octets: u64 pfn, 16 octets digest


class Budget:
    """Octets that epochs of all domains may hold together (--epoch-memory, invariant 6). Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        return self._used

    def take(self, octets: int) -> bool:
        """Reserve; False, and nothing reserved, if it is not there."""
        with self._lock:
            if self._used + octets > self.limit:
                return False
            self._used += octets
            return True

    def give_back(self, octets: int) -> None:
        with self._lock:
            assert octets <= self._used, "more given back than was taken"
            self._used -= octets


@dataclass(slots=True, eq=False)
class Arrived:
    """A frame that came reduced, and the record that it stands for once the replica's thread has made it."""

    reduced: Reduced
    record: Octets | None = None
    freed: bool = False  # nothing is reserved for the reduced one any more

    @property
    def length(self) -> int:
        """Octets of the record."""
        return self.reduced.length

    @property
    def surplus(self) -> int:
        """Octets that are reserved beside those."""
        return 0 if self.freed else self.reduced.octets


@dataclass(slots=True)
class Load:
    """A whole part. `octets` are reserved for it in the budget until its owner gives them back."""

    epoch: int
    part: int
    final: bool
    octets: int
    surplus: int = 0  # octets of `octets` that are free once nothing is reduced
    pages: list[Octets] = field(default_factory=list)  # PAGE_DATA records
    reduced: list[Arrived] = field(default_factory=list)  # more of them, until they are expanded
    zero: list[Octets] = field(default_factory=list)  # pfn words
    gone: list[Octets] = field(default_factory=list)  # pfn words
    context: bytes = b""  # tail records, final part only
    audit: bytes = b""  # {u64 pfn, 16 octets digest}, final part only


@dataclass(frozen=True, slots=True)
class Lacking:
    """These frames of the part are not here: [first, last] sequences, as Missing carries them."""

    epoch: int
    part: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Acked:
    """A part that was acked before; the ack was lost."""

    epoch: int
    part: int
    final: bool


class Ahead(Protocol):
    """Hears of the frames of pages of the part in the making: what can be made ready for them need not wait."""

    def frame(self, epoch: int, content: Octets | Arrived) -> None: ...

    def over(self) -> None:
        """The part is whole, or was thrown away."""
        ...


class _Nobody:
    def frame(self, epoch: int, content: Octets | Arrived) -> None:
        pass

    def over(self) -> None:
        pass


class EpochAssembler:
    """The parts of one session's epochs, one part at a time.

    Invariant 2: a partial epoch leaves no trace. Frames are kept here, and only here, until their part
    is whole; a frame of a higher epoch, a new session or a fault throws them away. A whole part leaves
    as one Load, once; acked() then opens the next part, so nothing is taken for a part before the one
    in front of it was acked.
    """

    def __init__(
        self,
        nr_pfns: int,
        key: Digester,
        budget: Budget,
        *,
        first_epoch: int,
    ) -> None:
        """Epochs below `first_epoch` are none of this session's."""
        self.ahead: Ahead = _Nobody()
        self._nr_pfns = nr_pfns
        self._key = key
        self._budget = budget
        self._epoch = first_epoch  # the one in the making, or the lowest that may come
        self._part = 0  # the part in the making
        self._last: Acked | None = None  # the last epoch acked
        self._whole = False  # the part has left as a Load and is not acked yet
        self._frames: dict[int, tuple[Kind, Octets | Arrived]] = {}
        self._end: PartEnd | None = None
        self._hungry = False  # a frame of the part was not kept for want of memory
        self._taken = 0  # octets reserved
        self._size = 0  # octets that the part takes once nothing of it is reduced
        self.discarded = 0  # partial epochs thrown away
        self.starved = 0  # frames not kept because other epochs held the memory

    @property
    def under_way(self) -> tuple[int, int]:
        """Epoch and part in the making."""
        return self._epoch, self._part

    def frame(self, header: Header, payload: Octets) -> Load | Lacking | Acked | None:
        """Take one bulk frame of this session and term.

        A Load once the part is whole; Lacking for an end that came with gaps; Acked where the answer is
        to ack again; None otherwise. Raises FrameError; the caller then calls restart_part().
        """
        if (header.epoch, header.part) < (self._epoch, self._part):
            return self._acked_before(header.epoch, header.part) if _ends(header) else None
        if header.epoch > self._epoch:
            self.discard()
            self._epoch, self._part = header.epoch, 0
        if header.part > self._part:
            raise FrameError("part", f"is {header.part}, but part {self._part} is not acked yet")
        if self._whole:
            return None
        check_digest(header, payload, self._key)
        if _ends(header):
            return self._part_end(PartEnd.unpack(header, payload))
        self._keep(header, payload)
        return self._try_whole() if self._end else None

    def query(self, epoch: int, part: int) -> Lacking | Acked | None:
        """Answer "what are you missing?"; None: all of it is here, and is being made ready to be acked."""
        if (epoch, part) < (self._epoch, self._part):
            return self._acked_before(epoch, part)
        if (epoch, part) != (self._epoch, self._part):
            return Lacking(epoch, part, EVERYTHING)
        if self._whole:
            return None
        if self._hungry and any(kind is Kind.REDUCED for kind, _ in self._frames.values()):
            # They take more until they are expanded. What is asked for again comes as it is.
            self.restart_part()
        self._hungry = False
        return Lacking(epoch, part, self._gaps())

    def acked(self, epoch: int, part: int, *, final: bool) -> None:
        """The part was acked: go on to the next."""
        if (epoch, part) != (self._epoch, self._part):
            return  # the primary has given it up meanwhile
        self.restart_part()
        if final:
            self._last = Acked(epoch, part, final)
            self._epoch, self._part = epoch + 1, 0
        else:
            self._part = part + 1

    def foreseen(self, frame: Octets | Arrived) -> None:
        """It was made ready ahead: once it has its record, what it came as is not needed any more."""
        if not isinstance(frame, Arrived) or frame.record is None:
            return
        if any(frame is content for _, content in self._frames.values()):
            self._budget.give_back(frame.surplus)
            self._taken -= frame.surplus
            frame.freed = True
            frame.reduced = replace(frame.reduced, body=b"")

    def restart_part(self) -> None:
        """Throw away what there is of the part in the making; earlier parts of its epoch stay acked."""
        self.ahead.over()
        self._budget.give_back(self._taken)
        self._frames = {}
        self._end = None
        self._taken = self._size = 0
        self._whole = self._hungry = False

    def discard(self) -> None:
        """Throw the partial epoch away."""
        if self._frames or self._part or self._whole:
            self.discarded += 1
        self.restart_part()
        self._part = 0

    # ------------------------------------------------------------ one part

    def _keep(self, header: Header, payload: Octets) -> None:
        if header.sequence in self._frames:
            return
        if self._end and header.sequence >= self._end.frames:
            raise FrameError("sequence", f"is {header.sequence} of {self._end.frames} frames")
        content: Octets | Arrived
        if header.kind is Kind.REDUCED:
            content = Arrived(unpack(payload))
        else:
            content = payload
            self._check(header.kind, content)
        size = _length(content) + FRAME_OVERHEAD
        if self._size + size > self._budget.limit:
            raise FrameError("octets", f"of a part exceed the limit of {self._budget.limit}")
        cost = _cost(content) + FRAME_OVERHEAD
        if not self._budget.take(cost):
            # Committing other epochs frees memory; the primary asks again for what is missing.
            self.starved += 1
            self._hungry = True
            return
        self._taken += cost
        self._size += size
        self._frames[header.sequence] = (header.kind, content)
        if header.kind in (Kind.PAGES, Kind.REDUCED):
            self.ahead.frame(header.epoch, content)

    def _check(self, kind: Kind, payload: Octets) -> None:
        """All of it but REDUCED, of which only what it stands for can be checked (expander.py)."""
        fault: str | None
        match kind:
            case Kind.PAGES:
                fault = native.check_record(payload, self._nr_pfns)
            case Kind.ZERO:
                fault = native.check_words(payload, self._nr_pfns, with_data=True)
            case Kind.GONE:
                fault = native.check_words(payload, self._nr_pfns, with_data=False)
            case Kind.AUDIT:
                fault = _audit_fault(payload, self._nr_pfns)
            case Kind.CONTEXT:
                fault = None  # a record may span frames: checked when they are joined
            case _:
                fault = "does not belong in a part"
        if fault is not None:
            raise FrameError(kind.name, fault)

    def _part_end(self, end: PartEnd) -> Load | Lacking | None:
        if any(sequence >= end.frames for sequence in self._frames):
            raise FrameError("frames", f"is {end.frames}, but a frame beyond came")
        self._end = end
        load = self._try_whole()
        if load is None and not self._hungry:
            return Lacking(self._epoch, self._part, self._gaps())
        return load  # hungry: shipping again at once would meet the same want

    def _try_whole(self) -> Load | None:
        end = self._end
        if end is None or len(self._frames) < end.frames:
            return None
        octets = sum(_length(content) for _, content in self._frames.values())
        if octets != end.octets:
            raise FrameError("octets", f"is {end.octets}, but {octets} came")
        self.ahead.over()
        load = Load(self._epoch, self._part, end.final, self._taken)
        context, audit = [], []
        for sequence in range(end.frames):
            kind, payload = self._frames[sequence]
            if isinstance(payload, Arrived):
                load.reduced.append(payload)
                load.surplus += payload.surplus
                continue
            match kind:
                case Kind.PAGES:
                    load.pages.append(payload)
                case Kind.ZERO:
                    load.zero.append(payload)
                case Kind.GONE:
                    load.gone.append(payload)
                case Kind.CONTEXT:
                    context.append(bytes(payload))
                case Kind.AUDIT:
                    audit.append(bytes(payload))
        load.context, load.audit = b"".join(context), b"".join(audit)
        _check_ends(load)
        # From here on the Load owns the reservation.
        self._frames, self._taken, self._size, self._whole = {}, 0, 0, True
        return load

    def _gaps(self) -> tuple[tuple[int, int], ...]:
        """What is missing, PART_END included as long as it has not come."""
        gaps = []
        at = 0
        for sequence in sorted(self._frames):
            if sequence > at:
                gaps.append((at, sequence - 1))
            at = sequence + 1
        if self._end is None:
            gaps.append((at, U32_MAX))
        elif at < self._end.frames:
            gaps.append((at, self._end.frames - 1))
        if len(gaps) > RANGES_MAX:
            gaps = [*gaps[: RANGES_MAX - 1], (gaps[RANGES_MAX - 1][0], gaps[-1][1])]
        return tuple(gaps)

    def _acked_before(self, epoch: int, part: int) -> Acked | None:
        if epoch == self._epoch:
            return Acked(epoch, part, final=False)
        if self._last and epoch == self._last.epoch and part <= self._last.part:
            return Acked(epoch, part, final=part == self._last.part)
        return None


def _length(content: Octets | Arrived) -> int:
    """Octets, once it is not reduced."""
    return content.length if isinstance(content, Arrived) else len(content)


def _cost(content: Octets | Arrived) -> int:
    """Octets, until then."""
    return _length(content) + (content.surplus if isinstance(content, Arrived) else 0)


def _ends(header: Header) -> bool:
    return header.kind is Kind.PART_END


def _check_ends(load: Load) -> None:
    """What only the whole part shows. Raises FrameError."""
    if not load.final:
        if load.context or load.audit:
            raise FrameError("CONTEXT", "or AUDIT came in a part that is not the final one")
        return
    if not load.context:
        raise FrameError("CONTEXT", "is missing from the final part")
    try:
        split_records(load.context)
    except StreamError as error:
        raise FrameError("CONTEXT", f"is not whole records: {error}") from None


def _audit_fault(payload: Octets, nr_pfns: int) -> str | None:
    words = memoryview(payload).cast("B")[: len(payload) // WORD * WORD].cast("Q")
    entry = AUDIT_ENTRY // WORD
    for at in range(0, len(words), entry):
        if words[at] >= nr_pfns:
            return f"names pfn {words[at]:#x} of {nr_pfns:#x}"
    return None
