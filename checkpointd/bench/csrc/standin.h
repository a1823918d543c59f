/*
 * A domain to measure the native pause on: memory and mappings are real, the guest is nobody. What
 * only a hypervisor can do (stopping a guest, a dirty log) costs next to nothing here, so that what
 * is measured is what an engine does in user space.
 */
#ifndef CHECKPOINTD_BENCH_STANDIN_H
#define CHECKPOINTD_BENCH_STANDIN_H

#include <stdint.h>

#include "hypervisor.h"

/* Of a PVH guest: X86_TSC_INFO, HVM_CONTEXT and HVM_PARAMS of one vcpu, about. */
#define STANDIN_CONTEXT 6144u

struct standin;

/* `fd` is its memory, of nr_pfns pages, and stays the caller's. `populated`, a bitmap, says which
 * of them are there; it is copied. NULL, errno set, if it cannot be made. */
struct standin *standin_new(int fd, uint64_t nr_pfns, const uint64_t *populated);
void standin_free(struct standin *s);

struct ck_hypervisor *standin_table(struct standin *s);

/* The whole memory, mapped: what a plain copy reads. */
uint8_t *standin_memory(struct standin *s);
uint64_t standin_nr_pfns(const struct standin *s);
int standin_fd(const struct standin *s);

/* Bits of the dirty log, which the next harvest takes. */
void standin_dirty(struct standin *s, const uint64_t *pfns, uint64_t n);

/* The log itself, nr_pfns bits. */
uint64_t *standin_log(struct standin *s);

#endif
