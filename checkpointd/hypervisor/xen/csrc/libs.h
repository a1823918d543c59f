/*
 * Xen's libraries, opened at run time, so that this module is built and tested without Xen's headers.
 *
 * What is declared here is what Xen's own headers of 4.17 and 4.20 agree on. libxenctrl and libxenguest are
 * not ABI-stable: they are opened by the name of the running release, so that a library of another release is
 * never called; the releases whose declarations were compared are listed in versions.py. The other libraries
 * are stable by promise.
 */
#ifndef CHECKPOINTD_XEN_LIBS_H
#define CHECKPOINTD_XEN_LIBS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* XEN_DOMCTL_SHADOW_OP_* and the one mode, public/domctl.h. */
#define XEN_LOG_OFF         0u
#define XEN_LOG_ENABLE      2u
#define XEN_LOG_CLEAN      11u
#define XEN_LOG_PEEK       12u
#define XEN_LOG_MODE_FINAL  1u

/* Shutdown reasons, public/sched.h. */
#define XEN_SHUTDOWN_POWEROFF   0u
#define XEN_SHUTDOWN_REBOOT     1u
#define XEN_SHUTDOWN_SUSPEND    2u
#define XEN_SHUTDOWN_CRASH      3u
#define XEN_SHUTDOWN_WATCHDOG   4u
#define XEN_SHUTDOWN_SOFT_RESET 5u

/* XEN_DOMINF_*: flags of xen_domain_state, public/domctl.h. */
#define XEN_STATE_DYING    (1u << 0)
#define XEN_STATE_HVM      (1u << 1)
#define XEN_STATE_SHUTDOWN (1u << 2)
#define XEN_STATE_PAUSED   (1u << 3)
#define XEN_STATE_HAP      (1u << 8)

/* xc_domaininfo_t of 4.16 to 4.20, octet by octet (112); asked for one domain at a time, into a larger
 * buffer, so that a longer one of another release overwrites nothing. */
struct xen_dominfo {
    uint16_t domain, pad1;
    uint32_t flags; /* XEN_STATE_*; the shutdown reason in bits 16-23 */
    uint64_t tot_pages, max_pages, outstanding_pages, shr_pages, paged_pages, shared_info_frame;
    uint64_t cpu_time;
    uint32_t nr_online_vcpus, max_vcpu_id, ssidref;
    uint8_t handle[16]; /* the UUID */
    uint32_t cpupool;
    uint8_t gpaddr_bits, pad2[7];
    uint32_t arch_config[2];
};

struct xen_log_stats { uint32_t faults, dirty; };    /* xc_shadow_op_stats_t */
struct xen_cpuid_leaf { uint32_t leaf, subleaf, a, b, c, d; }; /* xen_cpuid_leaf_t */
struct xen_msr_entry { uint32_t index, flags; uint64_t value; }; /* xen_msr_entry_t */

/* xc_hypercall_buffer_t: memory that a hypercall may write. Begins as XEN_BUFFER_INIT. */
struct xen_buffer {
    void *memory;
    struct xen_buffer *shadow;
    int direction;
    void *user;
    size_t size;
};
#define XEN_BUFFER_INIT { NULL, NULL, 0, (void *)-1, 0 }

/* Handles of the libraries, opaque. */
struct xen_ctrl;
struct xen_memory;
struct xen_memory_resource;
struct xen_events;
struct xen_devices;
struct xen_store;
struct xen_cpu_policy;
struct xen_logger;

/* F(library, result, name, arguments): each function that is called. */
#define XEN_FUNCTIONS(F) \
    F(CTRL, struct xen_ctrl *, xc_interface_open, (struct xen_logger *, struct xen_logger *, unsigned)) \
    F(CTRL, int, xc_interface_close, (struct xen_ctrl *)) \
    F(CTRL, int, xc_domain_getinfolist, (struct xen_ctrl *, uint32_t, unsigned, void *)) \
    F(CTRL, int, xc_domain_pause, (struct xen_ctrl *, uint32_t)) \
    F(CTRL, int, xc_domain_unpause, (struct xen_ctrl *, uint32_t)) \
    F(CTRL, int, xc_domain_destroy, (struct xen_ctrl *, uint32_t)) \
    F(CTRL, int, xc_domain_shutdown, (struct xen_ctrl *, uint32_t, int)) \
    F(CTRL, int, xc_domain_nr_gpfns, (struct xen_ctrl *, uint32_t, unsigned long *)) \
    F(CTRL, int, xc_domain_decrease_reservation_exact, \
      (struct xen_ctrl *, uint32_t, unsigned long, unsigned, unsigned long *)) \
    F(CTRL, int, xc_shadow_control, (struct xen_ctrl *, uint32_t, unsigned, unsigned *, unsigned)) \
    F(CTRL, long long, xc_logdirty_control, \
      (struct xen_ctrl *, uint32_t, unsigned, struct xen_buffer *, unsigned long, unsigned, \
       struct xen_log_stats *)) \
    F(CTRL, void *, xc__hypercall_buffer_alloc_pages, (struct xen_ctrl *, struct xen_buffer *, int)) \
    F(CTRL, void, xc__hypercall_buffer_free_pages, (struct xen_ctrl *, struct xen_buffer *, int)) \
    F(CTRL, int, xc_get_pfn_type_batch, (struct xen_ctrl *, uint32_t, unsigned, unsigned long *)) \
    F(CTRL, int, xc_domain_get_tsc_info, \
      (struct xen_ctrl *, uint32_t, uint32_t *, uint64_t *, uint32_t *, uint32_t *)) \
    F(CTRL, int, xc_domain_hvm_getcontext, (struct xen_ctrl *, uint32_t, uint8_t *, uint32_t)) \
    F(CTRL, int, xc_domain_hvm_getcontext_partial, \
      (struct xen_ctrl *, uint32_t, uint16_t, uint16_t, void *, uint32_t)) \
    F(CTRL, unsigned long, xc_translate_foreign_address, \
      (struct xen_ctrl *, uint32_t, int, unsigned long long)) \
    F(CTRL, int, xc_hvm_param_get, (struct xen_ctrl *, uint32_t, uint32_t, uint64_t *)) \
    F(GUEST, int, xc_domain_resume, (struct xen_ctrl *, uint32_t, int)) \
    F(GUEST, struct xen_cpu_policy *, xc_cpu_policy_init, (void)) \
    F(GUEST, void, xc_cpu_policy_destroy, (struct xen_cpu_policy *)) \
    F(GUEST, int, xc_cpu_policy_get_domain, (struct xen_ctrl *, uint32_t, struct xen_cpu_policy *)) \
    F(GUEST, int, xc_cpu_policy_get_system, (struct xen_ctrl *, unsigned, struct xen_cpu_policy *)) \
    F(GUEST, int, xc_cpu_policy_get_size, (struct xen_ctrl *, uint32_t *, uint32_t *)) \
    F(GUEST, int, xc_cpu_policy_serialise, \
      (struct xen_ctrl *, const struct xen_cpu_policy *, struct xen_cpuid_leaf *, uint32_t *, \
       struct xen_msr_entry *, uint32_t *)) \
    F(MEMORY, struct xen_memory *, xenforeignmemory_open, (struct xen_logger *, unsigned)) \
    F(MEMORY, int, xenforeignmemory_close, (struct xen_memory *)) \
    F(MEMORY, void *, xenforeignmemory_map, \
      (struct xen_memory *, uint32_t, int, size_t, const unsigned long *, int *)) \
    F(MEMORY, int, xenforeignmemory_unmap, (struct xen_memory *, void *, size_t)) \
    F(MEMORY, struct xen_memory_resource *, xenforeignmemory_map_resource, \
      (struct xen_memory *, uint16_t, unsigned, unsigned, unsigned long, unsigned long, void **, \
       int, int)) \
    F(MEMORY, int, xenforeignmemory_unmap_resource, \
      (struct xen_memory *, struct xen_memory_resource *)) \
    F(EVENTS, struct xen_events *, xenevtchn_open, (struct xen_logger *, unsigned)) \
    F(EVENTS, int, xenevtchn_close, (struct xen_events *)) \
    F(EVENTS, int, xenevtchn_fd, (struct xen_events *)) \
    F(EVENTS, int, xenevtchn_bind_interdomain, (struct xen_events *, uint32_t, uint32_t)) \
    F(EVENTS, int, xenevtchn_unbind, (struct xen_events *, uint32_t)) \
    F(EVENTS, int, xenevtchn_notify, (struct xen_events *, uint32_t)) \
    F(EVENTS, int, xenevtchn_pending, (struct xen_events *)) \
    F(EVENTS, int, xenevtchn_unmask, (struct xen_events *, uint32_t)) \
    F(DEVICES, struct xen_devices *, xendevicemodel_open, (struct xen_logger *, unsigned)) \
    F(DEVICES, int, xendevicemodel_close, (struct xen_devices *)) \
    F(DEVICES, int, xendevicemodel_modified_memory, \
      (struct xen_devices *, uint16_t, uint64_t, uint32_t)) \
    F(DEVICES, int, xendevicemodel_create_ioreq_server, \
      (struct xen_devices *, uint16_t, int, uint16_t *)) \
    F(DEVICES, int, xendevicemodel_get_ioreq_server_info, \
      (struct xen_devices *, uint16_t, uint16_t, unsigned long *, unsigned long *, uint32_t *)) \
    F(DEVICES, int, xendevicemodel_set_ioreq_server_state, \
      (struct xen_devices *, uint16_t, uint16_t, int)) \
    F(DEVICES, int, xendevicemodel_destroy_ioreq_server, (struct xen_devices *, uint16_t, uint16_t)) \
    F(STORE, struct xen_store *, xs_open, (unsigned long)) \
    F(STORE, void, xs_close, (struct xen_store *)) \
    F(STORE, void *, xs_read, (struct xen_store *, uint32_t, const char *, unsigned *)) \
    F(STORE, bool, xs_write, (struct xen_store *, uint32_t, const char *, const void *, unsigned)) \
    F(STORE, char **, xs_directory, (struct xen_store *, uint32_t, const char *, unsigned *)) \
    F(STORE, uint32_t, xs_transaction_start, (struct xen_store *)) \
    F(STORE, bool, xs_transaction_end, (struct xen_store *, uint32_t, bool)) \
    F(STORE, bool, xs_watch, (struct xen_store *, const char *, const char *)) \
    F(STORE, bool, xs_unwatch, (struct xen_store *, const char *, const char *)) \
    F(STORE, int, xs_fileno, (struct xen_store *)) \
    F(STORE, char **, xs_check_watch, (struct xen_store *)) \
    F(STORE, bool, xs_resume_domain, (struct xen_store *, unsigned))

enum xen_library {
    XEN_LIBRARY_CTRL, XEN_LIBRARY_GUEST, XEN_LIBRARY_MEMORY, XEN_LIBRARY_EVENTS, XEN_LIBRARY_DEVICES,
    XEN_LIBRARY_STORE, XEN_LIBRARIES
};

#define XEN_MEMBER(library, result, name, arguments) result (*name) arguments;

/* The libraries with the handles that every user of them shares; one a process. The handles may be used by any
 * thread; none survives a fork. */
struct xen_libs {
    void *opened[XEN_LIBRARIES];
    struct xen_ctrl *ctrl;
    struct xen_memory *memory;
    struct xen_devices *devices;
    XEN_FUNCTIONS(XEN_MEMBER)
};

/* Open the libraries of Xen `major`.`minor` (in `directory`, or where the system finds them: "") and their
 * handles. NULL on failure; `error` then says which library or function is missing, or which handle could not
 * be opened. */
struct xen_libs *xen_libs_open(uint32_t major, uint32_t minor, const char *directory, char *error,
                               size_t size);
void xen_libs_close(struct xen_libs *libs);

/* What the libraries said last on this thread, as text; forgotten by asking. "" if nothing. */
const char *xen_libs_said(void);

/* The facts about domain `domid`: 0, -ESRCH if there is none, or another negative errno. */
int xen_domain_state(struct xen_libs *libs, uint32_t domid, struct xen_dominfo *info);

/* The first domain whose domid is `first` or more; else as above. */
int xen_domain_next(struct xen_libs *libs, uint32_t first, struct xen_dominfo *info);

static inline bool xen_is_suspended(const struct xen_dominfo *info)
{
    return (info->flags & XEN_STATE_SHUTDOWN) != 0 && (info->flags & XEN_STATE_DYING) == 0
           && (info->flags >> 16 & 0xff) == XEN_SHUTDOWN_SUSPEND;
}

/* Ended for good: dying, or shut down for any reason but a suspend. */
static inline bool xen_is_ended(const struct xen_dominfo *info)
{
    return (info->flags & XEN_STATE_DYING) != 0
           || ((info->flags & XEN_STATE_SHUTDOWN) != 0 && !xen_is_suspended(info));
}

/* Orders to the hypervisor, for those who look after a domain without being attached to it. Each returns 0 or a
 * negative errno. */
int xen_pause(struct xen_libs *libs, uint32_t domid);
int xen_unpause(struct xen_libs *libs, uint32_t domid);
int xen_destroy(struct xen_libs *libs, uint32_t domid);
int xen_log_enable(struct xen_libs *libs, uint32_t domid); /* -EINVAL: it is on already */
int xen_log_off(struct xen_libs *libs, uint32_t domid);
/* Wake the vcpus that wait for the dead holder of this server, and destroy it (invalidation.c). -ENOENT: server or
 * domain is gone; -EBUSY: its holder lives. To be repeated if it was interrupted. */
int xen_ioreq_destroy(struct xen_libs *libs, uint32_t domid, uint16_t server);
/* Let a suspended domain run on, its devices as they were; and let xenstored know. Once each. */
int xen_resume(struct xen_libs *libs, struct xen_store *store, uint32_t domid);
int xen_nr_pfns(struct xen_libs *libs, uint32_t domid, uint64_t *nr_pfns);
/* Take back what is behind these pfns; each must have something. */
int xen_take_pages(struct xen_libs *libs, uint32_t domid, unsigned long *pfns, unsigned long count);

#endif
