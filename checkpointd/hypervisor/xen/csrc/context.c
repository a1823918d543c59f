/*
 * What Xen knows of a PVH guest beside its memory, as records of the libxc stream: those that end each epoch, and
 * those that begin the stream. Formats: docs/specs/libxc-migration-stream of Xen.
 */
#include "strict.h"
#include "domain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum record {
    X86_TSC_INFO = 0x08, HVM_CONTEXT = 0x09, HVM_PARAMS = 0x0a, STATIC_DATA_END = 0x10,
    X86_CPUID_POLICY = 0x11, X86_MSR_POLICY = 0x12,
};

/* Where records are written; once one did not fit, nothing more does. */
struct writer {
    uint8_t *at;
    uint64_t left;
    bool full;
};

/* Room for `length` octets, or NULL. */
static void *reserve(struct writer *w, uint64_t length)
{
    uint8_t *at = w->at;

    if (w->full || length > w->left) {
        w->full = true;
        return NULL;
    }
    w->at += length;
    w->left -= length;
    return at;
}

static void put(struct writer *w, const void *data, uint64_t length)
{
    void *at = reserve(w, length);

    if (at)
        memcpy(at, data, length);
}

static void put_header(struct writer *w, enum record type, uint64_t length)
{
    uint32_t header[2] = { type, (uint32_t)length };

    put(w, header, sizeof header);
}

static void pad(struct writer *w, uint64_t length)
{
    static const uint8_t zeros[8];

    put(w, zeros, -length % 8);
}

static int64_t written(const struct writer *w, const uint8_t *buffer)
{
    return w->full ? -ENOSPC : w->at - buffer;
}

/* ------------------------------------------------------------ the end of an epoch */

/* Parameters of an HVM domain that belong to its state, public/hvm/params.h; those that libxc saves, in its order.
 * Only a toolstack may set them, and does so before the guest first runs. */
static const uint32_t param_indices[XEN_PARAMS] = {
    1,  /* STORE_PFN */
    5,  /* IOREQ_PFN */
    6,  /* BUFIOREQ_PFN */
    27, /* PAGING_RING_PFN */
    28, /* MONITOR_RING_PFN */
    29, /* SHARING_RING_PFN */
    37, /* VM86_TSS_SIZED */
    17, /* CONSOLE_PFN */
    19, /* ACPI_IOPORTS_LOCATION */
    9,  /* VIRIDIAN */
    12, /* IDENT_PT */
    34, /* VM_GENERATION_ID_ADDR */
    32, /* IOREQ_SERVER_PFN */
    33, /* NR_IOREQ_SERVER_PAGES */
    36, /* X87_FIP_WIDTH */
    38, /* MCA_CAP */
};

int xen_context_prepare(struct xen_domain *d)
{
    int bytes = d->libs->xc_domain_hvm_getcontext(d->libs->ctrl, d->domid, NULL, 0);

    if (bytes < 0)
        return -errno;
    d->context_bytes = (uint32_t)bytes;
    d->nr_params = 0;
    for (unsigned i = 0; i < XEN_PARAMS; i++) {
        struct xen_param *param = &d->params[d->nr_params];

        param->index = param_indices[i];
        param->value = 0;
        if (d->libs->xc_hvm_param_get(d->libs->ctrl, d->domid, param_indices[i], &param->value) < 0)
            return -errno;
        d->nr_params += param->value != 0;
    }
    return 0;
}

static int put_tsc(struct writer *w, struct xen_domain *d)
{
    struct { uint32_t mode, khz; uint64_t nsec; uint32_t incarnation, reserved; } tsc = { 0 };

    if (d->libs->xc_domain_get_tsc_info(d->libs->ctrl, d->domid, &tsc.mode, &tsc.nsec, &tsc.khz,
                                        &tsc.incarnation) < 0)
        return -errno;
    put_header(w, X86_TSC_INFO, sizeof tsc);
    put(w, &tsc, sizeof tsc);
    return 0;
}

static int put_context(struct writer *w, struct xen_domain *d)
{
    uint32_t *header = reserve(w, 8);
    uint8_t *body = reserve(w, d->context_bytes);
    int length;

    if (!body)
        return 0; /* told by written() */
    length = d->libs->xc_domain_hvm_getcontext(d->libs->ctrl, d->domid, body, d->context_bytes);
    if (length < 0)
        return -errno;
    header[0] = HVM_CONTEXT;
    header[1] = (uint32_t)length;
    w->at -= d->context_bytes - (uint32_t)length;
    w->left += d->context_bytes - (uint32_t)length;
    pad(w, (uint32_t)length);
    return 0;
}

static void put_params(struct writer *w, const struct xen_domain *d)
{
    uint32_t count[2] = { d->nr_params, 0 };
    uint64_t bytes = d->nr_params * sizeof d->params[0];

    if (d->nr_params == 0)
        return;
    put_header(w, HVM_PARAMS, sizeof count + bytes);
    put(w, count, sizeof count);
    put(w, d->params, bytes);
}

int64_t xen_context(void *domain, uint8_t *buffer, uint64_t capacity)
{
    struct xen_domain *d = domain;
    struct writer w = { buffer, capacity, false };
    int rc;

    if (!d->suspended)
        return -EINVAL;
    rc = put_tsc(&w, d);
    if (rc == 0)
        rc = put_context(&w, d);
    if (rc)
        return rc;
    put_params(&w, d);
    return written(&w, buffer);
}

/* ------------------------------------------------------------ the beginning of the stream */

static int put_policies(struct writer *w, struct xen_domain *d, struct xen_cpu_policy *policy)
{
    struct xen_libs *libs = d->libs;
    struct xen_cpuid_leaf *leaves = NULL;
    struct xen_msr_entry *msrs = NULL;
    uint32_t nr_leaves, nr_msrs;
    int rc = -ENOMEM;

    if (libs->xc_cpu_policy_get_size(libs->ctrl, &nr_leaves, &nr_msrs) < 0)
        return -errno;
    leaves = calloc(nr_leaves, sizeof *leaves);
    msrs = calloc(nr_msrs, sizeof *msrs);
    if (!leaves || !msrs)
        goto out;
    rc = libs->xc_cpu_policy_get_domain(libs->ctrl, d->domid, policy);
    if (rc == 0)
        rc = libs->xc_cpu_policy_serialise(libs->ctrl, policy, leaves, &nr_leaves, msrs, &nr_msrs);
    if (rc) {
        rc = errno ? -errno : -EIO;
        goto out;
    }
    if (nr_leaves) {
        put_header(w, X86_CPUID_POLICY, nr_leaves * sizeof *leaves);
        put(w, leaves, nr_leaves * sizeof *leaves);
    }
    if (nr_msrs) {
        put_header(w, X86_MSR_POLICY, nr_msrs * sizeof *msrs);
        put(w, msrs, nr_msrs * sizeof *msrs);
    }
out:
    free(leaves);
    free(msrs);
    return rc;
}

int64_t xen_static_records(struct xen_domain *d, uint32_t major, uint32_t minor, uint8_t *buffer,
                           uint64_t capacity)
{
    /* Marker, "XENF", version 3, options 0 (little endian records), reserved; big endian as the format asks. */
    static const uint8_t image_header[24] = {
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 'X', 'E', 'N', 'F', 0, 0, 0, 3,
    };
    struct { uint32_t type; uint16_t page_shift, reserved; uint32_t major, minor; } domain_header = {
        2 /* HVM and PVH */, CK_PAGE_SHIFT, 0, major, minor,
    };
    struct writer w = { buffer, capacity, false };
    struct xen_cpu_policy *policy = d->libs->xc_cpu_policy_init();
    int rc;

    if (!policy)
        return -ENOMEM;
    put(&w, image_header, sizeof image_header);
    put(&w, &domain_header, sizeof domain_header);
    rc = put_policies(&w, d, policy);
    d->libs->xc_cpu_policy_destroy(policy);
    put_header(&w, STATIC_DATA_END, 0);
    return rc ? rc : written(&w, buffer);
}
