/*
 * The pages that an embedded host shares with the engine attached to its guest.
 *
 * One memfd: this struct in its first page, then three bitmaps of nr_pfns bits, each padded to whole pages.
 * Both sides map all of it, so the pause needs no message: a suspend, a harvest, the context and the closing
 * of the output are loads and stores here, and two eventfds to wake the other side.
 *
 * Words that both sides touch while the guest may run are accessed with __atomic builtins; everything else
 * is written by one side only, or under log_lock.
 */
#ifndef EMBEDDED_CONTROL_H
#define EMBEDDED_CONTROL_H

#include <errno.h>
#include <pthread.h>
#include <stdint.h>

#define CONTROL_ABI 1u
#define CONTROL_PAGE 4096u      /* octets; the bitmaps begin after this many */
#define CONTEXT_MAX 512u        /* octets; X86_TSC_INFO and HVM_CONTEXT take 192 of them */

/* Why a guest is no more (control.ended); 0 while it lives. EndReason in port.py, by number. */
enum end_reason { END_NONE, END_POWEROFF, END_REBOOT, END_CRASH, END_DESTROYED };

struct control {
    uint32_t abi;
    uint32_t context_bytes;         /* of `context`; written by the host before it reports a suspend */
    uint64_t nr_pfns;

    /* Orders the guest's stores against the harvest: a step stores and marks while it holds it, so CLEAN
     * sees either both or neither. Robust: whoever dies with it leaves it to the other side. */
    pthread_mutex_t log_lock;
    uint32_t log_on;                /* under log_lock */

    /* Suspend. The engine writes a fresh ticket into `request` and 0 to let the guest go on; the host
     * answers by writing that ticket into `state`. Tickets never repeat, so a late answer to a withdrawn
     * request is not mistaken for the answer to a new one. */
    uint32_t ticket;                /* the last one given out */
    uint32_t request;
    uint32_t state;
    uint32_t paused;                /* the operator's pause, beside and beyond any request */
    uint32_t ended;                 /* enum end_reason */

    /* Output. The engine writes `shut`, `open_epoch` (guest suspended) and `released`; the host the rest. */
    uint32_t shut;
    uint64_t open_epoch;            /* what the guest sends now belongs to this epoch */
    uint64_t released;              /* every epoch up to this one may leave */
    uint64_t held_packets, held_bytes, limit_bytes, dropped_packets, released_packets;

    uint64_t step;                  /* the last step done, for onlookers; the guest's own is in its RAM */
    uint8_t context[CONTEXT_MAX];   /* the tail records of the epoch, as of `state` */
};

_Static_assert(sizeof(struct control) <= CONTROL_PAGE, "the bitmaps begin on the second page");

static inline uint64_t bitmap_words(uint64_t nr_pfns)
{
    return (nr_pfns + 63) / 64;
}

static inline uint64_t control_bitmap_bytes(uint64_t nr_pfns)
{
    return (bitmap_words(nr_pfns) * 8 + CONTROL_PAGE - 1) / CONTROL_PAGE * CONTROL_PAGE;
}

static inline uint64_t control_bytes(uint64_t nr_pfns)
{
    return CONTROL_PAGE + 3 * control_bitmap_bytes(nr_pfns);
}

static inline uint64_t *control_bitmap(struct control *c, unsigned which)
{
    return (uint64_t *)((uint8_t *)c + CONTROL_PAGE + which * control_bitmap_bytes(c->nr_pfns));
}

/* Pages written since the last CLEAN; under log_lock. */
static inline uint64_t *control_dirty(struct control *c) { return control_bitmap(c, 0); }
/* Pages whose backing changed since the engine last asked; under log_lock. */
static inline uint64_t *control_changed(struct control *c) { return control_bitmap(c, 1); }
/* Pages with memory behind them; written by the host under log_lock, read by the engine as a hint while the
 * guest runs and as the truth while it is suspended. */
static inline uint64_t *control_populated(struct control *c) { return control_bitmap(c, 2); }

static inline void log_lock(struct control *c)
{
    /* The dead owner was at most half way through marking bits (the host is gone, nobody reads them again)
     * or collecting them (the engine is gone, and the next one trusts no earlier log). */
    if (pthread_mutex_lock(&c->log_lock) == EOWNERDEAD)
        pthread_mutex_consistent(&c->log_lock);
}

static inline void log_unlock(struct control *c)
{
    pthread_mutex_unlock(&c->log_lock);
}

#define LOAD(field) __atomic_load_n(&(field), __ATOMIC_SEQ_CST)
#define STORE(field, value) __atomic_store_n(&(field), (value), __ATOMIC_SEQ_CST)

/* Numbers of the output and the guest for status; each is read atomically, not all together. */
struct control_stats {
    uint64_t held_packets, held_bytes, limit_bytes, dropped_packets, released_packets;
    uint64_t step, ram_pages;
    uint32_t shut, paused, ended, log_on;
};

void control_read_stats(struct control *c, struct control_stats *stats);

/* Wake whoever polls this eventfd. */
void event_signal(int fd);
/* Make it unreadable again. */
void event_drain(int fd);

#endif
