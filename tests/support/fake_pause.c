/*
 * The pause of the Xen adapter (suspend, dirty log, context) on the fake Xen. The p2m, which it asks what is behind a
 * pfn, stands in here: of its requests it says what the test said.
 */
#include "domain.h"
#include "p2m.h"
#include "xen.h"

static struct xen_libs libs = { XEN_FUNCTIONS(XEN_ENTRY) };
static struct xen_domain *attached;
static uint64_t requests;

int64_t xen_p2m_changes(void *domain, struct ck_bitmap *bitmap)
{
    return 0;
}

int xen_types(void *domain, uint64_t *pfns, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (!fake_has_page(pfns[i]))
            pfns[i] |= CK_TYPE_XTAB << CK_TYPE_SHIFT;
    return 0;
}

int xen_map(void *domain, uint64_t first, uint32_t count, void **base)
{
    return -ENOSYS;
}

int xen_unmap(void *domain, void *base, uint32_t count)
{
    return -ENOSYS;
}

uint64_t xen_p2m_requests(const struct xen_domain *domain)
{
    return requests;
}

/* ------------------------------------------------------------ for the test */

/* A guest all of whose pfns have memory, and the adapter attached to it. One at a time: NULL if there is one. */
void *fake_attach(uint64_t nr_pfns)
{
    if (attached)
        return NULL;
    fake_reset(nr_pfns, 2 * nr_pfns);
    requests = 0;
    return xen_domain_new(&libs, DOMID, &attached) ? NULL : attached;
}

void fake_detach(void)
{
    xen_domain_free(attached);
    attached = NULL;
}

void fake_request(void)
{
    requests++;
}
