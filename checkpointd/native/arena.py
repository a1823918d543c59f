"""Arenas: the memory that an epoch is staged into, and sent from without a copy."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

from checkpointd.errors import NativeError
from checkpointd.native.library import MAX_PFNS, ffi, lib

if TYPE_CHECKING:
    from checkpointd._native import CData

MAX_AUDIT_PAGES = 1024  # one call of types(); at about 0.5 us a page more would dominate the pause
MAX_CONTEXT_BYTES = 128 << 20  # the longest record of the stream


class Arena:
    """Staging memory for one epoch, allocated and touched once (csrc/arena.h).

    The views show what the last pause() or live_round() staged, without a copy. They are read-only
    and good until the arena is staged into again, which its owner does only after the ack. pause()
    and live_round() refuse an arena whose `carried` bitmap is not empty.
    """

    def __init__(
        self,
        pages: int,
        nr_pfns: int,
        context_bytes: int = 1 << 20,
        audit_pages: int = 64,
    ) -> None:
        """Room for `pages` with data (and as many all zero, and as many gone) of a guest of `nr_pfns`.

        `audit_pages` clean pages are audited in each pause. Raises ValueError, OSError (no memory).
        """
        if not 0 < pages <= nr_pfns <= MAX_PFNS:
            raise ValueError(f"an arena of {pages} pages: must be 1 to {nr_pfns}, the guest's size")
        if not 0 < context_bytes <= MAX_CONTEXT_BYTES:
            raise ValueError(f"context_bytes {context_bytes}: must be 1 to {MAX_CONTEXT_BYTES}")
        if not 0 <= audit_pages <= MAX_AUDIT_PAGES:
            raise ValueError(f"audit_pages {audit_pages}: must be 0 to {MAX_AUDIT_PAGES}")
        self.capacity = pages
        self.nr_pfns = nr_pfns
        size = lib.ck_arena_size(pages, context_bytes, audit_pages)
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # fewer TLB misses on the way in and out
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages; they are only a hint
                raise
        self._arena = ffi.new("struct ck_arena *")
        self._open()
        lib.ck_arena_init(self._arena, self._base, pages, context_bytes, audit_pages)

    def _open(self) -> None:
        self._base: CData | None = ffi.from_buffer("uint8_t[]", self._memory, require_writable=True)
        self._view = memoryview(self._memory).toreadonly()

    @property
    def handle(self) -> CData:
        if self._base is None:
            raise ValueError("this Arena is closed")
        return self._arena

    def _part(self, start: CData, length: int) -> memoryview:
        offset = int(ffi.cast("uintptr_t", start)) - int(ffi.cast("uintptr_t", self._base))
        return self._view[offset : offset + length]

    @property
    def records(self) -> list[memoryview]:
        """Whole PAGE_DATA records (head, pfn words, pages), each of 1 to 256 pages."""
        arena = self.handle
        length = ffi.new("uint64_t *")
        count = -(-arena.pages // lib.CK_SLOT_PAGES)
        return [self._part(lib.ck_arena_record(arena, i, length), length[0]) for i in range(count)]

    @property
    def zero_pfns(self) -> memoryview:
        """The words (octets: u64 little endian each) of pages that are all zero, so not copied."""
        return self._part(self.handle.zero, 8 * self.handle.zeros)

    @property
    def gone_pfns(self) -> memoryview:
        """The words (octets: u64 little endian each) of pfns with nothing behind: XTAB or BROKEN."""
        return self._part(self.handle.gone, 8 * self.handle.nr_gone)

    @property
    def context(self) -> memoryview:
        """The tail records; empty after a live round."""
        return self._part(self.handle.context, self.handle.context_length)

    @property
    def audit(self) -> memoryview:
        """{u64 pfn, 16 octets of digest} for each audited page, taken in the pause."""
        return self._part(self.handle.audit, ffi.sizeof("struct ck_audit") * self.handle.audited)

    def close(self) -> None:
        """Free the memory; again is harmless.

        NativeError while a view is in use (a message still being sent): the arena stays as it is.
        """
        if self._base is None:
            return
        self._view.release()
        ffi.release(self._base)
        self._base = None
        try:
            self._memory.close()
        except BufferError as error:
            self._open()
            raise NativeError(
                "an arena was closed while views of it are in use; first close, with linger 0, the "
                "sockets that send from it"
            ) from error
