#define _GNU_SOURCE
#include "strict.h"
#include "libxc.h"

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "floors.h"

#define MAX_BATCH_SIZE 1024u

struct batch {
    uint64_t pfns[MAX_BATCH_SIZE];
    uint32_t n;
    int socket;
    struct standin *domain;
    struct libxc_times *times;
};

static int write_all(int socket, struct iovec *iov, int n)
{
    while (n > 0) {
        ssize_t done = writev(socket, iov, n < IOV_MAX ? n : IOV_MAX);

        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -errno;
        for (; n > 0 && (size_t)done >= iov->iov_len; iov++, n--)
            done -= (ssize_t)iov->iov_len;
        if (n > 0) {
            iov->iov_base = (uint8_t *)iov->iov_base + done;
            iov->iov_len -= (size_t)done;
        }
    }
    return 0;
}

static void *map_pages(struct standin *domain, const uint64_t *pfns, uint32_t n)
{
    uint8_t *base = mmap(NULL, (size_t)n * CK_PAGE_SIZE, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (base == MAP_FAILED)
        return NULL;
    for (uint32_t i = 0, next; i < n; i = next) {
        for (next = i + 1; next < n && pfns[next] == pfns[next - 1] + 1;)
            next++;
        if (mmap(base + (size_t)i * CK_PAGE_SIZE, (size_t)(next - i) * CK_PAGE_SIZE,
                 PROT_READ, MAP_SHARED | MAP_FIXED | MAP_POPULATE, standin_fd(domain),
                 (off_t)(pfns[i] * CK_PAGE_SIZE)) == MAP_FAILED) {
            munmap(base, (size_t)n * CK_PAGE_SIZE);
            return NULL;
        }
    }
    return base;
}

/* Arrays as write_batch() has them. */
struct arrays {
    uint64_t *mfns, *types, *rec_pfns;
    void **guest_data, **local_pages;
    int *errors;
    struct iovec *iov;
};

static bool allocate(struct arrays *a, uint32_t n)
{
    a->mfns = malloc(n * sizeof *a->mfns);
    a->types = malloc(n * sizeof *a->types);
    a->errors = malloc(n * sizeof *a->errors);
    a->guest_data = calloc(n, sizeof *a->guest_data);
    a->local_pages = calloc(n, sizeof *a->local_pages);
    a->iov = malloc((n + 4) * sizeof *a->iov);
    a->rec_pfns = malloc(n * sizeof *a->rec_pfns);
    return a->mfns && a->types && a->errors && a->guest_data && a->local_pages && a->iov
           && a->rec_pfns;
}

static void release(struct arrays *a)
{
    free(a->rec_pfns);
    free(a->iov);
    free(a->local_pages);
    free(a->guest_data);
    free(a->errors);
    free(a->types);
    free(a->mfns);
}

static int send_mapped(struct batch *b, struct arrays *a, uint8_t *mapped)
{
    uint32_t head[2] = {1, 8 + b->n * (8 + CK_PAGE_SIZE)}, count[2] = {b->n, 0};
    int64_t began;
    int rc;

    for (uint32_t i = 0; i < b->n; i++) {
        a->errors[i] = 0;
        a->rec_pfns[i] = a->types[i] | b->pfns[i];
        a->guest_data[i] = mapped + (size_t)i * CK_PAGE_SIZE;
        a->iov[3 + i] = (struct iovec){a->guest_data[i], CK_PAGE_SIZE};
    }
    a->iov[0] = (struct iovec){head, sizeof head};
    a->iov[1] = (struct iovec){count, sizeof count};
    a->iov[2] = (struct iovec){a->rec_pfns, b->n * sizeof *a->rec_pfns};
    began = bench_now();
    rc = write_all(b->socket, a->iov, (int)b->n + 3);
    b->times->write_ns += bench_now() - began;
    return rc;
}

static int flush_batch(struct batch *b)
{
    struct arrays a = {0};
    uint8_t *mapped;
    int64_t began;
    int rc = -ENOMEM;

    if (b->n == 0)
        return 0;
    if (allocate(&a, b->n)) {
        memcpy(a.mfns, b->pfns, b->n * sizeof *a.mfns);
        memset(a.types, 0, b->n * sizeof *a.types); /* xc_get_pfn_type_batch(): all of them NOTAB */
        began = bench_now();
        mapped = map_pages(b->domain, a.mfns, b->n);
        b->times->map_ns += bench_now() - began;
        if (mapped) {
            rc = send_mapped(b, &a, mapped);
            began = bench_now();
            munmap(mapped, (size_t)b->n * CK_PAGE_SIZE);
            b->times->map_ns += bench_now() - began;
        }
    }
    release(&a);
    b->times->pages += b->n;
    b->n = 0;
    return rc;
}

static bool test_bit(const uint64_t *bits, uint64_t i)
{
    return ((const uint8_t *)bits)[i / 8] >> i % 8 & 1;
}

int libxc_epoch(struct standin *s, int socket, struct libxc_times *times)
{
    uint64_t nr_pfns = standin_nr_pfns(s), *log = standin_log(s);
    size_t octets = (nr_pfns + 63) / 64 * sizeof *log;
    uint8_t tail[STANDIN_CONTEXT];
    struct batch *b = calloc(1, sizeof *b);
    uint64_t *bits = malloc(octets); /* the hypercall buffer, which it does keep */
    int64_t began;
    int rc = b && bits ? 0 : -ENOMEM;

    memset(times, 0, sizeof *times);
    if (!rc) {
        memset(bits, 0, octets);
        *b = (struct batch){.socket = socket, .domain = s, .times = times};
        began = bench_now();
        memcpy(bits, log, octets);
        memset(log, 0, octets);
        for (uint64_t pfn = 0; pfn < nr_pfns && !rc; pfn++) {
            if (!test_bit(bits, pfn))
                continue;
            b->pfns[b->n++] = pfn;
            if (b->n == MAX_BATCH_SIZE)
                rc = flush_batch(b);
        }
        if (!rc)
            rc = flush_batch(b);
        memset(tail, 1, sizeof tail);
        if (!rc)
            rc = write_all(socket, &(struct iovec){tail, sizeof tail}, 1);
        times->pause_ns = bench_now() - began;
    }
    free(bits);
    free(b);
    return rc;
}
