"""Reading a plain libxc image back, page by page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd.errors import StreamError
from checkpointd.stream.bodies import PageData
from checkpointd.stream.files import read_chunks
from checkpointd.stream.reader import Reader, Record
from checkpointd.stream.records import Layer, RecordType
from checkpointd.stream.verify import Shape, Verifier
from checkpointd.stream.writer import encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Image:
    """What an image holds besides its pages."""

    static: bytes  # headers, static records, STATIC_DATA_END, as write_image() took them
    tail: bytes  # all other records but PAGE_DATA and END, whole and padded
    entries: int  # pfn words, repeated ones counted each time


def read_image(path: str | Path, on_page: Callable[[int, int, memoryview | None], None]) -> Image:
    """Call on_page(pfn, type, page) for each entry, in stream order; page is None where the type
    has none.

    A later entry of a pfn replaces an earlier one. Raises StreamError if the file is anything but
    a whole, faultless, plain libxc stream; what on_page has got by then is void.
    """
    reader, verifier = Reader(), Verifier()
    static, tail = bytearray(), bytearray()
    part = static
    entries = 0
    for chunk in read_chunks(str(path)):
        for event in reader.feed(chunk):
            verifier.event(event)
            if not verifier.report.ok:
                raise StreamError(f"{path}: {verifier.report.findings[-1]}")
            content = event.content
            kind = content.type if isinstance(content, Record) else None
            if isinstance(content, Record) and kind == RecordType.PAGE_DATA:
                part = tail
                for pfn, page_type, page in PageData.unpack(content.body):
                    on_page(pfn, page_type, page)
                    entries += 1
            elif kind != RecordType.END:
                for octets in encode(content):
                    part += octets
                if kind == RecordType.STATIC_DATA_END:
                    part = tail
    reader.finish()
    report = verifier.finish(reader)
    if not report.ok:
        raise StreamError(f"{path}: {report.findings[-1]}")
    if report.formats != [Layer.LIBXC] or report.shape is not Shape.PLAIN:
        formats = " in ".join(reversed(report.formats))
        raise StreamError(f"{path}: no plain libxc image, but a {report.shape} stream, {formats}")
    return Image(bytes(static), bytes(tail), entries)
