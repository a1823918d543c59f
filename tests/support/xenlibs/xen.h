/*
 * A fake Xen of one guest, under the names of Xen's own libraries: what its parts share.
 *
 *   guest.c    the guest's life, and how it answers when it is asked to suspend
 *   control.c  libxenctrl and libxenguest: the domain's state, and its records of the stream
 *   log.c      the dirty log: libxenctrl, and the one call of libxendevicemodel that writes to it
 *   memory.c   libxenforeignmemory and page types, over frames that a mapping pins
 *   ioreq.c    libxendevicemodel and libxenevtchn: the ioreq server, and vcpus that wait for it
 *   store.c    libxenstore
 *
 * A test opens them by name as the adapter does (fake_dom0.py), or puts its own source beside them and a part of the
 * adapter on top (fake_pause.c, fake_p2m.c). There is one guest a library, so the handles say nothing. Nothing in here
 * waits, but a vcpu for its answer: what happens next is what the test said.
 */
#ifndef FAKE_XEN_H
#define FAKE_XEN_H

#include "libs.h"

#include <errno.h>
#include <pthread.h>

#include "hypervisor.h"

#include "guest.h"

/* A stub has the parameters of what it stands in for. Here, not for the compiler: the adapter is to need each of its. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#define PAGE CK_PAGE_SIZE
#define SHUTDOWN_NODE "/local/domain/4/control/shutdown" /* of DOMID */

/* Each library function, as the adapter declares it: a fake with other arguments does not compile. */
#define XEN_PROTOTYPE(library, result, name, arguments) result name arguments;
XEN_FUNCTIONS(XEN_PROTOTYPE)

/* `struct xen_libs libs = { XEN_FUNCTIONS(XEN_ENTRY) }`: for an adapter that is linked with them. */
#define XEN_ENTRY(library, result, name, arguments) .name = name,

/* Of xenstore and of the guest's state: another thread reads while the guest is stopped. Recursive. */
extern pthread_mutex_t fake_lock;
#define LOCKED \
    __attribute__((cleanup(fake_unlock))) pthread_mutex_t *held = &fake_lock; \
    pthread_mutex_lock(held)

static inline void fake_unlock(pthread_mutex_t **held)
{
    pthread_mutex_unlock(*held);
}

static inline int set_errno(int error)
{
    errno = error;
    return -1;
}

/* A handle of a library whose only guest is known. */
#define HANDLE ((void *)&guest)

/* What the guest does after such a call, before the engine's next; NULL: nothing. */
extern void (*fake_meanwhile)(enum call call);

/* Registers of a vcpu in a hypercall. */
extern struct registers { uint64_t rdi, rsi; uint32_t cs; } fake_registers;

/* guest.c: it obeys what control/shutdown says. */
void fake_react(void);

/* memory.c */
void fake_memory_reset(uint64_t nr_frames);
bool fake_has_page(uint64_t pfn);
uint8_t *fake_page(uint64_t pfn);
/* The page leaves the p2m, and its frame, which is returned, is charged until it is let go. -1: there was none. */
int64_t fake_page_out(uint64_t pfn);
void fake_let_go(int64_t frame);

/* log.c: a page has come in. */
void fake_log_new_page(uint64_t pfn);

/* ioreq.c: a vcpu asks, and waits; does it go on? */
bool fake_ask_and_wait(int vcpu);
void fake_ioreq_reset(void);

/* store.c: all nodes go, untold. */
void fake_store_reset(void);

#endif
