#include "strict.h"
#include "mappings.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "digest.h"
#include "scan.h"

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
    uint64_t words = extents * EXTENT_WORDS; /* the last extent's too: invalidate() reads all 8 */
    uint64_t size = sizeof(struct ck_mappings) + extents * sizeof(struct ck_extent)
                    + 4 * words * sizeof(uint64_t) + extents * sizeof(uint32_t);

    if (hypervisor->abi != CK_HYPERVISOR_ABI || hypervisor->size != sizeof *hypervisor)
        return -EPROTONOSUPPORT;

    /* One zeroed block, present from the start: nothing here may fault in the pause. */
    void *block = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (block == MAP_FAILED)
        return -ENOMEM;

    struct ck_mappings *cache = block;
    cache->extents = (struct ck_extent *)(cache + 1);
    cache->changed = (uint64_t *)(cache->extents + extents);
    cache->fresh = cache->changed + words;
    cache->populated = cache->fresh + words;
    cache->theirs = cache->populated + words;
    cache->mapped = (uint32_t *)(cache->theirs + words);
    cache->hypervisor = hypervisor;
    cache->nr_pfns = nr_pfns;
    cache->budget = budget_extents;
    cache->allocated = size;
    ck_bitmap_add(cache->theirs, 0, nr_pfns);
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
static int invalidate(struct ck_mappings *cache, const uint64_t *fresh)
{
    int first_error = 0;

    /* Downwards: unmapping fills the gap with the last one, which has been looked at already. */
    for (uint64_t i = cache->stats.mapped_extents; i-- > 0;) {
        uint32_t extent = cache->mapped[i];
        uint64_t touched = fresh == NULL;
        int rc;

        for (uint32_t w = 0; fresh && w < EXTENT_WORDS; w++)
            touched |= fresh[(uint64_t)extent * EXTENT_WORDS + w];
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
    uint64_t nr_pfns = cache->nr_pfns;
    int64_t changes = hypervisor->p2m_changes(hypervisor->domain, cache->fresh, nr_pfns);
    int rc;

    if (changes == 0 || changes == -EAGAIN)
        return changes;
    if (changes < 0)
        ck_bitmap_add(cache->fresh, 0, nr_pfns);
    ck_bitmap_trim(cache->fresh, nr_pfns);
    rc = invalidate(cache, cache->fresh);
    ck_bitmap_or(cache->changed, cache->fresh, nr_pfns);
    cache->any_changed = true;
    memset(cache->fresh, 0, ck_bitmap_words(nr_pfns) * sizeof(uint64_t));
    return changes > 0 && rc ? rc : changes;
}

void ck_mappings_take_changed(struct ck_mappings *cache, uint64_t *pending)
{
    if (!cache->any_changed)
        return; /* as nearly always: not worth two passes over the bitmap in each pause */
    cache->any_changed = false;
    ck_bitmap_or(pending, cache->changed, cache->nr_pfns);
    memset(cache->changed, 0, ck_bitmap_words(cache->nr_pfns) * sizeof(uint64_t));
}

int ck_mappings_invalidate_all(struct ck_mappings *cache) { return invalidate(cache, NULL); }

void ck_mappings_theirs(struct ck_mappings *cache, const uint8_t *digests)
{
    static const uint8_t none[CK_DIGEST_SIZE];

    memset(cache->theirs, 0, ck_bitmap_words(cache->nr_pfns) * sizeof(uint64_t));
    for (uint64_t pfn = 0; digests && pfn < cache->nr_pfns; pfn++)
        if (memcmp(digests + pfn * CK_DIGEST_SIZE, none, sizeof none) != 0)
            ck_bit_set(cache->theirs, pfn);
}
