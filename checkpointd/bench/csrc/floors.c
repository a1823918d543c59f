#include "strict.h"
#include "floors.h"

#include <string.h>
#include <time.h>

#include "hypervisor.h"

int64_t bench_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void bench_evict(uint8_t *buffer, uint64_t octets)
{
    for (uint64_t at = 0; at < octets; at += 64)
        buffer[at]++;
}

int64_t bench_copy_pages(uint8_t *to, const uint8_t *memory, const uint64_t *pfns, uint64_t n)
{
    int64_t began = bench_now();

    for (uint64_t i = 0; i < n; i++)
        memcpy(to + i * CK_PAGE_SIZE, memory + pfns[i] * CK_PAGE_SIZE, CK_PAGE_SIZE);
    return bench_now() - began;
}

int64_t bench_put_pages(uint8_t *memory, const uint8_t *from, const uint64_t *pfns, uint64_t n)
{
    int64_t began = bench_now();

    for (uint64_t i = 0; i < n; i++)
        memcpy(memory + pfns[i] * CK_PAGE_SIZE, from + i * CK_PAGE_SIZE, CK_PAGE_SIZE);
    return bench_now() - began;
}

int64_t bench_copy(uint8_t *to, const uint8_t *from, uint64_t octets)
{
    int64_t began = bench_now();

    memcpy(to, from, octets);
    return bench_now() - began;
}
