#include "strict.h"
#include "domain.h"

#include <errno.h>
#include <stdlib.h>

static int output_close(void *domain, uint64_t *closed)
{
    struct xen_domain *d = domain;

    if (!d->suspended)
        return -EINVAL;
    *closed = ++d->closed; /* nothing is held yet (output/xen.py): the numbers are all there is */
    return 0;
}

static const struct ck_hypervisor functions = {
    .abi = CK_HYPERVISOR_ABI,
    .size = sizeof(struct ck_hypervisor),
    .suspend = xen_suspend,
    .resume = xen_resume_ours,
    .harvest = xen_harvest,
    .p2m_changes = xen_p2m_changes,
    .types = xen_types,
    .map = xen_map,
    .unmap = xen_unmap,
    .context = xen_context,
    .output_close = output_close,
};

static int log_pages(const struct xen_domain *d)
{
    return (int)((d->nr_pfns + 8 * CK_PAGE_SIZE - 1) / (8 * CK_PAGE_SIZE));
}

static int prepare(struct xen_domain *d)
{
    int rc = xen_nr_pfns(d->libs, d->domid, &d->nr_pfns);

    if (rc)
        return rc;
    d->store = d->libs->xs_open(0);
    if (!d->store)
        return -errno;
    rc = xen_suspend_prepare(d);
    if (rc)
        return rc;
    d->canaries = calloc(XEN_CANARIES, sizeof *d->canaries);
    if (!d->canaries
        || !d->libs->xc__hypercall_buffer_alloc_pages(d->libs->ctrl, &d->log, log_pages(d)))
        return -ENOMEM;
    return xen_context_prepare(d);
}

int xen_domain_new(struct xen_libs *libs, uint32_t domid, struct xen_domain **out)
{
    struct xen_domain *d = calloc(1, sizeof *d);
    int rc;

    if (!d)
        return -ENOMEM;
    *d = (struct xen_domain){
        .table = functions, .libs = libs, .domid = domid, .log = XEN_BUFFER_INIT,
        .canary = XEN_NO_CANARY,
    };
    d->table.domain = d;
    d->asked_ns = &d->own_asked_ns;
    rc = prepare(d);
    if (rc) {
        xen_domain_free(d);
        return rc;
    }
    *out = d;
    return 0;
}

void xen_domain_free(struct xen_domain *d)
{
    if (!d)
        return;
    xen_suspend_end(d);
    if (d->log.memory)
        d->libs->xc__hypercall_buffer_free_pages(d->libs->ctrl, &d->log, log_pages(d));
    free(d->canaries);
    d->libs->xs_close(d->store);
    free(d);
}

struct ck_hypervisor *xen_domain_table(struct xen_domain *d)
{
    return &d->table;
}

uint64_t xen_domain_nr_pfns(const struct xen_domain *d)
{
    return d->nr_pfns;
}

void xen_domain_signs(const struct xen_domain *d, struct xen_signs *signs)
{
    *signs = (struct xen_signs){ d->thefts, d->suspended, d->late, d->foreign, d->grown };
}
