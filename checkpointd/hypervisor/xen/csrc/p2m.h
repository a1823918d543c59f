/*
 * What is behind the guest's pfns: types, mappings, and the news that it changed.
 *
 * The p2m of a PVH guest has a million pfns and more, most of them holes. A hole, once known, is
 * not asked for again until something changed; so the first round asks for every pfn once, and an
 * epoch asks for dirty pages only.
 *
 * What changed is told all or nothing: no pfn is known to be as it was, every mapping is void and
 * every page dirty. Two facts leave no other choice:
 *  - An invalidation (invalidation.h) says that pages left, not which; they may be back by now,
 *    with other frames.
 *  - The dirty log does not tell what came in. Up to Xen 4.19.4 and 4.20.2 a page put into the p2m
 *    is not marked dirty, and what the guest writes to it until the next CLEAN is logged nowhere.
 *    (Later releases mark it. The same order serves both, and asks no release what was backported
 *    to it.)
 * So a guest whose memory is resized is copied once more. That is rare, and right.
 *
 * A frame that came in without one going out is seen by the domain's number of frames (tot_pages).
 * A frame that went out stays in that number as long as we map it, so the number proves nothing
 * until our mappings of then are gone: that is why the call after an invalidation tells a change
 * again.
 *
 * Order: p2m_changes() is called before CLEAN, and a page is copied after CLEAN. So what was told
 * is logged from then on, and a page that comes in after the telling changes the number for the
 * next call.
 */
#ifndef CHECKPOINTD_XEN_P2M_H
#define CHECKPOINTD_XEN_P2M_H

#include "libs.h"

struct xen_domain; /* domain.h */

/* In this order. Begin: memory for what is known, and an ioreq server, whose number is to be on
 * disk before it is enabled (invalidation.h). `deaf`: never tell a change; for the test that
 * must fail without. 0 or a negative errno: nothing was begun. */
int xen_p2m_begin(struct xen_domain *domain, bool deaf, uint16_t *server);

/* Enable the server, before anything is mapped. 0 or a negative errno. */
int xen_p2m_watch(struct xen_domain *domain);

/* Undo both, after everything is unmapped; whatever has not been begun is passed over. 0, or the
 * first error: all is done that could be. */
int xen_p2m_end(struct xen_domain *domain);

/* Requests answered since xen_p2m_begin(): how often pages were taken out. */
uint64_t xen_p2m_requests(const struct xen_domain *domain);

/* xen_p2m_changes, xen_types, xen_map and xen_unmap are functions of the table (domain.h,
 * hypervisor.h). The first also returns -ERANGE: the guest's p2m has grown beyond the nr_pfns of
 * its attachment; -ESHUTDOWN: the domain is gone. */

#endif
