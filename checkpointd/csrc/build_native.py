"""Builds checkpointd._native; setup.py names it as a cffi module. Runs from the checkout's root."""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent  # relative to the root, as setuptools wants the paths of sources
tools = runpy.run_path(str(HERE / "source_hash.py"))

ffi = FFI()
ffi.cdef(
    """
    static char *const CK_SOURCE_HASH;

    /* kernel.h */
    const char *ck_kernel_name(unsigned index);
    bool ck_kernel_runs(unsigned index);
    void ck_kernel_choose(unsigned index);
    struct ck_kernel {
        bool (*page_is_zero)(const uint8_t *page);
        uint64_t (*count)(const uint64_t *words, uint64_t nr_words);
        void (*copy_page)(uint8_t *to, const uint8_t *from);
        void (*copied)(void);
        uint32_t (*changes)(uint8_t *was, const uint8_t *now, uint8_t *out);
        ...;
    };
    const struct ck_kernel *ck_kernel_at(unsigned index);

    /* bitmap.h */
    struct ck_bitmap {
        uint64_t nr_bits;
        uint64_t *words;
        ...;
    };
    uint64_t ck_bitmap_size(uint64_t nr_bits);
    void ck_bitmap_init(struct ck_bitmap *bitmap, void *memory, uint64_t nr_bits);
    uint64_t ck_bitmap_count(struct ck_bitmap *bitmap);
    bool ck_bitmap_any(struct ck_bitmap *bitmap);
    void ck_bitmap_add(struct ck_bitmap *bitmap, uint64_t first, uint64_t count);
    void ck_bitmap_fill(struct ck_bitmap *bitmap);
    void ck_bitmap_clear(struct ck_bitmap *bitmap);
    void ck_bitmap_or(struct ck_bitmap *into, const struct ck_bitmap *from);
    void ck_bitmap_loaded(struct ck_bitmap *bitmap);
    uint32_t ck_bitmap_list(const struct ck_bitmap *bitmap, uint64_t first, uint64_t end,
                            uint64_t *bits, uint32_t max);

    /* digest.h */
    #define CK_NH_KEY_WORDS ...
    #define CK_DIGEST_SIZE ...
    struct ck_digest_key {
        uint32_t words[...];
        uint64_t points[2];
    };
    void ck_digest(const struct ck_digest_key *key, const uint8_t *data, uint64_t length,
                   uint8_t *digest);
    void ck_digest_pages(const struct ck_digest_key *key, const uint8_t *pages, uint64_t nr,
                         uint8_t *digests);
    void ck_digest_with(const struct ck_kernel *kernel, const struct ck_digest_key *key,
                        const uint8_t *data, uint64_t length, uint8_t *digest);

    /* mappings.h */
    struct ck_mappings_stats {
        uint64_t hits, misses, evicted, invalidated, mapped_extents, mapped_pages;
    };
    struct ck_mappings {
        struct ck_mappings_stats stats;
        ...;
    };
    int ck_mappings_new(void *table, uint64_t nr_pfns, uint32_t budget_extents,
                        struct ck_mappings **out);
    void ck_mappings_free(struct ck_mappings *cache);
    int64_t ck_mappings_refresh(struct ck_mappings *cache);
    int ck_mappings_invalidate_all(struct ck_mappings *cache);
    void ck_mappings_theirs(struct ck_mappings *cache, const uint8_t *digests);

    /* arena.h */
    #define CK_SLOT_PAGES ...
    struct ck_audit {
        uint64_t pfn;
        ...;
    };
    struct ck_arena {
        uint64_t *zero;
        uint64_t *gone;
        uint8_t *context;
        struct ck_audit *audit;
        uint32_t audited;
        uint64_t pages, zeros, nr_gone, context_length;
        ...;
    };
    uint64_t ck_arena_size(uint64_t pages, uint64_t context_bytes, uint32_t audit_pages);
    void ck_arena_init(struct ck_arena *arena, void *memory, uint64_t pages, uint64_t context_bytes,
                       uint32_t audit_pages);
    const uint8_t *ck_arena_record(const struct ck_arena *arena, uint64_t i, uint64_t *length);

    /* pause.h */
    #define CK_TOO_MANY ...
    enum ck_step { CK_STEP_NONE, CK_STEP_ARENA, CK_STEP_SUSPEND, CK_STEP_P2M, CK_STEP_HARVEST,
                   CK_STEP_TYPES, CK_STEP_MAP, CK_STEP_STAGE, CK_STEP_CONTEXT, CK_STEP_AUDIT,
                   CK_STEP_OUTPUT, CK_STEP_RESUME, ... };
    struct ck_request {
        struct ck_mappings *mappings;
        struct ck_bitmap *pending;
        struct ck_bitmap *carried;
        struct ck_arena *arena;
        const struct ck_digest_key *key;
        const struct ck_bitmap *audit;
        uint8_t *known;
        uint64_t cursor;
        int64_t suspend_timeout_ns;
        bool close_output;
        bool stay;
        bool detect_zero;
    };
    struct ck_outcome {
        int status;
        int resume_status;
        enum ck_step step;
        int64_t suspend_ns, harvest_ns, stage_ns, context_ns, audit_ns, output_ns, resume_ns,
                pause_ns;
        uint64_t pages, zeros, gone, known, dirty, remaining, audited, cursor, closed_output;
    };
    void ck_pause(const struct ck_request *request, struct ck_outcome *outcome);
    void ck_live_round(const struct ck_request *request, struct ck_outcome *outcome);

    /* scatter.h */
    enum ck_fault { CK_FAULT_NONE, CK_FAULT_SHORT, CK_FAULT_TYPE, CK_FAULT_LENGTH,
                    CK_FAULT_RESERVED, CK_FAULT_COUNT, CK_FAULT_WORD, CK_FAULT_KIND, CK_FAULT_PFN,
                    CK_FAULT_DATA, CK_FAULT_BASE, ... };
    enum ck_fault ck_record_check(const uint8_t *record, uint64_t length, uint64_t nr_pfns,
                                  uint64_t *at);
    enum ck_fault ck_words_check(const uint8_t *words, uint64_t count, int with_data,
                                 uint64_t nr_pfns, uint64_t *at);
    void ck_mark(struct ck_bitmap *pfns, const uint8_t *words, uint64_t count);
    void ck_mark_extents(struct ck_bitmap *missing, const struct ck_bitmap *reserved,
                         const uint8_t *words, uint64_t count);
    void ck_scatter(uint8_t *image, struct ck_bitmap *populated, const uint8_t *record);
    void ck_zero_pages(uint8_t *image, struct ck_bitmap *populated, const uint8_t *words,
                       uint64_t count);
    void ck_drop_pages(uint8_t *image, struct ck_bitmap *populated, const uint8_t *words,
                       uint64_t count);
    void ck_merge(uint8_t *image, const uint8_t *overlay, const struct ck_bitmap *overlaid,
                  struct ck_bitmap *populated);

    /* history.h */
    #define CK_HISTORY_WAYS ...
    struct ck_history { uint64_t nr_sets; ...; };
    uint64_t ck_history_size(uint64_t nr_sets);
    void ck_history_init(struct ck_history *history, void *memory, uint64_t nr_sets);
    void ck_history_forget_words(struct ck_history *history, const uint8_t *words, uint64_t count);
    void ck_history_clear(struct ck_history *history);

    /* delta.h */
    #define CK_CHANGES_MAX ...
    #define CK_CHANGES_ROOM ...
    uint64_t ck_body_size(uint64_t length);
    struct ck_reduction { uint64_t seen, changes, octets; };
    struct ck_held {
        const uint8_t *image;
        const struct ck_bitmap *populated;
        const uint8_t *overlay;
        const struct ck_bitmap *overlaid;
    };
    uint64_t ck_reduce(struct ck_history *history, const uint8_t *record, uint32_t every,
                       uint8_t *out, struct ck_reduction *result);
    enum ck_fault ck_expand(const struct ck_held *held, uint64_t nr_pfns, const uint8_t *body,
                            uint64_t length, uint8_t *out, uint64_t out_length, uint64_t *at);
    """
)
ffi.set_source(
    "checkpointd._native",
    f"""
    #define CK_SOURCE_HASH "{tools["source_hash"](HERE)}"
    #include "bitmap.h"
    #include "delta.h"
    #include "digest.h"
    #include "kernel.h"
    #include "pause.h"
    #include "scatter.h"
    """,
    sources=[str(path) for path in tools["sources"](HERE) if path.suffix == ".c"],
    # Headers and helpers reach an sdist, and a change of one a rebuild, only by being named here.
    depends=[str(path) for path in tools["sources"](HERE) if path.suffix != ".c"]
    + [str(HERE / "source_hash.py")],
    include_dirs=[str(HERE)],
    # -Wconversion and the like: strict.h asks for them in our own files; in the binding they are
    # noise.
    extra_compile_args=["-O3", "-std=gnu11", "-Wall", "-Wextra"],
)
