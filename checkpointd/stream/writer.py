"""Writing streams: headers, padded records, and a whole plain image.

Nothing here copies page octets: parts are handed to the file one after the other, so the file
should be buffered (what open(path, "wb") gives), and whoever writes to a raw descriptor must mind
short writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from checkpointd.errors import StreamError
from checkpointd.stream.bodies import page_data_head
from checkpointd.stream.reader import Record
from checkpointd.stream.records import (
    BATCH_MAX,
    HEADERS_SIZE,
    IMAGE_MARKER,
    OPTIONAL,
    PAGE_SIZE,
    RECORD_HEADER,
    RECORD_MAX,
    TYPE_SHIFT,
    TYPES_WITH_DATA,
    DomainHeader,
    ImageHeader,
    Octets,
    PageType,
    RecordType,
    padding_of,
    split_records,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from checkpointd.stream.reader import Content


_KNOWN_TYPES = frozenset(PageType)


class Sink(Protocol):
    def write(self, data: Octets, /) -> object: ...


def headers(domain_type: int, *, version: int = 3, xen: tuple[int, int] = (4, 17)) -> bytes:
    """Image and domain header (40 octets) as a sender running Xen `xen` writes them."""
    domain = DomainHeader(domain_type, xen_major=xen[0], xen_minor=xen[1])
    return ImageHeader(version).pack() + domain.pack()


def record_header(record_type: int, length: int) -> bytes:
    """8 octets; `length` is the body's, without padding."""
    if length + padding_of(length) > RECORD_MAX:
        raise StreamError(f"a record of {length} octets is over the limit of {RECORD_MAX}")
    return RECORD_HEADER.pack(record_type, length)


def record(record_type: int, body: Octets = b"") -> bytes:
    """A whole small record; libxl's are framed in the same way."""
    return b"".join(record_parts(record_type, body))


def record_parts(record_type: int, *body: Octets) -> Iterator[Octets]:
    """A record as parts to be written one after the other; the body's are passed on, not copied."""
    length = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in body)
    yield record_header(record_type, length)
    yield from body
    yield b"\0" * padding_of(length)


def encode(content: Content) -> Iterator[Octets]:
    """What the reader made of a stream, back into octets; padding is always zero."""
    if isinstance(content, Record):
        yield from record_parts(content.type, content.body)
    else:
        yield content.pack()


def write_image(
    file: Sink,
    static_records: Octets,
    pages: Iterable[tuple[Sequence[int], Octets]],
    tail: Octets,
) -> int:
    """Write a plain libxc stream of version 3; returns its octets.

    `static_records`: image header, domain header, static records, STATIC_DATA_END, as they are to
    appear. `pages`: (pfn words, the pages of those whose type has data, in order); any number of
    words at a time, written as PAGE_DATA records of at most BATCH_MAX entries. `tail`: whole
    records, as an epoch's. Raises StreamError, before anything is written, if the static records
    or the tail would spoil the stream.
    """
    check_static(static_records)
    check_tail(tail)
    written = 0

    def put(*parts: Octets) -> None:
        nonlocal written
        for part in parts:
            file.write(part)
            written += len(part)

    put(static_records)
    for words, data in pages:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        for first in range(0, len(words), BATCH_MAX):
            batch = words[first : first + BATCH_MAX]
            size = PAGE_SIZE * sum(_has_data(word) for word in batch)
            if size > len(view):
                raise StreamError(f"{len(words)} pfn words, but too few pages: {len(data)} octets")
            put(*record_parts(RecordType.PAGE_DATA, page_data_head(batch), view[:size]))
            view = view[size:]
        if len(view):
            raise StreamError(f"{len(words)} pfn words, but {len(view)} octets of pages too many")
    put(tail, record(RecordType.END))
    return written


def _has_data(word: int) -> bool:
    kind = word >> TYPE_SHIFT
    if kind not in _KNOWN_TYPES:
        raise StreamError(f"pfn word {word:#x} has the reserved type {kind}")
    return kind in TYPES_WITH_DATA


def check_static(static_records: Octets) -> None:
    if bytes(static_records[:8]) != IMAGE_MARKER or len(static_records) < HEADERS_SIZE:
        raise StreamError("the static records do not begin with the image and domain header")
    split = split_records(memoryview(static_records)[HEADERS_SIZE:])
    if not split or split[-1][0] != RecordType.STATIC_DATA_END:
        raise StreamError("the static records do not end with STATIC_DATA_END")


def check_tail(tail: Octets) -> None:
    for record_type, _ in split_records(tail):
        if record_type in (RecordType.END, RecordType.CHECKPOINT) or record_type & OPTIONAL:
            raise StreamError(f"a record of type {record_type:#x} has no place in the tail")
