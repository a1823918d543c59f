#include "strict.h"
#include "mappings.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "digest.h"

#define EXTENT_WORDS (CK_EXTENT_PAGES / 64) /* words of a bitmap that one extent takes */

static uint64_t nr_extents(uint64_t nr_pfns)
{
    return (nr_pfns + CK_EXTENT_PAGES - 1) / CK_EXTENT_PAGES;
}

static uint32_t extent_pages(const struct ck_mappings *cache, uint32_t extent)
{
    uint64_t rest = cache->nr_pfns - ((uint64_t)extent << CK_EXTENT_SHIFT);

    return rest < CK_EXTENT_PAGES ? (uint32_t)rest : CK_EXTENT_PAGES;
}

int ck_mappings_new(void *table, uint64_t nr_pfns, uint32_t budget_extents,
                    struct ck_mappings **out)
{
    const struct ck_hypervisor *hypervisor = table;
    uint64_t extents = nr_extents(nr_pfns);
    uint64_t bitmap = ck_bitmap_size(nr_pfns);
    uint64_t size = sizeof(struct ck_mappings) + extents * sizeof(struct ck_extent) + 4 * bitmap
                    + extents * sizeof(uint32_t);

    if (hypervisor->abi != CK_HYPERVISOR_ABI || hypervisor->size != sizeof *hypervisor)
        return -EPROTONOSUPPORT;

    /* One zeroed block, present from the start: nothing here may fault in the pause. */
    void *block = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (block == MAP_FAILED)
        return -ENOMEM;

    struct ck_mappings *cache = block;
    cache->extents = (struct ck_extent *)(cache + 1);
    uint8_t *at = (uint8_t *)(cache->extents + extents);
    ck_bitmap_init(&cache->changed, at, nr_pfns);
    ck_bitmap_init(&cache->fresh, at + bitmap, nr_pfns);
    ck_bitmap_init(&cache->populated, at + 2 * bitmap, nr_pfns);
    ck_bitmap_init(&cache->theirs, at + 3 * bitmap, nr_pfns);
    cache->mapped = (uint32_t *)(at + 4 * bitmap);
    cache->hypervisor = hypervisor;
    cache->nr_pfns = nr_pfns;
    cache->budget = budget_extents;
    cache->allocated = size;
    ck_bitmap_fill(&cache->theirs);
    *out = cache;
    return 0;
}

void ck_mappings_free(struct ck_mappings *cache)
{
    if (cache)
        munmap(cache, cache->allocated);
}

static int unmap_extent(struct ck_mappings *cache, uint32_t extent)
{
    struct ck_extent *gone = &cache->extents[extent];
    int rc;

    gone->stale = true;
    gone->stamp = 0;
    rc = cache->hypervisor->unmap(cache->hypervisor->domain, gone->base,
                                  extent_pages(cache, extent));
    if (rc)
        return rc < 0 ? rc : -EPROTO;

    uint32_t last = cache->mapped[--cache->stats.mapped_extents];
    cache->mapped[gone->place] = last;
    cache->extents[last].place = gone->place;
    cache->stats.mapped_pages -= extent_pages(cache, extent);
    gone->base = NULL;
    gone->stale = false;
    return 0;
}

/* The least recently used one. A linear search: it stands beside a system call that changes page
 * tables. */
static int evict(struct ck_mappings *cache)
{
    uint32_t oldest = cache->mapped[0];
    int rc;

    for (uint64_t i = 1; i < cache->stats.mapped_extents; i++)
        if (cache->extents[cache->mapped[i]].stamp < cache->extents[oldest].stamp)
            oldest = cache->mapped[i];
    rc = unmap_extent(cache, oldest);
    if (rc == 0)
        cache->stats.evicted++;
    return rc;
}

static int map_extent(struct ck_mappings *cache, uint32_t extent)
{
    const struct ck_hypervisor *hypervisor = cache->hypervisor;
    struct ck_extent *entry = &cache->extents[extent];
    void *base = NULL;
    int rc;

    while (cache->stats.mapped_extents >= cache->budget)
        if ((rc = evict(cache)) != 0)
            return rc;
    while ((rc = hypervisor->map(hypervisor->domain, (uint64_t)extent << CK_EXTENT_SHIFT,
                                 extent_pages(cache, extent), &base)) == -ENOSPC
           && cache->stats.mapped_extents > 0)
        if ((rc = evict(cache)) != 0)
            return rc;
    if (rc || !base)
        return rc < 0 ? rc : -EPROTO;

    entry->base = base;
    entry->place = (uint32_t)cache->stats.mapped_extents;
    cache->mapped[cache->stats.mapped_extents++] = extent;
    cache->stats.mapped_pages += extent_pages(cache, extent);
    return 0;
}

int ck_mappings_extent(struct ck_mappings *cache, uint64_t pfn, const uint8_t **base)
{
    uint32_t extent = (uint32_t)(pfn >> CK_EXTENT_SHIFT);
    struct ck_extent *entry = &cache->extents[extent];
    int rc;

    if (entry->base && !entry->stale) {
        cache->stats.hits++;
    } else {
        cache->stats.misses++;
        if (entry->base && (rc = unmap_extent(cache, extent)) != 0)
            return rc;
        if ((rc = map_extent(cache, extent)) != 0)
            return rc;
    }
    entry->stamp = ++cache->clock;
    *base = entry->base;
    return 0;
}

/* Unmap every mapped extent that `fresh` touches; with fresh NULL, all of them. */
static int invalidate(struct ck_mappings *cache, const struct ck_bitmap *fresh)
{
    int first_error = 0;

    /* Downwards: unmapping fills the gap with the last one, which has been looked at already. */
    for (uint64_t i = cache->stats.mapped_extents; i-- > 0;) {
        uint32_t extent = cache->mapped[i];
        uint64_t touched = fresh == NULL;
        int rc;

        for (uint32_t w = 0; fresh && w < EXTENT_WORDS; w++)
            touched |= fresh->words[(uint64_t)extent * EXTENT_WORDS + w];
        if (!touched)
            continue;
        cache->stats.invalidated++;
        rc = unmap_extent(cache, extent);
        if (rc && !first_error)
            first_error = rc;
    }
    return first_error;
}

int64_t ck_mappings_refresh(struct ck_mappings *cache)
{
    const struct ck_hypervisor *hypervisor = cache->hypervisor;
    int64_t changes = hypervisor->p2m_changes(hypervisor->domain, &cache->fresh);
    int rc;

    if (changes == 0 || changes == -EAGAIN)
        return changes;
    if (changes < 0)
        ck_bitmap_fill(&cache->fresh);
    ck_bitmap_trim(&cache->fresh);
    rc = invalidate(cache, &cache->fresh);
    ck_bitmap_or(&cache->changed, &cache->fresh);
    ck_bitmap_clear(&cache->fresh);
    return changes > 0 && rc ? rc : changes;
}

void ck_mappings_take_changed(struct ck_mappings *cache, struct ck_bitmap *pending)
{
    ck_bitmap_or(pending, &cache->changed);
    ck_bitmap_clear(&cache->changed);
}

int ck_mappings_invalidate_all(struct ck_mappings *cache) { return invalidate(cache, NULL); }

void ck_mappings_theirs(struct ck_mappings *cache, const uint8_t *digests)
{
    static const uint8_t none[CK_DIGEST_SIZE];

    ck_bitmap_clear(&cache->theirs);
    for (uint64_t pfn = 0; digests && pfn < cache->nr_pfns; pfn++)
        if (memcmp(digests + pfn * CK_DIGEST_SIZE, none, sizeof none) != 0)
            ck_bit_set(&cache->theirs, pfn);
}
