/*
 * A hypervisor for the tests of the native pause: one guest whose frames lie in a memfd in any order, a dirty log,
 * a journal of calls, and one fault that can be armed for any passage of any function. It behaves as csrc/hypervisor.h
 * says, which includes the unkind parts: a mapping shows the frame it was made of, and a hole is a fault.
 */
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "hypervisor.h"

enum call { SUSPEND, RESUME, HARVEST, P2M, TYPES, MAP, UNMAP, CONTEXT, OUTPUT, CALLS };

#define HOLE UINT32_MAX
#define JOURNAL 65536

struct fake {
    struct ck_hypervisor table;
    uint64_t nr_pfns, words;
    int memory;          /* memfd of 2 * nr_pfns frames: a page can always get another one */
    uint8_t *frames;     /* all of it, as the guest sees it */
    uint32_t *p2m;       /* pfn to frame */
    uint32_t next_frame;
    uint64_t *log, *held, *changed; /* dirty; mapped writable by the hypervisor; p2m changes */
    uint8_t *type;       /* forced type of a pfn, 0: by the p2m */
    bool suspended;
    uint64_t closed, context_length, map_limit, mapped;
    uint64_t passages[CALLS];
    int fault_call, fault_errno, fault_late; /* late: the work is done, then it fails */
    uint64_t fault_at, fault_passages;
    int tell, wait;      /* fds: suspend writes to the one and waits for the other; -1: it does not */
    bool lies;           /* types() answers about another pfn */
    int64_t swap_after_types, hole_after_types; /* pfns, -1: none; the guest runs on between two calls */
    char journal[JOURNAL];
    size_t noted;
};

static bool get(const uint64_t *bits, uint64_t bit) { return bits[bit / 64] >> (bit % 64) & 1; }
static void set(uint64_t *bits, uint64_t bit) { bits[bit / 64] |= UINT64_C(1) << (bit % 64); }

static void note(struct fake *f, char what)
{
    if (f->noted < JOURNAL - 1)
        f->journal[f->noted++] = what;
}

/* To be asked once before the work (late = 0) and once after it (late = 1). */
static int fault(struct fake *f, enum call call, int late)
{
    if (late == 0)
        f->passages[call]++;
    if (f->fault_call == (int)call && f->fault_late == late && f->passages[call] >= f->fault_at
        && f->passages[call] < f->fault_at + f->fault_passages)
        return f->fault_errno;
    return 0;
}

static int suspend(void *domain, int64_t timeout_ns)
{
    struct fake *f = domain;
    int rc = fault(f, SUSPEND, 0);

    note(f, 'S');
    if (rc || timeout_ns <= 0)
        return rc ? rc : -ETIMEDOUT;
    if (f->tell >= 0) {
        struct pollfd answer = {f->wait, POLLIN, 0};

        if (write(f->tell, "S", 1) != 1 || poll(&answer, 1, (int)(timeout_ns / 1000000)) != 1)
            return -ETIMEDOUT;
    }
    f->suspended = true;
    return fault(f, SUSPEND, 1);
}

static int resume(void *domain)
{
    struct fake *f = domain;
    int rc = fault(f, RESUME, 0);

    note(f, 'R');
    if (rc)
        return rc;
    f->suspended = false;
    return fault(f, RESUME, 1);
}

static int harvest(void *domain, struct ck_bitmap *bitmap, int mode)
{
    struct fake *f = domain;
    int rc = fault(f, HARVEST, 0);

    note(f, mode == CK_HARVEST_FINAL ? 'F' : mode == CK_HARVEST_CLEAN ? 'C' : 'P');
    if (rc)
        return rc;
    if (bitmap->nr_bits != f->nr_pfns || (mode == CK_HARVEST_FINAL) != f->suspended)
        return -EINVAL;
    rc = fault(f, HARVEST, 1); /* late here: the log is cleared and lost, as the port allows */
    if (!rc && mode == CK_HARVEST_FINAL)
        ck_bitmap_take(bitmap, f->held, false);
    if (!rc)
        ck_bitmap_take(bitmap, f->log, false);
    if (mode != CK_HARVEST_PEEK)
        memset(f->log, 0, f->words * sizeof *f->log);
    return rc;
}

static int64_t p2m_changes(void *domain, struct ck_bitmap *bitmap)
{
    struct fake *f = domain;
    int rc = fault(f, P2M, 0);
    int64_t count = 0;

    note(f, 'p');
    if (rc || bitmap->nr_bits != f->nr_pfns)
        return rc ? rc : -EINVAL;
    rc = fault(f, P2M, 1);
    if (!rc)
        count = (int64_t)ck_bitmap_take(bitmap, f->changed, false);
    memset(f->changed, 0, f->words * sizeof *f->changed);
    return rc ? rc : count;
}

/* The guest (or its toolstack) gives a pfn another frame, or none. */
void fake_swap(struct fake *f, uint64_t pfn)
{
    f->p2m[pfn] = f->next_frame++ % (uint32_t)(2 * f->nr_pfns);
    set(f->changed, pfn);
    set(f->log, pfn);
}

void fake_hole(struct fake *f, uint64_t pfn)
{
    f->p2m[pfn] = HOLE;
    set(f->changed, pfn);
    f->log[pfn / 64] &= ~(UINT64_C(1) << (pfn % 64)); /* Xen marks a removed page clean */
}

static int types(void *domain, uint64_t *pfns, uint32_t count)
{
    struct fake *f = domain;
    int rc = fault(f, TYPES, 0);

    note(f, 't');
    if (rc || count == 0 || count > 1024)
        return rc ? rc : -E2BIG;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t type = f->type[pfns[i]];

        if (f->p2m[pfns[i]] == HOLE && !type)
            type = CK_TYPE_XTAB;
        pfns[i] = (pfns[i] ^ f->lies) | type << CK_TYPE_SHIFT;
    }
    if (f->swap_after_types >= 0)
        fake_swap(f, (uint64_t)f->swap_after_types);
    if (f->hole_after_types >= 0)
        fake_hole(f, (uint64_t)f->hole_after_types);
    f->swap_after_types = f->hole_after_types = -1;
    return fault(f, TYPES, 1);
}

static int map(void *domain, uint64_t first, uint32_t count, void **base)
{
    struct fake *f = domain;
    int rc = fault(f, MAP, 0);
    uint8_t *at;

    note(f, 'm');
    if (rc)
        return rc;
    if (first % CK_EXTENT_PAGES || first + count > f->nr_pfns)
        return -EINVAL;
    if (f->mapped >= f->map_limit)
        return -ENOSPC;
    at = mmap(NULL, (size_t)count * CK_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return -errno;
    for (uint32_t i = 0, n; i < count; i += n) {
        uint32_t frame = f->p2m[first + i];

        for (n = 1; i + n < count && frame != HOLE && f->p2m[first + i + n] == frame + n; n++)
            ;
        if (frame != HOLE
            && mmap(at + (size_t)i * CK_PAGE_SIZE, (size_t)n * CK_PAGE_SIZE, PROT_READ,
                    MAP_SHARED | MAP_FIXED | MAP_POPULATE, f->memory, (off_t)frame * CK_PAGE_SIZE)
                   == MAP_FAILED)
            return -errno;
    }
    if ((rc = fault(f, MAP, 1)) != 0) {
        munmap(at, (size_t)count * CK_PAGE_SIZE);
        return rc;
    }
    f->mapped++;
    *base = at;
    return 0;
}

static int unmap(void *domain, void *base, uint32_t count)
{
    struct fake *f = domain;
    int rc = fault(f, UNMAP, 0);

    note(f, 'u');
    if (rc)
        return rc;
    f->mapped--;
    return munmap(base, (size_t)count * CK_PAGE_SIZE) ? -errno : 0;
}

static int64_t context(void *domain, uint8_t *buffer, uint64_t capacity)
{
    struct fake *f = domain;
    int rc = fault(f, CONTEXT, 0);

    note(f, 'x');
    if (rc)
        return rc;
    if (f->context_length > capacity)
        return -ENOSPC;
    memset(buffer, 0xc7, f->context_length);
    rc = fault(f, CONTEXT, 1);
    return rc ? rc : (int64_t)f->context_length;
}

static int output_close(void *domain, uint64_t *closed)
{
    struct fake *f = domain;
    int rc = fault(f, OUTPUT, 0);

    note(f, 'o');
    if (rc || !f->suspended)
        return rc ? rc : -EINVAL;
    *closed = ++f->closed;
    return fault(f, OUTPUT, 1);
}

void *fake_table(struct fake *f) { return &f->table; }

struct fake *fake_new(uint64_t nr_pfns)
{
    struct fake *f = calloc(1, sizeof *f);
    size_t size = 2 * nr_pfns * CK_PAGE_SIZE;

    f->table = (struct ck_hypervisor){
        CK_HYPERVISOR_ABI, sizeof f->table, f, suspend, resume, harvest, p2m_changes,
        types, map, unmap, context, output_close,
    };
    f->nr_pfns = nr_pfns;
    f->words = (nr_pfns + 63) / 64;
    f->memory = memfd_create("fake guest", MFD_CLOEXEC);
    if (f->memory < 0 || ftruncate(f->memory, (off_t)size))
        return NULL;
    f->frames = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, f->memory, 0);
    if (f->frames == MAP_FAILED)
        return NULL;
    f->p2m = calloc(nr_pfns, sizeof *f->p2m);
    f->log = calloc(f->words, 8);
    f->held = calloc(f->words, 8);
    f->changed = calloc(f->words, 8);
    f->type = calloc(nr_pfns, 1);
    for (uint32_t i = 0; i < nr_pfns; i++)
        f->p2m[i] = i;
    f->next_frame = (uint32_t)nr_pfns;
    f->context_length = 48;
    f->map_limit = UINT64_MAX;
    f->fault_call = f->tell = f->wait = -1;
    f->swap_after_types = f->hole_after_types = -1;
    return f;
}

void fake_free(struct fake *f)
{
    munmap(f->frames, 2 * f->nr_pfns * CK_PAGE_SIZE);
    close(f->memory);
    free(f->p2m);
    free(f->log);
    free(f->held);
    free(f->changed);
    free(f->type);
    free(f);
}

/* From the `at`-th passage of `call` on, from now, fail with `error` (negative errno) for `passages` times. */
void fake_fail(struct fake *f, int call, uint64_t at, int error, int late, uint64_t passages)
{
    f->fault_call = call;
    f->fault_at = f->passages[call] + at;
    f->fault_errno = error;
    f->fault_late = late;
    f->fault_passages = passages;
}

void fake_heal(struct fake *f) { f->fault_call = -1; }
uint64_t fake_passages(struct fake *f, int call) { return f->passages[call]; }
uint8_t *fake_page(struct fake *f, uint64_t pfn)
{
    return f->p2m[pfn] == HOLE ? NULL : f->frames + (size_t)f->p2m[pfn] * CK_PAGE_SIZE;
}
void fake_dirty(struct fake *f, uint64_t pfn) { set(f->log, pfn); }
int fake_is_dirty(struct fake *f, uint64_t pfn) { return get(f->log, pfn); }
void fake_hold(struct fake *f, uint64_t pfn) { set(f->held, pfn); }
void fake_set_type(struct fake *f, uint64_t pfn, uint8_t type) { f->type[pfn] = type; }
void fake_meet(struct fake *f, int tell, int wait)
{
    f->tell = tell;
    f->wait = wait;
}
void fake_lie(struct fake *f) { f->lies = true; }
void fake_context_length(struct fake *f, uint64_t length) { f->context_length = length; }
void fake_map_limit(struct fake *f, uint64_t extents) { f->map_limit = extents; }
void fake_after_types(struct fake *f, int64_t swap, int64_t hole)
{
    f->swap_after_types = swap;
    f->hole_after_types = hole;
}
int fake_suspended(struct fake *f) { return f->suspended; }
uint64_t fake_mapped(struct fake *f) { return f->mapped; }
uint64_t fake_closed(struct fake *f) { return f->closed; }
void fake_abi(struct fake *f, uint32_t abi) { f->table.abi = abi; }
const char *fake_journal(struct fake *f)
{
    f->journal[f->noted] = 0;
    f->noted = 0;
    return f->journal;
}

/* What the pause is measured against: the same pages through the same kind of mapping, by memcpy alone. */
void fake_copy(const uint8_t *const *pages, uint64_t count, uint8_t *to)
{
    for (uint64_t i = 0; i < count; i++)
        memcpy(to + i * CK_PAGE_SIZE, pages[i], CK_PAGE_SIZE);
}
