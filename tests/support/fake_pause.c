/*
 * Xen's libraries as far as the pause of the Xen adapter calls them beside the p2m: one guest that can be asked to
 * suspend, its node in xenstore, its dirty log, its state. Nothing here waits: what happens next is what the test said.
 *
 * Kept from xenstored: what it has fired may be on its way to us yet, until it has answered something that we asked.
 */
#include "domain.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "p2m.h"

#define DOMID 7
#define EVENTS 64

/* What the guest does when it is asked to suspend. */
enum manner { STOPS, IGNORES, ANSWERS_ONLY, STOPS_UNANSWERED };

struct fake {
    struct xen_libs libs;
    struct xen_domain *domain;
    uint32_t flags;
    bool gone;
    enum manner manner;
    char node[32], interposed[32]; /* control/shutdown; what another writes just before the guest answers */
    bool in_transaction, broken_in; /* somebody comes in between: the next transaction fails */
    char staged[32];
    const char *events[EVENTS];
    unsigned head, tail, come; /* those up to `come` are here */
    unsigned prompt;           /* how many more come at once */
    int note;
    pthread_t caller;          /* who is in the pause */
    uint64_t waited;           /* reads that it waited for */
    uint64_t nr_pfns, log[16];
    bool log_on;
    uint64_t holes[16], requests;
    int fail_log, fail_mark; /* errno of the next one */
    long long short_log;     /* what the next CLEAN says instead of the number of pages */
    uint64_t resumes, told;
    int context_bytes;
    uint64_t params[64];
};

static struct fake *the; /* the libraries' handles say nothing of whose they are */
static pthread_mutex_t lock; /* of node and events: another thread reads while the guest is stopped. Recursive. */

#define LOCKED __attribute__((cleanup(unlock))) pthread_mutex_t *held = &lock; pthread_mutex_lock(held)

static void unlock(pthread_mutex_t **held)
{
    pthread_mutex_unlock(*held);
}

static int set_errno(int error)
{
    errno = error;
    return -1;
}

/* What is on its way comes. */
static void tell(void)
{
    the->come = the->head;
    eventfd_write(the->note, 1);
}

static void fire(const char *token)
{
    the->events[the->head++ % EVENTS] = token;
    if (the->prompt == 0)
        return;
    the->prompt--;
    tell();
}

static void put_node(const char *word)
{
    snprintf(the->node, sizeof the->node, "%s", word);
    fire("shutdown");
}

void fake_stop(uint32_t reason)
{
    LOCKED;
    the->flags |= XEN_STATE_SHUTDOWN | reason << 16;
    fire("released");
}

static void react(void)
{
    if (strcmp(the->node, "suspend") != 0 || the->manner == IGNORES)
        return;
    if (the->manner == STOPS_UNANSWERED) { /* for an earlier request, which it has answered */
        fake_stop(XEN_SHUTDOWN_SUSPEND);
        return;
    }
    if (the->interposed[0]) {
        put_node(the->interposed);
        the->interposed[0] = '\0';
    }
    put_node("");
    if (the->manner == STOPS)
        fake_stop(XEN_SHUTDOWN_SUSPEND);
}

/* Somebody else writes the node. */
void fake_ask(const char *word)
{
    LOCKED;
    put_node(word);
}

/* ------------------------------------------------------------ libxenctrl, libxenguest */

static int getinfo(struct xen_ctrl *c, uint32_t first, unsigned max, void *out)
{
    struct xen_dominfo info = { .domain = DOMID, .flags = the->flags | XEN_STATE_HVM };

    (void)c, (void)max;
    if (the->gone || first > DOMID)
        return 0;
    memcpy(out, &info, sizeof info);
    return 1;
}

static int nr_gpfns(struct xen_ctrl *c, uint32_t domid, unsigned long *nr)
{
    (void)c, (void)domid;
    *nr = the->nr_pfns;
    return 0;
}

static int shadow_control(struct xen_ctrl *c, uint32_t domid, unsigned op, unsigned *mb, unsigned mode)
{
    (void)c, (void)domid, (void)mb, (void)mode;
    if (op == XEN_LOG_ENABLE && the->log_on)
        return set_errno(EINVAL);
    the->log_on = op == XEN_LOG_ENABLE;
    memset(the->log, 0, sizeof the->log);
    return 0;
}

static long long logdirty(struct xen_ctrl *c, uint32_t domid, unsigned op, struct xen_buffer *buffer,
                          unsigned long pages, unsigned mode, struct xen_log_stats *stats)
{
    int error = the->fail_log;
    long long answer = the->short_log ? the->short_log : (long long)pages;

    (void)c, (void)domid, (void)mode, (void)stats;
    the->fail_log = 0;
    the->short_log = 0;
    if (error || !the->log_on)
        return set_errno(error ? error : EINVAL);
    memcpy(buffer->memory, the->log, (pages + 63) / 64 * 8);
    if (op == XEN_LOG_CLEAN)
        memset(the->log, 0, sizeof the->log);
    return answer;
}

static void *alloc_pages(struct xen_ctrl *c, struct xen_buffer *buffer, int pages)
{
    (void)c;
    return buffer->memory = calloc((size_t)pages, CK_PAGE_SIZE);
}

static void free_pages(struct xen_ctrl *c, struct xen_buffer *buffer, int pages)
{
    (void)c, (void)pages;
    free(buffer->memory);
}

static int get_tsc(struct xen_ctrl *c, uint32_t domid, uint32_t *mode, uint64_t *nsec, uint32_t *khz,
                   uint32_t *incarnation)
{
    (void)c, (void)domid;
    *mode = 1, *nsec = 0x1122334455667788, *khz = 2400000, *incarnation = 3;
    return 0;
}

static int get_context(struct xen_ctrl *c, uint32_t domid, uint8_t *buffer, uint32_t size)
{
    (void)c, (void)domid;
    if (buffer)
        memset(buffer, 0xc7, size);
    return buffer ? the->context_bytes : the->context_bytes + 5; /* it may take less than it asked for */
}

static int get_param(struct xen_ctrl *c, uint32_t domid, uint32_t index, uint64_t *value)
{
    (void)c, (void)domid;
    *value = the->params[index];
    return 0;
}

static int resume_domain(struct xen_ctrl *c, uint32_t domid, int fast)
{
    (void)c, (void)domid;
    LOCKED;
    if (!fast || !(the->flags & XEN_STATE_SHUTDOWN))
        return set_errno(EINVAL);
    the->flags = 0;
    the->resumes++;
    react(); /* what it was asked while it stood still */
    return 0;
}

static struct xen_cpu_policy *policy_init(void)
{
    return (struct xen_cpu_policy *)&the->flags;
}

static void policy_destroy(struct xen_cpu_policy *policy)
{
    (void)policy;
}

static int policy_get(struct xen_ctrl *c, uint32_t domid, struct xen_cpu_policy *policy)
{
    (void)c, (void)domid, (void)policy;
    return 0;
}

static int policy_size(struct xen_ctrl *c, uint32_t *leaves, uint32_t *msrs)
{
    (void)c;
    *leaves = 5, *msrs = 4;
    return 0;
}

static int policy_serialise(struct xen_ctrl *c, const struct xen_cpu_policy *policy,
                            struct xen_cpuid_leaf *leaves, uint32_t *nr_leaves,
                            struct xen_msr_entry *msrs, uint32_t *nr_msrs)
{
    (void)c, (void)policy;
    leaves[0] = (struct xen_cpuid_leaf){ 1, 0xffffffff, 2, 3, 4, 5 };
    msrs[0] = (struct xen_msr_entry){ 0xce, 0, 1ull << 31 };
    *nr_leaves = 1, *nr_msrs = 1; /* fewer than there is room for */
    return 0;
}

static int modified_memory(struct xen_devices *devices, uint16_t domid, uint64_t pfn, uint32_t nr)
{
    (void)devices, (void)domid, (void)nr;
    if (the->fail_mark)
        return set_errno(the->fail_mark);
    if (the->log_on && !(the->holes[pfn / 64] >> pfn % 64 & 1))
        the->log[pfn / 64] |= 1ull << pfn % 64;
    return 0;
}

/* ------------------------------------------------------------ libxenstore */

static struct xen_store *store_open(unsigned long flags)
{
    (void)flags;
    return (struct xen_store *)&the->note;
}

static void store_close(struct xen_store *store)
{
    (void)store;
}

static void *store_read(struct xen_store *store, uint32_t t, const char *path, unsigned *length)
{
    (void)store, (void)path;
    LOCKED;
    tell();
    the->waited += t == 0 && pthread_equal(pthread_self(), the->caller);
    *length = (unsigned)strlen(the->node);
    return strdup(the->node);
}

static bool store_write(struct xen_store *store, uint32_t t, const char *path, const void *data,
                        unsigned length)
{
    (void)store, (void)t, (void)path;
    memset(the->staged, 0, sizeof the->staged);
    memcpy(the->staged, data, length);
    the->in_transaction = true;
    return true;
}

static uint32_t transaction_start(struct xen_store *store)
{
    (void)store;
    the->in_transaction = false;
    return 1;
}

static bool transaction_end(struct xen_store *store, uint32_t t, bool abort)
{
    (void)store, (void)t;
    LOCKED;
    if (abort)
        return true;
    if (the->broken_in) {
        the->broken_in = false;
        errno = EAGAIN;
        return false;
    }
    if (the->in_transaction) {
        put_node(the->staged);
        react();
    }
    return true;
}

static bool watch(struct xen_store *store, const char *path, const char *token)
{
    (void)store, (void)path;
    LOCKED;
    fire(token);
    return true;
}

static int store_fileno(struct xen_store *store)
{
    (void)store;
    return the->note;
}

static char **check_watch(struct xen_store *store)
{
    char **pair;
    eventfd_t count;

    (void)store;
    LOCKED;
    if (the->tail == the->come) {
        eventfd_read(the->note, &count);
        errno = EAGAIN;
        return NULL;
    }
    pair = malloc(2 * sizeof *pair);
    pair[0] = (char *)"a path";
    pair[1] = (char *)the->events[the->tail++ % EVENTS];
    return pair;
}

static bool store_resume(struct xen_store *store, unsigned domid)
{
    (void)store, (void)domid;
    the->told++;
    return true;
}

/* ------------------------------------------------------------ the p2m */

int64_t xen_p2m_changes(void *domain, uint64_t *bitmap, uint64_t nr_pfns)
{
    (void)domain, (void)bitmap, (void)nr_pfns;
    return 0;
}

int xen_types(void *domain, uint64_t *pfns, uint32_t count)
{
    (void)domain;
    for (uint32_t i = 0; i < count; i++)
        if (the->holes[pfns[i] / 64] >> pfns[i] % 64 & 1)
            pfns[i] |= CK_TYPE_XTAB << CK_TYPE_SHIFT;
    return 0;
}

int xen_map(void *domain, uint64_t first, uint32_t count, void **base)
{
    (void)domain, (void)first, (void)count, (void)base;
    return -ENOSYS;
}

int xen_unmap(void *domain, void *base, uint32_t count)
{
    (void)domain, (void)base, (void)count;
    return -ENOSYS;
}

uint64_t xen_p2m_requests(const struct xen_domain *domain)
{
    (void)domain;
    return the->requests;
}

/* ------------------------------------------------------------ for the test */

struct fake *fake_new(uint64_t nr_pfns)
{
    the = calloc(1, sizeof *the);
    the->nr_pfns = nr_pfns;
    the->prompt = UINT32_MAX;
    the->caller = pthread_self();
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &recursive);
    the->note = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    the->context_bytes = 1003;
    the->params[1] = 0xfeffc;
    the->params[17] = 0xfefff;
    the->libs = (struct xen_libs){
        .xc_domain_getinfolist = getinfo, .xc_domain_nr_gpfns = nr_gpfns,
        .xc_shadow_control = shadow_control, .xc_logdirty_control = logdirty,
        .xc__hypercall_buffer_alloc_pages = alloc_pages,
        .xc__hypercall_buffer_free_pages = free_pages, .xc_domain_get_tsc_info = get_tsc,
        .xc_domain_hvm_getcontext = get_context, .xc_hvm_param_get = get_param,
        .xc_domain_resume = resume_domain, .xc_cpu_policy_init = policy_init,
        .xc_cpu_policy_destroy = policy_destroy, .xc_cpu_policy_get_domain = policy_get,
        .xc_cpu_policy_get_size = policy_size, .xc_cpu_policy_serialise = policy_serialise,
        .xendevicemodel_modified_memory = modified_memory, .xs_open = store_open,
        .xs_close = store_close, .xs_read = store_read, .xs_write = store_write,
        .xs_transaction_start = transaction_start, .xs_transaction_end = transaction_end,
        .xs_watch = watch, .xs_fileno = store_fileno, .xs_check_watch = check_watch,
        .xs_resume_domain = store_resume,
    };
    return xen_domain_new(&the->libs, DOMID, &the->domain) ? NULL : the;
}

void fake_free(void)
{
    xen_domain_free(the->domain);
    close(the->note);
    free(the);
}

void *fake_domain(void) { return the->domain; }
void *fake_table(void) { return xen_domain_table(the->domain); }
void fake_manner(enum manner manner) { the->manner = manner; }
void fake_interpose(const char *word) 
{
    snprintf(the->interposed, sizeof the->interposed, "%s", word);
}
/* From now on so many events come at once, and the others with the next answer. */
void fake_lag(unsigned prompt) { the->prompt = prompt; }
uint64_t fake_waited(void) { return the->waited; }
void fake_break_in(void) { the->broken_in = true; }
const char *fake_node(void) { return the->node; }
void fake_vanish(void) { the->gone = true; }
void fake_run(void) { the->flags = 0; }
void fake_hole(uint64_t pfn) { the->holes[pfn / 64] |= 1ull << pfn % 64; }
void fake_fill(uint64_t pfn) { the->holes[pfn / 64] &= ~(1ull << pfn % 64); }
void fake_request(void) { the->requests++; }
void fake_dirty(uint64_t pfn) { the->log[pfn / 64] |= 1ull << pfn % 64; }
void fake_clean(void) { memset(the->log, 0, sizeof the->log); }
void fake_log_off(void) { the->log_on = false; }
void fake_fail_log(int error) { the->fail_log = error; }
void fake_fail_mark(int error) { the->fail_mark = error; }
void fake_short_log(long long pages) { the->short_log = pages; }
uint64_t fake_resumes(void) { return the->resumes; }
uint64_t fake_told(void) { return the->told; }
