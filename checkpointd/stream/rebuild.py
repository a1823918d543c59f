"""A guest's memory built again from its stream: what a receiver makes of it, without a hypervisor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd import native
from checkpointd.errors import StreamError
from checkpointd.stream.reader import Event, Reader, Record
from checkpointd.stream.records import Layer, RecordType
from checkpointd.stream.verify import Verifier
from checkpointd.stream.writer import encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from checkpointd.stream.records import Octets

_STATIC = (
    RecordType.X86_CPUID_POLICY,
    RecordType.X86_MSR_POLICY,
    RecordType.STATIC_DATA_END,
)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    populated: bytes  # bit p for each pfn with memory, little endian u64 words
    context: bytes  # tail records of the last epoch, or of the image


def checked(chunks: Iterable[Octets]) -> Iterator[Event]:
    """The events of a stream that Xen's receivers take, as far as it is there. Raises StreamError at the first fault;
    a stream that stops within an epoch is none here.
    """
    reader, verifier = Reader(), Verifier()
    for chunk in chunks:
        for event in reader.feed(chunk):
            verifier.event(event)
            if not verifier.report.ok:
                raise StreamError(str(verifier.report.findings[-1]))
            yield event


def rebuild(chunks: Iterable[Octets], image: int, nr_pfns: int) -> Rebuilt:
    """Lay the stream's pages into the memory at address `image`, pfn p at octet p * 4096, all zero before. The chunks
    end with a whole epoch, or an image's END. Raises StreamError.
    """
    populated = native.Bitmap(nr_pfns)
    tail = bytearray()
    context = b""
    for event in checked(chunks):
        content = event.content
        if not isinstance(content, Record) or content.layer is not Layer.LIBXC:
            continue
        octets = b"".join(encode(content))
        if content.type == RecordType.PAGE_DATA:
            try:
                native.scatter(image, nr_pfns, populated, octets)
            except ValueError as error:
                raise StreamError(f"{event.position}: {error}") from error
        elif content.type in (RecordType.CHECKPOINT, RecordType.END):
            context = bytes(tail) or context  # END behind CHECKPOINT brings nothing new
            tail.clear()
        elif content.type not in _STATIC:
            tail += octets
    return Rebuilt(bytes(populated), context)
