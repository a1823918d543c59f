#include "xen.h"

#include <string.h>

#define CONTEXT_BYTES 1003

struct xen_ctrl *xc_interface_open(struct xen_logger *l, struct xen_logger *m, unsigned flags)
{
    return HANDLE;
}

int xc_interface_close(struct xen_ctrl *c)
{
    return 0;
}

/* ------------------------------------------------------------ its state */

/* Dom0, and our guest. */
int xc_domain_getinfolist(struct xen_ctrl *c, uint32_t first, unsigned max, void *out)
{
    struct xen_dominfo info = {
        .tot_pages = 100, .nr_online_vcpus = VCPUS, .max_vcpu_id = VCPUS - 1, .gpaddr_bits = 46,
    };

    if (first > DOMID || (first > 0 && guest.gone))
        return 0;
    if (first > 0) {
        info.domain = DOMID;
        info.flags = guest.flags | XEN_STATE_HVM;
        info.tot_pages = guest.tot_pages;
        for (unsigned i = 0; i < sizeof info.handle; i++)
            info.handle[i] = (uint8_t)(0x11 * i);
    }
    info.max_pages = info.tot_pages;
    memcpy(out, &info, sizeof info);
    return 1;
}

int xc_domain_pause(struct xen_ctrl *c, uint32_t domid)
{
    guest.flags |= XEN_STATE_PAUSED;
    return 0;
}

int xc_domain_unpause(struct xen_ctrl *c, uint32_t domid)
{
    guest.flags &= ~XEN_STATE_PAUSED;
    return 0;
}

int xc_domain_destroy(struct xen_ctrl *c, uint32_t domid)
{
    guest.gone = true;
    return 0;
}

int xc_domain_shutdown(struct xen_ctrl *c, uint32_t domid, int reason)
{
    fake_stop((uint32_t)reason);
    return 0;
}

/* The fast resume only: the slow one would have the guest build its devices anew. */
int xc_domain_resume(struct xen_ctrl *c, uint32_t domid, int fast)
{
    LOCKED;
    if (!fast || !(guest.flags & XEN_STATE_SHUTDOWN))
        return set_errno(EINVAL);
    guest.flags &= XEN_STATE_PAUSED;
    guest.resumes++;
    fake_react(); /* to what it was asked while it stood still */
    return 0;
}

/* ------------------------------------------------------------ its records of the stream */

int xc_domain_get_tsc_info(struct xen_ctrl *c, uint32_t domid, uint32_t *mode, uint64_t *nsec, uint32_t *khz,
                           uint32_t *incarnation)
{
    *mode = 1, *nsec = 0x1122334455667788, *khz = 2400000, *incarnation = 3;
    return 0;
}

/* It may take less than it asked for. */
int xc_domain_hvm_getcontext(struct xen_ctrl *c, uint32_t domid, uint8_t *buffer, uint32_t size)
{
    if (!buffer)
        return CONTEXT_BYTES + 5;
    memset(buffer, 0xc7, size);
    return CONTEXT_BYTES;
}

/* Of what Xen saves of a vcpu (struct hvm_hw_cpu), the registers that tell what hypercall it is in. */
int xc_domain_hvm_getcontext_partial(struct xen_ctrl *c, uint32_t domid, uint16_t code, uint16_t vcpu, void *to,
                                     uint32_t size)
{
    if (code != 2 || vcpu >= VCPUS || size < 1024)
        return set_errno(EINVAL);
    memset(to, 0, size);
    memcpy((uint8_t *)to + 552, &fake_registers.rsi, 8);
    memcpy((uint8_t *)to + 560, &fake_registers.rdi, 8);
    memcpy((uint8_t *)to + 888, &fake_registers.cs, 4);
    return 0;
}

/* Its page tables map every pfn where it is. */
unsigned long xc_translate_foreign_address(struct xen_ctrl *c, uint32_t domid, int vcpu, unsigned long long address)
{
    return address / PAGE;
}

int xc_hvm_param_get(struct xen_ctrl *c, uint32_t domid, uint32_t index, uint64_t *value)
{
    static const uint64_t params[64] = { [1] = 0xfeffc, [17] = 0xfefff };

    *value = params[index];
    return 0;
}

struct xen_cpu_policy *xc_cpu_policy_init(void)
{
    return HANDLE;
}

void xc_cpu_policy_destroy(struct xen_cpu_policy *policy)
{
}

int xc_cpu_policy_get_domain(struct xen_ctrl *c, uint32_t domid, struct xen_cpu_policy *policy)
{
    return 0;
}

int xc_cpu_policy_get_system(struct xen_ctrl *c, unsigned which, struct xen_cpu_policy *policy)
{
    return 0;
}

int xc_cpu_policy_get_size(struct xen_ctrl *c, uint32_t *leaves, uint32_t *msrs)
{
    *leaves = 5, *msrs = 4;
    return 0;
}

/* Fewer than there is room for. */
int xc_cpu_policy_serialise(struct xen_ctrl *c, const struct xen_cpu_policy *policy, struct xen_cpuid_leaf *leaves,
                            uint32_t *nr_leaves, struct xen_msr_entry *msrs, uint32_t *nr_msrs)
{
    leaves[0] = (struct xen_cpuid_leaf){ 1, 0xffffffff, 2, 3, 4, 5 };
    msrs[0] = (struct xen_msr_entry){ 0xce, 0, 1ull << 31 };
    *nr_leaves = 1, *nr_msrs = 1;
    return 0;
}
