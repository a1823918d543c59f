"""Builds checkpointd._embedded: setup.py names it as a cffi module, and it runs from the checkout's root."""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent  # relative to the root, as setuptools wants the paths of sources
PORT = HERE.parents[2] / "csrc"  # hypervisor.h and the hash of sources
tools = runpy.run_path(str(PORT / "source_hash.py"))
declared = runpy.run_path(str(PORT / "declared.py"))

ffi = FFI()
ffi.cdef(declared["port"]())
ffi.cdef(
    """
    static char *const CK_SOURCE_HASH;

    /* control.h */
    enum end_reason { END_NONE, END_POWEROFF, END_REBOOT, END_CRASH, END_DESTROYED };
    struct control;
    struct control_stats {
        uint64_t held_packets, held_bytes, limit_bytes, dropped_packets, released_packets;
        uint64_t step, ram_pages;
        uint32_t shut, paused, ended, log_on;
    };
    void control_read_stats(struct control *c, struct control_stats *stats);
    void event_drain(int fd);
    void log_lock(struct control *c);       /* these two for tests: to hold it, or die with it */
    void log_unlock(struct control *c);

    /* fault.h */
    #define FAULT_ACTIONS ...
    enum fault_point {
        FAULT_SUSPEND, FAULT_RESUME, FAULT_HARVEST, FAULT_P2M_CHANGES, FAULT_TYPES, FAULT_MAP,
        FAULT_UNMAP, FAULT_CONTEXT, FAULT_OUTPUT_CLOSE,
        FAULT_HOST_STEP, FAULT_HOST_INPUT_LOGGED, FAULT_HOST_SUSPENDED, FAULT_HOST_RELEASE, ...
    };
    enum fault_action { FAULT_KILL, FAULT_STOP, FAULT_FAIL, ... };
    struct fault_rule {
        uint32_t point, at, again, nr_actions;
        uint32_t action[...];
        int32_t pid[...];
        ...;
    };

    /* machine.h and guest.h: what replay needs */
    enum step_kind { STEP_TICK, STEP_DATAGRAM, STEP_BALLOON_OUT, STEP_BALLOON_IN };
    #define CONTEXT_MAX ...
    struct machine { uint64_t nr_pfns; int fd; uint64_t *populated; ...; };
    struct machine *machine_new(int fd, uint64_t nr_pfns, const uint64_t *populated, uint64_t seed);
    void machine_free(struct machine *m);
    const void *machine_page(const struct machine *m, uint64_t pfn);
    void machine_compare(const struct machine *m, const uint8_t *image, uint64_t *different);
    struct program { uint32_t kind, rate; uint64_t pages; };
    enum program_kind { PROGRAM_KV, PROGRAM_DIRTY };
    bool program_parse(const char *text, struct program *program);
    struct step_result { uint32_t reply_bytes, end, changed; uint8_t reply[...]; };
    int guest_boot(struct machine *m, const char *program, const uint8_t *uuid);
    int guest_step(struct machine *m, enum step_kind kind, const void *input, uint32_t bytes,
                   struct step_result *result);
    int guest_ticks(struct machine *m, uint64_t count);
    uint64_t guest_step_number(const struct machine *m);
    int64_t guest_context(const struct machine *m, uint8_t *buffer, uint64_t capacity);

    /* host.h */
    struct nic { int wake; ...; };
    struct host {
        struct machine *machine;
        struct control *control;
        int control_fd, kick, note, done, failure;
        struct nic nic;
        ...;
    };
    struct host *host_new(int memory_fd, uint64_t nr_pfns, const uint64_t *populated, uint64_t seed,
                          int udp_fd, int input_log_fd, uint64_t output_limit_bytes);
    void host_free(struct host *h);
    int host_boot(struct host *h, const char *program, const uint8_t *uuid);
    uint64_t host_step(const struct host *h);
    int host_add_fault(struct host *h, const struct fault_rule *rule);
    int host_start(struct host *h, bool paused);
    void host_end(struct host *h, uint32_t reason);
    void host_pause(struct host *h, bool paused);
    int host_balloon(struct host *h, bool in, const uint32_t *pfns, uint32_t nr);
    int64_t host_balloon_result(struct host *h);
    int host_attach(struct host *h, int *fd);
    void host_detach(struct host *h);
    int host_enable_log(struct host *h);
    void host_output_open(struct host *h);

    /* client.h */
    struct client;
    struct client *client_new(int memory_fd, int control_fd, int kick, int note, int wake, int mapper);
    void client_free(struct client *client);
    struct ck_hypervisor *client_table(struct client *client);
    struct control *client_control(struct client *client);
    int client_add_fault(struct client *client, const struct fault_rule *rule);
    void client_release(struct client *client, uint64_t closed);
    int client_hung_up(struct client *client);
    """
)
ffi.set_source(
    "checkpointd._embedded",
    f"""
    #define CK_SOURCE_HASH "{tools["source_hash"](HERE, PORT / "hypervisor.h", PORT / "bitmap.h")}"
    #include "client.h"
    #include "guest.h"
    #include "host.h"
    """,
    sources=[str(path) for path in tools["sources"](HERE) if path.suffix == ".c"],
    # Headers and this file reach an sdist, and a change of one a rebuild, only by being named here.
    depends=[
        str(path)
        for path in (*tools["sources"](HERE), PORT / "hypervisor.h", PORT / "bitmap.h")
        if path.suffix != ".c"
    ],
    include_dirs=[str(HERE)],
    # Hidden: plain names such as host_new must not meet another library's.
    extra_compile_args=[
        *("-O2", "-std=gnu11", "-Wall", "-Wextra"),
        *("-fvisibility=hidden", "-D_GNU_SOURCE"),
    ],
    extra_link_args=["-pthread"],
)
