#define _GNU_SOURCE
#include "strict.h"
#include "standin.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct standin {
    struct ck_hypervisor table;
    int fd;
    uint64_t nr_pfns;
    uint8_t *memory;
    uint64_t *populated, *log;
};

static uint64_t nr_words(uint64_t nr_pfns) { return (nr_pfns + 63) / 64; }

static int suspend(void *domain, int64_t timeout_ns)
{
    (void)domain;
    (void)timeout_ns;
    return 0;
}

static int resume(void *domain)
{
    (void)domain;
    return 0;
}

static int harvest(void *domain, struct ck_bitmap *bitmap, int mode)
{
    struct standin *s = domain;

    ck_bitmap_take(bitmap, s->log, mode != CK_HARVEST_PEEK);
    return 0;
}

static int64_t p2m_changes(void *domain, struct ck_bitmap *bitmap)
{
    (void)domain;
    (void)bitmap;
    return 0;
}

static int types(void *domain, uint64_t *pfns, uint32_t count)
{
    const struct standin *s = domain;

    for (uint32_t i = 0; i < count; i++)
        if (!(s->populated[pfns[i] / 64] >> pfns[i] % 64 & 1))
            pfns[i] |= CK_TYPE_XTAB << CK_TYPE_SHIFT;
    return 0;
}

static int map(void *domain, uint64_t first_pfn, uint32_t count, void **base)
{
    const struct standin *s = domain;
    size_t size = (size_t)count * CK_PAGE_SIZE;
    void *at = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, s->fd,
                    (off_t)(first_pfn * CK_PAGE_SIZE));

    if (at == MAP_FAILED)
        return -errno;
    *base = at;
    return 0;
}

static int unmap(void *domain, void *base, uint32_t count)
{
    (void)domain;
    return munmap(base, (size_t)count * CK_PAGE_SIZE) ? -errno : 0;
}

static int64_t context(void *domain, uint8_t *buffer, uint64_t capacity)
{
    (void)domain;
    if (capacity < STANDIN_CONTEXT)
        return -ENOSPC;
    memset(buffer, 1, STANDIN_CONTEXT);
    return STANDIN_CONTEXT;
}

static int output_close(void *domain, uint64_t *closed)
{
    (void)domain;
    *closed = 0;
    return 0;
}

struct standin *standin_new(int fd, uint64_t nr_pfns, const uint64_t *populated)
{
    size_t octets = nr_words(nr_pfns) * sizeof(uint64_t);
    struct standin *s = calloc(1, sizeof *s);

    if (!s)
        return NULL;
    s->memory = mmap(NULL, nr_pfns * CK_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    s->populated = malloc(octets);
    s->log = calloc(1, octets);
    if (s->memory == MAP_FAILED || !s->populated || !s->log) {
        int error = errno;

        if (s->memory == MAP_FAILED)
            s->memory = NULL;
        standin_free(s);
        errno = error;
        return NULL;
    }
    memcpy(s->populated, populated, octets);
    s->fd = fd;
    s->nr_pfns = nr_pfns;
    s->table = (struct ck_hypervisor){
        .abi = CK_HYPERVISOR_ABI,
        .size = sizeof s->table,
        .domain = s,
        .suspend = suspend,
        .resume = resume,
        .harvest = harvest,
        .p2m_changes = p2m_changes,
        .types = types,
        .map = map,
        .unmap = unmap,
        .context = context,
        .output_close = output_close,
    };
    return s;
}

void standin_free(struct standin *s)
{
    if (!s)
        return;
    if (s->memory)
        munmap(s->memory, s->nr_pfns * CK_PAGE_SIZE);
    free(s->populated);
    free(s->log);
    free(s);
}

struct ck_hypervisor *standin_table(struct standin *s) { return &s->table; }

uint8_t *standin_memory(struct standin *s) { return s->memory; }

uint64_t standin_nr_pfns(const struct standin *s) { return s->nr_pfns; }

int standin_fd(const struct standin *s) { return s->fd; }

uint64_t *standin_log(struct standin *s) { return s->log; }

void standin_dirty(struct standin *s, const uint64_t *pfns, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        s->log[pfns[i] / 64] |= UINT64_C(1) << pfns[i] % 64;
}
