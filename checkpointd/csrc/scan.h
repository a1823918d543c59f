/*
 * Bitmaps: one bit for each pfn, in u64 words; bit p is bit (p % 64) of word (p / 64).
 * Bits at and above nr_bits in the last word are zero; whoever lets a stranger write a bitmap trims
 * it afterwards.
 */
#ifndef CHECKPOINTD_SCAN_H
#define CHECKPOINTD_SCAN_H

#include <stdbool.h>
#include <stdint.h>

static inline uint64_t ck_bitmap_words(uint64_t nr_bits) { return (nr_bits + 63) / 64; }

static inline bool ck_bit_test(const uint64_t *bitmap, uint64_t bit)
{
    return bitmap[bit / 64] >> (bit % 64) & 1;
}

static inline void ck_bit_set(uint64_t *bitmap, uint64_t bit)
{
    bitmap[bit / 64] |= UINT64_C(1) << (bit % 64);
}

static inline void ck_bit_clear(uint64_t *bitmap, uint64_t bit)
{
    bitmap[bit / 64] &= ~(UINT64_C(1) << (bit % 64));
}

uint64_t ck_bitmap_count(const uint64_t *bitmap, uint64_t nr_bits);
bool ck_bitmap_any(const uint64_t *bitmap, uint64_t nr_bits);

/* Set `count` bits from `first`; they must lie within the bitmap. */
void ck_bitmap_add(uint64_t *bitmap, uint64_t first, uint64_t count);

void ck_bitmap_or(uint64_t *into, const uint64_t *from, uint64_t nr_bits);

/* Clear what lies above nr_bits in the last word. */
void ck_bitmap_trim(uint64_t *bitmap, uint64_t nr_bits);

/* Write the set bits of [first, end) to `bits`, ascending, `max` at most; returns how many. */
uint32_t ck_bitmap_list(const uint64_t *bitmap, uint64_t first, uint64_t end, uint64_t *bits,
                        uint32_t max);

#endif
