/*
 * Xen's libraries, all of them in one file, as a dom0 with one guest has them: for what of the adapter is in Python and
 * opens them by their names. What happens next is what the test said; nothing here waits.
 */
#include "libs.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define DOMID 4
#define PAGE 4096u
#define LOG_WORDS 64
#define NODES 256
#define STORES 8
#define WATCHES 16
#define EVENTS 128
#define SHUTDOWN_NODE "/local/domain/4/control/shutdown"

/* What the guest does when it is asked to suspend. */
enum manner { STOPS, ANSWERS_ONLY, IGNORES };

static struct guest {
    uint32_t flags;
    bool gone;
    enum manner manner;
    uint64_t nr_pfns, tot_pages, log[LOG_WORDS];
    bool log_on;
    uint64_t resumes, logs_ended;
    int fail_resume, fail_bind, fail_destroy; /* errno of each from now on */
    bool server;
} guest;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static struct { char path[128], value[64]; } nodes[NODES];
static struct xen_store {
    bool open;
    int note;
    struct { char path[128], token[32]; } watches[WATCHES];
    struct { char path[128], token[32]; } events[EVENTS];
    unsigned nr_watches, head, tail;
} stores[STORES];
static uint8_t page[PAGE] __attribute__((aligned(4096)));

static int set_errno(int error)
{
    errno = error;
    return -1;
}

/* ------------------------------------------------------------ xenstore */

static bool is_below(const char *path, const char *top)
{
    size_t n = strlen(top);

    return strncmp(path, top, n) == 0 && (path[n] == '\0' || path[n] == '/');
}

static void fire(struct xen_store *store, unsigned watch, const char *path)
{
    unsigned i = store->head++ % EVENTS;

    snprintf(store->events[i].path, sizeof store->events[i].path, "%s", path);
    memcpy(store->events[i].token, store->watches[watch].token, sizeof store->events[i].token);
    eventfd_write(store->note, 1);
}

static void fire_all(const char *path)
{
    for (unsigned s = 0; s < STORES; s++)
        for (unsigned w = 0; stores[s].open && w < stores[s].nr_watches; w++)
            if (is_below(path, stores[s].watches[w].path))
                fire(&stores[s], w, path);
}

static int find_node(const char *path)
{
    for (int i = 0; i < NODES; i++)
        if (strcmp(nodes[i].path, path) == 0)
            return i;
    return -1;
}

static void put_node(const char *path, const char *value)
{
    int i = find_node(path);

    if (i < 0)
        i = find_node("");
    snprintf(nodes[i].path, sizeof nodes[i].path, "%s", path);
    snprintf(nodes[i].value, sizeof nodes[i].value, "%s", value);
    fire_all(path);
}

/* The node and all below it. */
static void drop_node(const char *path)
{
    for (int i = 0; i < NODES; i++)
        if (nodes[i].path[0] && is_below(nodes[i].path, path))
            nodes[i].path[0] = '\0';
    fire_all(path);
}

/* It shuts down, and xenstored tells of it. */
static void stop(uint32_t reason)
{
    guest.flags |= XEN_STATE_SHUTDOWN | reason << 16;
    fire_all("@releaseDomain");
}

struct xen_store *xs_open(unsigned long flags)
{
    struct xen_store *store = stores;

    (void)flags;
    pthread_mutex_lock(&lock);
    while (store->open)
        store++;
    memset(store, 0, sizeof *store);
    store->open = true;
    store->note = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    pthread_mutex_unlock(&lock);
    return store;
}

void xs_close(struct xen_store *store)
{
    if (!store)
        return;
    pthread_mutex_lock(&lock);
    store->open = false;
    close(store->note);
    pthread_mutex_unlock(&lock);
}

void *xs_read(struct xen_store *store, uint32_t t, const char *path, unsigned *length)
{
    char *value = NULL;
    int i;

    (void)store, (void)t;
    pthread_mutex_lock(&lock);
    i = find_node(path);
    if (i >= 0) {
        value = strdup(nodes[i].value);
        *length = (unsigned)strlen(value);
    }
    pthread_mutex_unlock(&lock);
    errno = value ? 0 : ENOENT;
    return value;
}

bool xs_write(struct xen_store *store, uint32_t t, const char *path, const void *data, unsigned length)
{
    char value[64];

    (void)store, (void)t;
    snprintf(value, sizeof value, "%.*s", (int)length, (const char *)data);
    pthread_mutex_lock(&lock);
    put_node(path, value);
    if (guest.manner != IGNORES && strcmp(path, SHUTDOWN_NODE) == 0 && strcmp(value, "suspend") == 0) {
        put_node(path, "");
        if (guest.manner == STOPS)
            stop(XEN_SHUTDOWN_SUSPEND);
    }
    pthread_mutex_unlock(&lock);
    return true;
}

char **xs_directory(struct xen_store *store, uint32_t t, const char *path, unsigned *number)
{
    size_t n = strlen(path), room = NODES * (sizeof(char *) + sizeof nodes[0].path);
    char **names = calloc(1, room), *text = (char *)(names + NODES);

    (void)store, (void)t;
    *number = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < NODES; i++) {
        const char *rest = nodes[i].path + n + 1;
        bool known = false;

        if (strncmp(nodes[i].path, path, n) != 0 || nodes[i].path[n] != '/')
            continue;
        snprintf(text, sizeof nodes[0].path, "%.*s", (int)strcspn(rest, "/"), rest);
        for (unsigned k = 0; k < *number; k++)
            known |= strcmp(names[k], text) == 0;
        if (known)
            continue;
        names[(*number)++] = text;
        text += strlen(text) + 1;
    }
    pthread_mutex_unlock(&lock);
    return names;
}

uint32_t xs_transaction_start(struct xen_store *store)
{
    (void)store;
    return 1;
}

bool xs_transaction_end(struct xen_store *store, uint32_t t, bool abort)
{
    (void)store, (void)t, (void)abort;
    return true;
}

bool xs_watch(struct xen_store *store, const char *path, const char *token)
{
    pthread_mutex_lock(&lock);
    unsigned w = store->nr_watches++;

    snprintf(store->watches[w].path, sizeof store->watches[w].path, "%s", path);
    snprintf(store->watches[w].token, sizeof store->watches[w].token, "%s", token);
    fire(store, w, path);
    pthread_mutex_unlock(&lock);
    return true;
}

bool xs_unwatch(struct xen_store *store, const char *path, const char *token)
{
    (void)token;
    pthread_mutex_lock(&lock);
    for (unsigned w = 0; w < store->nr_watches; w++)
        if (strcmp(store->watches[w].path, path) == 0)
            store->watches[w].path[0] = '-';
    pthread_mutex_unlock(&lock);
    return true;
}

int xs_fileno(struct xen_store *store)
{
    return store->note;
}

char **xs_check_watch(struct xen_store *store)
{
    char **pair = NULL;
    eventfd_t count;

    pthread_mutex_lock(&lock);
    if (store->tail == store->head) {
        eventfd_read(store->note, &count);
    } else {
        unsigned i = store->tail++ % EVENTS;

        pair = calloc(1, 2 * sizeof *pair + sizeof store->events[i]);
        pair[0] = memcpy(pair + 2, store->events[i].path, sizeof store->events[i].path);
        pair[1] = memcpy(pair[0] + sizeof store->events[i].path, store->events[i].token,
                         sizeof store->events[i].token);
    }
    pthread_mutex_unlock(&lock);
    errno = EAGAIN;
    return pair;
}

bool xs_resume_domain(struct xen_store *store, unsigned domid)
{
    (void)store, (void)domid;
    return true;
}

/* ------------------------------------------------------------ libxenctrl, libxenguest */

struct xen_ctrl *xc_interface_open(struct xen_logger *l, struct xen_logger *m, unsigned flags)
{
    (void)l, (void)m, (void)flags;
    return (struct xen_ctrl *)&guest;
}

int xc_interface_close(struct xen_ctrl *c)
{
    (void)c;
    return 0;
}

int xc_domain_getinfolist(struct xen_ctrl *c, uint32_t first, unsigned max, void *out)
{
    struct xen_dominfo info = { .tot_pages = 100, .max_pages = 100, .nr_online_vcpus = 1, .gpaddr_bits = 46 };

    (void)c, (void)max;
    if (first > DOMID || (first > 0 && guest.gone))
        return 0;
    if (first > 0) {
        info.domain = DOMID;
        info.flags = guest.flags | XEN_STATE_HVM;
        info.tot_pages = guest.tot_pages;
        for (unsigned i = 0; i < sizeof info.handle; i++)
            info.handle[i] = (uint8_t)(0x11 * i);
    }
    memcpy(out, &info, sizeof info);
    return 1;
}

int xc_domain_pause(struct xen_ctrl *c, uint32_t domid)
{
    (void)c, (void)domid;
    guest.flags |= XEN_STATE_PAUSED;
    return 0;
}

int xc_domain_unpause(struct xen_ctrl *c, uint32_t domid)
{
    (void)c, (void)domid;
    guest.flags &= ~XEN_STATE_PAUSED;
    return 0;
}

int xc_domain_destroy(struct xen_ctrl *c, uint32_t domid)
{
    (void)c, (void)domid;
    guest.gone = true;
    return 0;
}

int xc_domain_shutdown(struct xen_ctrl *c, uint32_t domid, int reason)
{
    (void)c, (void)domid;
    guest.flags |= XEN_STATE_SHUTDOWN | (uint32_t)reason << 16;
    return 0;
}

int xc_domain_decrease_reservation_exact(struct xen_ctrl *c, uint32_t domid, unsigned long nr, unsigned order,
                                         unsigned long *pfns)
{
    (void)c, (void)domid, (void)order;
    for (unsigned long i = 0; i < nr; i++)
        if (pfns[i] >= guest.tot_pages)
            return set_errno(EBUSY);
    guest.tot_pages -= nr;
    return 0;
}

int xc_domain_nr_gpfns(struct xen_ctrl *c, uint32_t domid, unsigned long *nr)
{
    (void)c, (void)domid;
    *nr = guest.nr_pfns;
    return guest.gone ? set_errno(ESRCH) : 0;
}

int xc_shadow_control(struct xen_ctrl *c, uint32_t domid, unsigned op, unsigned *mb, unsigned mode)
{
    (void)c, (void)domid, (void)mb, (void)mode;
    if (op == XEN_LOG_ENABLE && guest.log_on)
        return set_errno(EINVAL);
    guest.log_on = op == XEN_LOG_ENABLE;
    guest.logs_ended += op == XEN_LOG_OFF;
    memset(guest.log, 0, sizeof guest.log);
    return 0;
}

long long xc_logdirty_control(struct xen_ctrl *c, uint32_t domid, unsigned op, struct xen_buffer *buffer,
                              unsigned long pages, unsigned mode, struct xen_log_stats *stats)
{
    (void)c, (void)domid, (void)mode, (void)stats;
    if (!guest.log_on)
        return set_errno(EINVAL);
    memcpy(buffer->memory, guest.log, (pages + 63) / 64 * 8);
    if (op == XEN_LOG_CLEAN)
        memset(guest.log, 0, sizeof guest.log);
    return (long long)pages;
}

void *xc__hypercall_buffer_alloc_pages(struct xen_ctrl *c, struct xen_buffer *buffer, int pages)
{
    (void)c;
    return buffer->memory = calloc((size_t)pages, PAGE);
}

void xc__hypercall_buffer_free_pages(struct xen_ctrl *c, struct xen_buffer *buffer, int pages)
{
    (void)c, (void)pages;
    free(buffer->memory);
}

int xc_get_pfn_type_batch(struct xen_ctrl *c, uint32_t domid, unsigned n, unsigned long *pfns)
{
    (void)c, (void)domid;
    for (unsigned i = 0; i < n; i++)
        pfns[i] = pfns[i] < guest.tot_pages ? 0 : 0xf0000000;
    return 0;
}

int xc_domain_get_tsc_info(struct xen_ctrl *c, uint32_t domid, uint32_t *mode, uint64_t *nsec, uint32_t *khz,
                           uint32_t *incarnation)
{
    (void)c, (void)domid;
    *mode = 1, *nsec = 2, *khz = 3, *incarnation = 4;
    return 0;
}

int xc_domain_hvm_getcontext(struct xen_ctrl *c, uint32_t domid, uint8_t *buffer, uint32_t size)
{
    (void)c, (void)domid;
    if (buffer)
        memset(buffer, 0, size);
    return 64;
}

int xc_domain_hvm_getcontext_partial(struct xen_ctrl *c, uint32_t domid, uint16_t code, uint16_t vcpu, void *to,
                                     uint32_t size)
{
    (void)c, (void)domid, (void)code, (void)vcpu, (void)to, (void)size;
    return set_errno(EINVAL);
}

unsigned long xc_translate_foreign_address(struct xen_ctrl *c, uint32_t domid, int vcpu, unsigned long long address)
{
    (void)c, (void)domid, (void)vcpu, (void)address;
    return 0;
}

int xc_hvm_param_get(struct xen_ctrl *c, uint32_t domid, uint32_t index, uint64_t *value)
{
    (void)c, (void)domid, (void)index;
    *value = 0;
    return 0;
}

int xc_domain_resume(struct xen_ctrl *c, uint32_t domid, int fast)
{
    (void)c, (void)domid, (void)fast;
    if (guest.fail_resume)
        return set_errno(guest.fail_resume);
    guest.flags &= XEN_STATE_PAUSED;
    guest.resumes++;
    return 0;
}

struct xen_cpu_policy *xc_cpu_policy_init(void)
{
    return (struct xen_cpu_policy *)&guest;
}

void xc_cpu_policy_destroy(struct xen_cpu_policy *policy)
{
    (void)policy;
}

int xc_cpu_policy_get_domain(struct xen_ctrl *c, uint32_t domid, struct xen_cpu_policy *policy)
{
    (void)c, (void)domid, (void)policy;
    return 0;
}

int xc_cpu_policy_get_system(struct xen_ctrl *c, unsigned which, struct xen_cpu_policy *policy)
{
    (void)c, (void)which, (void)policy;
    return 0;
}

int xc_cpu_policy_get_size(struct xen_ctrl *c, uint32_t *leaves, uint32_t *msrs)
{
    (void)c;
    *leaves = 1, *msrs = 1;
    return 0;
}

int xc_cpu_policy_serialise(struct xen_ctrl *c, const struct xen_cpu_policy *policy, struct xen_cpuid_leaf *leaves,
                            uint32_t *nr_leaves, struct xen_msr_entry *msrs, uint32_t *nr_msrs)
{
    (void)c, (void)policy, (void)leaves, (void)msrs;
    *nr_leaves = *nr_msrs = 0;
    return 0;
}

/* ------------------------------------------------------------ the other libraries */

struct xen_memory *xenforeignmemory_open(struct xen_logger *l, unsigned flags)
{
    (void)l, (void)flags;
    return (struct xen_memory *)&guest;
}

int xenforeignmemory_close(struct xen_memory *m)
{
    (void)m;
    return 0;
}

void *xenforeignmemory_map(struct xen_memory *m, uint32_t domid, int prot, size_t n, const unsigned long *pfns,
                           int *errors)
{
    (void)m, (void)domid, (void)prot, (void)pfns;
    memset(errors, 0, n * sizeof *errors);
    return mmap(NULL, n * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

int xenforeignmemory_unmap(struct xen_memory *m, void *base, size_t n)
{
    (void)m;
    return munmap(base, n * PAGE);
}

struct xen_memory_resource *xenforeignmemory_map_resource(struct xen_memory *m, uint16_t domid, unsigned type,
                                                          unsigned id, unsigned long frame, unsigned long nr,
                                                          void **base, int prot, int flags)
{
    (void)m, (void)domid, (void)type, (void)id, (void)frame, (void)nr, (void)prot, (void)flags;
    *base = page;
    return (struct xen_memory_resource *)page;
}

int xenforeignmemory_unmap_resource(struct xen_memory *m, struct xen_memory_resource *r)
{
    (void)m, (void)r;
    return 0;
}

struct xen_events *xenevtchn_open(struct xen_logger *l, unsigned flags)
{
    int *fd = malloc(sizeof *fd);

    (void)l, (void)flags;
    *fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return (struct xen_events *)fd;
}

int xenevtchn_close(struct xen_events *e)
{
    close(*(int *)e);
    free(e);
    return 0;
}

int xenevtchn_fd(struct xen_events *e)
{
    return *(int *)e;
}

int xenevtchn_bind_interdomain(struct xen_events *e, uint32_t domid, uint32_t port)
{
    (void)e, (void)domid, (void)port;
    return guest.fail_bind ? set_errno(guest.fail_bind) : 7;
}

int xenevtchn_unbind(struct xen_events *e, uint32_t port)
{
    (void)e, (void)port;
    return 0;
}

int xenevtchn_notify(struct xen_events *e, uint32_t port)
{
    (void)e, (void)port;
    return 0;
}

int xenevtchn_pending(struct xen_events *e)
{
    (void)e;
    return set_errno(EAGAIN);
}

int xenevtchn_unmask(struct xen_events *e, uint32_t port)
{
    (void)e, (void)port;
    return 0;
}

struct xen_devices *xendevicemodel_open(struct xen_logger *l, unsigned flags)
{
    (void)l, (void)flags;
    return (struct xen_devices *)&guest;
}

int xendevicemodel_close(struct xen_devices *d)
{
    (void)d;
    return 0;
}

int xendevicemodel_modified_memory(struct xen_devices *d, uint16_t domid, uint64_t pfn, uint32_t nr)
{
    (void)d, (void)domid, (void)nr;
    if (guest.log_on)
        guest.log[pfn / 64] |= 1ull << pfn % 64;
    return 0;
}

int xendevicemodel_create_ioreq_server(struct xen_devices *d, uint16_t domid, int buffered, uint16_t *id)
{
    (void)d, (void)domid, (void)buffered;
    guest.server = true;
    *id = 3;
    return 0;
}

int xendevicemodel_get_ioreq_server_info(struct xen_devices *d, uint16_t domid, uint16_t id, unsigned long *gfn,
                                         unsigned long *buffered, uint32_t *port)
{
    (void)d, (void)domid, (void)id, (void)gfn, (void)buffered, (void)port;
    return set_errno(EINVAL);
}

int xendevicemodel_set_ioreq_server_state(struct xen_devices *d, uint16_t domid, uint16_t id, int enabled)
{
    (void)d, (void)domid, (void)id, (void)enabled;
    return guest.server ? 0 : set_errno(ENOENT);
}

int xendevicemodel_destroy_ioreq_server(struct xen_devices *d, uint16_t domid, uint16_t id)
{
    (void)d, (void)domid, (void)id;
    if (guest.fail_destroy)
        return set_errno(guest.fail_destroy);
    if (!guest.server)
        return set_errno(ENOENT);
    guest.server = false;
    return 0;
}

/* ------------------------------------------------------------ for the test */

void dom0_reset(uint64_t nr_pfns, uint64_t tot_pages)
{
    guest = (struct guest){ .nr_pfns = nr_pfns, .tot_pages = tot_pages };
    memset(nodes, 0, sizeof nodes);
    memset(page, 0, sizeof page);
}

struct guest *dom0_guest(void) { return &guest; }

void dom0_put(const char *path, const char *value)
{
    pthread_mutex_lock(&lock);
    put_node(path, value);
    pthread_mutex_unlock(&lock);
}

void dom0_drop(const char *path)
{
    pthread_mutex_lock(&lock);
    drop_node(path);
    pthread_mutex_unlock(&lock);
}

void dom0_stop(uint32_t reason)
{
    pthread_mutex_lock(&lock);
    stop(reason);
    pthread_mutex_unlock(&lock);
}
