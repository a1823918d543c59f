/*
 * The ioreq server and the event channels of its vcpus. Kept from the real thing, since the tests are about it: a vcpu
 * that took pages out asks the enabled server and stands still. It looks for the answer only when it is told; an event
 * is lost if no port is bound, but binding makes one.
 */
#include "xen.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define SERVER 3
#define FIRST_PORT 10     /* of the guest: one a vcpu */
#define OWN_PORT 110      /* the same, at our end */
#define TOLD_WITHIN 10000 /* ms; an answer comes at once, and the machine may be busy */

#define STATE_MASK 0x0f
#define ASKED 1
#define ANSWERED 3

struct slot { /* ioreq_t */
    uint8_t request[24];
    uint32_t port;
    uint8_t pad[2];
    _Atomic uint8_t bits;
    uint8_t type;
};
struct xen_events { int fd; /* eventfd */ };

static struct slot page[PAGE / sizeof(struct slot)] __attribute__((aligned(PAGE)));
static struct xen_events *holder[VCPUS]; /* who has bound the vcpu's port */
static int told[VCPUS] = { -1, -1 };     /* eventfds: the vcpu is to look for its answer */

static void release(int vcpu)
{
    guest.free_ports += holder[vcpu] != NULL;
    holder[vcpu] = NULL;
}

void fake_unbind(void)
{
    for (int v = 0; v < VCPUS; v++)
        release(v);
}

void fake_ioreq_reset(void)
{
    memset(page, 0, sizeof page);
    for (int v = 0; v < VCPUS; v++) {
        holder[v] = NULL;
        close(told[v]);
        told[v] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
}

/* ------------------------------------------------------------ the vcpus */

void fake_ask(int vcpu)
{
    if (!guest.server || !guest.enabled)
        return;
    page[vcpu].type = 8; /* IOREQ_TYPE_INVALIDATE */
    page[vcpu].bits = ASKED;
    if (holder[vcpu] && !guest.mute)
        eventfd_write(holder[vcpu]->fd, 1);
}

bool fake_waits(int vcpu)
{
    eventfd_t events;

    if ((page[vcpu].bits & STATE_MASK) == 0)
        return false;
    if (eventfd_read(told[vcpu], &events) == 0 && (page[vcpu].bits & STATE_MASK) == ANSWERED)
        page[vcpu].bits &= (uint8_t)~STATE_MASK;
    return (page[vcpu].bits & STATE_MASK) != 0;
}

bool fake_ask_and_wait(int vcpu)
{
    struct pollfd look = { .fd = told[vcpu], .events = POLLIN };

    fake_ask(vcpu);
    while (fake_waits(vcpu))
        if (poll(&look, 1, TOLD_WITHIN) <= 0)
            return false;
    return true;
}

/* ------------------------------------------------------------ libxendevicemodel, and the server's page */

struct xen_devices *xendevicemodel_open(struct xen_logger *l, unsigned flags)
{
    return HANDLE;
}

int xendevicemodel_close(struct xen_devices *d)
{
    return 0;
}

int xendevicemodel_create_ioreq_server(struct xen_devices *d, uint16_t domid, int buffered, uint16_t *id)
{
    if (guest.server || buffered)
        return set_errno(guest.server ? ENOSPC : EINVAL);
    guest.server = true;
    memset(page, 0, sizeof page);
    *id = SERVER;
    return 0;
}

static int find_server(uint16_t id)
{
    if (guest.gone)
        return set_errno(ESRCH);
    return guest.server && id == SERVER ? 0 : set_errno(ENOENT);
}

/* Its page is a resource: a server without buffered requests has no gfn to tell. */
int xendevicemodel_get_ioreq_server_info(struct xen_devices *d, uint16_t domid, uint16_t id, unsigned long *gfn,
                                         unsigned long *buffered, uint32_t *port)
{
    return set_errno(EINVAL);
}

int xendevicemodel_set_ioreq_server_state(struct xen_devices *d, uint16_t domid, uint16_t id, int enabled)
{
    if (find_server(id))
        return -1;
    guest.enabled = enabled;
    for (uint32_t v = 0; v < VCPUS && enabled; v++)
        page[v].port = FIRST_PORT + v;
    for (int v = 0; v < VCPUS && enabled && guest.ask_at_enable; v++)
        fake_ask(v);
    return 0;
}

int xendevicemodel_destroy_ioreq_server(struct xen_devices *d, uint16_t domid, uint16_t id)
{
    if (guest.fail_destroy)
        return set_errno(guest.fail_destroy);
    if (find_server(id))
        return -1;
    guest.server = guest.enabled = false;
    return 0;
}

struct xen_memory_resource *xenforeignmemory_map_resource(struct xen_memory *m, uint16_t domid, unsigned type,
                                                          unsigned id, unsigned long frame, unsigned long nr,
                                                          void **base, int prot, int flags)
{
    if (!guest.server || type != 0 || frame != 1 || nr != 1 || prot != (PROT_READ | PROT_WRITE)) {
        errno = ENOENT;
        return NULL;
    }
    *base = page;
    return HANDLE;
}

int xenforeignmemory_unmap_resource(struct xen_memory *m, struct xen_memory_resource *r)
{
    return 0;
}

/* ------------------------------------------------------------ libxenevtchn */

struct xen_events *xenevtchn_open(struct xen_logger *l, unsigned flags)
{
    struct xen_events *e = malloc(sizeof *e);

    e->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return e;
}

int xenevtchn_close(struct xen_events *e)
{
    for (int v = 0; v < VCPUS; v++)
        if (holder[v] == e)
            release(v);
    close(e->fd);
    free(e);
    return 0;
}

int xenevtchn_fd(struct xen_events *e)
{
    return e->fd;
}

int xenevtchn_bind_interdomain(struct xen_events *e, uint32_t domid, uint32_t port)
{
    uint32_t vcpu = port - FIRST_PORT;

    if (vcpu >= VCPUS || holder[vcpu])
        return set_errno(EINVAL);
    if (guest.free_ports == 0)
        return set_errno(ENOSPC);
    guest.free_ports--;
    holder[vcpu] = e;
    eventfd_write(e->fd, 1);
    return (int)(OWN_PORT + vcpu);
}

int xenevtchn_unbind(struct xen_events *e, uint32_t port)
{
    uint32_t vcpu = port - OWN_PORT;

    if (vcpu >= VCPUS || holder[vcpu] != e)
        return set_errno(EINVAL);
    release((int)vcpu);
    return 0;
}

int xenevtchn_notify(struct xen_events *e, uint32_t port)
{
    return guest.mute ? 0 : eventfd_write(told[port - OWN_PORT], 1);
}

int xenevtchn_pending(struct xen_events *e)
{
    eventfd_t n;

    return eventfd_read(e->fd, &n) ? -1 : OWN_PORT;
}

int xenevtchn_unmask(struct xen_events *e, uint32_t port)
{
    return 0;
}
