"""The header that begins each message, and what each kind of message may carry
(docs/wire-protocol.md, 2 and 3).

Pure: octets in, values out. Whatever the octets, the only exception is FrameError, and it names the
field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from checkpointd.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Sequence

Octets: TypeAlias = bytes | bytearray | memoryview

MAGIC: Final = 0x314B4843  # "CHK1" as octets
VERSION: Final = 4
HEADER_BYTES: Final = 64
FLAG: Final = 1  # the one flag of a kind that has one; section 3 says what it means there
NO_DIGEST: Final = bytes(16)

# Octets. Control: the largest JSON payload. Bulk: one PAGE_DATA record of 256 pages (1 050 640)
# with room for a context of 1 MiB and its records' headers.
CONTROL_PAYLOAD_MAX: Final = 256 << 10
BULK_PAYLOAD_MAX: Final = (1 << 20) + (64 << 10)

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1

_HEADER: Final = struct.Struct("<IHHIIQQQII16s")
_PART_END: Final = struct.Struct("<IIQ")


class FrameError(WireError):
    """The peer sent something malformed; its session ends. Both daemons must be of the same
    version.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"malformed message: {field} {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[FrameError], tuple[str, str]]:
        return FrameError, (self.field, self.problem)


class Channel(IntEnum):
    """Bits 7-6 of a kind: which connection it uses, and in which direction."""

    CONTROL_TO_SECONDARY = 0
    CONTROL_TO_PRIMARY = 1
    BULK_TO_SECONDARY = 2
    BULK_TO_PRIMARY = 3


class Kind(IntEnum):
    HELLO = 0x01
    HEARTBEAT = 0x02
    QUERY = 0x03
    RETIRE = 0x04
    END = 0x05
    ENGINE_LOST = 0x06
    CHECK = 0x20

    WELCOME = 0x41
    REFUSED = 0x42
    ECHO = 0x43
    ACK = 0x44
    MISSING = 0x45
    COMMITTED = 0x46
    FULL_COPY_WANTED = 0x47
    RETIRED = 0x48
    ENGINE_LOST_HEARD = 0x49
    CHECKED = 0x60

    PAGES = 0x81
    ZERO = 0x82
    GONE = 0x83
    CONTEXT = 0x84
    AUDIT = 0x85
    PART_END = 0x86
    DIGESTS_WANTED = 0x87
    REDUCED = 0x88

    DIGESTS = 0xC1

    @property
    def channel(self) -> Channel:
        return Channel(self >> 6)


@dataclass(frozen=True, slots=True)
class Header:
    """The 64 octets before each payload; a field that the kind does not use is 0."""

    kind: Kind
    session: int
    term: int
    epoch: int = 0
    part: int = 0
    sequence: int = 0
    flags: int = 0
    length: int = 0  # octets of payload
    digest: bytes = NO_DIGEST  # of the payload, 16 octets


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a kind may carry: header fields that may differ from 0, and lengths low..high that leave
    `offset` octets and then a multiple of `unit`.
    """

    uses: frozenset[str]
    low: int = 0
    high: int = 0
    unit: int = 1
    offset: int = 0


_IN_PART = "epoch part sequence digest"


def _shape(
    uses: str = "", *, low: int = 0, high: int = 0, unit: int = 1, offset: int = 0
) -> _Shape:
    return _Shape(frozenset(uses.split()), low, high, unit, offset)


def _json(uses: str = "") -> _Shape:
    return _shape(uses, low=len("{}"), high=CONTROL_PAYLOAD_MAX)


_SHAPES: Final = {
    Kind.HELLO: _json(),
    Kind.HEARTBEAT: _shape("epoch", low=32, high=32),
    Kind.QUERY: _shape("epoch part"),
    Kind.RETIRE: _json(),
    Kind.END: _json(),
    Kind.ENGINE_LOST: _json(),
    Kind.WELCOME: _json(),
    Kind.REFUSED: _json(),
    Kind.ECHO: _shape("epoch flags", low=16, high=16),
    Kind.ACK: _shape("epoch part flags"),
    Kind.MISSING: _json("epoch part"),
    Kind.COMMITTED: _shape("epoch", low=16, high=16),
    Kind.FULL_COPY_WANTED: _json(),
    Kind.RETIRED: _shape(),
    Kind.ENGINE_LOST_HEARD: _shape(),
    Kind.CHECK: _json(),
    Kind.CHECKED: _json(),
    Kind.PAGES: _shape(_IN_PART, low=16, high=BULK_PAYLOAD_MAX, unit=8),
    Kind.ZERO: _shape(_IN_PART, low=8, high=BULK_PAYLOAD_MAX, unit=8),
    Kind.GONE: _shape(_IN_PART, low=8, high=BULK_PAYLOAD_MAX, unit=8),
    Kind.CONTEXT: _shape(_IN_PART, low=8, high=BULK_PAYLOAD_MAX, unit=8),
    Kind.AUDIT: _shape(_IN_PART, low=24, high=BULK_PAYLOAD_MAX, unit=24),
    Kind.PART_END: _shape(_IN_PART, low=16, high=16),
    Kind.DIGESTS_WANTED: _shape(),
    Kind.REDUCED: _shape(_IN_PART, low=33, high=BULK_PAYLOAD_MAX),
    Kind.DIGESTS: _shape("sequence flags digest", low=8, high=BULK_PAYLOAD_MAX, unit=16, offset=8),
}


def pack(header: Header) -> bytes:
    """The header as 64 octets. Raises FrameError if it is not one that unpack() takes."""
    _check(header)
    return _HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.flags,
        header.part,
        header.session,
        header.term,
        header.epoch,
        header.sequence,
        header.length,
        header.digest,
    )


def unpack(data: Octets) -> Header:
    """The header that these 64 octets are; raises FrameError."""
    size = memoryview(data).nbytes
    if size != HEADER_BYTES:
        raise FrameError("header", f"has {size} octets, not {HEADER_BYTES}")
    magic, version, kind, flags, part, session, term, epoch, sequence, length, digest = (
        _HEADER.unpack(data)
    )
    if magic != MAGIC:
        raise FrameError("magic", f"is {magic:#010x}, not {MAGIC:#010x}: not checkpointd's")
    if version != VERSION:
        raise FrameError(
            "version", f"is {version}, this side speaks {VERSION}: run one release on both sides"
        )
    try:
        kind = Kind(kind)
    except ValueError:
        raise FrameError("kind", f"{kind:#x} is unknown") from None
    header = Header(kind, session, term, epoch, part, sequence, flags, length, digest)
    _check(header)
    return header


def _check(header: Header) -> None:
    shape = _SHAPES[header.kind]
    name = header.kind.name
    for field, value, limit in (
        ("flags", header.flags, FLAG),
        ("part", header.part, U32_MAX),
        ("session", header.session, U64_MAX),
        ("term", header.term, U64_MAX),
        ("epoch", header.epoch, U64_MAX),
        ("sequence", header.sequence, U32_MAX),
    ):
        if not 0 <= value <= limit:
            raise FrameError(field, f"is {value}, above {limit} or below 0")
        if value and field not in shape.uses and field not in ("session", "term"):
            raise FrameError(field, f"is {value}, but {name} has none: it must be 0")
    if header.session == 0:
        raise FrameError("session", "is 0")
    if not shape.low <= header.length <= shape.high:
        raise FrameError(
            "length", f"is {header.length}, but {name} has {shape.low} to {shape.high} octets"
        )
    if (header.length - shape.offset) % shape.unit:
        raise FrameError(
            "length",
            f"is {header.length}: {name} has {shape.offset} and n times {shape.unit} octets",
        )
    if len(header.digest) != len(NO_DIGEST):
        raise FrameError("digest", f"has {len(header.digest)} octets, not {len(NO_DIGEST)}")
    if header.digest != NO_DIGEST and "digest" not in shape.uses:
        raise FrameError("digest", f"is not 0, but {name} has none")


def split(parts: Sequence[Octets], channel: Channel) -> tuple[Header, memoryview]:
    """Header and payload of a message that came by `channel`; the payload is looked at for its size
    only.
    """
    if not 1 <= len(parts) <= 2:
        raise FrameError("message", f"has {len(parts)} parts, not 1 or 2")
    header = unpack(parts[0])
    if header.kind.channel is not channel:
        raise FrameError("kind", f"{header.kind.name} does not belong on {channel.name}")
    payload = memoryview(parts[1] if len(parts) == 2 else b"")
    if payload.nbytes != header.length:
        raise FrameError("length", f"is {header.length}, but {payload.nbytes} octets came")
    if len(parts) == 2 and not payload.nbytes:
        raise FrameError("message", "has an empty second part")
    return header, payload


class Digester(Protocol):
    """A session's digest key (section 5): 16 octets for data of any length."""

    def digest(self, data: Octets, /) -> bytes: ...


def seal(header: Header, payload: Octets, key: Digester) -> Header:
    """The header with length and digest of its bulk payload filled in."""
    length = memoryview(payload).nbytes
    return replace(header, length=length, digest=key.digest(payload) if length else NO_DIGEST)


def check_digest(header: Header, payload: Octets, key: Digester) -> None:
    """Raises FrameError if the payload is not what was sealed."""
    if header.length and key.digest(payload) != header.digest:
        raise FrameError(
            "digest",
            f"does not fit the payload ({header.kind.name}, epoch {header.epoch},"
            f" part {header.part}, sequence {header.sequence}): the sender's memory changed"
            " while it was sent",
        )


@dataclass(frozen=True, slots=True)
class PartEnd:
    """Payload of PART_END: what came before it in its part."""

    frames: int  # as many as its own sequence says
    final: bool  # this part ends the epoch
    octets: int  # sum of the payload lengths of those frames; a REDUCED one counts as what it stands for

    def pack(self) -> bytes:
        return _PART_END.pack(self.frames, FLAG if self.final else 0, self.octets)

    @classmethod
    def unpack(cls, header: Header, payload: Octets) -> PartEnd:
        """Raises FrameError if it contradicts its header or itself."""
        if memoryview(payload).nbytes != _PART_END.size:
            raise FrameError("length", f"of PART_END is not {_PART_END.size}")
        frames, flags, octets = _PART_END.unpack(payload)
        if flags > FLAG:
            raise FrameError("flags of PART_END", f"is {flags:#x}: bits 31-1 must be 0")
        if frames != header.sequence:
            raise FrameError("frames", f"is {frames}, but PART_END has sequence {header.sequence}")
        if octets > frames * BULK_PAYLOAD_MAX:
            raise FrameError("octets", f"is {octets}, more than {frames} frames can hold")
        return cls(frames, bool(flags), octets)
