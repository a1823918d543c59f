"""Builds checkpointd._bench: setup.py names it as a cffi module, and it runs from the checkout's root."""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent  # relative to the root, as setuptools wants the paths of sources
PORT = HERE.parents[1] / "csrc"  # hypervisor.h and the hash of sources
tools = runpy.run_path(str(PORT / "source_hash.py"))

ffi = FFI()
ffi.cdef(
    """
    static char *const CK_SOURCE_HASH;

    /* floors.h */
    int64_t bench_now(void);
    void bench_evict(uint8_t *buffer, uint64_t octets);
    int64_t bench_copy_pages(uint8_t *to, const uint8_t *memory, const uint64_t *pfns, uint64_t n);
    int64_t bench_put_pages(uint8_t *memory, const uint8_t *from, const uint64_t *pfns, uint64_t n);
    int64_t bench_copy(uint8_t *to, const uint8_t *from, uint64_t octets);

    /* standin.h */
    struct standin;
    struct standin *standin_new(int fd, uint64_t nr_pfns, const uint64_t *populated);
    void standin_free(struct standin *s);
    void *standin_table(struct standin *s);
    uint8_t *standin_memory(struct standin *s);
    void standin_dirty(struct standin *s, const uint64_t *pfns, uint64_t n);

    /* libxc.h */
    struct libxc_times { int64_t pause_ns, map_ns, write_ns; uint64_t pages; };
    int libxc_epoch(struct standin *s, int socket, struct libxc_times *times);
    """
)
ffi.set_source(
    "checkpointd._bench",
    f"""
    #define CK_SOURCE_HASH "{tools["source_hash"](HERE, PORT / "hypervisor.h", PORT / "bitmap.h")}"
    #include "floors.h"
    #include "libxc.h"
    #include "standin.h"
    """,
    sources=[str(path) for path in tools["sources"](HERE) if path.suffix == ".c"],
    depends=[
        str(path)
        for path in (
            *tools["sources"](HERE),
            PORT / "hypervisor.h",
            PORT / "bitmap.h",
            PORT / "strict.h",
        )
        if path.suffix != ".c"
    ],
    include_dirs=[str(HERE), str(PORT)],
    extra_compile_args=["-O3", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
)
