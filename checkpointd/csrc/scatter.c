#include "strict.h"
#include "scatter.h"

#include <stdbool.h>
#include <string.h>

#include "arena.h"
#include "hypervisor.h"
#include "kernel.h"

static bool has_none(uint64_t word)
{
    return word >> CK_TYPE_SHIFT == CK_TYPE_BROKEN || word >> CK_TYPE_SHIFT == CK_TYPE_XTAB;
}

static enum ck_fault check_word(uint64_t word, uint64_t nr_pfns)
{
    if (word << 4 >> 4 & ~CK_PFN_MASK)
        return CK_FAULT_WORD;
    if (!ck_word_has_data(word) && !has_none(word))
        return CK_FAULT_KIND;
    return (word & CK_PFN_MASK) < nr_pfns ? CK_FAULT_NONE : CK_FAULT_PFN;
}

enum ck_fault ck_head_check(const uint8_t *head, uint64_t length, const uint8_t *words,
                            uint64_t nr_pfns, uint64_t *at)
{
    uint32_t fields[4]; /* type, length, count, reserved */
    uint64_t data = 0;
    enum ck_fault fault;

    *at = 0;
    if (length < CK_RECORD_HEAD)
        return CK_FAULT_SHORT;
    memcpy(fields, head, sizeof fields);
    if (fields[0] != CK_RECORD_PAGE_DATA)
        return CK_FAULT_TYPE;
    if (fields[1] != length - 8)
        return CK_FAULT_LENGTH;
    if (fields[3] != 0)
        return CK_FAULT_RESERVED;
    if (fields[2] == 0 || fields[2] > (length - CK_RECORD_HEAD) / sizeof(uint64_t))
        return CK_FAULT_COUNT;
    for (; *at < fields[2]; ++*at) {
        uint64_t word = ck_word_at(words, *at);

        if ((fault = check_word(word, nr_pfns)) != CK_FAULT_NONE)
            return fault;
        data += ck_word_has_data(word);
    }
    if (length != CK_RECORD_HEAD + fields[2] * sizeof(uint64_t) + data * CK_PAGE_SIZE)
        return CK_FAULT_DATA;
    return CK_FAULT_NONE;
}

enum ck_fault ck_record_check(const uint8_t *record, uint64_t length, uint64_t nr_pfns,
                              uint64_t *at)
{
    *at = 0;
    if (length < CK_RECORD_HEAD)
        return CK_FAULT_SHORT;
    return ck_head_check(record, length, record + CK_RECORD_HEAD, nr_pfns, at);
}

enum ck_fault ck_words_check(const uint8_t *words, uint64_t count, int with_data, uint64_t nr_pfns,
                             uint64_t *at)
{
    enum ck_fault fault;

    for (*at = 0; *at < count; ++*at) {
        uint64_t word = ck_word_at(words, *at);

        if ((fault = check_word(word, nr_pfns)) != CK_FAULT_NONE)
            return fault;
        if (ck_word_has_data(word) != (with_data != 0))
            return CK_FAULT_KIND;
    }
    return CK_FAULT_NONE;
}

void ck_mark(struct ck_bitmap *pfns, const uint8_t *words, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        ck_bit_set(pfns, ck_word_at(words, i) & CK_PFN_MASK);
}

void ck_mark_extents(struct ck_bitmap *missing, const struct ck_bitmap *reserved,
                     const uint8_t *words, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t word = ck_word_at(words, i), extent = (word & CK_PFN_MASK) >> CK_EXTENT_SHIFT;

        if (ck_word_has_data(word) && !ck_bit_test(reserved, extent))
            ck_bit_set(missing, extent);
    }
}

/* Memory of a page that is not populated is zero already, and touching it would take a frame for
 * nothing. */
static void zero_page(uint8_t *image, const struct ck_bitmap *populated, uint64_t pfn)
{
    if (ck_bit_test(populated, pfn))
        memset(image + pfn * CK_PAGE_SIZE, 0, CK_PAGE_SIZE);
}

void ck_scatter(uint8_t *image, struct ck_bitmap *populated, const uint8_t *record)
{
    uint32_t count;
    const uint8_t *words = record + CK_RECORD_HEAD, *data;

    memcpy(&count, record + 8, sizeof count);
    data = words + count * sizeof(uint64_t);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t word = ck_word_at(words, i), pfn = word & CK_PFN_MASK;

        if (ck_word_has_data(word)) {
            ck_kernel->copy_page(image + pfn * CK_PAGE_SIZE, data);
            ck_bit_set(populated, pfn);
            data += CK_PAGE_SIZE;
        } else {
            zero_page(image, populated, pfn);
            ck_bit_clear(populated, pfn);
        }
    }
    ck_kernel->copied();
}

void ck_zero_pages(uint8_t *image, struct ck_bitmap *populated, const uint8_t *words, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t pfn = ck_word_at(words, i) & CK_PFN_MASK;

        zero_page(image, populated, pfn);
        ck_bit_set(populated, pfn);
    }
}

void ck_drop_pages(uint8_t *image, struct ck_bitmap *populated, const uint8_t *words, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t pfn = ck_word_at(words, i) & CK_PFN_MASK;

        zero_page(image, populated, pfn);
        ck_bit_clear(populated, pfn);
    }
}

void ck_merge(uint8_t *image, const uint8_t *overlay, const struct ck_bitmap *overlaid,
              struct ck_bitmap *populated)
{
    for (uint64_t i = 0; i < ck_bitmap_words(overlaid->nr_bits); i++)
        for (uint64_t bits = overlaid->words[i]; bits; bits &= bits - 1) {
            uint64_t at = (i * 64 + (uint64_t)__builtin_ctzll(bits)) * CK_PAGE_SIZE;

            ck_kernel->copy_page(image + at, overlay + at);
        }
    ck_kernel->copied();
    ck_bitmap_or(populated, overlaid);
}
