# Types of the compiled module, whose interface is the cdef of csrc/build_native.py.

from typing import Any, TypeAlias

# A struct, array or pointer of C; what is in it, the cdef says and mypy cannot know.
CData: TypeAlias = Any

ffi: Any  # types-cffi knows no fields of structs

class _Kernels:
    def ck_kernel_name(self, index: int, /) -> CData: ...
    def ck_kernel_runs(self, index: int, /) -> bool: ...
    def ck_kernel_choose(self, index: int, /) -> None: ...
    def ck_kernel_at(self, index: int, /) -> CData: ...

class _Bitmaps:
    def ck_bitmap_count(self, bitmap: CData, nr_bits: int, /) -> int: ...
    def ck_bitmap_any(self, bitmap: CData, nr_bits: int, /) -> bool: ...
    def ck_bitmap_add(self, bitmap: CData, first: int, count: int, /) -> None: ...
    def ck_bitmap_or(self, into: CData, other: CData, nr_bits: int, /) -> None: ...
    def ck_bitmap_trim(self, bitmap: CData, nr_bits: int, /) -> None: ...
    def ck_bitmap_list(
        self, bitmap: CData, first: int, end: int, bits: CData, most: int, /
    ) -> int: ...

class _Digests:
    CK_NH_KEY_WORDS: int
    CK_DIGEST_SIZE: int

    def ck_digest(self, key: CData, data: CData, length: int, digest: CData, /) -> None: ...
    def ck_digest_pages(self, key: CData, pages: CData, nr: int, digests: CData, /) -> None: ...
    def ck_digest_with(
        self, kernel: CData, key: CData, data: CData, length: int, digest: CData, /
    ) -> None: ...

class _Staging:
    CK_SLOT_PAGES: int
    CK_TOO_MANY: int
    CK_STEP_NONE: int
    CK_STEP_ARENA: int
    CK_STEP_SUSPEND: int
    CK_STEP_P2M: int
    CK_STEP_HARVEST: int
    CK_STEP_TYPES: int
    CK_STEP_MAP: int
    CK_STEP_STAGE: int
    CK_STEP_CONTEXT: int
    CK_STEP_AUDIT: int
    CK_STEP_OUTPUT: int
    CK_STEP_RESUME: int

    def ck_mappings_new(
        self, table: CData, nr_pfns: int, budget_extents: int, out: CData, /
    ) -> int: ...
    def ck_mappings_free(self, cache: CData, /) -> None: ...
    def ck_mappings_refresh(self, cache: CData, /) -> int: ...
    def ck_mappings_invalidate_all(self, cache: CData, /) -> int: ...
    def ck_mappings_theirs(self, cache: CData, digests: CData, /) -> None: ...
    def ck_arena_size(self, pages: int, context_bytes: int, audit_pages: int, /) -> int: ...
    def ck_arena_init(
        self, arena: CData, memory: CData, pages: int, context_bytes: int, audit_pages: int, /
    ) -> None: ...
    def ck_arena_record(self, arena: CData, i: int, length: CData, /) -> CData: ...
    def ck_pause(self, request: CData, outcome: CData, /) -> None: ...
    def ck_live_round(self, request: CData, outcome: CData, /) -> None: ...

class _Image:
    CK_FAULT_NONE: int
    CK_FAULT_SHORT: int
    CK_FAULT_TYPE: int
    CK_FAULT_LENGTH: int
    CK_FAULT_RESERVED: int
    CK_FAULT_COUNT: int
    CK_FAULT_WORD: int
    CK_FAULT_KIND: int
    CK_FAULT_PFN: int
    CK_FAULT_DATA: int

    def ck_record_check(self, record: CData, length: int, nr_pfns: int, at: CData, /) -> int: ...
    def ck_words_check(
        self, words: CData, count: int, with_data: bool, nr_pfns: int, at: CData, /
    ) -> int: ...
    def ck_scatter(self, image: CData, populated: CData, record: CData, /) -> None: ...
    def ck_zero_pages(
        self, image: CData, populated: CData, words: CData, count: int, /
    ) -> None: ...
    def ck_drop_pages(
        self, image: CData, populated: CData, words: CData, count: int, /
    ) -> None: ...
    def ck_merge(
        self, image: CData, overlay: CData, nr_pfns: int, overlaid: CData, populated: CData, /
    ) -> None: ...

class _Lib(_Kernels, _Bitmaps, _Digests, _Staging, _Image):
    CK_SOURCE_HASH: CData

lib: _Lib
