/*
 * The standby's side: from the records of an epoch into a guest's image (pfn p at octet p * 4096).
 *
 * A record or list is checked once, when it arrives (ck_record_check, ck_words_check); after that
 * nothing here can fail, which is what lets an ack be a promise (invariant 1). No function writes
 * outside the image and the bitmap, provided that the check passed with the same nr_pfns.
 *
 * Images are page aligned. Invariant of image and `populated`: the memory of a page that is not populated is all zero.
 */
#ifndef CHECKPOINTD_SCATTER_H
#define CHECKPOINTD_SCATTER_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "bitmap.h"
#include "hypervisor.h"

/* Answers of the checks; each has its own text in native/image.py. */
enum ck_fault {
    CK_FAULT_NONE,
    CK_FAULT_SHORT,    /* too short to hold the head */
    CK_FAULT_TYPE,     /* not a PAGE_DATA record */
    CK_FAULT_LENGTH,   /* the length field is not that of the buffer */
    CK_FAULT_RESERVED, /* a reserved field is not zero */
    CK_FAULT_COUNT,    /* no pfns, or more than fit */
    CK_FAULT_WORD,     /* reserved bits of a pfn word are set */
    CK_FAULT_KIND,     /* a page type that is reserved or never sent, or not for this list */
    CK_FAULT_PFN,      /* beyond the guest */
    CK_FAULT_DATA,     /* not as much page data as the types call for */
    CK_FAULT_BASE,     /* changes of a page that is not held */
};

/* The i-th of a list of pfn words, which may lie at any address. */
static inline uint64_t ck_word_at(const uint8_t *words, uint64_t i)
{
    uint64_t word;

    memcpy(&word, words + i * sizeof word, sizeof word);
    return word;
}

/* Whether a page follows for this pfn word: 0x0-0x4 and 0x9-0xc carry data; 0x5-0x8 are reserved and 0xe (XALLOC)
 * is never sent. */
static inline bool ck_word_has_data(uint64_t word)
{
    return 0x1e1f >> (word >> CK_TYPE_SHIFT) & 1;
}

/* `at` is the index of the word at fault, where it is one. Reads `length` octets at most; any
 * alignment. */
enum ck_fault ck_record_check(const uint8_t *record, uint64_t length, uint64_t nr_pfns,
                              uint64_t *at);

/* The same of a record of which only head and words are here: everything but the pages. */
enum ck_fault ck_head_check(const uint8_t *head, uint64_t length, const uint8_t *words,
                            uint64_t nr_pfns, uint64_t *at);

/* A list of `count` pfn words alone: with_data, all of a type that has data; else all of one that
 * has none. */
enum ck_fault ck_words_check(const uint8_t *words, uint64_t count, int with_data, uint64_t nr_pfns,
                             uint64_t *at);

/* Add the pfns of checked words. */
void ck_mark(struct ck_bitmap *pfns, const uint8_t *words, uint64_t count);

/* Add to `missing` the extents (CK_EXTENT_PAGES pages) in which checked words name pages with data, but for those in
 * `reserved`: both have a bit for each extent of the guest. */
void ck_mark_extents(struct ck_bitmap *missing, const struct ck_bitmap *reserved,
                     const uint8_t *words, uint64_t count);

/* Put the pages of a checked record in their places; those that it says have gone are dropped. */
void ck_scatter(uint8_t *image, struct ck_bitmap *populated, const uint8_t *record);

/* Make these pages zero and populated. */
void ck_zero_pages(uint8_t *image, struct ck_bitmap *populated, const uint8_t *words, uint64_t count);

/* Take these pages away: zero and not populated. */
void ck_drop_pages(uint8_t *image, struct ck_bitmap *populated, const uint8_t *words, uint64_t count);

/* Copy each page in `overlaid` from the overlay, an image of the same size; mark it populated. */
void ck_merge(uint8_t *image, const uint8_t *overlay, const struct ck_bitmap *overlaid,
              struct ck_bitmap *populated);

#endif
