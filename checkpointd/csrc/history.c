#include "strict.h"
#include "history.h"

#include <stddef.h>
#include <string.h>

#include "hypervisor.h"
#include "scatter.h"

#define AGE_NEW 2u
#define AGE_MAX 3u

#define NONE UINT64_MAX

uint64_t ck_history_size(uint64_t nr_sets)
{
    return nr_sets * CK_HISTORY_WAYS * (CK_PAGE_SIZE + sizeof(uint64_t) + 1);
}

void ck_history_init(struct ck_history *h, void *memory, uint64_t nr_sets)
{
    uint64_t slots = nr_sets * CK_HISTORY_WAYS;

    h->nr_sets = nr_sets;
    h->pages = memory;
    h->tags = (uint64_t *)(h->pages + slots * CK_PAGE_SIZE);
    h->ages = (uint8_t *)(h->tags + slots);
}

static uint64_t first_of(const struct ck_history *h, uint64_t pfn)
{
    return pfn % h->nr_sets * CK_HISTORY_WAYS;
}

static uint64_t slot_of(const struct ck_history *h, uint64_t pfn)
{
    uint64_t first = first_of(h, pfn);

    for (uint64_t slot = first; slot < first + CK_HISTORY_WAYS; slot++)
        if (h->tags[slot] == pfn + 1)
            return slot;
    return NONE;
}

uint8_t *ck_history_find(struct ck_history *h, uint64_t pfn)
{
    uint64_t slot = slot_of(h, pfn);

    if (slot == NONE)
        return NULL;
    h->ages[slot] = 0;
    return h->pages + slot * CK_PAGE_SIZE;
}

/* The set has no empty slot. */
static uint64_t oldest(struct ck_history *h, uint64_t first)
{
    for (;;) {
        for (uint64_t slot = first; slot < first + CK_HISTORY_WAYS; slot++)
            if (h->ages[slot] == AGE_MAX)
                return slot;
        for (uint64_t slot = first; slot < first + CK_HISTORY_WAYS; slot++)
            h->ages[slot]++;
    }
}

uint8_t *ck_history_add(struct ck_history *h, uint64_t pfn)
{
    uint64_t first = first_of(h, pfn), slot;

    for (slot = first; slot < first + CK_HISTORY_WAYS; slot++)
        if (!h->tags[slot])
            break;
    if (slot == first + CK_HISTORY_WAYS)
        slot = oldest(h, first);
    h->tags[slot] = pfn + 1;
    h->ages[slot] = AGE_NEW;
    return h->pages + slot * CK_PAGE_SIZE;
}

void ck_history_forget(struct ck_history *h, uint64_t pfn)
{
    uint64_t slot = slot_of(h, pfn);

    if (slot != NONE)
        h->tags[slot] = 0;
}

void ck_history_forget_words(struct ck_history *h, const uint8_t *words, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        ck_history_forget(h, ck_word_at(words, i) & CK_PFN_MASK);
}

void ck_history_clear(struct ck_history *h)
{
    memset(h->tags, 0, h->nr_sets * CK_HISTORY_WAYS * sizeof *h->tags);
}
