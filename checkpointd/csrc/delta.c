#include "strict.h"
#include "delta.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "arena.h"
#include "hypervisor.h"

#define WORD sizeof(uint64_t)

/* Whole sets of the history are looked at, or not: those that are have as many pages to keep as they would have if
 * all were. Fibonacci hashing: neighbours fall on different sides of any `every`, and set 0 is always in. */
static bool looked_at(const struct ck_history *history, uint64_t pfn, uint32_t every)
{
    return (pfn % history->nr_sets * UINT64_C(0x9e3779b97f4a7c15) >> 32) % every == 0;
}

/* One page; returns how many octets it takes at `out`, and whether they are its changes. */
static uint64_t reduce_page(struct ck_history *history, uint64_t pfn, const uint8_t *page,
                            uint8_t *out, bool *changes)
{
    uint8_t *held = ck_history_find(history, pfn), scratch[CK_CHANGES_ROOM];
    uint64_t length;

    *changes = false;
    if (held) {
        length = ck_kernel->changes(held, page, out ? out : scratch);
        if (length) {
            *changes = true;
            return length;
        }
    } else {
        held = ck_history_add(history, pfn);
    }
    ck_kernel->copy_page(held, page);
    if (out)
        memcpy(out, page, CK_PAGE_SIZE);
    return CK_PAGE_SIZE;
}

uint64_t ck_reduce(struct ck_history *history, const uint8_t *record, uint32_t every, uint8_t *out,
                   struct ck_reduction *result)
{
    const uint8_t *words = record + CK_RECORD_HEAD, *page;
    uint8_t *bits = NULL, *to = NULL;
    uint32_t count;
    uint64_t head;

    memcpy(&count, record + 8, sizeof count);
    head = CK_RECORD_HEAD + count * WORD;
    page = record + head;
    *result = (struct ck_reduction){0};
    if (out) {
        memcpy(out, record, head);
        bits = out + head;
        to = bits + (count + 7) / 8;
        memset(bits, 0, (count + 7) / 8);
    }
    for (uint32_t i = 0; i < count; i++) {
        uint64_t word = ck_word_at(words, i), pfn = word & CK_PFN_MASK, octets;
        bool changes;

        if (!ck_word_has_data(word) || !looked_at(history, pfn, every)) {
            ck_history_forget(history, pfn);
            page += ck_word_has_data(word) ? CK_PAGE_SIZE : 0;
            continue;
        }
        octets = reduce_page(history, pfn, page, to, &changes);
        page += CK_PAGE_SIZE;
        result->seen++;
        result->changes += changes;
        result->octets += octets;
        if (out) {
            bits[i / 8] |= (uint8_t)(changes << (i % 8));
            to += octets;
        }
    }
    ck_kernel->copied();
    return out ? (uint64_t)(to - out) : 0;
}

/* What is left of the body; take() gives NULL once it is less than what is asked for. */
struct rest {
    const uint8_t *at;
    uint64_t octets;
};

static const uint8_t *take(struct rest *rest, uint64_t octets)
{
    const uint8_t *at = rest->at;

    if (octets > rest->octets)
        return NULL;
    rest->at += octets;
    rest->octets -= octets;
    return at;
}

static bool apply(struct rest *rest, uint8_t *page)
{
    const uint8_t *lines = take(rest, WORD);

    if (!lines)
        return false;
    for (uint64_t left = ck_word_at(lines, 0); left; left &= left - 1) {
        uint8_t *line = page + (uint64_t)__builtin_ctzll(left) * CK_LINE;
        const uint8_t *mask = take(rest, 1), *words;

        if (!mask || !(words = take(rest, (uint64_t)__builtin_popcount(*mask) * WORD)))
            return false;
        for (unsigned bits = *mask; bits; bits &= bits - 1) {
            memcpy(line + (unsigned)__builtin_ctz(bits) * WORD, words, WORD);
            words += WORD;
        }
    }
    return true;
}

static const uint8_t *held_page(const struct ck_held *held, uint64_t pfn)
{
    if (held->overlay && ck_bit_test(held->overlaid, pfn))
        return held->overlay + pfn * CK_PAGE_SIZE;
    return ck_bit_test(held->populated, pfn) ? held->image + pfn * CK_PAGE_SIZE : NULL;
}

enum ck_fault ck_expand(const struct ck_held *held, uint64_t nr_pfns, const uint8_t *body,
                        uint64_t length, uint8_t *out, uint64_t out_length, uint64_t *at)
{
    struct rest rest = {body, length};
    const uint8_t *head = take(&rest, CK_RECORD_HEAD), *words, *bits;
    enum ck_fault fault;
    uint32_t count;

    *at = 0;
    if (!head)
        return CK_FAULT_SHORT;
    memcpy(&count, head + 8, sizeof count);
    words = take(&rest, count * WORD);
    bits = take(&rest, (count + UINT64_C(7)) / 8);
    if (!words || !bits)
        return CK_FAULT_COUNT;
    fault = ck_head_check(head, out_length, words, nr_pfns, at);
    if (fault != CK_FAULT_NONE)
        return fault;
    memcpy(out, body, CK_RECORD_HEAD + count * WORD);
    out += CK_RECORD_HEAD + count * WORD;
    for (*at = 0; *at < count; ++*at) {
        uint64_t word = ck_word_at(words, *at);
        bool changes = bits[*at / 8] >> (*at % 8) & 1;
        const uint8_t *page;

        if (!ck_word_has_data(word)) {
            if (changes)
                return CK_FAULT_KIND;
            continue;
        }
        page = changes ? held_page(held, word & CK_PFN_MASK) : take(&rest, CK_PAGE_SIZE);
        if (!page)
            return changes ? CK_FAULT_BASE : CK_FAULT_DATA;
        memcpy(out, page, CK_PAGE_SIZE);
        if (changes && !apply(&rest, out))
            return CK_FAULT_DATA;
        out += CK_PAGE_SIZE;
    }
    return rest.octets ? CK_FAULT_LENGTH : CK_FAULT_NONE;
}
