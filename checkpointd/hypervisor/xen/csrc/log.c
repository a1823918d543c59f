/*
 * The dirty log.
 *
 * Xen has one log for each domain, and whoever may call the hypervisor may clean it, end it or begin it anew: a
 * bit that somebody else cleaned is a page that the replica would never get. So after each CLEAN one page, another
 * each time, is marked dirty on purpose: if the next harvest does not show that canary, the log was in other hands
 * (xl migrate and xl save --live begin it anew), and every page counts as dirty.
 */
#include "strict.h"
#include "domain.h"
#include "p2m.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Canaries live on pages that had memory at the start, one of each MiB, so that whatever the guest keeps writing to,
 * one is found that it has not written to lately. */
#define CANARY_STRIDE 256u
#define CANARY_LOOKS 16u /* that Xen is asked for in one harvest, at most: each is a call of its own */
#define BATCH 1024u /* types() takes no more */


static bool log_bit(const struct xen_domain *d, uint64_t pfn)
{
    return ((const uint64_t *)d->log.memory)[pfn / 64] >> pfn % 64 & 1;
}

/* Does `pfn` have memory behind it now? */
static int is_populated(struct xen_domain *d, uint64_t pfn)
{
    uint64_t word = pfn;
    int rc = xen_types(d, &word, 1);

    return rc < 0 ? rc : word >> CK_TYPE_SHIFT == CK_TYPE_NOTAB;
}

static int find_canaries(struct xen_domain *d)
{
    uint64_t words[BATCH];

    d->nr_canaries = d->next_canary = 0;
    for (uint64_t pfn = 0; pfn < d->nr_pfns && d->nr_canaries < XEN_CANARIES;) {
        uint32_t n = 0;
        int rc;

        for (; pfn < d->nr_pfns && n < BATCH; pfn += CANARY_STRIDE)
            words[n++] = pfn;
        rc = xen_types(d, words, n);
        if (rc < 0)
            return rc;
        for (uint32_t i = 0; i < n && d->nr_canaries < XEN_CANARIES; i++)
            if (words[i] >> CK_TYPE_SHIFT == CK_TYPE_NOTAB)
                d->canaries[d->nr_canaries++] = words[i] & CK_PFN_MASK;
    }
    return 0;
}

/* Mark a page that this harvest found clean, or, if the guest writes to all of them, the last. Never a pfn that has no
 * memory, as those of a guest that has given some back: Xen marks nothing there. */
static int send_out_canary(struct xen_domain *d)
{
    uint64_t pfn = XEN_NO_CANARY, dirty = XEN_NO_CANARY;
    uint32_t looks = 0;

    d->canary = XEN_NO_CANARY;
    d->requests = xen_p2m_requests(d);
    for (uint32_t i = 0; i < d->nr_canaries && looks < CANARY_LOOKS && pfn == XEN_NO_CANARY; i++) {
        uint64_t next = d->canaries[d->next_canary++ % d->nr_canaries];

        if (log_bit(d, next))
            dirty = next;
        else if (looks++, is_populated(d, next) == 1)
            pfn = next;
    }
    if (pfn == XEN_NO_CANARY && dirty != XEN_NO_CANARY && is_populated(d, dirty) == 1)
        pfn = dirty;
    if (pfn == XEN_NO_CANARY) {
        d->next_canary++; /* the next harvest begins, and ends, with another one */
        return 0;
    }
    if (d->libs->xendevicemodel_modified_memory(d->libs->devices, (uint16_t)d->domid, pfn, 1) < 0)
        return -errno;
    d->canary = pfn;
    return 0;
}

/* Did the log that has just been read hold the canary? A page that the guest has given back is clean, and stays so
 * when it takes one again: it proves nothing if there is none now, or if any was given back in the meantime. (That is
 * asked last: it is told before the guest can take one.) 0, -ESTALE (the log was in other hands), or another negative
 * errno. */
static int look_for_canary(struct xen_domain *d)
{
    int rc;

    if (d->canary == XEN_NO_CANARY || log_bit(d, d->canary))
        return 0;
    rc = is_populated(d, d->canary);
    if (rc != 1 || xen_p2m_requests(d) != d->requests)
        return rc < 0 ? rc : 0;
    d->thefts++;
    return -ESTALE;
}

int xen_log_begin(struct xen_domain *d)
{
    int rc = find_canaries(d);

    if (rc == 0)
        rc = xen_log_enable(d->libs, d->domid);
    if (rc)
        return rc;
    d->log_on = true;
    memset(d->log.memory, 0, (d->nr_pfns + 63) / 64 * 8);
    return send_out_canary(d);
}

/* Read the log into d->log; `operation` is of Xen. 0, -EAGAIN (nothing was changed), or another negative errno: the log
 * is lost. */
static int read_log(struct xen_domain *d, unsigned operation, unsigned mode)
{
    struct xen_log_stats stats;
    long long rc = d->libs->xc_logdirty_control(d->libs->ctrl, d->domid, operation, &d->log,
                                                d->nr_pfns, mode, &stats);

    if (rc < 0) {
        /* Interrupted before it began, or another's operation is half done: ours has done nothing yet. */
        if (errno == EINTR || errno == EAGAIN || errno == EBUSY)
            return -EAGAIN;
        d->thefts += d->log_on && errno == EINVAL; /* somebody has ended it */
        d->canary = XEN_NO_CANARY;
        return errno ? -errno : -EIO;
    }
    if ((uint64_t)rc != d->nr_pfns) {
        d->canary = XEN_NO_CANARY;
        return -EPROTO; /* the rest of the bitmap would be of an earlier harvest */
    }
    return 0;
}

int xen_harvest(void *domain, struct ck_bitmap *bitmap, int mode)
{
    struct xen_domain *d = domain;
    int rc;

    if (!d->log_on || bitmap->nr_bits != d->nr_pfns || (mode == CK_HARVEST_FINAL && !d->suspended))
        return -EINVAL;
    /* xl save and xl migrate read the log once more when the guest has stopped for them: not ours to clear. */
    if (mode == CK_HARVEST_CLEAN && xen_stands_for_others(d))
        return -EAGAIN;
    rc = read_log(d, mode == CK_HARVEST_PEEK ? XEN_LOG_PEEK : XEN_LOG_CLEAN,
                  mode == CK_HARVEST_FINAL ? XEN_LOG_MODE_FINAL : 0);
    if (rc)
        return rc;
    ck_bitmap_take(bitmap, d->log.memory, false);
    rc = look_for_canary(d);
    if (mode != CK_HARVEST_PEEK) {
        int sent = send_out_canary(d);

        rc = rc ? rc : sent;
    }
    return rc;
}

int xen_log_check(struct xen_domain *d)
{
    int rc = d->log_on ? read_log(d, XEN_LOG_PEEK, 0) : 0;

    return rc ? rc : look_for_canary(d);
}
