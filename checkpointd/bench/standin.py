"""A domain that is nobody's, and an engine's native half on it: what the pause is measured with (csrc/standin.h)."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from checkpointd import native
from checkpointd.bench.lib import ffi, lib
from checkpointd.errors import CheckpointdError
from checkpointd.native import Arena, Bitmap, DigestKey, Mappings, Outcome

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence
    from types import TracebackType
    from typing import Self

PAGE = 4096
AUDIT_PAGES = 16  # a pause; the default of `checkpointd primary`
_FILL = os.urandom(1 << 20)  # no page of it is all zero, and none compresses


class BenchError(CheckpointdError):
    """A benchmark could not be taken."""


class Standin:
    """Its memory, mappings, bitmaps and one arena; a context manager. `memory_pages` of `nr_pfns` have memory, the
    first ones; all of it is written once. Raises BenchError if the machine has not so much.
    """

    def __init__(
        self, nr_pfns: int, *, memory_pages: int | None = None, arena_pages: int = 0
    ) -> None:
        self.nr_pfns = nr_pfns
        self.memory_pages = nr_pfns if memory_pages is None else memory_pages
        self._fd = os.memfd_create("bench")
        os.ftruncate(self._fd, nr_pfns * PAGE)
        self._populate()
        populated = Bitmap(nr_pfns)
        populated.add(0, self.memory_pages)
        self._handle = lib.standin_new(
            self._fd, nr_pfns, ffi.from_buffer("uint64_t[]", bytes(populated))
        )
        if not self._handle:
            os.close(self._fd)
            raise BenchError(f"no domain of {nr_pfns} pages: {os.strerror(ffi.errno)}")
        self.memory = lib.standin_memory(self._handle)
        self.table = int(ffi.cast("uintptr_t", lib.standin_table(self._handle)))
        self.mappings = Mappings(self.table, nr_pfns, max(nr_pfns * PAGE, 2 << 20))
        self.pending, self.carried = Bitmap(nr_pfns), Bitmap(nr_pfns)
        self.arena = Arena(arena_pages or self.memory_pages, nr_pfns, audit_pages=AUDIT_PAGES)
        self.key = DigestKey(bytes(32))
        self._audit_cursor = 0

    def _populate(self) -> None:
        need = self.memory_pages * PAGE
        free = os.sysconf("SC_AVPHYS_PAGES") * PAGE
        if need > free:
            os.close(self._fd)
            raise BenchError(f"a guest of {need >> 20} MiB: only {free >> 20} MiB are free")
        for at in range(0, need, len(_FILL)):
            os.pwrite(self._fd, _FILL[: need - at], at)

    def map_all(self) -> None:
        """Every page staged once, as a first copy does: from here on all mappings are cached, and holes are known."""
        self.pending.fill()
        cursor = 0
        while self.pending:
            outcome = native.live_round(
                self.table, self.mappings, self.pending, self.carried, self.arena, cursor=cursor
            )
            cursor = outcome.cursor
            self._settle(outcome)

    def dirty(self, pfns: Iterable[int]) -> None:
        """In the log, for the next epoch."""
        listed = ffi.new("uint64_t[]", list(pfns))
        lib.standin_dirty(self._handle, listed, len(listed))

    def pause(self) -> Outcome:
        """One epoch; its pages are acked at once."""
        outcome = native.pause(
            self.table, self.mappings, self.pending, self.carried, self.arena, key=self.key,
            suspend_timeout_ns=1, audit_cursor=self._audit_cursor,
        )  # fmt: skip
        self._audit_cursor = outcome.cursor
        self._settle(outcome)
        return outcome

    def _settle(self, outcome: Outcome) -> None:
        if outcome.fault:
            raise BenchError(f"an epoch failed: {outcome.fault}")
        self.carried.clear()

    def libxc_epoch(self, socket: int) -> tuple[int, int, int]:
        """One epoch as libxc takes it, into a socket: ns of the pause, of mapping in it, of writing in it."""
        times = ffi.new("struct libxc_times *")
        status = lib.libxc_epoch(self._handle, socket, times)
        if status:
            raise BenchError(f"an epoch failed: {os.strerror(-status)}")
        return times.pause_ns, times.map_ns, times.write_ns

    def close(self) -> None:
        self.mappings.close()
        self.arena.close()
        lib.standin_free(self._handle)
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Copies:
    """Plain copies of a stand-in's pages into a buffer as large as its arena: the floor."""

    def __init__(self, domain: Standin, pages: int) -> None:
        self._domain = domain
        self._memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # as arenas are
        self._to = ffi.from_buffer("uint8_t[]", self._memory, require_writable=True)
        for at in range(0, pages * PAGE, len(_FILL)):
            self._memory[at : at + len(_FILL)] = _FILL[: pages * PAGE - at]

    def scattered(self, pfns: Sequence[int]) -> int:
        """Those pages, each by itself; takes so many ns."""
        listed = ffi.new("uint64_t[]", pfns)
        return int(lib.bench_copy_pages(self._to, self._domain.memory, listed, len(pfns)))

    def one(self, first: int, pages: int) -> int:
        """So many that follow each other, at once; takes so many ns."""
        return int(lib.bench_copy(self._to, self._domain.memory + first * PAGE, pages * PAGE))

    def back(self, pfns: Sequence[int]) -> int:
        """From the buffer to where those pages are in the guest's memory; takes so many ns."""
        listed = ffi.new("uint64_t[]", pfns)
        return int(lib.bench_put_pages(self._domain.memory, self._to, listed, len(pfns)))

    def content(self) -> bytes:
        """Of the buffer."""
        return self._memory[:]

    def close(self) -> None:
        ffi.release(self._to)
        self._memory.close()


class Evictor:
    """Makes everything cold."""

    def __init__(self, octets: int) -> None:
        self._buffer = ffi.new("uint8_t[]", octets)

    def evict(self) -> None:
        lib.bench_evict(self._buffer, len(self._buffer))


def scattered(choose: random.Random, nr_pfns: int, count: int) -> list[int]:
    """Ascending, as a bitmap lists them, and no two of them neighbours if there is room."""
    stride = nr_pfns // count
    return [i * stride + choose.randrange(max(1, stride - 1)) for i in range(count)]
