/*
 * Bitmaps: one bit for each pfn, in u64 words; bit p is bit (p % 64) of word (p / 64). Above them, one
 * bit for each block of 64 words, so that what is mostly empty is gone through in no time: of a guest
 * of 64 GiB with nothing dirty, 512 octets are looked at in place of 2 MiB.
 *
 * A block whose bit is not set has no bit set; one whose bit is set may have none. Bits at and above
 * nr_bits are zero; whoever lets a stranger write a bitmap trims it afterwards.
 */
#ifndef CHECKPOINTD_BITMAP_H
#define CHECKPOINTD_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

#define CK_BLOCK_WORDS 64u

struct ck_bitmap {
    uint64_t nr_bits;
    uint64_t *words;  /* whole blocks of them */
    uint64_t *blocks; /* bit b: of words 64 b to 64 b + 63 */
};

static inline uint64_t ck_bitmap_words(uint64_t nr_bits) { return (nr_bits + 63) / 64; }

static inline uint64_t ck_bitmap_blocks(uint64_t nr_bits)
{
    return (ck_bitmap_words(nr_bits) + CK_BLOCK_WORDS - 1) / CK_BLOCK_WORDS;
}

static inline bool ck_bit_test(const struct ck_bitmap *bitmap, uint64_t bit)
{
    return bitmap->words[bit / 64] >> (bit % 64) & 1;
}

static inline void ck_bit_set(struct ck_bitmap *bitmap, uint64_t bit)
{
    uint64_t block = bit / 64 / CK_BLOCK_WORDS;

    bitmap->words[bit / 64] |= UINT64_C(1) << (bit % 64);
    bitmap->blocks[block / 64] |= UINT64_C(1) << (block % 64);
}

static inline void ck_bit_clear(struct ck_bitmap *bitmap, uint64_t bit)
{
    bitmap->words[bit / 64] &= ~(UINT64_C(1) << (bit % 64));
}

/* OR a hypervisor's own plain bitmap of as many bits in, and with `clear` empty that. Returns how many
 * bits it had. What an adapter's harvest() is made of. */
static inline uint64_t ck_bitmap_take(struct ck_bitmap *into, uint64_t *from, bool clear)
{
    uint64_t nr_words = ck_bitmap_words(into->nr_bits), found = 0;

    for (uint64_t block = 0; block * CK_BLOCK_WORDS < nr_words; block++) {
        uint64_t first = block * CK_BLOCK_WORDS, left = nr_words - first, any = 0;
        uint64_t n = left < CK_BLOCK_WORDS ? left : CK_BLOCK_WORDS;

        for (uint64_t i = 0; i < n; i++)
            any |= from[first + i];
        if (!any)
            continue;
        into->blocks[block / 64] |= UINT64_C(1) << (block % 64);
        for (uint64_t i = first; i < first + n; i++) {
            found += (uint64_t)__builtin_popcountll(from[i]);
            into->words[i] |= from[i];
            if (clear)
                from[i] = 0;
        }
    }
    return found;
}

static inline void ck_bitmap_fill(struct ck_bitmap *bitmap)
{
    uint64_t whole = bitmap->nr_bits / 64;

    for (uint64_t i = 0; i < whole; i++)
        bitmap->words[i] = UINT64_MAX;
    if (bitmap->nr_bits % 64)
        bitmap->words[whole] = (UINT64_C(1) << bitmap->nr_bits % 64) - 1;
    for (uint64_t block = 0; block < ck_bitmap_blocks(bitmap->nr_bits); block++)
        bitmap->blocks[block / 64] |= UINT64_C(1) << (block % 64);
}

/* Lay one out over zeroed memory of ck_bitmap_size() octets, aligned to 8. */
uint64_t ck_bitmap_size(uint64_t nr_bits);
void ck_bitmap_init(struct ck_bitmap *bitmap, void *memory, uint64_t nr_bits);

/* These two also find which blocks are empty, so that the next one need not look there. */
uint64_t ck_bitmap_count(struct ck_bitmap *bitmap);
bool ck_bitmap_any(struct ck_bitmap *bitmap);

/* Set `count` bits from `first`; they must lie within the bitmap. */
void ck_bitmap_add(struct ck_bitmap *bitmap, uint64_t first, uint64_t count);
void ck_bitmap_clear(struct ck_bitmap *bitmap);

/* Of as many bits. */
void ck_bitmap_or(struct ck_bitmap *into, const struct ck_bitmap *from);

/* The words have been written by others: clear what lies above nr_bits, and look at all of it. */
void ck_bitmap_loaded(struct ck_bitmap *bitmap);

/* Clear what lies above nr_bits. */
void ck_bitmap_trim(struct ck_bitmap *bitmap);

/* The first block from `block` on that may have a bit set; ck_bitmap_blocks() if there is none. */
uint64_t ck_bitmap_next_block(const struct ck_bitmap *bitmap, uint64_t block);

/* Write the set bits of [first, end) to `bits`, ascending, `max` at most; returns how many. */
uint32_t ck_bitmap_list(const struct ck_bitmap *bitmap, uint64_t first, uint64_t end,
                        uint64_t *bits, uint32_t max);

/* The same of one word, whose lowest bit is bit 0: of its bits [first, end), end at most 64. */
uint32_t ck_word_list(uint64_t word, uint64_t first, uint64_t end, uint64_t base, uint64_t *bits,
                      uint32_t max);

#endif
