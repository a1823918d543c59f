/*
 * Answers the engine's mapping requests: which frames are behind these pfns? Frames are counted as mapped from
 * the answer on, and given back by an unmap request or, all of them, when the engine's end closes.
 */
#ifndef EMBEDDED_MAPPER_H
#define EMBEDDED_MAPPER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "machine.h"

enum mapper_op { MAPPER_MAP, MAPPER_UNMAP };

/* One extent in one slot; the engine chooses the slot, and it stays taken until it is unmapped. */
struct mapper_request {
    uint32_t op;            /* enum mapper_op */
    uint32_t slot;
    uint64_t first_pfn;     /* MAPPER_MAP */
    uint32_t count;
    uint32_t tag;           /* comes back in the reply, so that a late one is known */
};

struct mapper_reply {
    int32_t status;         /* 0 or negative errno */
    uint32_t tag;
    uint32_t count;
    uint32_t frames[CK_EXTENT_PAGES];
};

/* Slots for twice the extents there are: an old and a new mapping of each, and some for small guests. */
static inline uint32_t mapper_slots(uint64_t nr_pfns)
{
    return (uint32_t)((nr_pfns + CK_EXTENT_PAGES - 1) / CK_EXTENT_PAGES * 2 + 64);
}

struct mapper {
    struct machine *machine;
    int socket;             /* -1: no engine */
    uint32_t **slots;       /* frames of each slot, with their count in front; NULL: free */
    uint32_t nr_slots;
    pthread_t thread;
};

/* Begin to serve; the engine's end in *fd. */
int mapper_start(struct mapper *mapper, struct machine *machine, int *fd);
/* Stop and drop every mapping; nothing happens if it does not run. */
void mapper_stop(struct mapper *mapper);

#endif
