#include "strict.h"
#include "pause.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "bitmap.h"

/* Pages of one call of types(): the most that Xen's getpageframeinfo3 takes. */
#define BATCH 1024u

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Returns the time since *mark, and moves the mark. */
static int64_t lap(int64_t *mark)
{
    int64_t then = *mark;

    *mark = now_ns();
    return *mark - then;
}

/* Note a failure; a positive answer where only 0 means success breaks the port's contract. Returns
 * false. */
static bool fail(struct ck_outcome *out, enum ck_step step, int64_t rc)
{
    out->status = rc < 0 ? (int)rc : -EPROTO;
    out->step = step;
    return false;
}

/* Everything the round has taken goes back, and it is as if it had not been. */
static void give_back(const struct ck_request *q, struct ck_outcome *out)
{
    ck_bitmap_or(q->pending, q->carried);
    ck_bitmap_clear(q->carried);
    ck_arena_empty(q->arena);
    out->pages = out->zeros = out->gone = out->known = out->audited = 0;
    out->cursor = q->cursor;
}

/* Mappings made true, and every bit known to the hypervisor brought into `pending`. */
static bool harvest(const struct ck_request *q, struct ck_outcome *out, int mode)
{
    struct ck_mappings *cache = q->mappings;
    const struct ck_hypervisor *hypervisor = cache->hypervisor;
    int64_t changes = ck_mappings_refresh(cache);
    int rc;

    ck_mappings_take_changed(cache, q->pending);
    if (changes < 0)
        return fail(out, CK_STEP_P2M, changes);
    rc = hypervisor->harvest(hypervisor->domain, q->pending, mode);
    if (rc < 0 && rc != -EAGAIN)
        ck_bitmap_fill(q->pending); /* the log is lost: any page may be dirty */
    ck_bitmap_trim(q->pending);
    if (rc)
        return fail(out, CK_STEP_HARVEST, rc);
    out->dirty = ck_bitmap_count(q->pending);
    return true;
}

/* What a PAGE_DATA word says is behind its pfn. */
enum content { DATA, NOTHING, INVALID };

static enum content content(uint64_t word)
{
    switch (word >> CK_TYPE_SHIFT) {
    case 0: case 1: case 2: case 3: case 4: /* NOTAB; L1TAB..L4TAB of a PV guest */
    case 9: case 10: case 11: case 12:      /* the same, pinned */
        return DATA;
    case CK_TYPE_BROKEN: case CK_TYPE_XTAB:
        return NOTHING;
    default: /* 5..8 are reserved; XALLOC is of senders long gone */
        return INVALID;
    }
}

/* Ask for the types of pfns[0..n), into words, and check that the answer is about them. */
static bool ask_types(const struct ck_request *q, struct ck_outcome *out, enum ck_step step,
                      const uint64_t *pfns, uint64_t *words, uint32_t n)
{
    const struct ck_hypervisor *hypervisor = q->mappings->hypervisor;
    int rc;

    memcpy(words, pfns, n * sizeof *words);
    rc = hypervisor->types(hypervisor->domain, words, n);
    if (rc)
        return fail(out, step, rc);
    for (uint32_t i = 0; i < n; i++)
        if (words[i] << 4 >> 4 != pfns[i] || content(words[i]) == INVALID)
            return fail(out, CK_STEP_STAGE, -EPROTO);
    return true;
}

static const uint8_t *page_of(const uint8_t *base, uint64_t pfn)
{
    return base + pfn % CK_EXTENT_PAGES * CK_PAGE_SIZE;
}

/* Bring the first lines of a page on their way while the one before it is copied. Most of the gain
 * is the address translation, which the processor's own prefetcher never begins for a page that it
 * was not led to. Measured: scattered pages take a quarter less time with 2 to 16 lines, and hardly
 * less with all 64. */
static void prefetch(const struct ck_mappings *cache, uint64_t pfn)
{
    const uint8_t *base = ck_mappings_peek(cache, pfn);

    if (base)
        for (unsigned line = 0; line < 8; line++)
            __builtin_prefetch(page_of(base, pfn) + line * 64);
}

/* Does the other side have this page as it is now? */
static bool is_known(const struct ck_request *q, uint64_t pfn, const uint8_t *page)
{
    static const uint8_t none[CK_DIGEST_SIZE];
    const uint8_t *theirs;
    uint8_t ours[CK_DIGEST_SIZE];

    if (!q->known)
        return false;
    theirs = q->known + pfn * CK_DIGEST_SIZE;
    if (memcmp(theirs, none, sizeof none) == 0)
        return false;
    ck_digest(q->key, page, CK_PAGE_SIZE, ours);
    return memcmp(theirs, ours, sizeof ours) == 0;
}

/* It will get another version: were this one to come back, it must not pass for known. */
static void forget_known(const struct ck_request *q, uint64_t pfn)
{
    if (q->known)
        memset(q->known + pfn * CK_DIGEST_SIZE, 0, CK_DIGEST_SIZE);
}

static void stage_page(const struct ck_request *q, struct ck_outcome *out, uint64_t word,
                       const uint8_t *base)
{
    struct ck_arena *arena = q->arena;
    uint64_t pfn = word & CK_PFN_MASK;

    if (content(word) == NOTHING) {
        ck_bit_clear(&q->mappings->populated, pfn);
        /* `theirs` keeps its bit: nobody knows yet whether this part will arrive. */
        if (ck_bit_test(&q->mappings->theirs, pfn))
            arena->gone[arena->nr_gone++] = word;
        forget_known(q, pfn);
        return;
    }
    const uint8_t *page = page_of(base, pfn);
    ck_bit_set(&q->mappings->populated, pfn);
    ck_bit_set(&q->mappings->theirs, pfn);
    if (is_known(q, pfn, page)) {
        out->known++;
        return;
    }
    if (q->detect_zero && ck_kernel->page_is_zero(page))
        arena->zero[arena->zeros++] = word;
    else
        ck_arena_put(arena, word, page);
    forget_known(q, pfn);
}

/* Live only: are words[0..n), of the one extent that is mapped at `base`, still what their types said?
 * If not, they wait for the next round. Frames may have changed between the types and the mapping, and
 * a page that has gone is a hole now. The news of it may have come while another extent of the same
 * batch was looked at: what this round has heard so far is in `changed`. */
static bool still_true(const struct ck_request *q, struct ck_outcome *out, const uint64_t *words,
                       uint32_t n, const uint8_t *base, bool *same)
{
    const struct ck_mappings *cache = q->mappings;
    int64_t changes = ck_mappings_refresh(q->mappings);

    if (changes < 0)
        return fail(out, CK_STEP_P2M, changes);
    *same = ck_mappings_peek(cache, words[0] & CK_PFN_MASK) == base;
    for (uint32_t i = 0; i < n; i++)
        *same &= !ck_bit_test(&cache->changed, words[i] & CK_PFN_MASK);
    return true;
}

/* Stage words[0..n), whose pfns lie in one extent. */
static bool stage_run(const struct ck_request *q, struct ck_outcome *out, const uint64_t *words,
                      uint32_t n, bool live)
{
    const uint8_t *base = NULL;
    uint32_t with_data = 0;

    while (with_data < n && content(words[with_data]) != DATA)
        with_data++;
    if (with_data < n) { /* else there is nothing to map */
        uint64_t pfn = words[with_data] & CK_PFN_MASK;
        int rc = ck_mappings_extent(q->mappings, pfn, &base);
        bool same = true;

        if (rc)
            return fail(out, CK_STEP_MAP, rc);
        if (live && !still_true(q, out, words, n, base, &same))
            return false;
        if (!same) {
            for (uint32_t i = 0; i < n; i++) {
                ck_bit_clear(q->carried, words[i] & CK_PFN_MASK);
                ck_bit_set(q->pending, words[i] & CK_PFN_MASK);
            }
            return true;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        if (i + 1 < n)
            prefetch(q->mappings, words[i + 1] & CK_PFN_MASK);
        stage_page(q, out, words[i], base);
    }
    return true;
}

static bool stage_batch(const struct ck_request *q, struct ck_outcome *out, const uint64_t *pfns,
                        uint32_t n, bool live)
{
    uint64_t words[BATCH];

    for (uint32_t i = 0; i < n; i++) {
        ck_bit_clear(q->pending, pfns[i]);
        ck_bit_set(q->carried, pfns[i]);
    }
    if (!ask_types(q, out, CK_STEP_TYPES, pfns, words, n))
        return false;
    for (uint32_t i = 0, next; i < n; i = next) {
        for (next = i + 1; next < n && pfns[next] >> CK_EXTENT_SHIFT == pfns[i] >> CK_EXTENT_SHIFT;)
            next++;
        if (!stage_run(q, out, words + i, next - i, live))
            return false;
    }
    return true;
}

/* Pages that may still be taken, whatever they turn out to be. */
static uint32_t room(const struct ck_arena *arena)
{
    uint64_t used = arena->pages > arena->zeros ? arena->pages : arena->zeros;

    used = used > arena->nr_gone ? used : arena->nr_gone;
    return arena->capacity - used < BATCH ? (uint32_t)(arena->capacity - used) : BATCH;
}

/* Stage what is pending in [first, end), as far as there is room; *next is where it stopped. */
static bool stage_range(const struct ck_request *q, struct ck_outcome *out, uint64_t first,
                        uint64_t end, bool live, uint64_t *next)
{
    uint64_t pfns[BATCH];

    for (*next = first; *next < end && room(q->arena) > 0;) {
        uint32_t n = ck_bitmap_list(q->pending, *next, end, pfns, room(q->arena));

        *next = n ? pfns[n - 1] + 1 : end;
        if (n && !stage_batch(q, out, pfns, n, live))
            return false;
    }
    return true;
}

static void seal(const struct ck_request *q, struct ck_outcome *out)
{
    ck_arena_seal(q->arena);
    out->pages = q->arena->pages;
    out->zeros = q->arena->zeros;
    out->gone = q->arena->nr_gone;
}

static bool write_context(const struct ck_request *q, struct ck_outcome *out)
{
    const struct ck_hypervisor *hypervisor = q->mappings->hypervisor;
    struct ck_arena *arena = q->arena;
    int64_t length = hypervisor->context(hypervisor->domain, arena->context,
                                         arena->context_capacity);

    if (length < 0 || (uint64_t)length > arena->context_capacity)
        return fail(out, CK_STEP_CONTEXT, length);
    arena->context_length = (uint64_t)length;
    return true;
}

/* The pages of [first, end) that the replica should already have as they are now: `max` at most. */
static uint32_t list_clean(const struct ck_request *q, uint64_t first, uint64_t end, uint64_t *pfns,
                           uint32_t max)
{
    const struct ck_bitmap *populated = &q->mappings->populated;
    uint32_t found = 0;

    for (uint64_t i = first / 64; i * 64 < end && found < max; i++) {
        uint64_t clean = populated->words[i] & ~q->carried->words[i];

        if (q->audit)
            clean &= q->audit->words[i];
        if (clean)
            found += ck_word_list(clean, i == first / 64 ? first % 64 : 0,
                                  end - i * 64 < 64 ? end - i * 64 : 64, i * 64, pfns + found,
                                  max - found);
        else if ((i + 1) % CK_BLOCK_WORDS == 0) /* holes, most of a PVH guest's map */
            i = ck_bitmap_next_block(populated, (i + 1) / CK_BLOCK_WORDS) * CK_BLOCK_WORDS - 1;
    }
    return found;
}

/* Digests of clean pages, a few each epoch, so that dirt nobody reported does not stay hidden
 * (invariant 10). Bounded work: no more pages are looked at than can be audited, whatever they turn
 * out to be. */
static bool audit(const struct ck_request *q, struct ck_outcome *out)
{
    struct ck_mappings *cache = q->mappings;
    struct ck_arena *arena = q->arena;
    uint64_t pfns[BATCH], words[BATCH];
    uint32_t n = list_clean(q, q->cursor, cache->nr_pfns, pfns, arena->audit_capacity);

    if (n < arena->audit_capacity)
        n += list_clean(q, 0, q->cursor, pfns + n, arena->audit_capacity - n);
    if (n == 0)
        return true;
    if (!ask_types(q, out, CK_STEP_AUDIT, pfns, words, n))
        return false;
    for (uint32_t i = 0; i < n; i++) {
        struct ck_audit *entry = &arena->audit[arena->audited];
        const uint8_t *base;
        int rc;

        if (content(words[i]) != DATA)
            continue;
        rc = ck_mappings_extent(cache, pfns[i], &base);
        if (rc)
            return fail(out, CK_STEP_AUDIT, rc);
        entry->pfn = pfns[i];
        ck_digest(q->key, page_of(base, pfns[i]), CK_PAGE_SIZE, entry->digest);
        arena->audited++;
    }
    out->audited = arena->audited;
    out->cursor = (pfns[n - 1] + 1) % cache->nr_pfns;
    return true;
}

/* All that is done while the guest stands still. */
static void checkpoint(const struct ck_request *q, struct ck_outcome *out, int64_t mark)
{
    const struct ck_hypervisor *hypervisor = q->mappings->hypervisor;
    uint64_t end;
    bool ok = harvest(q, out, CK_HARVEST_FINAL);

    out->harvest_ns = lap(&mark);
    if (!ok)
        return;
    if (out->dirty > q->arena->capacity) {
        out->status = CK_TOO_MANY;
        return;
    }
    ok = stage_range(q, out, 0, q->mappings->nr_pfns, false, &end);
    if (ok)
        seal(q, out);
    out->stage_ns = lap(&mark);
    if (!ok)
        return;
    ok = write_context(q, out);
    out->context_ns = lap(&mark);
    if (!ok)
        return;
    ok = audit(q, out);
    out->audit_ns = lap(&mark);
    if (!ok || !q->close_output)
        return;
    int rc = hypervisor->output_close(hypervisor->domain, &out->closed_output);
    if (rc)
        fail(out, CK_STEP_OUTPUT, rc);
    out->output_ns = lap(&mark);
}

static bool begin(const struct ck_request *q, struct ck_outcome *out)
{
    memset(out, 0, sizeof *out);
    out->cursor = q->cursor;
    if (ck_bitmap_any(q->carried))
        return fail(out, CK_STEP_ARENA, -EBUSY);
    ck_arena_empty(q->arena);
    return true;
}

void ck_pause(const struct ck_request *q, struct ck_outcome *out)
{
    const struct ck_hypervisor *hypervisor = q->mappings->hypervisor;
    int64_t mark = now_ns(), stopped, resuming;
    int rc;

    if (!begin(q, out))
        return;
    rc = hypervisor->suspend(hypervisor->domain, q->suspend_timeout_ns);
    out->suspend_ns = lap(&mark);
    stopped = mark;
    if (rc)
        fail(out, CK_STEP_SUSPEND, rc); /* it may have stopped all the same: it is resumed */
    else
        checkpoint(q, out, mark);

    resuming = now_ns();
    if (!q->stay || out->status)
        out->resume_status = hypervisor->resume(hypervisor->domain);
    mark = now_ns();
    out->resume_ns = mark - resuming;
    out->pause_ns = mark - stopped;

    /* The guest runs: what follows costs it nothing. */
    if (out->status)
        give_back(q, out);
    else if (out->resume_status)
        out->step = CK_STEP_RESUME;
    out->remaining = ck_bitmap_count(q->pending);
}

void ck_live_round(const struct ck_request *q, struct ck_outcome *out)
{
    int64_t mark = now_ns();
    uint64_t nr_pfns = q->mappings->nr_pfns;
    bool ok;

    if (!begin(q, out))
        return;
    ok = harvest(q, out, CK_HARVEST_CLEAN);
    out->harvest_ns = lap(&mark);
    ok = ok && stage_range(q, out, q->cursor, nr_pfns, true, &out->cursor);
    if (ok && out->cursor == nr_pfns)
        ok = stage_range(q, out, 0, q->cursor, true, &out->cursor);
    if (ok)
        seal(q, out);
    else
        give_back(q, out);
    out->stage_ns = lap(&mark);
    ck_mappings_take_changed(q->mappings, q->pending); /* what changed while the round went on */
    out->remaining = ck_bitmap_count(q->pending);
}
