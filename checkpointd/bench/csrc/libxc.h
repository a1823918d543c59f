/*
 * A model of what libxc's save code does in the pause of a Remus epoch (tools/libs/guest/
 * xg_sr_save.c, as of Xen 4.17 to 4.20), for comparison only: each bit of the dirty log looked at
 * by itself; for each batch of 1024 pages arrays allocated, the guest's pages mapped, gathered and
 * written to the socket, unmapped, and the arrays freed; then the tail records.
 *
 * Mapped is by one mmap() for each run of pages that follow each other, at one address range, as
 * xenforeignmemory_map() gives one. What Xen's own way may cost: docs/performance.md.
 */
#ifndef CHECKPOINTD_BENCH_LIBXC_H
#define CHECKPOINTD_BENCH_LIBXC_H

#include <stdint.h>

#include "standin.h"

struct libxc_times {
    int64_t pause_ns; /* all of it */
    int64_t map_ns, write_ns; /* of it: map and unmap; writing to the socket */
    uint64_t pages;
};

/* One epoch of what is in the log, which is empty then, into `socket`. 0 or a negative errno. */
int libxc_epoch(struct standin *s, int socket, struct libxc_times *times);

#endif
