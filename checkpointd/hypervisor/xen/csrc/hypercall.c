#include "strict.h"
#include "hypercall.h"

#include <string.h>
#include <sys/mman.h>

#include "hypervisor.h"

/* struct hvm_hw_cpu, public/arch-x86/hvm/save.h, up to the segments' attributes. */
struct cpu {
    uint8_t fpu[512];
    uint64_t rax, rbx, rcx, rdx, rbp, rsi, rdi, rsp, r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags, cr0, cr2, cr3, cr4, debug[6];
    uint32_t selectors[8], limits[10];
    uint64_t bases[10];
    uint32_t cs_attributes;
};
_Static_assert(offsetof(struct cpu, rdi) == 560 && offsetof(struct cpu, cs_attributes) == 888,
               "public/arch-x86/hvm/save.h");

#define RECORD_CPU 2         /* HVM_SAVE_CODE(CPU) */
#define RECORD_ROOM 4096     /* octets; the record has about 1 KiB, and may grow */
#define CS_LONG (1u << 9)    /* of the attributes: 64-bit code */

/* xen_add_to_physmap_t, public/memory.h. */
struct add_to_physmap {
    uint16_t domain, count;
    uint32_t space;
    uint64_t index, pfn;
};
_Static_assert(sizeof(struct add_to_physmap) == 24, "public/memory.h");

#define ADD_TO_PHYSMAP 7 /* XENMEM_add_to_physmap */
#define SPACE_GRANTS   1 /* XENMAPSPACE_grant_table */

/* Read what lies at a virtual address of the guest, within one page. */
static bool read_guest(struct xen_libs *libs, uint32_t domid, uint32_t vcpu, uint64_t address,
                       void *to, size_t size)
{
    uint64_t offset = address % CK_PAGE_SIZE;
    unsigned long pfn;
    uint8_t *page;
    int error = 0;

    if (offset + size > CK_PAGE_SIZE)
        return false;
    pfn = libs->xc_translate_foreign_address(libs->ctrl, domid, (int)vcpu, address);
    if (pfn == 0)
        return false;
    page = libs->xenforeignmemory_map(libs->memory, domid, PROT_READ, 1, &pfn, &error);
    if (!page)
        return false;
    if (error == 0)
        memcpy(to, page + offset, size);
    libs->xenforeignmemory_unmap(libs->memory, page, 1);
    return error == 0;
}

uint64_t xen_grant_frame_put(struct xen_libs *libs, uint32_t domid, uint32_t vcpu)
{
    union { struct cpu cpu; uint8_t room[RECORD_ROOM]; } record;
    struct add_to_physmap put;

    if (libs->xc_domain_hvm_getcontext_partial(libs->ctrl, domid, RECORD_CPU, (uint16_t)vcpu,
                                               &record, sizeof record) != 0)
        return XEN_NO_GRANT_FRAME;
    if (!(record.cpu.cs_attributes & CS_LONG) || record.cpu.rdi != ADD_TO_PHYSMAP
        || !read_guest(libs, domid, vcpu, record.cpu.rsi, &put, sizeof put)
        || put.space != SPACE_GRANTS)
        return XEN_NO_GRANT_FRAME;
    return put.pfn;
}
