"""Xen's stream on its way out: what xl and libxl put around libxc records that were staged.

    stream = RemusStream(write)
    stream.begin(config, static_records)
    stream.pages(record); stream.zero(words); stream.gone(words)   # any number, in any order
    stream.end_epoch(tail)    # the epoch is whole; the next one's pages may follow
    ...
    stream.end(tail)          # or instead of the one end_epoch(): a plain image, and closed

    xl header with the configuration, libxl header, LIBXC_CONTEXT,
      static records, { PAGE_DATA ..., tail, CHECKPOINT } CHECKPOINT_END ...      checkpointed
      static records, PAGE_DATA ..., tail, END, libxl's END                       plain

`xl restore` takes the plain form from a file, `xl migrate-receive -r` the other from a pipe, where
it commits an epoch at CHECKPOINT_END. No I/O here, and no octet of a page is copied: parts go to
`write` one after the other. Sources: as for writer.py and libxl.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd.errors import StreamError
from checkpointd.stream.bodies import page_data_head
from checkpointd.stream.libxl import LibxlHeader, LibxlType, XlHeader
from checkpointd.stream.records import (
    BATCH_MAX,
    PAGE_SIZE,
    RECORD_HEADER,
    Octets,
    RecordType,
)
from checkpointd.stream.writer import check_static, check_tail, record, record_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORD = 8  # octets of a pfn word
ZERO_PAGES = 256  # pages of zeros in one record: 1 MiB, as large as a record of an arena
ZEROS = memoryview(bytes(ZERO_PAGES * PAGE_SIZE))

# The receiver spins for ever if its input ends between these two (Xen 4.17 to 4.20), so nobody may
# ever write only the first of them.
SEAL = record(RecordType.CHECKPOINT) + record(LibxlType.CHECKPOINT_END)
CLOSE = record(RecordType.END) + record(LibxlType.END)


class RemusStream:
    """One domain's stream, framed as xl reads it.

    Whole epochs (invariant 2), the sender's half: an epoch counts for the receiver only at its
    CHECKPOINT_END, and that leaves in one call of `write` with all that comes behind the pages.
    Records of an epoch are at most BATCH_MAX entries long and never optional: a receiver that
    buffers an epoch fails on the optional ones.
    """

    def __init__(self, write: Callable[[Octets], object]) -> None:
        """`write` takes each part once, in order, and is done with it when it returns."""
        self._write = write

    def begin(self, config: str, static_records: Octets) -> None:
        """The headers. `config`: the domain's configuration, as JSON; `static_records`: image and
        domain header, static records, STATIC_DATA_END. Raises StreamError, before anything is
        written, if the static records would spoil the stream.
        """
        check_static(static_records)
        xl = XlHeader.with_config(config).pack()
        libxl = LibxlHeader().pack() + record(LibxlType.LIBXC_CONTEXT)
        self._write(b"".join((xl, libxl, static_records)))

    def pages(self, page_data: Octets) -> None:
        """A whole PAGE_DATA record as it was staged."""
        kind, _ = RECORD_HEADER.unpack_from(page_data)
        count, _ = RECORD_HEADER.unpack_from(page_data, RECORD_HEADER.size)
        if kind != RecordType.PAGE_DATA or not 0 < count <= BATCH_MAX:
            raise StreamError(f"not a PAGE_DATA record of 1 to {BATCH_MAX} entries: {kind}, {count}")
        self._write(page_data)

    def zero(self, words: Octets) -> None:
        """Pages of zeros by their pfn words (u64 each): the receiver has no shorter way to say it."""
        for batch in _batches(words, ZERO_PAGES):
            octets = len(batch) // WORD * PAGE_SIZE
            self._write(_head(batch, octets))
            self._write(ZEROS[:octets])

    def gone(self, words: Octets) -> None:
        """Pfns with nothing behind them, by words of the types XTAB and BROKEN. A receiver of Xen
        keeps the page that it has for such a pfn; the guest cannot reach it.
        """
        for batch in _batches(words, BATCH_MAX):
            self._write(_head(batch, 0))

    def tail(self, records: Octets) -> None:
        """Tail records alone, for whoever wants them to lie safely before the epoch is sealed."""
        check_tail(records)
        self._write(records)

    def end_epoch(self, tail: Octets = b"") -> None:
        """The epoch is whole: its tail records, unless tail() has had them, CHECKPOINT and
        CHECKPOINT_END, in one piece.
        """
        check_tail(tail)
        self._write(b"".join((tail, SEAL)))

    def end(self, tail: Octets = b"") -> None:
        """The image is whole, and the stream over."""
        check_tail(tail)
        self._write(b"".join((tail, CLOSE)))


def _head(words: memoryview, page_octets: int) -> bytes:
    """What comes before the pages of a PAGE_DATA record; its length is a multiple of 8."""
    body = page_data_head(words)
    return record_header(RecordType.PAGE_DATA, len(body) + page_octets) + body


def _batches(words: Octets, entries: int) -> Iterator[memoryview]:
    view = memoryview(words).cast("B")
    size = entries * WORD
    return (view[at : at + size] for at in range(0, len(view), size))
