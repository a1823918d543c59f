/*
 * One Xen domain that this engine is attached to: what the functions of its table share.
 *
 * Memory and handles are made at attach; the functions of the table allocate nothing of their own. (What libxenctrl
 * allocates inside of a call is its own affair; its buffers of one page are kept from call to call.)
 */
#ifndef CHECKPOINTD_XEN_DOMAIN_H
#define CHECKPOINTD_XEN_DOMAIN_H

#include "aside.h"
#include "hypervisor.h"
#include "libs.h"

struct xen_p2m;          /* p2m.c */
struct xen_invalidation; /* invalidation.c */

#define XEN_PARAMS 16 /* of HVM_PARAMS, at most (context.c) */

struct xen_domain {
    struct ck_hypervisor table;
    struct xen_libs *libs;
    struct xen_store *store; /* of the pause alone, with its watches */
    uint32_t domid;
    uint64_t nr_pfns;

    /* suspend.c */
    char shutdown_path[64]; /* /local/domain/DOMID/control/shutdown */
    bool suspended;         /* by us: resume() is ours to do */
    bool late;              /* a request was taken and not obeyed in time: the next stop may be for that */
    bool foreign;           /* somebody else suspends this domain (xl save, xl migrate): hands off */
    uint64_t writes;        /* of control/shutdown, by anybody, from our last request on */
    struct xen_aside look;  /* reads that node while the guest stands still: these two */
    char word[32];
    int word_rc;
    uint64_t *asked_ns, own_asked_ns; /* see xen_domain_keep() */

    /* log.c */
    struct xen_buffer log;  /* hypercall-safe: one bit a pfn */
    bool log_on;            /* by us */
    uint64_t *canaries;     /* pfns that had memory when the log was enabled */
    uint32_t nr_canaries, next_canary;
    uint64_t canary;        /* marked dirty after the last CLEAN; XEN_NO_CANARY: none is out */
    uint64_t requests;      /* xen_p2m_requests() of that time */
    uint64_t thefts;        /* times that the log was cleaned or ended behind our back */

    /* context.c */
    uint32_t context_bytes; /* of HVM_CONTEXT, for all vcpus there may be */
    uint32_t nr_params;
    struct xen_param { uint64_t index, value; } params[XEN_PARAMS]; /* those that are not 0 */

    uint64_t closed;        /* epochs closed by output_close() */

    struct xen_p2m *p2m;
    bool grown;             /* the p2m has more pfns than nr_pfns: what is beyond is not looked at */
    struct xen_invalidation *invalidation;
};

#define XEN_NO_CANARY UINT64_MAX
#define XEN_CANARIES 1024u /* pages that may be marked, at most */

/* Attach to `domid`: memory, watches, the table. 0 or a negative errno. Changes nothing in the hypervisor. */
int xen_domain_new(struct xen_libs *libs, uint32_t domid, struct xen_domain **out);

/* Gives back memory and handles; what was done in the hypervisor is undone by others before. NULL is allowed. */
void xen_domain_free(struct xen_domain *domain);

struct ck_hypervisor *xen_domain_table(struct xen_domain *domain);

/* Of its p2m when it was attached to, holes included. */
uint64_t xen_domain_nr_pfns(const struct xen_domain *domain);

/* From now on *asked_ns says, also to those who find us dead, whether a request of ours to suspend is out: the time in
 * which the guest is to stop, from before it is asked until it has been resumed, or the request is proved to be void;
 * else 0. Not 0 now: one of a dead engine's is out, and what the guest stops for is ours to undo. */
void xen_domain_keep(struct xen_domain *domain, uint64_t *asked_ns);

/* For those who look on from another thread. */
struct xen_signs { uint64_t thefts; bool suspended, late, foreign, grown; };
void xen_domain_signs(const struct xen_domain *domain, struct xen_signs *signs);

/* Functions of the table that are not of the p2m; see hypervisor.h. */
int xen_suspend(void *domain, int64_t timeout_ns);       /* suspend.c */
int xen_resume_ours(void *domain);
int xen_harvest(void *domain, struct ck_bitmap *bitmap, int mode); /* log.c */
int64_t xen_context(void *domain, uint8_t *buffer, uint64_t capacity);       /* context.c */

/* The p2m (p2m.c, invalidation.c). */
int64_t xen_p2m_changes(void *domain, struct ck_bitmap *bitmap);
int xen_types(void *domain, uint64_t *pfns, uint32_t count);
int xen_map(void *domain, uint64_t first_pfn, uint32_t count, void **base);
int xen_unmap(void *domain, void *base, uint32_t count);

/* suspend.c: watches of the pause, and a thread beside it. 0 or a negative errno. */
int xen_suspend_prepare(struct xen_domain *domain);
void xen_suspend_end(struct xen_domain *domain);

/* Has somebody else stopped the guest, who reads its memory now? Then it is lost to us, and signs() say so. */
bool xen_stands_for_others(struct xen_domain *domain);

/* log.c: on, all clean. -EINVAL: it is on already, by whomever. */
int xen_log_begin(struct xen_domain *domain);

/* Is it still as we left it? Takes nothing out of it; for the epoch loop's thread. 0; -ESTALE, and a theft more, if it
 * was in other hands; or as harvest(). */
int xen_log_check(struct xen_domain *domain);

/* context.c: what the pause needs to know beforehand. */
int xen_context_prepare(struct xen_domain *domain);

/* The records that begin the stream, whole: image header, domain header (of Xen `major`.`minor`), both CPU
 * policies, STATIC_DATA_END. Returns the octets written, -ENOSPC, or another negative errno. */
int64_t xen_static_records(struct xen_domain *domain, uint32_t major, uint32_t minor,
                           uint8_t *buffer, uint64_t capacity);

#endif
