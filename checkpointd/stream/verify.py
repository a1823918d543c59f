"""Is a stream one that Xen's receivers restore? A pure state machine over the reader's events.

    report = verify(chunks)

Finds what Xen's own verifier (verify-stream-v2) finds, without its false rejections, and what it
does not look for: order, missing or repeated records, the framing of Remus epochs, the place of
END, a stream that stops within an epoch. A checkpointed stream that stops right behind a whole
epoch is no fault: that is how every one of them ends in life. docs/stream.md lists all rules.

Rules of a single record are in rules.py; those that see more than one record are here. All
findings are gathered as long as the stream can be read on, in bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from checkpointd.stream.bodies import iter_words
from checkpointd.stream.libxl import LibxlHeader, LibxlType, XlHeader
from checkpointd.stream.reader import (
    BrokenStreamError,
    Event,
    Position,
    Reader,
    Record,
)
from checkpointd.stream.records import (
    OPTIONAL,
    PFN_MASK,
    RECORD_HEADER,
    DomainHeader,
    DomainType,
    ImageHeader,
    Layer,
    RecordType,
    type_name,
)
from checkpointd.stream.rules import (
    ERROR,
    NOTE,
    Severity,
    header_faults,
    libxc_faults,
    libxl_faults,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from checkpointd.stream.records import Octets

# Findings that are kept; of the rest only the number is. A hostile stream could hold millions.
FINDINGS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    position: Position
    what: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.position}: {self.what}"


class Shape(StrEnum):
    PLAIN = "plain"  # one image, closed by END
    CHECKPOINTED = "checkpointed"  # Remus or COLO: epochs, closed by CHECKPOINT


@dataclass(slots=True)
class Report:
    """What verify() found out. `ok`: no finding of severity ERROR."""

    formats: list[Layer] = field(default_factory=list)  # outermost first
    version: int | None = None  # of libxc
    domain_type: int | None = None
    shape: Shape = Shape.PLAIN
    closed: bool = False  # by the outermost END
    whole_epochs: int = 0
    records: int = 0
    octets: int = 0
    errors: int = 0
    notes: int = 0
    findings: list[Finding] = field(default_factory=list)  # the first FINDINGS_MAX

    @property
    def ok(self) -> bool:
        return not self.errors


def verify(chunks: Iterable[Octets]) -> Report:
    """Read a whole stream and report. Raises nothing of its own: what is broken is a finding."""
    reader, verifier = Reader(), Verifier()
    try:
        for chunk in chunks:
            for event in reader.feed(chunk):
                verifier.event(event)
        reader.finish()
    except BrokenStreamError as error:
        verifier.broken(error)
    return verifier.finish(reader)


class Verifier:
    """Gets every event of a Reader in order, then finish()."""

    def __init__(self) -> None:
        self.report = Report()
        self._broken = False
        self._libxc = _LibxcOrder(self)
        self._libxl: _LibxlOrder | None = None

    def event(self, event: Event) -> None:
        position, content = event.position, event.content
        if isinstance(content, Record):
            self.report.records += 1
            if content.layer is Layer.LIBXC:
                self._libxc.record(position, content)
                if self._libxl:
                    self._libxl.libxc_record(content)
            else:
                self.check_padding(position, content)
                for severity, what in libxl_faults(content.type, content.body):
                    self.found(severity, position, what)
                assert self._libxl is not None, "a libxl record comes behind a libxl header"
                self._libxl.record(position, content)
            return
        for severity, what in header_faults(content):
            self.found(severity, position, what)
        match content:
            case XlHeader():
                self._format(Layer.XL)
            case LibxlHeader():
                self._format(Layer.LIBXL)
                self._libxl = _LibxlOrder(self)
            case ImageHeader():
                if Layer.XL in self.report.formats and not self._libxl:
                    self.found(ERROR, position, "a libxl stream should follow the xl header")
                self._format(Layer.LIBXC)
                self.report.version = content.version
                self._libxc = _LibxcOrder(self, content.version)
            case DomainHeader():
                self.report.domain_type = self._libxc.domain_type = content.type

    def broken(self, error: BrokenStreamError) -> None:
        """The reader gave up here."""
        self._broken = True
        self.found(ERROR, error.position, error.what)

    def finish(self, reader: Reader) -> Report:
        """Judge the end of the stream."""
        report = self.report
        report.octets = reader.offset + reader.trailing
        report.closed = reader.ended
        report.whole_epochs = reader.position.epoch - 1
        if reader.trailing:
            where = Position(reader.offset, None, 0, reader.position.epoch, "behind the stream")
            self.found(ERROR, where, f"{reader.trailing} octets follow the last END")
        elif not self._broken and not reader.ended:
            self._stopped(reader)
        return report

    def _stopped(self, reader: Reader) -> None:
        """The octets ended between two records, without END."""
        position, order = reader.position, self._libxl or self._libxc
        if order.between_epochs:
            return
        whole = f"{self.report.whole_epochs} whole epochs before it"
        if self.report.shape is Shape.PLAIN:
            what = "the stream stops here, without END"
        elif self._libxl and self._libxc.between_epochs:
            what = f"the stream stops in mid-epoch, before CHECKPOINT_END; {whole}"
        else:
            what = f"the stream stops in mid-epoch, before CHECKPOINT; {whole}"
        self.found(ERROR, position, what)

    def found(self, severity: Severity, position: Position, what: str) -> None:
        if severity is ERROR:
            self.report.errors += 1
        else:
            self.report.notes += 1
        if len(self.report.findings) < FINDINGS_MAX:
            self.report.findings.append(Finding(severity, position, what))

    def check_padding(self, position: Position, record: Record) -> None:
        if any(record.padding):
            self.found(ERROR, position, f"padding is not zero: {record.padding.hex()}")

    def _format(self, layer: Layer) -> None:
        if layer not in self.report.formats:
            self.report.formats.append(layer)


# Records that come once, before STATIC_DATA_END.
_STATIC = (RecordType.X86_PV_INFO, RecordType.X86_CPUID_POLICY, RecordType.X86_MSR_POLICY)
_BEFORE_STATIC_END = (*_STATIC, RecordType.STATIC_DATA_END)
_VCPU = (
    RecordType.X86_PV_VCPU_BASIC,
    RecordType.X86_PV_VCPU_EXTENDED,
    RecordType.X86_PV_VCPU_XSAVE,
    RecordType.X86_PV_VCPU_MSRS,
)
_PV_ONLY = (*_VCPU, RecordType.X86_PV_INFO, RecordType.X86_PV_P2M_FRAMES, RecordType.SHARED_INFO)
_HVM_ONLY = (RecordType.HVM_CONTEXT, RecordType.HVM_PARAMS)
# Records of a PV guest that a receiver can use only once another has come.
_NEEDS = {
    RecordType.X86_PV_P2M_FRAMES: RecordType.X86_PV_INFO,
    RecordType.SHARED_INFO: RecordType.X86_PV_INFO,
    RecordType.PAGE_DATA: RecordType.X86_PV_P2M_FRAMES,
    **dict.fromkeys(_VCPU, RecordType.PAGE_DATA),
}
_CLOSING = (RecordType.END, RecordType.CHECKPOINT)


class _LibxcOrder:
    """Order within one libxc stream. Keeps what has been seen, never the records."""

    def __init__(self, verifier: Verifier, version: int = 3) -> None:
        self._verifier = verifier
        self.version = version
        self.domain_type: int = DomainType.HVM
        self.between_epochs = False  # directly behind CHECKPOINT
        self._seen: set[int] = set()  # known types, in the whole stream
        self._epoch: set[int] = set()  # known types, since the last CHECKPOINT
        self._vcpu0 = False  # its X86_PV_VCPU_BASIC has come in this epoch
        self._told: set[str] = set()  # once-only findings that have been made
        self._guest_width: int | None = None
        self._max_pfn: int | None = None  # PV: pfns beyond it are refused

    def record(self, position: Position, record: Record) -> None:
        verifier = self._verifier
        verifier.check_padding(position, record)
        faults = libxc_faults(
            record.type, record.body, version=self.version, guest_width=self._guest_width
        )
        for severity, what in faults:
            verifier.found(severity, position, what)

        checkpointed = RecordType.CHECKPOINT in self._seen
        if record.type & OPTIONAL and checkpointed:
            verifier.found(
                ERROR, position, "optional record in a buffered epoch: the receiver fails on it"
            )
        if record.type in tuple(RecordType):
            self._order(position, RecordType(record.type))
            self._learn(position, record)
            if record.type in _CLOSING:
                self._close(position, RecordType(record.type), checkpointed=checkpointed)
            else:
                self._epoch.add(record.type)
            self._seen.add(record.type)
        self.between_epochs = record.type == RecordType.CHECKPOINT

    def _order(self, position: Position, kind: RecordType) -> None:
        found = self._verifier.found
        seen = self._seen
        static_done = RecordType.STATIC_DATA_END in seen

        if kind is RecordType.STATIC_DATA_END and static_done:
            found(ERROR, position, "comes a second time; receivers take it once")
        elif kind in _STATIC and kind in seen:
            found(ERROR, position, "comes a second time: static records are sent once")
        elif kind in _STATIC and static_done:
            found(ERROR, position, "static record behind STATIC_DATA_END")
        elif self.version >= 3 and not static_done and kind not in _BEFORE_STATIC_END:
            self._once(position, "no STATIC_DATA_END before it: a receiver of version 3 fails")

        if self.domain_type == DomainType.PV and kind in _HVM_ONLY:
            found(ERROR, position, "belongs to an HVM guest, the domain header says PV")
        if self.domain_type == DomainType.HVM and kind in _PV_ONLY:
            found(ERROR, position, "belongs to a PV guest, the domain header says HVM")
        elif self.domain_type == DomainType.PV:
            needed = _NEEDS.get(kind)
            if needed is not None and needed not in seen:
                self._once(position, f"no {needed.name} before it")
            if kind is RecordType.X86_PV_P2M_FRAMES and kind in seen:
                if RecordType.PAGE_DATA in seen:
                    found(ERROR, position, "comes again behind PAGE_DATA: the p2m cannot move")
                else:
                    found(NOTE, position, "comes a second time; Xen's sender sends one")

    def _learn(self, position: Position, record: Record) -> None:
        """Take from a record what the rules of later ones need."""
        body = record.body
        if record.type == RecordType.X86_PV_INFO and len(body) == 8:
            self._guest_width = body[0]
        elif record.type == RecordType.X86_PV_P2M_FRAMES and len(body) >= 8:
            self._max_pfn = max(RECORD_HEADER.unpack_from(body)[1], self._max_pfn or 0)
        elif record.type == RecordType.X86_PV_VCPU_BASIC and len(body) > 8:
            self._vcpu0 |= RECORD_HEADER.unpack_from(body)[0] == 0
        elif record.type == RecordType.PAGE_DATA and self._max_pfn is not None and len(body) >= 8:
            count = RECORD_HEADER.unpack_from(body)[0]
            words = iter_words(body[8 : min(8 + 8 * count, len(body) // 8 * 8)])
            highest = max((word & PFN_MASK for word in words), default=0)
            if highest > self._max_pfn:
                self._verifier.found(
                    ERROR, position, f"pfn {highest:#x} is beyond the p2m, up to {self._max_pfn:#x}"
                )

    def _close(self, position: Position, kind: RecordType, *, checkpointed: bool) -> None:
        """CHECKPOINT or END: is the epoch one that a guest can be started from?"""
        found = self._verifier.found
        if kind is RecordType.CHECKPOINT:
            self._verifier.report.shape = Shape.CHECKPOINTED
            if RecordType.VERIFY in self._seen:
                found(ERROR, position, "behind VERIFY pages are only compared: the epoch is lost")
        elif checkpointed and self._epoch:
            names = ", ".join(type_name(kind) for kind in sorted(self._epoch))
            found(
                ERROR,
                position,
                f"END in mid-epoch: the receiver drops the epoch's records ({names})",
            )
        if kind is RecordType.CHECKPOINT or not checkpointed:
            if self.domain_type == DomainType.HVM:
                needed = {"HVM_CONTEXT": RecordType.HVM_CONTEXT in self._epoch}
            elif self.domain_type == DomainType.PV:
                shared_info = RecordType.SHARED_INFO in self._epoch
                needed = {"SHARED_INFO": shared_info, "X86_PV_VCPU_BASIC of vcpu 0": self._vcpu0}
            else:
                needed = {}
            for name in (name for name, there in needed.items() if not there):
                found(ERROR, position, f"the epoch has no {name}: no guest can be started from it")
        self._epoch.clear()
        self._vcpu0 = False

    def _once(self, position: Position, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._verifier.found(ERROR, position, what)


class _LibxlOrder:
    """Order of libxl's records around the libxc stream."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self.between_epochs = False  # directly behind CHECKPOINT_END, or COLO's state behind it
        self._contexts = 0
        self._libxc_ended = False
        self._checkpoint_open = False  # CHECKPOINT has come, its CHECKPOINT_END has not
        self._tail: list[int] = []  # emulator records since libxc last spoke; at most two kinds

    def libxc_record(self, record: Record) -> None:
        self.between_epochs = False
        if record.type in _CLOSING:
            self._libxc_ended = record.type == RecordType.END
            self._checkpoint_open = record.type == RecordType.CHECKPOINT
            self._tail = []

    def record(self, position: Position, record: Record) -> None:
        found = self._verifier.found
        kind = record.type
        between, self.between_epochs = self.between_epochs, False
        if kind == LibxlType.LIBXC_CONTEXT:
            self._contexts += 1
            if self._contexts > 1:
                found(ERROR, position, "comes a second time: epochs bring no new LIBXC_CONTEXT")
        elif kind == LibxlType.CHECKPOINT_STATE:
            if not between:
                found(ERROR, position, "belongs between two epochs, behind CHECKPOINT_END")
            self.between_epochs = between
        elif not self._contexts:
            found(ERROR, position, "no LIBXC_CONTEXT before it")
        elif kind in (LibxlType.EMULATOR_XENSTORE_DATA, LibxlType.EMULATOR_CONTEXT):
            self._emulator(position, kind)
        elif kind == LibxlType.CHECKPOINT_END:
            if not self._checkpoint_open:
                found(ERROR, position, "no libxc CHECKPOINT before it")
            self.between_epochs = self._checkpoint_open
            self._checkpoint_open = False
        elif kind == LibxlType.END and self._checkpoint_open:
            found(ERROR, position, "END in mid-epoch: CHECKPOINT without CHECKPOINT_END")

    def _emulator(self, position: Position, kind: int) -> None:
        found = self._verifier.found
        if self._verifier.report.domain_type == DomainType.PV:
            found(ERROR, position, "a PV guest has no emulator: libxl fails on it")
        if kind in self._tail:
            found(ERROR, position, "comes twice in one epoch")
        elif kind == LibxlType.EMULATOR_XENSTORE_DATA and self._tail:
            found(NOTE, position, "comes behind EMULATOR_CONTEXT; libxl sends it before")
        if kind not in self._tail:
            self._tail.append(kind)
