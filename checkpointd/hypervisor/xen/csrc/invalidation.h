/*
 * How we learn that a guest gave frames back: an ioreq server of our own.
 *
 * Xen asks every ioreq server of an HVM or PVH domain to drop its mappings (IOREQ_TYPE_INVALIDATE)
 * whenever a page was taken out of the domain's p2m. The vcpu that did it asks at the end of that
 * hypercall, and runs on only when it is answered. Ours has no I/O ranges and no buffer, so it gets
 * no other request.
 *
 * The order that makes this sound (invariant 8): (1) the page leaves the p2m; (2) the vcpu asks,
 * and stands still; (3) we raise the flag; (4) we answer; (5) the guest goes on, and only now can
 * it put another frame there. So whoever reads the flag after the guest has used the new frame
 * finds it raised. The flag is taken before the mappings are dropped: if it rises in between they
 * are dropped once more, and no rise is lost. A suspend waits for step (4), for Xen does not count
 * a vcpu as stopped that waits for an answer: in the pause the flag is complete.
 *
 * The one request that is passed over is that of a guest's resume, which moves no memory of the
 * guest (hypercall.h); `is_hole` says whether a pfn is known to have held none.
 *
 * What Xen does not tell so (p2m.c, which sees that the domain's number of frames changes, covers
 * part of it):
 *  - a frame put where there was none, or over another: no request;
 *  - changes made by dom0: each vcpu asks at the end of its next hypercall, later than (5). An epoch
 *    in between may have such a page as it was; the next one is whole again. No tool of Xen's
 *    changes the p2m of a running PVH guest;
 *  - a vcpu that gives pages back while another one shuts the guest down: the request is dropped.
 *    Linux stops all other vcpus first.
 *
 * An unanswered vcpu stands still for ever. So the server's number is to be on disk before it is
 * enabled, and whoever finds its holder dead calls xen_ioreq_destroy() (libs.h).
 */
#ifndef CHECKPOINTD_XEN_INVALIDATION_H
#define CHECKPOINTD_XEN_INVALIDATION_H

#include "libs.h"

struct xen_invalidation;

/* Is this pfn known to have nothing of the guest's behind it? Asked on the server's own thread. */
typedef bool xen_is_hole(const void *p2m, uint64_t pfn);

/* Make the server, not yet enabled: it can stop nobody. `nr_vcpus`: all there may ever be
 * (max_vcpu_id + 1), online or not. `is_hole` is called with `p2m`. *server is its number, for the disk. 0, -E2BIG (too many
 * vcpus), -ENOSPC (the domain has all servers it may have), or another negative errno. */
int xen_invalidation_create(struct xen_libs *libs, uint32_t domid, uint32_t nr_vcpus,
                            xen_is_hole *is_hole, const void *p2m, uint16_t *server, struct xen_invalidation **out);

/* Enable it, and start the thread that answers. Map nothing of the guest before: what left the
 * p2m earlier is not told. 0 or a negative errno; then it asks nobody any more, and who has been asked meanwhile waits
 * for close(). */
int xen_invalidation_enable(struct xen_invalidation *invalidation);

/* Did pages leave the p2m since the last call? 1, 0, or a negative errno if nobody knows any
 * more, because the thread met an error and has disabled the server. Any thread. */
int xen_invalidation_take(struct xen_invalidation *invalidation);

/* How many requests have been answered that told of a change. */
uint64_t xen_invalidation_answered(const struct xen_invalidation *invalidation);

/* Answer who still waits, destroy the server, and free everything. On a negative errno the server is still there, for
 * somebody may wait who could not be answered: xen_ioreq_destroy() does it later. That domain or server is gone already
 * is none. NULL is allowed. */
int xen_invalidation_close(struct xen_invalidation *invalidation);

#endif
