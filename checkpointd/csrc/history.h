/*
 * What the standby holds of the pages that were sent last, so that a page sent again can travel as
 * its changes. A cache of fixed size: sets of 8 pages, a page in the set of its pfn, so that neighbours
 * are spread over all of them.
 *
 * Which page of a set makes room: SRRIP (Jaleel et al., "High performance cache replacement using
 * re-reference interval prediction", ISCA 2010). Each page has an age of 0 to 3; one that came once has
 * 2, one that came again 0; the first of age 3 goes, after all have aged until there is one. A sweep
 * over more memory than there is room for thereby drives out itself, and not what is written again and
 * again.
 */
#ifndef CHECKPOINTD_HISTORY_H
#define CHECKPOINTD_HISTORY_H

#include <stdint.h>

#define CK_HISTORY_WAYS 8u

struct ck_history {
    uint64_t nr_sets;
    uint8_t *pages; /* page aligned */
    uint64_t *tags; /* pfn + 1; 0: nothing is here */
    uint8_t *ages;
};

/* Octets of memory that a history of so many sets needs. */
uint64_t ck_history_size(uint64_t nr_sets);

/* Lay it out over zeroed, page aligned memory of ck_history_size(), none of which is touched. */
void ck_history_init(struct ck_history *history, void *memory, uint64_t nr_sets);

/* The page as the standby holds it; NULL: not known. It counts as used again. */
uint8_t *ck_history_find(struct ck_history *history, uint64_t pfn);

/* Memory for a page that find() does not know; the caller fills it. */
uint8_t *ck_history_add(struct ck_history *history, uint64_t pfn);

/* The standby will hold something else: one page; those of a list of pfn words; all. */
void ck_history_forget(struct ck_history *history, uint64_t pfn);
void ck_history_forget_words(struct ck_history *history, const uint8_t *words, uint64_t count);
void ck_history_clear(struct ck_history *history);

#endif
