"""Pages as their changes (csrc/delta.h): on the primary from a record to a shorter body, on the standby back."""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd.native.bitmap import handle_of
from checkpointd.native.image import check_record, fault_text
from checkpointd.native.library import MAX_PFNS, ffi, lib

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from checkpointd._native import CData
    from checkpointd.native.bitmap import Bitmap


@dataclass(frozen=True, slots=True)
class Reduction:
    """What came of a record's pages."""

    seen: int  # pages with data that were looked at
    changes: int  # of them, those that travel as their changes
    octets: int  # that the pages looked at take
    body: int  # octets of the body; 0: none was made


def body_size(length: int) -> int:
    """Octets of a body at most, for a record of `length`."""
    return lib.ck_body_size(length)


class History:
    """What the standby holds of the pages that were sent last (csrc/history.h): `octets` of memory at most, taken as
    it is used.
    """

    def __init__(self, octets: int) -> None:
        """Raises ValueError if that is not enough for one set of 8 pages; OSError (no memory)."""
        sets = octets // lib.ck_history_size(1)
        if sets < 1:
            raise ValueError(f"a history of {octets} octets: must be {lib.ck_history_size(1)} at least")
        self.capacity = sets * lib.CK_HISTORY_WAYS  # pages
        self._memory = mmap.mmap(
            -1, lib.ck_history_size(sets), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        try:
            # A page of one set is 32 KiB from the next one's first: huge pages would take all of it for a few.
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
        self._base: CData | None = ffi.from_buffer(
            "uint8_t[]", self._memory, require_writable=True
        )
        self._history = ffi.new("struct ck_history *")
        lib.ck_history_init(self._history, self._base, sets)
        self._result = ffi.new("struct ck_reduction *")

    @property
    def _handle(self) -> CData:
        if self._base is None:
            raise ValueError("this History is closed")
        return self._history

    def reduce(
        self, record: ReadableBuffer, out: WriteableBuffer | None = None, *, every: int = 1
    ) -> Reduction:
        """Write the body of a record, as Arena.records gives them, to `out`, which has body_size() octets; the history
        then has its pages. Without `out` no body is made, with all else the same: for one pfn in `every`, a power of
        two, the others being forgotten.

        Raises ValueError if `out` is too small, or the record malformed; nothing is changed then.
        """
        if fault := check_record(record, MAX_PFNS):
            raise ValueError(f"PAGE_DATA record: {fault}")
        source = ffi.from_buffer("uint8_t[]", record)
        target = ffi.NULL
        if out is not None:
            target = ffi.from_buffer("uint8_t[]", out, require_writable=True)
            if every != 1 or len(target) < lib.ck_body_size(len(source)):
                raise ValueError(f"{len(target)} octets for the body of a record of {len(source)}")
        body = lib.ck_reduce(self._handle, source, every, target, self._result)
        result = self._result
        return Reduction(result.seen, result.changes, result.octets, body)

    def forget(self, words: ReadableBuffer) -> None:
        """The standby will hold something else for these pfn words."""
        view = ffi.from_buffer("uint8_t[]", words)
        lib.ck_history_forget_words(self._handle, view, len(view) // 8)

    def clear(self) -> None:
        """Nothing is known of what the standby holds."""
        lib.ck_history_clear(self._handle)

    def close(self) -> None:
        """Free the memory; again is harmless."""
        if self._base is not None:
            ffi.release(self._base)
            self._base = None
            self._memory.close()


def expand(
    body: ReadableBuffer,
    out: WriteableBuffer,
    nr_pfns: int,
    image: tuple[int, Bitmap],
    overlay: tuple[int, Bitmap] | None = None,
) -> str | None:
    """Make the record again, to all of `out`. What is wrong with the body, None if nothing is: then the record passes
    check_record().

    `image` and `overlay`, which goes before it: address of pfn 0, and which pages are there.
    """
    held = ffi.new("struct ck_held *")
    held.image, held.populated = ffi.cast("uint8_t *", image[0]), handle_of(image[1], nr_pfns)
    if overlay is not None:
        held.overlay, held.overlaid = (
            ffi.cast("uint8_t *", overlay[0]),
            handle_of(overlay[1], nr_pfns),
        )
    source, at = ffi.from_buffer("uint8_t[]", body), ffi.new("uint64_t *")
    target = ffi.from_buffer("uint8_t[]", out, require_writable=True)
    code = lib.ck_expand(held, nr_pfns, source, len(source), target, len(target), at)
    return fault_text(code, at[0])

