/*
 * The p2m of the Xen adapter (p2m.c, invalidation.c) on the fake Xen, and a table for an engine's native half. What of
 * that is not of the p2m stands in here, so that a test sees no dirty page but its own.
 */
#include "domain.h"
#include "p2m.h"
#include "xen.h"

#include <string.h>

#define HOOKS 8

enum change { OUT, IN, OUT_IN, LEAVE };

static struct xen_libs libs = { XEN_FUNCTIONS(XEN_ENTRY) };
static struct xen_domain domain;
static struct hook { bool armed; enum call call; uint64_t after; enum change change; uint64_t pfn; } hooks[HOOKS];
static int64_t leaving; /* a frame that has left the p2m, while its vcpu is still in that hypercall */

/* ------------------------------------------------------------ the guest */

/* Take a page out; does its vcpu go on? */
bool fake_out(uint64_t pfn)
{
    if (!fake_has_page(pfn))
        return true;
    fake_take(pfn);
    return fake_ask_and_wait((int)(pfn % VCPUS));
}

/* The other half of LEAVE: the page has left, it is charged still, and nobody has been asked. Does its vcpu go on? */
bool fake_left(void)
{
    fake_let_go(leaving);
    return fake_ask_and_wait(0);
}

/* Vcpu 0 puts a frame of its grant table at `pfn`, as Linux does when it resumes; `stack` is the page that holds the
 * argument. Does it go on? */
bool fake_put_grant(uint64_t pfn, uint64_t stack, uint64_t command, uint32_t space, bool is_64bit)
{
    struct { uint16_t domain, count; uint32_t space; uint64_t index, pfn; } argument = {
        .space = space, .pfn = pfn,
    };
    const uint64_t offset = 0x100;
    bool goes_on;

    memcpy(fake_page(stack) + offset, &argument, sizeof argument);
    fake_registers = (struct registers){ command, stack * PAGE + offset, is_64bit ? 1u << 9 : 0 };
    goes_on = fake_ask_and_wait(0);
    fake_registers = (struct registers){ 0 };
    return goes_on;
}

/* Arm a change: it happens in the call `after` calls from now. */
void fake_hook(enum call call, uint64_t after, enum change change, uint64_t pfn)
{
    for (int i = 0; i < HOOKS; i++)
        if (!hooks[i].armed) {
            hooks[i] = (struct hook){ true, call, guest.calls[call] + after, change, pfn };
            return;
        }
}

/* What the guest does between two calls of an engine in a live round. */
static void happen(enum call call)
{
    for (int i = 0; i < HOOKS; i++) {
        struct hook *h = &hooks[i];

        if (!h->armed || h->call != call || domain.suspended || guest.calls[call] < h->after)
            continue;
        h->armed = false;
        if (h->change == LEAVE)
            leaving = fake_page_out(h->pfn);
        if (h->change == OUT || h->change == OUT_IN)
            fake_out(h->pfn);
        if (h->change == IN || h->change == OUT_IN)
            fake_give(h->pfn, (int64_t)(1000000 + guest.calls[call] * 1000 + (uint64_t)i));
    }
}

/* ------------------------------------------------------------ the rest of the table */

static int suspend(void *d, int64_t timeout_ns)
{
    domain.suspended = true;
    return 0;
}

static int resume(void *d)
{
    domain.suspended = false;
    return 0;
}

static int harvest(void *d, struct ck_bitmap *bitmap, int mode)
{
    uint64_t log[MAX_PFNS / 64] = { 0 };
    struct xen_buffer buffer = { .memory = log };

    xc_logdirty_control(NULL, DOMID, mode == CK_HARVEST_PEEK ? XEN_LOG_PEEK : XEN_LOG_CLEAN, &buffer, bitmap->nr_bits, 0, NULL);
    ck_bitmap_take(bitmap, log, false);
    return 0;
}

static int64_t context(void *d, uint8_t *buffer, uint64_t capacity)
{
    memset(buffer, 0, 8);
    return 8;
}

static int output_close(void *d, uint64_t *closed)
{
    *closed = 1;
    return 0;
}

/* ------------------------------------------------------------ its life */

/* A guest with memory behind the first nr_frames / 2 pfns, each page holding its pfn, all of them dirty; and the
 * adapter's table for it. One at a time: NULL if there is one. */
void *fake_new(uint64_t nr_pfns, uint64_t nr_frames, bool marks)
{
    if (domain.p2m)
        return NULL;
    fake_reset(nr_pfns, nr_frames);
    guest.marks = marks;
    xc_shadow_control(NULL, DOMID, XEN_LOG_ENABLE, NULL, 0);
    for (uint64_t p = 0; p < nr_pfns; p++)
        fake_write(p, (int64_t)p);
    memset(hooks, 0, sizeof hooks);
    fake_meanwhile = happen;
    domain = (struct xen_domain){ .libs = &libs, .domid = DOMID, .nr_pfns = nr_pfns };
    domain.table = (struct ck_hypervisor){
        .abi = CK_HYPERVISOR_ABI, .size = sizeof(struct ck_hypervisor), .domain = &domain,
        .suspend = suspend, .resume = resume, .harvest = harvest, .p2m_changes = xen_p2m_changes,
        .types = xen_types, .map = xen_map, .unmap = xen_unmap, .context = context,
        .output_close = output_close,
    };
    return &domain.table;
}

int fake_begin(bool deaf)
{
    uint16_t server = 0;
    int rc = xen_p2m_begin(&domain, deaf, &server);

    return rc ? rc : server;
}

int fake_watch(void) { return xen_p2m_watch(&domain); }
int fake_end(void) { return xen_p2m_end(&domain); }
uint64_t fake_requests(void) { return xen_p2m_requests(&domain); }
int fake_ioreq_destroy(uint16_t server) { return xen_ioreq_destroy(&libs, DOMID, server); }
