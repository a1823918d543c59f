#include "strict.h"
#include "arena.h"

#include <string.h>

#include "kernel.h"

#define WORDS_SIZE (CK_SLOT_PAGES * sizeof(uint64_t))

static uint64_t whole_pages(uint64_t octets)
{
    return (octets + CK_PAGE_SIZE - 1) / CK_PAGE_SIZE * CK_PAGE_SIZE;
}

static uint64_t nr_slots(uint64_t pages) { return (pages + CK_SLOT_PAGES - 1) / CK_SLOT_PAGES; }

static uint8_t *slot_data(const struct ck_arena *arena, uint64_t slot)
{
    return arena->slots + slot * CK_SLOT_SIZE + CK_PAGE_SIZE;
}

uint64_t ck_arena_size(uint64_t pages, uint64_t context_bytes, uint32_t audit_pages)
{
    return nr_slots(pages) * CK_SLOT_SIZE + 2 * whole_pages(pages * sizeof(uint64_t))
           + whole_pages(context_bytes) + whole_pages(audit_pages * sizeof(struct ck_audit));
}

void ck_arena_init(struct ck_arena *arena, void *memory, uint64_t pages, uint64_t context_bytes,
                   uint32_t audit_pages)
{
    uint64_t words = whole_pages(pages * sizeof(uint64_t));
    uint8_t *at = memory;

    memset(memory, 0, ck_arena_size(pages, context_bytes, audit_pages));
    memset(arena, 0, sizeof *arena);
    arena->capacity = pages;
    arena->context_capacity = context_bytes;
    arena->audit_capacity = audit_pages;
    arena->slots = at;
    at += nr_slots(pages) * CK_SLOT_SIZE;
    arena->zero = (uint64_t *)at;
    at += words;
    arena->gone = (uint64_t *)at;
    at += words;
    arena->context = at;
    at += whole_pages(context_bytes);
    arena->audit = (struct ck_audit *)at;
}

void ck_arena_empty(struct ck_arena *arena)
{
    arena->pages = arena->zeros = arena->nr_gone = arena->context_length = 0;
    arena->audited = 0;
}

void ck_arena_put(struct ck_arena *arena, uint64_t word, const uint8_t *page)
{
    uint8_t *data = slot_data(arena, arena->pages / CK_SLOT_PAGES);
    uint64_t at = arena->pages % CK_SLOT_PAGES;

    /* As if the slot were to become full; seal moves the words of the one that does not. */
    memcpy(data - WORDS_SIZE + at * sizeof word, &word, sizeof word);
    ck_kernel->copy_page(data + at * CK_PAGE_SIZE, page);
    arena->pages++;
}

static uint32_t slot_count(const struct ck_arena *arena, uint64_t slot)
{
    uint64_t rest = arena->pages - slot * CK_SLOT_PAGES;

    return rest < CK_SLOT_PAGES ? (uint32_t)rest : CK_SLOT_PAGES;
}

void ck_arena_seal(struct ck_arena *arena)
{
    for (uint64_t slot = 0; slot < nr_slots(arena->pages); slot++) {
        uint8_t *data = slot_data(arena, slot);
        uint32_t count = slot_count(arena, slot);
        uint32_t words = count * (uint32_t)sizeof(uint64_t);
        uint32_t head[4] = {CK_RECORD_PAGE_DATA, 8 + words + count * CK_PAGE_SIZE, count, 0};

        if (count < CK_SLOT_PAGES)
            memmove(data - words, data - WORDS_SIZE, words);
        memcpy(data - words - CK_RECORD_HEAD, head, sizeof head);
    }
    ck_kernel->copied();
}

const uint8_t *ck_arena_record(const struct ck_arena *arena, uint64_t i, uint64_t *length)
{
    uint64_t count = slot_count(arena, i);
    uint64_t head = CK_RECORD_HEAD + count * sizeof(uint64_t);

    *length = head + count * CK_PAGE_SIZE;
    return slot_data(arena, i) - head;
}
