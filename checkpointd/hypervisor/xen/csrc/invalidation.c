#include "strict.h"
#include "invalidation.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "aside.h"
#include "hypercall.h"

/* ioreq_t, public/hvm/ioreq.h. */
struct ioreq {
    uint64_t address, data;
    uint32_t count, size;
    uint32_t port; /* the guest's end of the vcpu's event channel */
    uint16_t pad;
    _Atomic uint8_t bits; /* 3-0: state, written by both sides; the others are of the request */
    uint8_t type;
};
_Static_assert(sizeof(struct ioreq) == 32, "public/hvm/ioreq.h");

#define STATE_MASK     0x0fu
#define STATE_ASKED    1u /* STATE_IOREQ_READY */
#define STATE_ANSWERED 3u /* STATE_IORESP_READY */

#define BUFFERED_OFF  0 /* HVM_IOREQSRV_BUFIOREQ_OFF, public/hvm/hvm_op.h */
#define RESOURCE      0 /* XENMEM_resource_ioreq_server, public/memory.h */
#define FRAME_OF_PAGE 1 /* XENMEM_resource_ioreq_server_frame_ioreq(0) */
#define MAX_VCPUS     (4096 / sizeof(struct ioreq)) /* of one page; Xen allows no more */
#define NO_PORT       (-1)

struct xen_invalidation {
    struct xen_libs *libs;
    struct xen_memory_resource *resource;
    struct ioreq *page; /* one slot a vcpu */
    struct xen_events *events;
    uint32_t domid, nr_vcpus;
    xen_is_hole *is_hole; /* of p2m */
    const void *p2m;
    uint16_t server;
    int stop; /* eventfd: the thread is to end */
    bool running;
    pthread_t thread;
    atomic_bool raised;
    atomic_int failure; /* negative errno: the thread could not go on */
    atomic_uint_fast64_t answered;
    int ports[MAX_VCPUS]; /* ours, by vcpu; NO_PORT: not bound */
};

static int failed(void)
{
    return errno ? -errno : -EIO;
}

static int set_enabled(const struct xen_invalidation *inv, bool enabled)
{
    int rc = inv->libs->xendevicemodel_set_ioreq_server_state(
        inv->libs->devices, (uint16_t)inv->domid, inv->server, enabled);

    return rc ? failed() : 0;
}

static int destroy(const struct xen_invalidation *inv)
{
    int rc = inv->libs->xendevicemodel_destroy_ioreq_server(inv->libs->devices,
                                                            (uint16_t)inv->domid, inv->server);

    return rc ? failed() : 0;
}

/* A domain or a server that is gone asks nothing, and needs nothing. */
static int unless_gone(int rc)
{
    return rc == -ENOENT || rc == -ESRCH ? 0 : rc;
}

/* ------------------------------------------------------------ page and ports */

/* Also makes Xen allocate the page, which must have happened before the server is enabled. */
static int map_page(struct xen_invalidation *inv)
{
    void *page = NULL;

    inv->resource = inv->libs->xenforeignmemory_map_resource(
        inv->libs->memory, (uint16_t)inv->domid, RESOURCE, inv->server, FRAME_OF_PAGE, 1, &page,
        PROT_READ | PROT_WRITE, 0);
    if (!inv->resource)
        return failed();
    inv->page = page;
    return 0;
}

static int open_events(struct xen_invalidation *inv)
{
    inv->events = inv->libs->xenevtchn_open(NULL, 0);
    return inv->events ? 0 : failed();
}

static int bind_port(struct xen_invalidation *inv, uint32_t vcpu)
{
    int port = inv->libs->xenevtchn_bind_interdomain(inv->events, inv->domid,
                                                     inv->page[vcpu].port);

    if (port < 0)
        return failed();
    inv->ports[vcpu] = port;
    return 0;
}

/* Let a waiting vcpu go on. */
static int answer(struct xen_invalidation *inv, uint32_t vcpu)
{
    struct ioreq *slot = &inv->page[vcpu];
    uint8_t bits = atomic_load(&slot->bits);

    atomic_store(&slot->bits, (uint8_t)((bits & ~STATE_MASK) | STATE_ANSWERED));
    return inv->libs->xenevtchn_notify(inv->events, (uint32_t)inv->ports[vcpu]) ? failed() : 0;
}

static bool asks(const struct xen_invalidation *inv, uint32_t vcpu)
{
    return (atomic_load(&inv->page[vcpu].bits) & STATE_MASK) == STATE_ASKED;
}

/* Only a resume, which put a frame of the grant table where one was before? */
static bool is_harmless(const struct xen_invalidation *inv, uint32_t vcpu)
{
    uint64_t pfn = xen_grant_frame_put(inv->libs, inv->domid, vcpu);

    return pfn != XEN_NO_GRANT_FRAME && inv->is_hole(inv->p2m, pfn);
}

/* Raise the flag, then answer: see the order in invalidation.h. */
static int answer_all(struct xen_invalidation *inv)
{
    int first = 0;

    for (uint32_t vcpu = 0; vcpu < inv->nr_vcpus; vcpu++) {
        if (inv->ports[vcpu] == NO_PORT || !asks(inv, vcpu))
            continue;
        if (!is_harmless(inv, vcpu)) {
            atomic_store(&inv->raised, true);
            atomic_fetch_add(&inv->answered, 1);
        }
        int rc = answer(inv, vcpu);
        if (rc && !first)
            first = rc;
    }
    return first;
}

/* Wake every vcpu that may wait, on a port of its own each time: one free event channel is enough. The holder may
 * have died between writing its answer and telling, so that all are told who are not seen to be at rest; a vcpu that is
 * told for nothing looks at its slot and waits on. */
static int wake(struct xen_invalidation *inv)
{
    for (uint32_t vcpu = 0; vcpu < inv->nr_vcpus; vcpu++) {
        int rc;

        if ((atomic_load(&inv->page[vcpu].bits) & STATE_MASK) == 0)
            continue;
        rc = bind_port(inv, vcpu);
        if (rc == -EINVAL)
            return -EBUSY; /* bound: its holder lives */
        if (rc)
            return rc;
        rc = answer(inv, vcpu);
        inv->libs->xenevtchn_unbind(inv->events, (uint32_t)inv->ports[vcpu]);
        inv->ports[vcpu] = NO_PORT;
        if (rc)
            return rc;
    }
    return 0;
}

/* Answer all who wait, whatever became of the ports: those of before are given back first. */
static int answer_anew(struct xen_invalidation *inv)
{
    int rc;

    if (inv->events)
        inv->libs->xenevtchn_close(inv->events); /* unbinds all ports */
    for (uint32_t vcpu = 0; vcpu < MAX_VCPUS; vcpu++)
        inv->ports[vcpu] = NO_PORT;
    rc = open_events(inv);
    return rc ? rc : wake(inv);
}

/* ------------------------------------------------------------ the thread */

/* Take one event, and answer. Unmasked first, so that who asks after we looked wakes us again. */
static int serve(struct xen_invalidation *inv)
{
    int port = inv->libs->xenevtchn_pending(inv->events);

    if (port < 0)
        return errno == EINTR || errno == EAGAIN ? 0 : failed();
    if (inv->libs->xenevtchn_unmask(inv->events, (uint32_t)port))
        return failed();
    return answer_all(inv);
}

static void *run(void *argument)
{
    struct xen_invalidation *inv = argument;
    struct pollfd wait[2] = {
        { .fd = inv->libs->xenevtchn_fd(inv->events), .events = POLLIN },
        { .fd = inv->stop, .events = POLLIN },
    };
    int rc = answer_all(inv); /* who asked before the ports were bound */

    while (rc == 0) {
        if (poll(wait, 2, -1) < 0)
            rc = errno == EINTR ? 0 : failed();
        else if (wait[1].revents)
            return NULL;
        else if (wait[0].revents)
            rc = serve(inv);
    }
    /* Blind from now on: take() says so, and the guest is not to wait for us. */
    atomic_store(&inv->failure, rc);
    set_enabled(inv, false);
    answer_anew(inv);
    return NULL;
}

static int start_thread(struct xen_invalidation *inv)
{
    int rc = xen_start_thread(&inv->thread, "invalidations", run, inv);

    inv->running = rc == 0;
    return rc;
}

static void stop_thread(struct xen_invalidation *inv)
{
    if (!inv->running)
        return;
    eventfd_write(inv->stop, 1);
    pthread_join(inv->thread, NULL);
    inv->running = false;
}

/* ------------------------------------------------------------ its life */

static struct xen_invalidation *allocate(struct xen_libs *libs, uint32_t domid, uint32_t nr_vcpus)
{
    struct xen_invalidation *inv = calloc(1, sizeof *inv);

    if (!inv)
        return NULL;
    inv->libs = libs;
    inv->domid = domid;
    inv->nr_vcpus = nr_vcpus;
    inv->stop = -1;
    for (uint32_t i = 0; i < MAX_VCPUS; i++)
        inv->ports[i] = NO_PORT;
    return inv;
}

static void release(struct xen_invalidation *inv)
{
    if (inv->events)
        inv->libs->xenevtchn_close(inv->events); /* unbinds all ports */
    if (inv->resource)
        inv->libs->xenforeignmemory_unmap_resource(inv->libs->memory, inv->resource);
    if (inv->stop >= 0)
        close(inv->stop);
    free(inv);
}

int xen_invalidation_create(struct xen_libs *libs, uint32_t domid, uint32_t nr_vcpus,
                            xen_is_hole *is_hole, const void *p2m, uint16_t *server, struct xen_invalidation **out)
{
    struct xen_invalidation *inv;
    int rc;

    if (nr_vcpus > MAX_VCPUS)
        return -E2BIG;
    inv = allocate(libs, domid, nr_vcpus);
    if (!inv)
        return -ENOMEM;
    inv->is_hole = is_hole;
    inv->p2m = p2m;
    inv->stop = eventfd(0, EFD_CLOEXEC);
    rc = inv->stop < 0 ? failed() : open_events(inv);
    if (rc == 0
        && libs->xendevicemodel_create_ioreq_server(libs->devices, (uint16_t)domid, BUFFERED_OFF,
                                                    &inv->server))
        rc = failed();
    if (rc) {
        release(inv);
        return rc;
    }
    rc = map_page(inv);
    if (rc) {
        destroy(inv);
        release(inv);
        return rc;
    }
    *server = inv->server;
    *out = inv;
    return 0;
}

int xen_invalidation_enable(struct xen_invalidation *inv)
{
    /* Xen writes the ports into the page only now; who asks before they are bound waits for run(). */
    int rc = set_enabled(inv, true);

    for (uint32_t vcpu = 0; rc == 0 && vcpu < inv->nr_vcpus; vcpu++)
        rc = bind_port(inv, vcpu);
    if (rc == 0)
        rc = start_thread(inv);
    if (rc) {
        set_enabled(inv, false);
        answer_all(inv);
    }
    return rc;
}

int xen_invalidation_take(struct xen_invalidation *inv)
{
    int failure = atomic_load(&inv->failure);

    return failure ? failure : atomic_exchange(&inv->raised, false);
}

uint64_t xen_invalidation_answered(const struct xen_invalidation *inv)
{
    return atomic_load(&inv->answered);
}

/* Destroying the server does not wake who waits, and nobody can afterwards: first no one else can ask, then all are
 * answered. */
static int end_server(struct xen_invalidation *inv)
{
    int rc = set_enabled(inv, false);

    stop_thread(inv);
    if (rc == 0)
        rc = answer_anew(inv);
    return rc ? rc : destroy(inv);
}

/* The event channels of a domain that is dying are gone before the domain is. */
static bool is_dying(const struct xen_invalidation *inv)
{
    struct xen_dominfo info;
    int rc = xen_domain_state(inv->libs, inv->domid, &info);

    return rc == -ESRCH || (rc == 0 && (info.flags & XEN_STATE_DYING));
}

int xen_invalidation_close(struct xen_invalidation *inv)
{
    int rc;

    if (!inv)
        return 0;
    rc = unless_gone(end_server(inv));
    if (rc && is_dying(inv))
        rc = 0;
    release(inv);
    return rc;
}

/* ------------------------------------------------------------ after its holder's death */

int xen_ioreq_destroy(struct xen_libs *libs, uint32_t domid, uint16_t server)
{
    struct xen_invalidation *inv;
    struct xen_dominfo info;
    int rc = xen_domain_state(libs, domid, &info);

    if (rc)
        return rc == -ESRCH ? -ENOENT : rc;
    inv = allocate(libs, domid, info.max_vcpu_id + 1);
    if (!inv)
        return -ENOMEM;
    inv->server = server;
    /* Can be repeated from the start, wherever it was interrupted. */
    rc = set_enabled(inv, false);
    if (rc == 0)
        rc = map_page(inv);
    if (rc == 0)
        rc = open_events(inv);
    if (rc == 0)
        rc = wake(inv);
    if (rc == 0)
        rc = destroy(inv);
    release(inv);
    return rc;
}
