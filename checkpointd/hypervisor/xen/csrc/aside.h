/*
 * One call at a time, made by a thread of its own while its caller does something else.
 */
#ifndef CHECKPOINTD_XEN_ASIDE_H
#define CHECKPOINTD_XEN_ASIDE_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>

struct xen_aside {
    void (*work)(void *context);
    void *context;
    pthread_t thread;
    sem_t go, done;
    bool running, begun, stop;
};

/* Start a thread called `name` (15 characters) to which no signal is delivered: those are for Python's threads. 0 or a
 * negative errno. */
int xen_start_thread(pthread_t *thread, const char *name, void *(*run)(void *), void *argument);

/* The thread that will call work(context). 0 or a negative errno. */
int xen_aside_start(struct xen_aside *aside, const char *name, void (*work)(void *), void *context);

/* Call it, and do not wait. Nothing, if it was begun and is not ended yet. */
void xen_aside_begin(struct xen_aside *aside);

/* Wait until it has been called: what it wrote may be read now. False: it was not begun. */
bool xen_aside_end(struct xen_aside *aside);

/* Nothing, if it was not started. */
void xen_aside_stop(struct xen_aside *aside);

#endif
