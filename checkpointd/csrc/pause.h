/*
 * The pause and the live round, each one call: from here to the return nothing touches Python,
 * takes a lock, allocates, or logs.
 *
 * Who owns a dirty bit (invariant 3): the hypervisor's log, until harvest ORs it into `pending`;
 * `pending`, until its page is staged; then `carried`, the bitmap of that arena, until the caller
 * has the ack and clears it. On any failure all of `carried` goes back to `pending` and the arena
 * is empty. Where the hypervisor says that its own log is lost (a failed harvest or p2m_changes,
 * other than -EAGAIN), every bit of `pending` is set.
 */
#ifndef CHECKPOINTD_PAUSE_H
#define CHECKPOINTD_PAUSE_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "digest.h"
#include "mappings.h"

#define CK_TOO_MANY 1 /* status: the dirty set does not fit the arena */

/* Where a call failed. */
enum ck_step {
    CK_STEP_NONE,
    CK_STEP_ARENA, /* -EBUSY: `carried` is not empty; nothing was done */
    CK_STEP_SUSPEND,
    CK_STEP_P2M,
    CK_STEP_HARVEST,
    CK_STEP_TYPES,
    CK_STEP_MAP,
    CK_STEP_STAGE, /* -EPROTO: types() gave a word that no PAGE_DATA record may hold */
    CK_STEP_CONTEXT,
    CK_STEP_AUDIT, /* types() or map() for the audit */
    CK_STEP_OUTPUT,
    CK_STEP_RESUME, /* resume_status says why: the epoch is whole, but the guest may stand still */
};

/* All bitmaps have the cache's nr_pfns bits. */
struct ck_request {
    struct ck_mappings *mappings;
    struct ck_bitmap *pending;
    struct ck_bitmap *carried; /* empty */
    struct ck_arena *arena;
    const struct ck_digest_key *key; /* of the audit, and of `known` */
    const struct ck_bitmap *audit; /* pause: what to audit; NULL: all that was ever staged */
    uint8_t *known;        /* live, or NULL: CK_DIGEST_SIZE octets a pfn, of what the other side
                            * has, zero: unknown; becomes zero where another version is staged */
    uint64_t cursor;       /* pfn at which the audit (pause) or the staging (live) begins */
    int64_t suspend_timeout_ns;
    bool close_output; /* pause */
    bool stay;         /* pause: if all goes well the guest is left suspended */
    bool detect_zero;
};

struct ck_outcome {
    int status; /* 0, CK_TOO_MANY, or negative errno */
    int resume_status;
    enum ck_step step;

    /* CLOCK_MONOTONIC nanoseconds; pause_ns: from the return of suspend() to that of resume(). */
    int64_t suspend_ns, harvest_ns, stage_ns, context_ns, audit_ns, output_ns, resume_ns, pause_ns;

    uint64_t pages, zeros, gone; /* staged: with data, all zero, nothing there */
    uint64_t known;     /* left out, since the other side has them; their bits are in `carried` */
    uint64_t dirty;     /* bits in `pending` after the harvest */
    uint64_t remaining; /* bits in `pending` at the end */
    uint64_t audited;
    uint64_t cursor; /* for the next call of the same kind */
    uint64_t closed_output;
};

/* One epoch: suspend, harvest FINAL, stage everything, context, audit, output_close, resume. The
 * guest is resumed on every path on which suspend() was called, but for a success with `stay`. */
void ck_pause(const struct ck_request *request, struct ck_outcome *outcome);

/* One round with the guest running: harvest CLEAN, then stage from the cursor upwards and round to
 * it again, as much as fits; the rest stays in `pending`. */
void ck_live_round(const struct ck_request *request, struct ck_outcome *outcome);

#endif
