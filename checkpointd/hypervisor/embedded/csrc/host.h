/*
 * The host of one guest: the thread that runs its steps, and what stops, feeds and ends it.
 *
 * Threads: the guest thread (here), the transmit thread (nic.c), the mapper thread while an engine is attached
 * (mapper.c), and the caller's (host.py), which gives the orders below.
 */
#ifndef EMBEDDED_HOST_H
#define EMBEDDED_HOST_H

#include "fault.h"
#include "guest.h"
#include "machine.h"
#include "mapper.h"
#include "nic.h"

struct host {
    struct machine *machine;
    struct control *control;
    int control_fd;             /* memfd of the control page and bitmaps */
    int kick;                   /* eventfd: the guest thread should look up */
    int note;                   /* eventfd: tells the engine that `state` or `ended` changed */
    int done;                   /* eventfd: tells host.py that a balloon order is done, or the guest ended */
    int input_log;
    struct nic nic;
    struct mapper mapper;
    struct fault_rules faults;
    uint64_t ticks_per_second;  /* 0: the program only answers */
    bool running;
    pthread_t thread;
    uint32_t stop;              /* an end_reason by order; 0: none */
    int failure;                /* negative errno that made the host give up (input log, RAM); 0: none */

    /* One balloon order at a time; host.py waits for `done` before it gives the next. */
    pthread_mutex_t order_lock;
    uint32_t order_kind;        /* enum step_kind; 0: none pending */
    uint32_t order_pages;
    uint32_t *order_pfns;
    uint32_t order_changed;
};

/* Build a host around the memory file `memory_fd`; it takes over udp_fd and input_log_fd. `populated` as for
 * machine_new. NULL and errno on failure, both then still the caller's. */
struct host *host_new(int memory_fd, uint64_t nr_pfns, const uint64_t *populated, uint64_t seed,
                      int udp_fd, int input_log_fd, uint64_t output_limit_bytes);
/* Stop the guest's threads, if any, and free all. */
void host_free(struct host *h);

/* Lay out fresh RAM; see guest_boot. */
int host_boot(struct host *h, const char *program, const uint8_t uuid[16]);
uint64_t host_step(const struct host *h);

/* Add a rule of the host's points, before it starts; -ENOSPC if there are too many. */
int host_add_fault(struct host *h, const struct fault_rule *rule);

/* Begin to run. -EINVAL: the RAM holds no guest. */
int host_start(struct host *h, bool paused);
/* End the guest for this reason and wait until it has ended. */
void host_end(struct host *h, uint32_t reason);
void host_pause(struct host *h, bool paused);

/* Order the balloon driver; -EBUSY: the last order is not done. */
int host_balloon(struct host *h, bool in, const uint32_t *pfns, uint32_t nr);
/* Pages changed by the last order, -EAGAIN if it is not done yet. */
int64_t host_balloon_result(struct host *h);

/* An engine comes: its end of the mapper's socket in *fd. And goes: mappings dropped, log ended, suspend
 * withdrawn, output left as it is. */
int host_attach(struct host *h, int *fd);
void host_detach(struct host *h);
/* Begin the dirty log, all clean; -EINVAL if it is on. */
int host_enable_log(struct host *h);
void host_output_open(struct host *h);

#endif
