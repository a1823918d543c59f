"""A hypervisor for the tests of the native hot path (fake_hypervisor.c), its guest, and plain
oracles of what is staged.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cffi import FFI
from fake_library import compile_library

from checkpointd import native
from checkpointd.native import Arena, Bitmap, DigestKey, Mappings, Outcome

PAGE = 4096
EXTENT = 512  # pages
SECOND = 1_000_000_000  # ns
ZERO = bytes(PAGE)
XTAB, BROKEN = 0xF, 0xD
CALLS = ("suspend", "resume", "harvest", "p2m", "types", "map", "unmap", "context", "output")
KEY = DigestKey(bytes(range(32)))
NR_PFNS = 3 * EXTENT + 100  # whole extents and a partial one; not a multiple of 64
BLOCK = 4096  # pfns that share a bit of a bitmap's blocks (csrc/bitmap.h)
BLOCKS = 3 * BLOCK + 100  # pfns: whole blocks and a partial one


def compile_fake(directory: Path) -> Any:
    """The fake hypervisor, compiled into `directory`: (ffi, lib)."""
    source = Path(__file__).with_suffix(".c")
    library = compile_library(directory / "fake_hypervisor.so", [source])
    ffi = FFI()
    ffi.cdef(
        """
        void *fake_new(uint64_t nr_pfns);
        void fake_free(void *f);
        void *fake_table(void *f);
        void fake_swap(void *f, uint64_t pfn);
        void fake_hole(void *f, uint64_t pfn);
        void fake_fail(void *f, int call, uint64_t at, int error, int late, uint64_t passages);
        void fake_heal(void *f);
        uint64_t fake_passages(void *f, int call);
        uint8_t *fake_page(void *f, uint64_t pfn);
        void fake_dirty(void *f, uint64_t pfn);
        int fake_is_dirty(void *f, uint64_t pfn);
        void fake_hold(void *f, uint64_t pfn);
        void fake_set_type(void *f, uint64_t pfn, uint8_t type);
        void fake_meet(void *f, int tell, int wait);
        void fake_lie(void *f);
        void fake_context_length(void *f, uint64_t length);
        void fake_map_limit(void *f, uint64_t extents);
        void fake_after_types(void *f, int64_t swap, int64_t hole);
        int fake_suspended(void *f);
        uint64_t fake_mapped(void *f);
        uint64_t fake_closed(void *f);
        void fake_abi(void *f, uint32_t abi);
        const char *fake_journal(void *f);
        """
    )
    return ffi, ffi.dlopen(str(library))


@dataclass
class Guest:
    """A guest of the fake hypervisor, with what an engine needs to protect it."""

    fake: Any
    nr_pfns: int = NR_PFNS
    budget: int = 64  # extents
    capacity: int = 600  # pages
    audit_pages: int = 4
    handle: Any = None
    mappings: Mappings = field(init=False)
    pending: Bitmap = field(init=False)
    carried: Bitmap = field(init=False)
    arena: Arena = field(init=False)

    def __post_init__(self) -> None:
        self.ffi, self.lib = self.fake
        self.handle = self.lib.fake_new(self.nr_pfns)
        assert self.handle
        self.table = int(self.ffi.cast("uintptr_t", self.lib.fake_table(self.handle)))
        self.mappings = Mappings(self.table, self.nr_pfns, self.budget * EXTENT * PAGE)
        self.pending, self.carried = Bitmap(self.nr_pfns), Bitmap(self.nr_pfns)
        self.arena = Arena(self.capacity, self.nr_pfns, 4096, self.audit_pages)

    def write(self, pfn: int, data: bytes) -> None:
        """The guest stores `data` at the start of a page, then the hypervisor notes it."""
        self.ffi.memmove(self.lib.fake_page(self.handle, pfn), data, len(data))
        self.lib.fake_dirty(self.handle, pfn)

    def read(self, pfn: int) -> bytes | None:
        page = self.lib.fake_page(self.handle, pfn)
        return bytes(self.ffi.buffer(page, PAGE)) if page else None

    def fail(
        self, call: str, at: int = 1, error: int = errno.EIO, *, late: bool = False, times: int = 1
    ) -> None:
        self.lib.fake_fail(self.handle, CALLS.index(call), at, -error, late, times)

    def heal(self) -> None:
        self.lib.fake_heal(self.handle)

    def journal(self) -> str:
        """Letters of the calls since the last journal()."""
        return bytes(self.ffi.string(self.lib.fake_journal(self.handle))).decode()

    def passages(self) -> dict[str, int]:
        return {name: self.lib.fake_passages(self.handle, i) for i, name in enumerate(CALLS)}

    def pause(self, **options: Any) -> Outcome:
        options = {"key": KEY, "suspend_timeout_ns": SECOND, **options}
        return native.pause(
            self.table, self.mappings, self.pending, self.carried, self.arena, **options
        )

    def live_round(self, cursor: int = 0, **options: Any) -> Outcome:
        return native.live_round(
            self.table,
            self.mappings,
            self.pending,
            self.carried,
            self.arena,
            cursor=cursor,
            **options,
        )

    def owned(self) -> set[int]:
        return set(self.pending) | set(self.carried)

    def close(self) -> None:
        self.heal()
        self.mappings.close()
        self.arena.close()
        leaked, suspended = self.lib.fake_mapped(self.handle), self.lib.fake_suspended(self.handle)
        self.lib.fake_free(self.handle)
        assert not leaked, "extents are still mapped"
        assert not suspended, "the guest was left suspended"


def text(pfn: int, version: int = 0) -> bytes:
    """Contents of a page that names it; never all zero."""
    return struct.pack("<QQ", pfn + 1, version) * (PAGE // 16)


def page_data(pages: dict[int, bytes], types: dict[int, int] | None = None) -> bytes:
    """A PAGE_DATA record, written the plain way: the oracle of the staged one."""
    types = types or {}
    words = [types.get(pfn, 0) << 60 | pfn for pfn in pages]
    body = struct.pack(f"<II{len(words)}Q", len(words), 0, *words) + b"".join(pages.values())
    return struct.pack("<II", 1, len(body)) + body


def words_of(view: memoryview) -> list[int]:
    return list(struct.unpack(f"<{len(view) // 8}Q", view))


def staged(arena: Arena) -> dict[int, bytes]:
    """Pages with data in the records, all of which must be well-formed."""
    pages = {}
    for record in arena.records:
        assert native.check_record(record, arena.nr_pfns) is None
        kind, _, count, _ = struct.unpack_from("<IIII", record)
        assert kind == 1
        for i, word in enumerate(words_of(record[16 : 16 + 8 * count])):
            start = 16 + 8 * count + i * PAGE
            pages[word & (1 << 52) - 1] = bytes(record[start : start + PAGE])
    return pages


def is_empty(arena: Arena) -> bool:
    return not (arena.records or arena.zero_pfns or arena.gone_pfns or arena.context or arena.audit)
