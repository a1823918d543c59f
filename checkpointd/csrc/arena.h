/*
 * An arena: the memory one epoch (or one live round) is staged into, all of it allocated and
 * touched at start.
 *
 *   slot 0 | slot 1 | ... | zero words | gone words | context | audit
 *
 * A slot is one page for the head and 256 pages for data. The head of a PAGE_DATA record (type,
 * length, count, a reserved u32, and one u64 word for each page) is written to end where the data
 * begins, so the data is page aligned, the head is right before it, and together they are the
 * record, ready to be sent:
 *
 *   |....head|page|page|page|...|     u32 1, u32 length, u32 count, u32 0, u64 words[count], pages
 *
 * Its length is a multiple of 8, so it needs no padding. Every slot but the last one in use is
 * full.
 */
#ifndef CHECKPOINTD_ARENA_H
#define CHECKPOINTD_ARENA_H

#include <stdint.h>

#include "hypervisor.h"
#include "digest.h"

/* 256 pages: a record is one wire frame of about 1 MiB, large enough that the cost of a message
 * does not count and small enough that the receiver's buffers and a retry stay small. */
#define CK_SLOT_PAGES 256u
#define CK_SLOT_SIZE ((1 + CK_SLOT_PAGES) * (uint64_t)CK_PAGE_SIZE)

#define CK_RECORD_PAGE_DATA 1u /* type of the record (libxc stream, section PAGE_DATA) */
#define CK_RECORD_HEAD 16u     /* octets before the pfn words: type, length, count, reserved */

struct ck_audit {
    uint64_t pfn;
    uint8_t digest[CK_DIGEST_SIZE];
};

struct ck_arena {
    uint8_t *slots;
    uint64_t *zero;  /* pfn words of pages that are all zero */
    uint64_t *gone;  /* pfn words of pfns with nothing behind them */
    uint8_t *context;
    struct ck_audit *audit;
    uint64_t capacity; /* of pages, and of each of zero and gone */
    uint64_t context_capacity;
    uint32_t audit_capacity;

    /* What the last stage put in. */
    uint32_t audited;
    uint64_t pages, zeros, nr_gone, context_length;
};

/* Octets of memory that an arena of this shape needs. */
uint64_t ck_arena_size(uint64_t pages, uint64_t context_bytes, uint32_t audit_pages);

/* Lay it out over `memory` (page aligned, ck_arena_size() octets) and touch all of that. */
void ck_arena_init(struct ck_arena *arena, void *memory, uint64_t pages, uint64_t context_bytes,
                   uint32_t audit_pages);

void ck_arena_empty(struct ck_arena *arena);

/* Copy one page in, under its PAGE_DATA word. There must be room. */
void ck_arena_put(struct ck_arena *arena, uint64_t word, const uint8_t *page);

/* After the last ck_arena_put(): write the heads. */
void ck_arena_seal(struct ck_arena *arena);

/* The i-th record: where it is and how long. Valid once sealed, for i < ceil(pages / 256). */
const uint8_t *ck_arena_record(const struct ck_arena *arena, uint64_t i, uint64_t *length);

#endif
