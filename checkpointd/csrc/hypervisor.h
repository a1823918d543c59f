/*
 * The hypervisor port, C half: what the pause needs of a hypervisor, and no more.
 *
 * An adapter fills one `struct ck_hypervisor` for each domain it attaches to and hands its address to the
 * native pause, which calls through it without ever touching Python. The Python half of the port is
 * checkpointd/hypervisor/port.py.
 *
 * Rules for every function:
 *  - returns 0 (or a count, where it says so) on success and a negative errno on failure; never aborts;
 *  - is called by one thread at a time (the caller serialises), not always by the same thread;
 *  - allocates nothing and logs nothing: it may run while the guest is stopped;
 *  - "pfn" is the guest's page frame number; a bitmap (bitmap.h) has a bit for each pfn of the guest, else -EINVAL.
 */
#ifndef CHECKPOINTD_HYPERVISOR_H
#define CHECKPOINTD_HYPERVISOR_H

#include <stdint.h>

#include "bitmap.h"

#define CK_HYPERVISOR_ABI 2u

#define CK_PAGE_SHIFT 12
#define CK_PAGE_SIZE  4096u

/* Pages are mapped, kept, evicted and invalidated in whole extents: 512 pages, 2 MiB, aligned in pfn space.
 * privcmd cannot unmap or replace a part of what one call mapped, and 2 MiB is one page-table page. */
#define CK_EXTENT_SHIFT 9
#define CK_EXTENT_PAGES 512u

/* Modes of harvest(): Xen's log-dirty operations under their own names. */
#define CK_HARVEST_PEEK  0   /* return the log, keep it */
#define CK_HARVEST_CLEAN 1   /* return the log and clear it; the guest may be running (live rounds) */
#define CK_HARVEST_FINAL 2   /* CLEAN, plus what the hypervisor itself has mapped writable; guest suspended */

/* Page types as PAGE_DATA carries them in bits 63-60 of a pfn word (libxc stream, section PAGE_DATA). */
#define CK_PFN_MASK      0x000fffffffffffffull
#define CK_TYPE_SHIFT    60
#define CK_TYPE_NOTAB    0x0ull   /* ordinary page, carries data */
#define CK_TYPE_BROKEN   0xdull   /* no data */
#define CK_TYPE_XTAB     0xfull   /* nothing behind this pfn, no data */

struct ck_hypervisor {
    uint32_t abi;    /* CK_HYPERVISOR_ABI; the native side refuses any other */
    uint32_t size;   /* sizeof(struct ck_hypervisor) */
    void *domain;    /* given back as the first argument of each function */

    /* Stop the guest and return once it has stopped, -ETIMEDOUT after timeout_ns (the request is then
     * withdrawn: the guest goes on), -ESHUTDOWN if the guest has ended for good (power-off, crash, destroy),
     * -EHOSTDOWN if its host is gone. */
    int (*suspend)(void *domain, int64_t timeout_ns);

    /* Let a suspended guest run on. Idempotent. */
    int (*resume)(void *domain);

    /* OR the dirty log into `bitmap` (never clears a bit there, so that no bit is lost when a call fails
     * half way). -EAGAIN: nothing was changed, ask again. Any other failure: the log is lost. */
    int (*harvest)(void *domain, struct ck_bitmap *bitmap, int mode);

    /* OR into `bitmap` each pfn whose backing changed (ballooned out, in, or exchanged) since the last call.
     * Returns how many there were. A mapping made before such a change shows another page: invariant 8.
     * A change is reported no later than types() or map() shows it: live rounds rely on that. */
    int64_t (*p2m_changes)(void *domain, struct ck_bitmap *bitmap);

    /* For count <= 1024 pfns, replace pfns[i] by its PAGE_DATA word: type << CK_TYPE_SHIFT | pfn. */
    int (*types)(void *domain, uint64_t *pfns, uint32_t count);

    /* Map `count` pages from first_pfn read-only at one address range. Pages with nothing behind them are
     * holes, and touching one is a fault: types() says which, before the copy. -ENOSPC: the adapter's own
     * limit of mappings is reached; the caller unmaps another extent and asks again. */
    int (*map)(void *domain, uint64_t first_pfn, uint32_t count, void **base);
    int (*unmap)(void *domain, void *base, uint32_t count);

    /* Write the tail records of an epoch (for PVH: X86_TSC_INFO, HVM_CONTEXT, HVM_PARAMS), whole and padded,
     * as they go into the stream. Guest suspended. Returns the bytes written, -ENOSPC if they do not fit. */
    int64_t (*context)(void *domain, uint8_t *buffer, uint64_t capacity);

    /* Close the open epoch of the output buffer: what the guest sends from now on belongs to the next one.
     * Gives the number of the closed epoch, which release (port.py) takes. Guest suspended. */
    int (*output_close)(void *domain, uint64_t *closed);
};

#endif
