"""Builds checkpointd._xen: setup.py names it as a cffi module, and it runs from the checkout's root."""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent  # relative to the root, as setuptools wants the paths of sources
PORT = HERE.parents[2] / "csrc"  # hypervisor.h, strict.h and the hash of sources
tools = runpy.run_path(str(PORT / "source_hash.py"))
declared = runpy.run_path(str(PORT / "declared.py"))

ffi = FFI()
ffi.cdef(declared["port"]())
ffi.cdef(
    """
    static char *const CK_SOURCE_HASH;
    void free(void *memory);  /* of what libxenstore returns */

    /* libs.h */
    #define XEN_STATE_DYING ...
    #define XEN_STATE_HVM ...
    #define XEN_STATE_SHUTDOWN ...
    #define XEN_STATE_PAUSED ...
    #define XEN_STATE_HAP ...
    #define XEN_SHUTDOWN_POWEROFF ...
    #define XEN_SHUTDOWN_REBOOT ...
    #define XEN_SHUTDOWN_SUSPEND ...
    #define XEN_SHUTDOWN_CRASH ...
    #define XEN_SHUTDOWN_WATCHDOG ...
    #define XEN_SHUTDOWN_SOFT_RESET ...
    struct xen_dominfo {
        uint16_t domain;
        uint32_t flags;
        uint64_t tot_pages, max_pages, outstanding_pages, shr_pages, paged_pages;
        uint32_t nr_online_vcpus, max_vcpu_id;
        uint8_t handle[16];
        uint8_t gpaddr_bits;
        ...;
    };
    struct xen_store;
    struct xen_cpuid_leaf { uint32_t leaf, subleaf, a, b, c, d; };
    struct xen_msr_entry { uint32_t index, flags; uint64_t value; };
    struct xen_ctrl;
    struct xen_cpu_policy;
    struct xen_libs {
        struct xen_ctrl *ctrl;
        struct xen_cpu_policy *(*xc_cpu_policy_init)(void);
        void (*xc_cpu_policy_destroy)(struct xen_cpu_policy *);
        int (*xc_cpu_policy_get_system)(struct xen_ctrl *, unsigned, struct xen_cpu_policy *);
        int (*xc_cpu_policy_get_domain)(struct xen_ctrl *, uint32_t, struct xen_cpu_policy *);
        int (*xc_cpu_policy_get_size)(struct xen_ctrl *, uint32_t *, uint32_t *);
        int (*xc_cpu_policy_serialise)(struct xen_ctrl *, const struct xen_cpu_policy *,
                                       struct xen_cpuid_leaf *, uint32_t *,
                                       struct xen_msr_entry *, uint32_t *);
        struct xen_store *(*xs_open)(unsigned long);
        void (*xs_close)(struct xen_store *);
        void *(*xs_read)(struct xen_store *, uint32_t, const char *, unsigned *);
        bool (*xs_write)(struct xen_store *, uint32_t, const char *, const void *, unsigned);
        char **(*xs_directory)(struct xen_store *, uint32_t, const char *, unsigned *);
        uint32_t (*xs_transaction_start)(struct xen_store *);
        bool (*xs_transaction_end)(struct xen_store *, uint32_t, bool);
        bool (*xs_watch)(struct xen_store *, const char *, const char *);
        bool (*xs_unwatch)(struct xen_store *, const char *, const char *);
        int (*xs_fileno)(struct xen_store *);
        char **(*xs_check_watch)(struct xen_store *);
        bool (*xs_resume_domain)(struct xen_store *, unsigned);
        ...;
    };
    struct xen_libs *xen_libs_open(uint32_t major, uint32_t minor, const char *directory, char *error,
                                   size_t size);
    void xen_libs_close(struct xen_libs *libs);
    const char *xen_libs_said(void);
    int xen_domain_state(struct xen_libs *libs, uint32_t domid, struct xen_dominfo *info);
    int xen_domain_next(struct xen_libs *libs, uint32_t first, struct xen_dominfo *info);
    bool xen_is_suspended(const struct xen_dominfo *info);
    bool xen_is_ended(const struct xen_dominfo *info);
    int xen_pause(struct xen_libs *libs, uint32_t domid);
    int xen_unpause(struct xen_libs *libs, uint32_t domid);
    int xen_destroy(struct xen_libs *libs, uint32_t domid);
    int xen_log_enable(struct xen_libs *libs, uint32_t domid);
    int xen_log_off(struct xen_libs *libs, uint32_t domid);
    int xen_ioreq_destroy(struct xen_libs *libs, uint32_t domid, uint16_t server);
    int xen_resume(struct xen_libs *libs, struct xen_store *store, uint32_t domid);
    int xen_nr_pfns(struct xen_libs *libs, uint32_t domid, uint64_t *nr_pfns);
    int xen_take_pages(struct xen_libs *libs, uint32_t domid, unsigned long *pfns, unsigned long count);

    /* domain.h */
    struct xen_domain;
    int xen_domain_new(struct xen_libs *libs, uint32_t domid, struct xen_domain **out);
    void xen_domain_free(struct xen_domain *domain);
    struct ck_hypervisor *xen_domain_table(struct xen_domain *domain);
    void xen_domain_keep(struct xen_domain *domain, uint64_t *asked_ns);
    uint64_t xen_domain_nr_pfns(const struct xen_domain *domain);
    struct xen_signs { uint64_t thefts; bool suspended, late, foreign, grown; };
    void xen_domain_signs(const struct xen_domain *domain, struct xen_signs *signs);
    int xen_log_begin(struct xen_domain *domain);
    int xen_log_check(struct xen_domain *domain);
    int xen_resume_ours(void *domain);
    int64_t xen_static_records(struct xen_domain *domain, uint32_t major, uint32_t minor,
                               uint8_t *buffer, uint64_t capacity);

    /* p2m.h */
    int xen_p2m_begin(struct xen_domain *domain, bool deaf, uint16_t *server);
    int xen_p2m_watch(struct xen_domain *domain);
    int xen_p2m_end(struct xen_domain *domain);
    uint64_t xen_p2m_requests(const struct xen_domain *domain);
    """
)
ffi.set_source(
    "checkpointd._xen",
    f"""
    #define CK_SOURCE_HASH "{tools["source_hash"](HERE, PORT / "hypervisor.h", PORT / "bitmap.h", PORT / "strict.h")}"
    #include <stdlib.h>
    #include "domain.h"
    #include "p2m.h"
    """,
    sources=[str(path) for path in tools["sources"](HERE) if path.suffix == ".c"],
    # Headers and this file reach an sdist, and a change of one a rebuild, only by being named here.
    depends=[
        str(path)
        for path in (*tools["sources"](HERE), PORT / "hypervisor.h", PORT / "bitmap.h", PORT / "strict.h")
        if path.suffix != ".c"
    ],
    include_dirs=[str(HERE), str(PORT)],
    # Hidden: plain names such as xen_map must not meet another library's.
    extra_compile_args=[
        *("-O2", "-std=gnu11", "-Wall", "-Wextra"),
        *("-fvisibility=hidden", "-D_GNU_SOURCE"),
    ],
    extra_link_args=["-pthread"],
)
