#include "strict.h"
#include "bitmap.h"

#include <string.h>

#include "kernel.h"

#define BLOCK_SIZE (CK_BLOCK_WORDS * sizeof(uint64_t))

static uint64_t nr_blocks(const struct ck_bitmap *b) { return ck_bitmap_blocks(b->nr_bits); }

static uint64_t *block_words(const struct ck_bitmap *b, uint64_t block)
{
    return b->words + block * CK_BLOCK_WORDS;
}

static void set_block(struct ck_bitmap *b, uint64_t block)
{
    b->blocks[block / 64] |= UINT64_C(1) << (block % 64);
}

static void clear_block(struct ck_bitmap *b, uint64_t block)
{
    b->blocks[block / 64] &= ~(UINT64_C(1) << (block % 64));
}

uint64_t ck_bitmap_next_block(const struct ck_bitmap *b, uint64_t block)
{
    uint64_t n = nr_blocks(b);

    while (block < n) {
        uint64_t rest = b->blocks[block / 64] >> (block % 64);

        if (rest)
            return block + (uint64_t)__builtin_ctzll(rest);
        block = (block / 64 + 1) * 64;
    }
    return n;
}

#define each_block(b, block)                                                                       \
    (uint64_t block = ck_bitmap_next_block(b, 0); block < nr_blocks(b);                            \
     block = ck_bitmap_next_block(b, block + 1))

uint64_t ck_bitmap_size(uint64_t nr_bits)
{
    uint64_t blocks = ck_bitmap_blocks(nr_bits);

    return blocks * BLOCK_SIZE + ck_bitmap_words(blocks) * sizeof(uint64_t);
}

void ck_bitmap_init(struct ck_bitmap *b, void *memory, uint64_t nr_bits)
{
    b->nr_bits = nr_bits;
    b->words = memory;
    b->blocks = b->words + ck_bitmap_blocks(nr_bits) * CK_BLOCK_WORDS;
}

uint64_t ck_bitmap_count(struct ck_bitmap *b)
{
    uint64_t count = 0;

    for each_block(b, block) {
        uint64_t here = ck_kernel->count(block_words(b, block), CK_BLOCK_WORDS);

        if (!here)
            clear_block(b, block);
        count += here;
    }
    return count;
}

bool ck_bitmap_any(struct ck_bitmap *b)
{
    for each_block(b, block) {
        const uint64_t *words = block_words(b, block);
        uint64_t any = 0;

        for (uint32_t i = 0; i < CK_BLOCK_WORDS; i++)
            any |= words[i];
        if (any)
            return true;
        clear_block(b, block);
    }
    return false;
}

void ck_bitmap_add(struct ck_bitmap *b, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t shift = first % 64, room = 64 - shift;
        uint64_t here = count < room ? count : room;

        /* `here` ones; a shift by 64 is undefined, and here >= 1 makes 64 - here the safe way
         * round. */
        b->words[first / 64] |= UINT64_MAX >> (64 - here) << shift;
        set_block(b, first / 64 / CK_BLOCK_WORDS);
        first += here;
        count -= here;
    }
}

void ck_bitmap_clear(struct ck_bitmap *b)
{
    for each_block(b, block) {
        memset(block_words(b, block), 0, BLOCK_SIZE);
        clear_block(b, block);
    }
}

void ck_bitmap_or(struct ck_bitmap *into, const struct ck_bitmap *from)
{
    for each_block(from, block) {
        const uint64_t *source = block_words(from, block);
        uint64_t *words = block_words(into, block);

        for (uint32_t i = 0; i < CK_BLOCK_WORDS; i++)
            words[i] |= source[i];
        set_block(into, block);
    }
}

void ck_bitmap_trim(struct ck_bitmap *b)
{
    if (b->nr_bits % 64)
        b->words[b->nr_bits / 64] &= UINT64_MAX >> (64 - b->nr_bits % 64);
}

void ck_bitmap_loaded(struct ck_bitmap *b)
{
    for (uint64_t block = 0; block < nr_blocks(b); block++)
        set_block(b, block);
    ck_bitmap_trim(b);
    ck_bitmap_count(b);
}

uint32_t ck_word_list(uint64_t word, uint64_t first, uint64_t end, uint64_t base, uint64_t *bits,
                      uint32_t max)
{
    uint32_t found = 0;

    word &= UINT64_MAX << first;
    if (end < 64)
        word &= ~(UINT64_MAX << end);
    for (; word && found < max; word &= word - 1)
        bits[found++] = base + (uint64_t)__builtin_ctzll(word);
    return found;
}

uint32_t ck_bitmap_list(const struct ck_bitmap *b, uint64_t first, uint64_t end, uint64_t *bits,
                        uint32_t max)
{
    uint32_t found = 0;

    for (uint64_t i = first / 64; i * 64 < end && found < max; i++) {
        if (i % CK_BLOCK_WORDS == 0 || i == first / 64) {
            uint64_t block = ck_bitmap_next_block(b, i / CK_BLOCK_WORDS);

            if (block != i / CK_BLOCK_WORDS) {
                i = block * CK_BLOCK_WORDS - 1;
                continue;
            }
        }
        if (b->words[i])
            found += ck_word_list(b->words[i], i == first / 64 ? first % 64 : 0,
                                  end - i * 64 < 64 ? end - i * 64 : 64, i * 64, bits + found,
                                  max - found);
    }
    return found;
}
