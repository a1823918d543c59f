/*
 * Pages as their changes (docs/wire-protocol.md, section 6): a PAGE_DATA record becomes a shorter body, and
 * that, with the pages that the standby holds, the record again.
 *
 *   the record's head and pfn words | one bit for each pfn: it travels as changes | for each pfn with data
 *   either the page, or its changes:
 *      u64, bit l: line l (64 octets) has changed | for each such line: u8, bit w: word w (8 octets) has
 *      changed | those words
 */
#ifndef CHECKPOINTD_DELTA_H
#define CHECKPOINTD_DELTA_H

#include <stdint.h>

#include "bitmap.h"
#include "history.h"
#include "kernel.h"
#include "scatter.h"

/* Octets of a body at most, for a record of so many: each page whole, and a bit for each word. */
static inline uint64_t ck_body_size(uint64_t length) { return length + length / 64 + 1; }

struct ck_reduction {
    uint64_t seen;    /* pages with data that were looked at */
    uint64_t changes; /* of them, those that travel as changes */
    uint64_t octets;  /* that the pages looked at take */
};

/*
 * Writes the body of a record that ck_arena_seal() made to `out` (ck_body_size() octets), returns its
 * length; the history then has the pages as they are in the record. With `out` NULL it writes nothing
 * and returns 0, with all else the same.
 *
 * `every`, a power of two: only one set of so many is looked at, the pfns of others are forgotten, which tells
 * at a small part of the cost what it would be to look at all; `out` is NULL then.
 */
uint64_t ck_reduce(struct ck_history *history, const uint8_t *record, uint32_t every, uint8_t *out,
                   struct ck_reduction *result);

/* Where the standby has the pages: pfn p at octet p * 4096 of the overlay if it is in `overlaid`, else of
 * the image if it is in `populated`. */
struct ck_held {
    const uint8_t *image;
    const struct ck_bitmap *populated;
    const uint8_t *overlay; /* NULL: there is none */
    const struct ck_bitmap *overlaid;
};

/*
 * Makes the record of `out_length` octets again. Reads `length` octets of `body` and writes `out_length` of
 * `out` at most, whatever the body holds; `at` is the index of the pfn word at fault. After CK_FAULT_NONE
 * the record passes ck_record_check().
 */
enum ck_fault ck_expand(const struct ck_held *held, uint64_t nr_pfns, const uint8_t *body,
                        uint64_t length, uint8_t *out, uint64_t out_length, uint64_t *at);

#endif
