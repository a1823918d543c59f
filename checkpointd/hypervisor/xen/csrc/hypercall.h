/*
 * What a vcpu that waits for an ioreq server has just asked of Xen, read from its registers.
 *
 * Every resume makes a request for an invalidation, though no memory of the guest changes: Linux
 * puts its grant table into the p2m anew (drivers/xen/grant-table.c, gnttab_resume()), and Xen
 * first takes the same frames out. Were that taken for a change, each epoch would be a full copy.
 *
 * It is told from a change by the hypercall itself: XENMEM_add_to_physmap of one frame of the grant
 * table, at a pfn that was known to hold no memory of the guest. Nothing of the guest's can have
 * left by that. The vcpu stands still at the end of the very hypercall that made the request, so
 * its registers are that hypercall's: the command in rdi, its argument's address in rsi (64-bit
 * guests; a debug build of Xen overwrites them, and then nothing is harmless).
 */
#ifndef CHECKPOINTD_XEN_HYPERCALL_H
#define CHECKPOINTD_XEN_HYPERCALL_H

#include "libs.h"

/* The pfn at which this vcpu, which waits, has put a frame of the grant table, or
 * XEN_NO_GRANT_FRAME: it did something else, or it cannot be told. */
uint64_t xen_grant_frame_put(struct xen_libs *libs, uint32_t domid, uint32_t vcpu);

#define XEN_NO_GRANT_FRAME UINT64_MAX

#endif
