#include "strict.h"
#include "p2m.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "domain.h"
#include "invalidation.h"

/* The most that one call may ask for: Xen refuses more (XEN_DOMCTL_getpageframeinfo3). */
#define TYPES_MAX 1024u

/* XEN_DOMCTL_PFINFO_*: the type stands in bits 31-28 of what xc_get_pfn_type_batch() gives. */
#define XEN_TYPE_SHIFT 28

struct xen_p2m {
    struct xen_libs *libs;
    uint32_t domid;
    uint64_t nr_pfns, words;
    uint64_t tot_pages; /* at the last call; 0: none yet, what is known may be older than the watch */
    bool deaf;
    bool settling;      /* pages left, and the mappings of then may have lived until this call */
    bool seen;          /* types() or map() saw a change that nobody had told */
    uint64_t *hole;     /* bitmap: known to have nothing behind them */
    uint64_t *present;  /* bitmap: known to have something; neither: not known */
    size_t allocated;   /* octets */
};

static bool bit(const uint64_t *bitmap, uint64_t pfn)
{
    return __atomic_load_n(&bitmap[pfn / 64], __ATOMIC_RELAXED) >> pfn % 64 & 1;
}

static void put_bit(uint64_t *bitmap, uint64_t pfn, bool value)
{
    uint64_t mask = 1ull << pfn % 64;

    /* One thread writes; that of the invalidations reads along. */
    __atomic_store_n(&bitmap[pfn / 64], value ? bitmap[pfn / 64] | mask : bitmap[pfn / 64] & ~mask,
                     __ATOMIC_RELAXED);
}

/* Known as a hole since the last telling; a frame that came in silently changes tot_pages, and is told. */
static bool is_hole(const void *context, uint64_t pfn)
{
    const struct xen_p2m *p2m = context;

    return pfn < p2m->nr_pfns && bit(p2m->hole, pfn);
}

static struct xen_p2m *new(const struct xen_domain *domain, bool deaf)
{
    uint64_t words = (domain->nr_pfns + 63) / 64;
    size_t size = sizeof(struct xen_p2m) + 2 * words * sizeof(uint64_t);
    /* Zeroed and present from the start: nothing here may fault in the pause. */
    struct xen_p2m *p2m = mmap(NULL, size, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    if (p2m == MAP_FAILED)
        return NULL;
    p2m->libs = domain->libs;
    p2m->domid = domain->domid;
    p2m->nr_pfns = domain->nr_pfns;
    p2m->words = words;
    p2m->deaf = deaf;
    p2m->hole = (uint64_t *)(p2m + 1);
    p2m->present = p2m->hole + words;
    p2m->allocated = size;
    return p2m;
}

int xen_p2m_begin(struct xen_domain *domain, bool deaf, uint16_t *server)
{
    struct xen_dominfo info;
    int rc = xen_domain_state(domain->libs, domain->domid, &info);

    if (rc)
        return rc;
    domain->p2m = new(domain, deaf);
    if (!domain->p2m)
        return -ENOMEM;
    rc = xen_invalidation_create(domain->libs, domain->domid, info.max_vcpu_id + 1, is_hole,
                                 domain->p2m, server, &domain->invalidation);
    if (rc)
        xen_p2m_end(domain);
    return rc;
}

int xen_p2m_watch(struct xen_domain *domain)
{
    return xen_invalidation_enable(domain->invalidation);
}

int xen_p2m_end(struct xen_domain *domain)
{
    int rc = xen_invalidation_close(domain->invalidation);

    if (domain->p2m)
        munmap(domain->p2m, domain->p2m->allocated);
    domain->invalidation = NULL;
    domain->p2m = NULL;
    return rc;
}

uint64_t xen_p2m_requests(const struct xen_domain *domain)
{
    return xen_invalidation_answered(domain->invalidation);
}

/* ------------------------------------------------------------ changes */

static int64_t tell_all(struct xen_p2m *p2m, struct ck_bitmap *bitmap)
{
    memset(p2m->hole, 0, p2m->words * sizeof(uint64_t));
    memset(p2m->present, 0, p2m->words * sizeof(uint64_t));
    ck_bitmap_fill(bitmap);
    return (int64_t)p2m->nr_pfns;
}

int64_t xen_p2m_changes(void *context, struct ck_bitmap *bitmap)
{
    struct xen_domain *domain = context;
    struct xen_p2m *p2m = domain->p2m;
    struct xen_dominfo info;
    uint64_t now = 0;
    int raised, rc;
    bool changed;

    if (bitmap->nr_bits != p2m->nr_pfns)
        return -EINVAL;
    raised = xen_invalidation_take(domain->invalidation);
    if (raised < 0)
        return raised;
    rc = xen_domain_state(p2m->libs, p2m->domid, &info);
    if (rc)
        return rc == -ESRCH ? -ESHUTDOWN : rc;

    changed = raised || p2m->settling || p2m->seen || info.tot_pages != p2m->tot_pages;
    p2m->settling = raised;
    p2m->seen = false;
    p2m->tot_pages = info.tot_pages;
    if (!changed || p2m->deaf)
        return 0;
    rc = xen_nr_pfns(p2m->libs, p2m->domid, &now);
    if (rc == 0 && now > p2m->nr_pfns) {
        domain->grown = true;
        rc = -ERANGE;
    }
    return rc ? rc : tell_all(p2m, bitmap);
}

/* ------------------------------------------------------------ types */

static int ask(struct xen_p2m *p2m, unsigned long *pfns, uint32_t count)
{
    if (p2m->libs->xc_get_pfn_type_batch(p2m->libs->ctrl, p2m->domid, count, pfns) == 0)
        return 0;
    return errno ? -errno : -EIO;
}

/* Note what Xen says of `pfn`, and return its word. */
static uint64_t learn(struct xen_p2m *p2m, uint64_t pfn, unsigned long answer)
{
    uint64_t type = answer >> XEN_TYPE_SHIFT & 0xf;
    bool hole = type == CK_TYPE_XTAB;

    if (hole && bit(p2m->present, pfn))
        p2m->seen = true;
    put_bit(p2m->hole, pfn, hole);
    put_bit(p2m->present, pfn, !hole && type != CK_TYPE_BROKEN);
    return type << CK_TYPE_SHIFT | pfn;
}

int xen_types(void *context, uint64_t *pfns, uint32_t count)
{
    struct xen_p2m *p2m = ((struct xen_domain *)context)->p2m;
    unsigned long asked[TYPES_MAX];
    uint32_t nr_asked = 0, next = 0;
    int rc;

    if (count > TYPES_MAX)
        return -E2BIG;
    for (uint32_t i = 0; i < count; i++) {
        if (pfns[i] >= p2m->nr_pfns)
            return -EINVAL;
        if (bit(p2m->hole, pfns[i]))
            pfns[i] |= CK_TYPE_XTAB << CK_TYPE_SHIFT;
        else
            asked[nr_asked++] = pfns[i];
    }
    rc = nr_asked ? ask(p2m, asked, nr_asked) : 0;
    for (uint32_t i = 0; rc == 0 && i < count; i++)
        if (pfns[i] >> CK_TYPE_SHIFT == 0)
            pfns[i] = learn(p2m, pfns[i], asked[next++]);
    return rc;
}

/* ------------------------------------------------------------ mappings */

/* privcmd maps what it can, and says of each page that it could not. A page that has memory, by
 * what types() said last, is to be there. If it is not, it left just now, before its vcpu could
 * ask: the next p2m_changes() must tell, for the live round that mapped it copies nothing before
 * that call. A guest that is stopped does not change. */
static int check_pages(struct xen_domain *domain, uint64_t first_pfn, uint32_t count,
                       const int *errors)
{
    struct xen_p2m *p2m = domain->p2m;

    for (uint32_t i = 0; i < count; i++) {
        if (errors[i] == 0 || !bit(p2m->present, first_pfn + i))
            continue;
        if (domain->suspended)
            return -EIO;
        p2m->seen = true;
    }
    return 0;
}

int xen_map(void *context, uint64_t first_pfn, uint32_t count, void **base)
{
    struct xen_domain *domain = context;
    struct xen_p2m *p2m = domain->p2m;
    unsigned long pfns[CK_EXTENT_PAGES];
    int errors[CK_EXTENT_PAGES];
    void *mapped;
    int rc;

    if (count == 0 || count > CK_EXTENT_PAGES || first_pfn > p2m->nr_pfns
        || count > p2m->nr_pfns - first_pfn)
        return -EINVAL;
    for (uint32_t i = 0; i < count; i++)
        pfns[i] = first_pfn + i;
    mapped = p2m->libs->xenforeignmemory_map(p2m->libs->memory, p2m->domid, PROT_READ, count, pfns,
                                             errors);
    if (!mapped) {
        /* ENOMEM: of mappings (vm.max_map_count), or of page frames to map over (a PVH dom0). */
        if (errno == ENOMEM)
            return -ENOSPC;
        return errno ? -errno : -EIO;
    }
    rc = check_pages(domain, first_pfn, count, errors);
    if (rc) {
        p2m->libs->xenforeignmemory_unmap(p2m->libs->memory, mapped, count);
        return rc;
    }
    *base = mapped;
    return 0;
}

int xen_unmap(void *context, void *base, uint32_t count)
{
    struct xen_p2m *p2m = ((struct xen_domain *)context)->p2m;

    if (p2m->libs->xenforeignmemory_unmap(p2m->libs->memory, base, count) == 0)
        return 0;
    return errno ? -errno : -EIO;
}
