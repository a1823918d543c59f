/*
 * The mapping cache: guest memory is mapped in whole extents, once, and kept mapped from epoch to
 * epoch, since mapping costs far more than copying. It is bounded (a mapping may cost the host a
 * page frame a page) and it keeps invariant 8, "a page is never read through a mapping that no
 * longer shows that page", by this order:
 *
 *   1. ck_mappings_refresh() learns which pfns have other frames behind them, and unmaps every
 *      extent that has one, before
 *   2. types() says which pages have anything behind them, before
 *   3. ck_mappings_extent() gives an address, valid until the next call of a function here.
 *
 * While the guest runs its frames may change between 1 and 3: live rounds refresh once more after 3
 * and leave alone any extent that is no longer valid.
 *
 * Not thread safe: the caller serialises. Nothing here allocates after ck_mappings_new().
 */
#ifndef CHECKPOINTD_MAPPINGS_H
#define CHECKPOINTD_MAPPINGS_H

#include <stdbool.h>
#include <stdint.h>

#include "hypervisor.h"

struct ck_extent {
    void *base;     /* NULL: not mapped */
    uint64_t stamp; /* of its last use, by the cache's clock; stale: 0, to be evicted first */
    uint32_t place; /* in mapped[] */
    bool stale;     /* mapped still, but not to be read: it is unmapped before any other use */
};

struct ck_mappings_stats {
    uint64_t hits, misses, evicted, invalidated; /* extents, since ck_mappings_new() */
    uint64_t mapped_extents, mapped_pages; /* now */
};

struct ck_mappings {
    const struct ck_hypervisor *hypervisor;
    uint64_t nr_pfns;
    uint64_t clock;
    uint32_t budget;          /* extents, at least 1 */
    uint32_t *mapped;         /* which are mapped, stats.mapped_extents of them, in no order */
    struct ck_extent *extents;
    struct ck_bitmap changed;   /* got other frames since ck_mappings_take_changed() */
    struct ck_bitmap fresh;     /* scratch of refresh, empty outside of it */
    struct ck_bitmap populated; /* had memory behind them when last staged */
    struct ck_bitmap theirs;    /* the other side may have a page here; at first it may have any */
    struct ck_mappings_stats stats;
    uint64_t allocated;       /* octets, of this struct and all arrays */
};

/* For `table`, a struct ck_hypervisor that outlives the cache. 0, -EPROTONOSUPPORT (another ABI),
 * -ENOMEM. */
int ck_mappings_new(void *table, uint64_t nr_pfns, uint32_t budget_extents,
                    struct ck_mappings **out);

/* Frees the memory only; unmap first, with ck_mappings_invalidate_all(). NULL is allowed. */
void ck_mappings_free(struct ck_mappings *cache);

/* Where the extent that contains `pfn` is mapped; maps it, evicting others as needed. 0 or negative
 * errno. */
int ck_mappings_extent(struct ck_mappings *cache, uint64_t pfn, const uint8_t **base);

/* The same for a hint: NULL if it is not mapped; neither maps nor counts. */
static inline const uint8_t *ck_mappings_peek(const struct ck_mappings *cache, uint64_t pfn)
{
    return cache->extents[pfn >> CK_EXTENT_SHIFT].base;
}

/* Ask which pfns have changed frames, unmap their extents, remember the pfns in `changed`. Returns
 * how many, or a negative errno; after any but -EAGAIN nothing is known any more, so every extent
 * is stale and every pfn is in `changed`. An extent that cannot be unmapped stays stale, and its
 * error is returned. */
int64_t ck_mappings_refresh(struct ck_mappings *cache);

/* OR what changed into the dirty set and forget it here. */
void ck_mappings_take_changed(struct ck_mappings *cache, struct ck_bitmap *pending);

/* The other side has just the pages with a digest that is not zero (CK_DIGEST_SIZE octets a pfn; NULL:
 * none). A hole need not be told for a page that it never had: most of a PVH guest's p2m is one. */
void ck_mappings_theirs(struct ck_mappings *cache, const uint8_t *digests);

/* Unmap everything. 0, or the first error; what could not be unmapped stays stale. */
int ck_mappings_invalidate_all(struct ck_mappings *cache);

#endif
