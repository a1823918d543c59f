/*
 * Xen's libraries as far as the p2m half of the Xen adapter calls them, over a guest made of plain
 * memory.
 *
 * Kept from the real thing, since the tests are about it:
 *  - a mapping pins the frames of its time; a pinned frame is charged to the guest (tot_pages) and
 *    not used again;
 *  - a page that comes in is neither marked dirty nor logged until the next CLEAN (Xen 4.17),
 *    unless `marks` is set (from 4.19.5 and 4.20.3 on: marked once, as it comes in);
 *  - a vcpu that took pages out asks every enabled ioreq server and stands still. It looks for the
 *    answer only when it is told; an event is lost if no port is bound, but binding makes one.
 * Touching a hole in a mapping is a SIGSEGV.
 */
#include "domain.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "p2m.h"

#define VCPUS 2
#define PAGE CK_PAGE_SIZE
#define MAPS 16
#define HOOKS 8
#define TOLD_WITHIN 10000 /* ms; an answer comes at once, and this machine may be busy */

struct slot { /* ioreq_t */
    uint8_t request[24];
    uint32_t port;
    uint8_t pad[2];
    _Atomic uint8_t bits;
    uint8_t type;
};
enum call { CALL_TYPES, CALL_MAP, CALLS };
enum change { CHANGE_OUT, CHANGE_IN, CHANGE_OUT_IN, CHANGE_LEAVE };
struct hook { bool armed; enum call call; uint64_t after; enum change change; uint64_t pfn; };

struct fake {
    struct xen_libs libs;
    struct xen_domain domain;
    uint64_t nr_pfns, nr_frames, grown;
    int memory;      /* the frames */
    uint8_t *frames; /* our own view of them */
    int64_t *p2m;    /* frame, or -1 */
    uint32_t *uses;  /* of a frame: by the p2m, and by each mapping that pins it */
    uint64_t tot_pages;
    uint64_t *log;
    bool *logged, marks, gone;
    struct { uint8_t *base; uint32_t count; int64_t frame[CK_EXTENT_PAGES]; } maps[MAPS];
    uint64_t calls[CALLS], pfns_asked;
    struct hook hooks[HOOKS];
    int fail_map; /* errno of the next one */
    int64_t leaving; /* a frame that has left the p2m, while its vcpu is still in that hypercall */
    /* ioreq server */
    struct slot *page;
    bool server, enabled, bound[VCPUS], mute;
    int free_ports; /* of dom0 */
    bool ask_at_enable; /* every vcpu, as soon as it can */
    int event, told[VCPUS];
    /* registers of a vcpu in a hypercall */
    uint64_t rdi, rsi;
    uint32_t cs;
};

static int set_errno(int value)
{
    errno = value;
    return -1;
}

/* ------------------------------------------------------------ the guest */

static void use(struct fake *f, int64_t frame)
{
    f->tot_pages += f->uses[frame]++ == 0;
}

static void let_go(struct fake *f, int64_t frame)
{
    f->tot_pages -= --f->uses[frame] == 0;
}

int64_t fake_value(struct fake *f, uint64_t pfn)
{
    int64_t value;

    if (f->p2m[pfn] < 0)
        return -1;
    memcpy(&value, f->frames + f->p2m[pfn] * PAGE, sizeof value);
    return value;
}

void fake_write(struct fake *f, uint64_t pfn, int64_t value)
{
    if (f->p2m[pfn] < 0)
        return;
    memcpy(f->frames + f->p2m[pfn] * PAGE, &value, sizeof value);
    if (f->logged[pfn])
        f->log[pfn / 64] |= 1ull << pfn % 64;
}

bool fake_waits(struct fake *f, int vcpu)
{
    uint64_t events;
    uint8_t state = f->page[vcpu].bits & 0x0f;

    if (state == 0)
        return false;
    if (read(f->told[vcpu], &events, sizeof events) > 0 && (f->page[vcpu].bits & 0x0f) == 3)
        f->page[vcpu].bits &= 0xf0;
    return (f->page[vcpu].bits & 0x0f) != 0;
}

/* The vcpu asks, and does not wait yet. */
void fake_ask(struct fake *f, int vcpu)
{
    if (!f->server || !f->enabled)
        return;
    f->page[vcpu].type = 8;
    f->page[vcpu].bits = 1;
    if (f->bound[vcpu] && !f->mute)
        eventfd_write(f->event, 1);
}

static bool ask_and_wait(struct fake *f, int vcpu)
{
    struct pollfd told = { .fd = f->told[vcpu], .events = POLLIN };

    fake_ask(f, vcpu);
    while (fake_waits(f, vcpu))
        if (poll(&told, 1, TOLD_WITHIN) <= 0)
            return false;
    return true;
}

/* Take a page out; does its vcpu go on? */
bool fake_out(struct fake *f, uint64_t pfn)
{
    if (f->p2m[pfn] < 0)
        return true;
    let_go(f, f->p2m[pfn]);
    f->p2m[pfn] = -1;
    return ask_and_wait(f, (int)(pfn % VCPUS));
}

/* Vcpu 0 puts a frame of its grant table at `pfn`, as Linux does when it resumes; `stack` is the page that holds the
 * argument. Does it go on? */
bool fake_put_grant(struct fake *f, uint64_t pfn, uint64_t stack, uint64_t command, uint32_t space,
                    bool is_64bit)
{
    struct { uint16_t domain, count; uint32_t space; uint64_t index, pfn; } argument = {
        .space = space, .pfn = pfn,
    };
    const uint64_t offset = 0x100;
    bool goes_on;

    memcpy(f->frames + f->p2m[stack] * PAGE + offset, &argument, sizeof argument);
    f->rdi = command;
    f->rsi = stack * PAGE + offset;
    f->cs = is_64bit ? 1u << 9 : 0;
    goes_on = ask_and_wait(f, 0);
    f->rdi = f->rsi = f->cs = 0;
    return goes_on;
}

static int getcontext_partial(struct xen_ctrl *ctrl, uint32_t domid, uint16_t code, uint16_t vcpu, void *to,
                              uint32_t size)
{
    struct fake *f = (struct fake *)ctrl;

    (void)domid;
    if (code != 2 || vcpu >= VCPUS || size < 1024)
        return set_errno(EINVAL);
    memset(to, 0, size);
    memcpy((uint8_t *)to + 552, &f->rsi, 8);
    memcpy((uint8_t *)to + 560, &f->rdi, 8);
    memcpy((uint8_t *)to + 888, &f->cs, 4);
    return 0;
}

/* Its page tables map every pfn where it is. */
static unsigned long translate(struct xen_ctrl *ctrl, uint32_t domid, int vcpu, unsigned long long address)
{
    (void)ctrl, (void)domid, (void)vcpu;
    return address / PAGE;
}

/* Put a page in, holding `value`. */
bool fake_in(struct fake *f, uint64_t pfn, int64_t value)
{
    int64_t frame = 0;

    if (f->p2m[pfn] >= 0)
        return false;
    while (f->uses[frame])
        if (++frame == (int64_t)f->nr_frames)
            return false;
    memset(f->frames + frame * PAGE, 0, PAGE);
    use(f, frame);
    f->p2m[pfn] = frame;
    f->logged[pfn] = false;
    if (f->marks)
        f->log[pfn / 64] |= 1ull << pfn % 64;
    fake_write(f, pfn, value);
    return true;
}

/* The first half of fake_out(): the page has left, it is charged still, and nobody has been asked. */
static void leave(struct fake *f, uint64_t pfn)
{
    f->leaving = f->p2m[pfn];
    f->p2m[pfn] = -1;
}

/* The other half. */
bool fake_left(struct fake *f)
{
    let_go(f, f->leaving);
    return ask_and_wait(f, 0);
}

void fake_hook(struct fake *f, enum call call, uint64_t after, enum change change, uint64_t pfn)
{
    for (int i = 0; i < HOOKS; i++)
        if (!f->hooks[i].armed) {
            f->hooks[i] = (struct hook){ true, call, f->calls[call] + after, change, pfn };
            return;
        }
}

/* What the guest does between two calls of an engine in a live round. */
static void happen(struct fake *f, enum call call)
{
    f->calls[call]++;
    for (int i = 0; i < HOOKS; i++) {
        struct hook *h = &f->hooks[i];

        if (!h->armed || h->call != call || f->domain.suspended || f->calls[call] < h->after)
            continue;
        h->armed = false;
        if (h->change == CHANGE_LEAVE)
            leave(f, h->pfn);
        if (h->change == CHANGE_OUT || h->change == CHANGE_OUT_IN)
            fake_out(f, h->pfn);
        if (h->change == CHANGE_IN || h->change == CHANGE_OUT_IN)
            fake_in(f, h->pfn, (int64_t)(1000000 + f->calls[call] * 1000 + (uint64_t)i));
    }
}

/* ------------------------------------------------------------ libxenctrl, libxenforeignmemory */

static int getinfolist(struct xen_ctrl *x, uint32_t domid, unsigned max, void *to)
{
    struct fake *f = (struct fake *)x;
    struct xen_dominfo *info = to;

    (void)max;
    if (f->gone)
        return 0;
    memset(info, 0, sizeof *info);
    info->domain = (uint16_t)domid;
    info->tot_pages = f->tot_pages;
    info->max_vcpu_id = VCPUS - 1;
    return 1;
}

static int nr_gpfns(struct xen_ctrl *x, uint32_t domid, unsigned long *nr)
{
    struct fake *f = (struct fake *)x;

    (void)domid;
    *nr = f->nr_pfns + f->grown;
    return 0;
}

static int type_batch(struct xen_ctrl *x, uint32_t domid, unsigned n, unsigned long *pfns)
{
    struct fake *f = (struct fake *)x;

    (void)domid;
    if (n > 1024)
        return set_errno(E2BIG);
    f->pfns_asked += n;
    for (unsigned i = 0; i < n; i++)
        pfns[i] = f->p2m[pfns[i]] < 0 ? 0xf0000000 : 0;
    happen(f, CALL_TYPES);
    return 0;
}

static void *map(struct xen_memory *x, uint32_t domid, int prot, size_t n,
                 const unsigned long *pfns, int *errors)
{
    struct fake *f = (struct fake *)x;
    int i = 0;

    (void)domid;
    if (f->fail_map || prot != PROT_READ) {
        errno = f->fail_map ? f->fail_map : EINVAL;
        f->fail_map = 0;
        return NULL;
    }
    while (f->maps[i].base)
        i++;
    f->maps[i].base = mmap(NULL, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    f->maps[i].count = (uint32_t)n;
    for (size_t p = 0; p < n; p++) {
        int64_t frame = f->p2m[pfns[p]];

        errors[p] = frame < 0 ? -EINVAL : 0;
        f->maps[i].frame[p] = frame;
        if (frame < 0)
            continue;
        use(f, frame);
        mmap(f->maps[i].base + p * PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, f->memory,
             frame * PAGE);
    }
    happen(f, CALL_MAP);
    return f->maps[i].base;
}

static int unmap(struct xen_memory *x, void *base, size_t n)
{
    struct fake *f = (struct fake *)x;

    for (int i = 0; i < MAPS; i++) {
        if (f->maps[i].base != base || f->maps[i].count != n)
            continue;
        for (size_t p = 0; p < n; p++)
            if (f->maps[i].frame[p] >= 0)
                let_go(f, f->maps[i].frame[p]);
        munmap(base, n * PAGE);
        f->maps[i].base = NULL;
        return 0;
    }
    return set_errno(EINVAL); /* privcmd: the whole of what one call mapped, or nothing */
}

uint32_t fake_mapped(struct fake *f)
{
    uint32_t n = 0;

    for (int i = 0; i < MAPS; i++)
        n += f->maps[i].base != NULL;
    return n;
}

/* ------------------------------------------------------------ ioreq server and event channels */

static struct xen_memory_resource *map_resource(struct xen_memory *x, uint16_t domid, unsigned type,
                                                unsigned id, unsigned long frame, unsigned long nr,
                                                void **base, int prot, int flags)
{
    struct fake *f = (struct fake *)x;

    (void)domid, (void)id, (void)flags;
    if (!f->server || type != 0 || frame != 1 || nr != 1 || prot != (PROT_READ | PROT_WRITE)) {
        errno = ENOENT;
        return NULL;
    }
    *base = f->page;
    return (struct xen_memory_resource *)f;
}

static int unmap_resource(struct xen_memory *x, struct xen_memory_resource *r)
{
    (void)x, (void)r;
    return 0;
}

/* xenevtchn_open() is given no handle to know its fake by: tests make one at a time. */
static struct fake *events_for;

static struct xen_events *events_open(struct xen_logger *l, unsigned flags)
{
    (void)l, (void)flags;
    return (struct xen_events *)events_for;
}

/* As when the holder of the ports dies. */
void fake_unbind(struct fake *f)
{
    for (int v = 0; v < VCPUS; v++)
        f->free_ports += f->bound[v];
    memset(f->bound, 0, sizeof f->bound);
}

static int events_close(struct xen_events *x)
{
    fake_unbind((struct fake *)x);
    return 0;
}

static int events_unbind(struct xen_events *x, uint32_t port)
{
    struct fake *f = (struct fake *)x;

    f->free_ports++;
    f->bound[port - 110] = false;
    return 0;
}

static int events_fd(struct xen_events *x)
{
    return ((struct fake *)x)->event;
}

static int events_bind(struct xen_events *x, uint32_t domid, uint32_t port)
{
    struct fake *f = (struct fake *)x;

    (void)domid;
    if (port < 10 || port >= 10 + VCPUS || f->bound[port - 10])
        return set_errno(EINVAL);
    if (f->free_ports == 0)
        return set_errno(ENOSPC);
    f->free_ports--;
    f->bound[port - 10] = true;
    eventfd_write(f->event, 1);
    return (int)port + 100;
}

static int events_notify(struct xen_events *x, uint32_t port)
{
    struct fake *f = (struct fake *)x;

    return f->mute ? 0 : eventfd_write(f->told[port - 110], 1);
}

static int events_pending(struct xen_events *x)
{
    eventfd_t n;

    return eventfd_read(((struct fake *)x)->event, &n) ? -1 : 110;
}

static int events_unmask(struct xen_events *x, uint32_t port)
{
    (void)x, (void)port;
    return 0;
}

static int server_create(struct xen_devices *x, uint16_t domid, int buffered, uint16_t *id)
{
    struct fake *f = (struct fake *)x;

    (void)domid;
    if (f->server || buffered)
        return set_errno(f->server ? ENOSPC : EINVAL);
    f->server = true;
    memset(f->page, 0, PAGE);
    *id = 3;
    return 0;
}

static int server_enable(struct xen_devices *x, uint16_t domid, uint16_t id, int enabled)
{
    struct fake *f = (struct fake *)x;

    (void)domid;
    if (f->gone)
        return set_errno(ESRCH);
    if (!f->server || id != 3)
        return set_errno(ENOENT);
    f->enabled = enabled;
    for (uint32_t v = 0; v < VCPUS && enabled; v++)
        f->page[v].port = 10 + v;
    for (int v = 0; v < VCPUS && enabled && f->ask_at_enable; v++)
        fake_ask(f, v);
    return 0;
}

static int server_destroy(struct xen_devices *x, uint16_t domid, uint16_t id)
{
    struct fake *f = (struct fake *)x;

    (void)domid;
    if (f->gone)
        return set_errno(ESRCH);
    if (!f->server || id != 3)
        return set_errno(ENOENT);
    f->server = f->enabled = false;
    return 0;
}

/* ------------------------------------------------------------ the rest of the table */

static int suspend(void *d, int64_t timeout_ns)
{
    (void)timeout_ns;
    ((struct xen_domain *)d)->suspended = true;
    return 0;
}

static int resume(void *d)
{
    ((struct xen_domain *)d)->suspended = false;
    return 0;
}

#define OF(d) ((struct fake *)((struct xen_domain *)(d))->libs->ctrl)

static int harvest(void *d, uint64_t *bitmap, uint64_t nr_pfns, int mode)
{
    struct fake *f = OF(d);

    for (uint64_t p = 0; p < nr_pfns; p++) {
        if (f->log[p / 64] >> p % 64 & 1)
            bitmap[p / 64] |= 1ull << p % 64;
        f->logged[p] |= mode != CK_HARVEST_PEEK;
    }
    if (mode != CK_HARVEST_PEEK)
        memset(f->log, 0, (nr_pfns + 63) / 64 * 8);
    return 0;
}

static int64_t context(void *d, uint8_t *buffer, uint64_t capacity)
{
    (void)d, (void)capacity;
    memset(buffer, 0, 8);
    return 8;
}

static int output_close(void *d, uint64_t *closed)
{
    (void)d;
    *closed = 1;
    return 0;
}

/* ------------------------------------------------------------ its life */

/* A guest with memory behind the first nr_frames / 2 pfns. */
struct fake *fake_xen_new(uint64_t nr_pfns, uint64_t nr_frames, bool marks)
{
    struct fake *f = calloc(1, sizeof *f);

    f->nr_pfns = nr_pfns;
    f->nr_frames = nr_frames;
    f->marks = marks;
    f->free_ports = 1000;
    f->memory = memfd_create("frames", MFD_CLOEXEC);
    if (ftruncate(f->memory, (off_t)(nr_frames * PAGE)))
        abort();
    f->frames = mmap(NULL, nr_frames * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, f->memory, 0);
    f->p2m = calloc(nr_pfns, sizeof *f->p2m);
    f->uses = calloc(nr_frames, sizeof *f->uses);
    f->log = calloc((nr_pfns + 63) / 64, 8);
    f->logged = calloc(nr_pfns, sizeof *f->logged);
    f->page = aligned_alloc(PAGE, PAGE);
    memset(f->page, 0, PAGE);
    f->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (int v = 0; v < VCPUS; v++)
        f->told[v] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (uint64_t p = 0; p < nr_pfns; p++) {
        f->p2m[p] = p < nr_frames / 2 ? (int64_t)p : -1;
        f->logged[p] = true;
        if (f->p2m[p] >= 0)
            use(f, f->p2m[p]);
        fake_write(f, p, (int64_t)p);
    }
    f->libs = (struct xen_libs){
        .ctrl = (void *)f, .memory = (void *)f, .devices = (void *)f,
        .xc_domain_getinfolist = getinfolist, .xc_domain_nr_gpfns = nr_gpfns,
        .xc_domain_hvm_getcontext_partial = getcontext_partial,
        .xc_translate_foreign_address = translate, .xc_get_pfn_type_batch = type_batch, .xenforeignmemory_map = map,
        .xenforeignmemory_unmap = unmap, .xenforeignmemory_map_resource = map_resource,
        .xenforeignmemory_unmap_resource = unmap_resource, .xenevtchn_open = events_open,
        .xenevtchn_close = events_close, .xenevtchn_fd = events_fd,
        .xenevtchn_bind_interdomain = events_bind, .xenevtchn_unbind = events_unbind,
        .xenevtchn_notify = events_notify,
        .xenevtchn_pending = events_pending, .xenevtchn_unmask = events_unmask,
        .xendevicemodel_create_ioreq_server = server_create,
        .xendevicemodel_set_ioreq_server_state = server_enable,
        .xendevicemodel_destroy_ioreq_server = server_destroy,
    };
    f->domain = (struct xen_domain){ .libs = &f->libs, .domid = 7, .nr_pfns = nr_pfns };
    f->domain.table = (struct ck_hypervisor){
        .abi = CK_HYPERVISOR_ABI, .size = sizeof(struct ck_hypervisor), .domain = &f->domain,
        .suspend = suspend, .resume = resume, .harvest = harvest, .p2m_changes = xen_p2m_changes,
        .types = xen_types, .map = xen_map, .unmap = xen_unmap, .context = context,
        .output_close = output_close,
    };
    return f;
}

void fake_xen_free(struct fake *f)
{
    munmap(f->frames, f->nr_frames * PAGE);
    close(f->memory);
    close(f->event);
    for (int v = 0; v < VCPUS; v++)
        close(f->told[v]);
    free(f->p2m), free(f->uses), free(f->log), free(f->logged), free(f->page), free(f);
}

int fake_begin(struct fake *f, bool deaf)
{
    uint16_t server = 0;

    events_for = f;
    int rc = xen_p2m_begin(&f->domain, deaf, &server);
    return rc ? rc : server;
}

int fake_watch(struct fake *f) { return xen_p2m_watch(&f->domain); }
int fake_end(struct fake *f) { return xen_p2m_end(&f->domain); }
uint64_t fake_requests(struct fake *f) { return xen_p2m_requests(&f->domain); }
void *fake_xen_table(struct fake *f) { return &f->domain.table; }
uint64_t fake_tot_pages(struct fake *f) { return f->tot_pages; }
uint64_t fake_asked(struct fake *f) { return f->pfns_asked; }
uint64_t fake_type_calls(struct fake *f) { return f->calls[CALL_TYPES]; }
bool fake_server(struct fake *f) { return f->server; }
bool fake_enabled(struct fake *f) { return f->enabled; }
void fake_fail_map(struct fake *f, int error) { f->fail_map = error; }
void fake_grow(struct fake *f, uint64_t pfns) { f->grown = pfns; }
void fake_be_gone(struct fake *f) { f->gone = true; }
/* Events are lost from now on: this process is as good as dead. */
void fake_mute(struct fake *f, bool mute) { f->mute = mute; }
void fake_free_ports(struct fake *f, int ports) { f->free_ports = ports; }
void fake_ask_at_enable(struct fake *f) { f->ask_at_enable = true; }

int fake_ioreq_destroy(struct fake *f, uint16_t server)
{
    events_for = f;
    return xen_ioreq_destroy(&f->libs, f->domain.domid, server);
}
