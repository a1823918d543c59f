"""Where the whole epochs of a recorded stream end.

A recording is cut wherever its writer, or the writer's host, died. Only headers are read here and
bodies are skipped, so that memory is bounded and a file of many GiB takes seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from checkpointd.stream.libxl import LibxlHeader, LibxlType
from checkpointd.stream.reader import Reader
from checkpointd.stream.records import (
    RECORD_HEADER,
    RECORD_MAX,
    DomainHeader,
    RecordType,
    padding_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADERS_READ = 4096  # octets of one read; the headers are a few KiB
_EMULATOR = (LibxlType.EMULATOR_XENSTORE_DATA, LibxlType.EMULATOR_CONTEXT)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file holds, in octets and epochs."""

    octets: int  # of the file
    epochs: int  # whole ones
    end: int  # behind the last of them; 0 if there is none
    plain: bool  # no epochs, but one image closed by END: what `xl save` makes


def survey(file: BinaryIO) -> Survey:
    """Look through a whole file. Raises StreamError if it is no stream of xl, libxl or libxc."""
    walk = _Walk(file)
    epochs = end = 0
    for end in walk.epochs():  # noqa: B007 - the last one is kept
        epochs += 1
    return Survey(walk.size, epochs, end, plain=walk.closed and not epochs)


def whole_epochs(file: BinaryIO) -> Iterator[int]:
    """The octet behind each whole epoch: behind its CHECKPOINT_END, or CHECKPOINT where no libxl
    stream is around it. Raises as survey() does.
    """
    return _Walk(file).epochs()


class _CutError(Exception):
    """Here the records end; what follows, if anything, is none."""


class _Walk:
    """From record to record. What is no record ends it like the end of the file: a power failure
    may leave a tail of zeros, which read as END records, and those are no epoch's either.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        self.closed = False  # by the outermost END, which is the last record of the file
        self._at = 0

    def epochs(self) -> Iterator[int]:
        try:
            framed = self._headers()
            while self._libxc_records() == RecordType.CHECKPOINT:
                if framed and self._libxl_records() != LibxlType.CHECKPOINT_END:
                    return
                yield self._at
            self.closed = not framed or self._libxl_records() == LibxlType.END
            self.closed &= self._at == self.size
        except _CutError:
            return

    def _headers(self) -> bool:
        """Go behind the domain header; whether a libxl stream is around the libxc one."""
        reader, framed = Reader(), False
        self._file.seek(0)
        while piece := self._file.read(_HEADERS_READ):
            for event in reader.feed(piece):
                framed |= isinstance(event.content, LibxlHeader)
                if isinstance(event.content, DomainHeader):
                    self._at = event.position.offset + DomainHeader.FORMAT.size
                    return framed
        raise _CutError

    def _libxc_records(self) -> int:
        """Go behind the next CHECKPOINT or END; which of them it is."""
        while (kind := self._record()) not in (RecordType.CHECKPOINT, RecordType.END):
            if kind not in tuple(RecordType):
                raise _CutError
        return kind

    def _libxl_records(self) -> int:
        """Go behind what libxl says between two epochs, or at the end; the type that ends it."""
        while (kind := self._record()) in _EMULATOR:
            pass
        return kind

    def _record(self) -> int:
        """The type of the next record, which is there to its last octet."""
        self._file.seek(self._at)
        head = self._file.read(RECORD_HEADER.size)
        if len(head) < RECORD_HEADER.size:
            raise _CutError
        kind, length = RECORD_HEADER.unpack(head)
        end = self._at + RECORD_HEADER.size + length + padding_of(length)
        if length > RECORD_MAX or end > self.size:
            raise _CutError
        self._at = end
        return int(kind)
