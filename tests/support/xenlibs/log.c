/*
 * Kept from the real thing, since the tests are about it: a page that comes in is neither marked dirty nor logged until
 * the next CLEAN (Xen 4.17), unless `guest.marks` is set (marked once, as it comes in).
 */
#include "xen.h"

#include <stdlib.h>
#include <string.h>

static bool unlogged[MAX_PFNS]; /* came in since the last CLEAN */

static void mark(uint64_t pfn)
{
    guest.log[pfn / 64] |= 1ull << pfn % 64;
}

void fake_clean(void)
{
    memset(guest.log, 0, sizeof guest.log);
    memset(unlogged, 0, sizeof unlogged);
}

void fake_dirty(uint64_t pfn)
{
    if (guest.log_on && !unlogged[pfn])
        mark(pfn);
}

void fake_log_new_page(uint64_t pfn)
{
    unlogged[pfn] = true;
    if (guest.marks)
        mark(pfn);
}

int xc_shadow_control(struct xen_ctrl *c, uint32_t domid, unsigned op, unsigned *mb, unsigned mode)
{
    if (op == XEN_LOG_ENABLE && guest.log_on)
        return set_errno(EINVAL);
    guest.log_on = op == XEN_LOG_ENABLE;
    guest.logs_ended += op == XEN_LOG_OFF;
    fake_clean();
    return 0;
}

long long xc_logdirty_control(struct xen_ctrl *c, uint32_t domid, unsigned op, struct xen_buffer *buffer,
                              unsigned long pages, unsigned mode, struct xen_log_stats *stats)
{
    int error = guest.fail_log;
    long long answer = guest.short_log ? guest.short_log : (long long)pages;

    guest.fail_log = 0;
    guest.short_log = 0;
    if (error || !guest.log_on)
        return set_errno(error ? error : EINVAL);
    memcpy(buffer->memory, guest.log, (pages + 63) / 64 * 8);
    if (op == XEN_LOG_CLEAN)
        fake_clean();
    return answer;
}

int xendevicemodel_modified_memory(struct xen_devices *d, uint16_t domid, uint64_t pfn, uint32_t nr)
{
    if (guest.fail_mark)
        return set_errno(guest.fail_mark);
    if (guest.log_on && fake_has_page(pfn))
        mark(pfn);
    return 0;
}

void *xc__hypercall_buffer_alloc_pages(struct xen_ctrl *c, struct xen_buffer *buffer, int pages)
{
    return buffer->memory = calloc((size_t)pages, PAGE);
}

void xc__hypercall_buffer_free_pages(struct xen_ctrl *c, struct xen_buffer *buffer, int pages)
{
    free(buffer->memory);
}
