#include "strict.h"
#include "scan.h"

#include "kernel.h"

uint64_t ck_bitmap_count(const uint64_t *bitmap, uint64_t nr_bits)
{
    return ck_kernel->count(bitmap, ck_bitmap_words(nr_bits));
}

bool ck_bitmap_any(const uint64_t *bitmap, uint64_t nr_bits)
{
    for (uint64_t i = 0; i < ck_bitmap_words(nr_bits); i++)
        if (bitmap[i])
            return true;
    return false;
}

void ck_bitmap_add(uint64_t *bitmap, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t shift = first % 64, room = 64 - shift;
        uint64_t here = count < room ? count : room;

        /* `here` ones; a shift by 64 is undefined, and here >= 1 makes 64 - here the safe way
         * round. */
        bitmap[first / 64] |= UINT64_MAX >> (64 - here) << shift;
        first += here;
        count -= here;
    }
}

void ck_bitmap_or(uint64_t *into, const uint64_t *from, uint64_t nr_bits)
{
    for (uint64_t i = 0; i < ck_bitmap_words(nr_bits); i++)
        into[i] |= from[i];
}

void ck_bitmap_trim(uint64_t *bitmap, uint64_t nr_bits)
{
    if (nr_bits % 64)
        bitmap[nr_bits / 64] &= UINT64_MAX >> (64 - nr_bits % 64);
}

uint32_t ck_bitmap_list(const uint64_t *bitmap, uint64_t first, uint64_t end, uint64_t *bits,
                        uint32_t max)
{
    uint32_t found = 0;

    if (first >= end || max == 0)
        return 0;
    for (uint64_t i = first / 64; i <= (end - 1) / 64; i++) {
        uint64_t word = bitmap[i];

        if (i == first / 64)
            word &= UINT64_MAX << (first % 64);
        if (i == (end - 1) / 64)
            word &= UINT64_MAX >> (63 - (end - 1) % 64);
        for (; word; word &= word - 1) {
            bits[found++] = i * 64 + (uint64_t)__builtin_ctzll(word);
            if (found == max)
                return found;
        }
    }
    return found;
}
