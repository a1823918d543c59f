/* What the machine itself can do: the limits that figures are held against. */
#ifndef CHECKPOINTD_BENCH_FLOORS_H
#define CHECKPOINTD_BENCH_FLOORS_H

#include <stdint.h>

int64_t bench_now(void); /* CLOCK_MONOTONIC, ns */

/* Write to each cache line of `buffer`, which is larger than all caches: nothing else stays in
 * them, nor in the translation buffers. */
void bench_evict(uint8_t *buffer, uint64_t octets);

/* memcpy of the pages `pfns` of `memory`, one after the other, to `to`. Takes so many ns. */
int64_t bench_copy_pages(uint8_t *to, const uint8_t *memory, const uint64_t *pfns, uint64_t n);

/* The other way round: from one place to those pages of `memory`. Takes so many ns. */
int64_t bench_put_pages(uint8_t *memory, const uint8_t *from, const uint64_t *pfns, uint64_t n);

/* One memcpy. Takes so many ns. */
int64_t bench_copy(uint8_t *to, const uint8_t *from, uint64_t octets);

#endif
