"""A push parser for libxc, libxl and xl streams, without I/O: octets in, events out.

    reader = Reader()
    for chunk in chunks:
        for event in reader.feed(chunk): ...
    reader.finish()

The first octets tell the format. Under libxl the layers take turns, and nothing in the octets says
which one is speaking; the order does:

    libxl header, LIBXC_CONTEXT,
      libxc headers, libxc records ... CHECKPOINT          epoch 1
    [EMULATOR_XENSTORE_DATA] [EMULATOR_CONTEXT] CHECKPOINT_END
      libxc records ... CHECKPOINT                         epoch 2: no header, no LIBXC_CONTEXT
    [EMULATOR_XENSTORE_DATA] [EMULATOR_CONTEXT] CHECKPOINT_END ...

with libxc's END in the place of CHECKPOINT, and libxl's END behind it, if the stream is closed at
all.

The reader checks only what it needs to find the next record; whether the stream is *right* is
verify.py's business. It holds one record at most, never takes memory for octets that have not
come, and refuses a length above RECORD_MAX before it reads on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from checkpointd.errors import StreamError
from checkpointd.stream.libxl import (
    LIBXL_IDENT,
    LIBXL_OPTION_BE,
    LIBXL_VERSION,
    XL_BYTEORDER,
    XL_BYTEORDER_FOREIGN,
    XL_CONFIG_MAX,
    XL_MAGIC,
    LibxlHeader,
    LibxlType,
    XlHeader,
    libxl_type_name,
)
from checkpointd.stream.records import (
    IMAGE_ID,
    IMAGE_MARKER,
    IMAGE_OPTION_BE,
    RECORD_HEADER,
    RECORD_MAX,
    DomainHeader,
    ImageHeader,
    Layer,
    Octets,
    RecordType,
    padding_of,
    type_name,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# A CHECKPOINT_STATE of COLO may stand where the next epoch's first libxc record is expected. No
# libxc record looks like it: libxc's type 5 (X86_PV_VCPU_EXTENDED) has at least 8 octets.
_COLO_STATE = RECORD_HEADER.pack(LibxlType.CHECKPOINT_STATE, 4)


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the stream something is."""

    offset: int  # octets from the beginning of the (uncompressed) stream
    layer: Layer | None  # None: the format is not known yet
    record: int  # number within its layer, from 1; 0: a header
    epoch: int  # from 1; grows behind CHECKPOINT, under libxl behind CHECKPOINT_END
    name: str

    def __str__(self) -> str:
        if self.layer is None:
            return f"octet {self.offset} ({self.name})"
        what = f"record {self.record} ({self.name})" if self.record else self.name
        return f"octet {self.offset}, {self.layer} {what}, epoch {self.epoch}"


@dataclass(frozen=True, slots=True)
class Record:
    layer: Layer  # LIBXC or LIBXL
    type: int
    body: memoryview  # read-only, without padding
    padding: bytes = b""


Content: TypeAlias = XlHeader | LibxlHeader | ImageHeader | DomainHeader | Record


@dataclass(frozen=True, slots=True)
class Event:
    """One header or one record. Its octets are its own: they stay valid as long as it is kept."""

    position: Position
    content: Content


class BrokenStreamError(StreamError):
    """The stream cannot be read on: `what` is wrong at `position`."""

    def __init__(self, position: Position, what: str) -> None:
        super().__init__(f"{position}: {what}")
        self.position = position
        self.what = what


# A grammar asks for octets by yielding how many, and gets exactly those.
Grammar: TypeAlias = "Generator[int, bytearray, None]"


class Reader:
    def __init__(self) -> None:
        self.ended = False  # the outermost END has been read
        self.trailing = 0  # octets behind it
        self._consumed = 0  # octets given to the grammar
        self._records = {Layer.LIBXL: 0, Layer.LIBXC: 0}
        self._epoch = 1
        self._events: list[Event] = []
        self._error: BrokenStreamError | None = None
        self._held = bytearray()
        self._mark(None, "its first octets")
        self._grammar = self._stream()
        self._need = next(self._grammar)

    @property
    def position(self) -> Position:
        """The item being read, or the one that would come next."""
        return self._position

    @property
    def offset(self) -> int:
        """Octets fed so far, without those behind the end."""
        return self._consumed + len(self._held)

    @property
    def between_records(self) -> bool:
        return self.offset == self._position.offset

    def feed(self, data: Octets) -> Iterator[Event]:
        """Yield what these octets complete; run the iterator to its end before the next call.

        Raises BrokenStreamError where the stream cannot be read on; so does every later call.
        """
        if self._error is not None:
            raise self._error
        view = memoryview(data)
        while view and not self.ended:
            # Appending, not allocating the announced length: eight octets must not cost 128 MiB.
            take = view[: self._need - len(self._held)]
            self._held += take
            view = view[len(take) :]
            if len(self._held) == self._need:
                self._step()
                yield from self._events
                self._events.clear()
        self.trailing += len(view)

    def finish(self) -> None:
        """Tell that no more octets come. Raises BrokenStreamError if they end within a header or
        record.
        """
        if self._error is not None:
            raise self._error
        if self.ended or (self.between_records and self._consumed):
            return
        if not self.offset:
            raise self._broken("the stream is empty")
        missing = self._need - len(self._held)
        raise self._broken(
            f"the stream is cut off here: it ends at octet {self.offset}, with at least"
            f" {missing} octets of this missing"
        )

    def _step(self) -> None:
        held, self._held = self._held, bytearray()
        self._consumed += len(held)
        try:
            self._need = self._grammar.send(held)
        except StopIteration:
            self.ended = True
        except BrokenStreamError as error:
            self._error = error
            raise

    # -- the grammar ------------------------------------------------------------------------------

    def _stream(self) -> Grammar:
        ident = yield 8
        if ident == XL_MAGIC[:8]:
            yield from self._xl_header(ident)
            self._mark(None, "what follows the xl header")
            ident = yield 8
        if ident == LIBXL_IDENT:
            yield from self._libxl_stream(ident)
        elif ident == IMAGE_MARKER:
            yield from self._libxc_headers(ident)
            while (yield from self._libxc_records()):
                self._epoch += 1
        else:
            raise self._broken(
                f"{bytes(ident).hex()} begins no stream of xl, libxl or libxc of version 2 or 3"
                " (older streams must be converted with Xen's convert-legacy-stream first)"
            )

    def _xl_header(self, start: bytearray) -> Grammar:
        self._mark(Layer.XL, "file header", back=len(start))
        magic = start + (yield len(XL_MAGIC) - len(start))
        if magic != XL_MAGIC:
            raise self._broken("the file header of xl is damaged")
        byteorder, mandatory, optional, length = XlHeader.FORMAT.unpack(
            (yield XlHeader.FORMAT.size)
        )
        if byteorder == XL_BYTEORDER_FOREIGN:
            raise self._broken("saved on a big-endian machine; no Xen host here can restore it")
        if byteorder != XL_BYTEORDER:
            raise self._broken(f"byte order mark {byteorder:#010x} instead of {XL_BYTEORDER:#010x}")
        if length > XL_CONFIG_MAX:
            raise self._broken(f"{length} octets of configuration; the limit is {XL_CONFIG_MAX}")
        data = bytes((yield length)) if length else b""
        self._emit(XlHeader(mandatory, optional, data))

    def _libxl_stream(self, start: bytearray) -> Grammar:
        self._mark(Layer.LIBXL, "header", back=len(start))
        header = LibxlHeader.unpack(start + (yield LibxlHeader.FORMAT.size - len(start)))
        if header.version != LIBXL_VERSION:
            raise self._broken(f"version {header.version} is unknown; there is only 2")
        if header.options & LIBXL_OPTION_BE:
            raise self._broken("option bit 0 says big endian; every receiver refuses that")
        self._emit(header)

        libxc_open = False  # has headers, has not met END: CHECKPOINT_END leads back into it
        while True:
            head = yield from self._record_head(Layer.LIBXL)
            record = yield from self._record(Layer.LIBXL, head)
            if record.type == LibxlType.END:
                return
            if record.type == LibxlType.LIBXC_CONTEXT:
                self._mark(Layer.LIBXC, "image header")
                yield from self._libxc_headers((yield 8))
                libxc_open = yield from self._libxc_records()
            elif record.type == LibxlType.CHECKPOINT_END:
                self._epoch += 1
                if libxc_open:
                    libxc_open = yield from self._libxc_records(colo=True)

    def _libxc_headers(self, start: bytearray) -> Grammar:
        self._mark(Layer.LIBXC, "image header", back=len(start))
        image = ImageHeader.unpack(start + (yield ImageHeader.FORMAT.size - len(start)))
        if image.marker != IMAGE_MARKER or image.ident != IMAGE_ID:
            raise self._broken("no image header: it begins with 8 octets of 0xff and 'XENF'")
        if image.version not in (2, 3):
            raise self._broken(f"version {image.version} is unknown; there are 2 and 3")
        if image.options & IMAGE_OPTION_BE:
            raise self._broken("option bit 0 says big endian; every receiver refuses that")
        self._emit(image)
        self._mark(Layer.LIBXC, "domain header")
        self._emit(DomainHeader.unpack((yield DomainHeader.FORMAT.size)))

    def _libxc_records(self, *, colo: bool = False) -> Generator[int, bytearray, bool]:
        """Read up to CHECKPOINT (True: there may be more) or END (False)."""
        head = yield from self._record_head(Layer.LIBXC)
        while colo and head == _COLO_STATE:
            self._mark_record(Layer.LIBXL, "CHECKPOINT_STATE", back=len(head))
            yield from self._record(Layer.LIBXL, head)
            head = yield from self._record_head(Layer.LIBXC)
        while True:
            record = yield from self._record(Layer.LIBXC, head)
            if record.type in (RecordType.CHECKPOINT, RecordType.END):
                return record.type == RecordType.CHECKPOINT
            head = yield from self._record_head(Layer.LIBXC)

    def _record_head(self, layer: Layer) -> Generator[int, bytearray, bytearray]:
        self._mark_record(layer, "next record")
        return (yield RECORD_HEADER.size)

    def _record(self, layer: Layer, head: bytearray) -> Generator[int, bytearray, Record]:
        record_type, length = RECORD_HEADER.unpack(head)
        name = type_name(record_type) if layer is Layer.LIBXC else libxl_type_name(record_type)
        self._mark_record(layer, name, back=len(head))
        if head == IMAGE_MARKER:
            raise self._broken(
                "an image header where a record should begin: headers come once, not in every epoch"
            )
        if length > RECORD_MAX:
            raise self._broken(f"announces {length} octets; the limit is {RECORD_MAX}")
        padded = length + padding_of(length)
        held = memoryview((yield padded) if padded else b"").toreadonly()
        record = Record(layer, record_type, held[:length], bytes(held[length:]))
        self._emit(record)
        self._records[layer] += 1
        return record

    # -- where we are -----------------------------------------------------------------------------

    def _mark(self, layer: Layer | None, name: str, record: int = 0, back: int = 0) -> None:
        """Begin an item `back` octets before what has been consumed."""
        self._position = Position(self._consumed - back, layer, record, self._epoch, name)

    def _mark_record(self, layer: Layer, name: str, back: int = 0) -> None:
        self._mark(layer, name, self._records[layer] + 1, back)

    def _emit(self, content: Content) -> None:
        self._events.append(Event(self._position, content))

    def _broken(self, what: str) -> BrokenStreamError:
        return BrokenStreamError(self._position, what)
