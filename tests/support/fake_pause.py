"""One guest on fake Xen libraries (fake_pause.c), and the Xen adapter's pause on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cffi import FFI
from fake_hypervisor import SECOND
from fake_library import XEN, compile_library

STOPS, IGNORES, ANSWERS_ONLY, STOPS_UNANSWERED = range(4)  # enum manner
PEEK, CLEAN, FINAL = 0, 1, 2  # CK_HARVEST_*


def compile_fake_pause(directory: Path) -> Any:
    """The adapter's suspend, log and context on the fake, compiled into `directory`: (ffi, lib)."""
    names = ("domain", "suspend", "aside", "log", "context", "libs")
    sources = [Path(__file__).with_suffix(".c"), *(XEN / f"{name}.c" for name in names)]
    library = compile_library(directory / "fake_pause.so", sources)
    ffi = FFI()
    ffi.cdef(
        """
        struct ck_hypervisor {
            uint32_t abi;
            uint32_t size;
            void *domain;
            int (*suspend)(void *domain, int64_t timeout_ns);
            int (*resume)(void *domain);
            int (*harvest)(void *domain, uint64_t *bitmap, uint64_t nr_pfns, int mode);
            int64_t (*p2m_changes)(void *domain, uint64_t *bitmap, uint64_t nr_pfns);
            int (*types)(void *domain, uint64_t *pfns, uint32_t count);
            int (*map)(void *domain, uint64_t first_pfn, uint32_t count, void **base);
            int (*unmap)(void *domain, void *base, uint32_t count);
            int64_t (*context)(void *domain, uint8_t *buffer, uint64_t capacity);
            int (*output_close)(void *domain, uint64_t *closed);
        };
        struct xen_signs { uint64_t thefts; bool suspended, late, foreign; };
        void xen_domain_signs(const void *domain, struct xen_signs *signs);
        void xen_domain_keep(void *domain, uint64_t *asked_ns);
        int xen_log_begin(void *domain);
        int64_t xen_static_records(void *domain, uint32_t major, uint32_t minor, uint8_t *buffer,
                                   uint64_t capacity);
        void *fake_new(uint64_t nr_pfns);
        void fake_free(void);
        void *fake_domain(void);
        struct ck_hypervisor *fake_table(void);
        void fake_manner(int manner);
        void fake_interpose(const char *word);
        void fake_lag(unsigned prompt);
        uint64_t fake_waited(void);
        void fake_break_in(void);
        void fake_ask(const char *word);
        const char *fake_node(void);
        void fake_stop(uint32_t reason);
        void fake_vanish(void);
        void fake_run(void);
        void fake_hole(uint64_t pfn);
        void fake_fill(uint64_t pfn);
        void fake_request(void);
        void fake_dirty(uint64_t pfn);
        void fake_clean(void);
        void fake_log_off(void);
        void fake_fail_log(int error);
        void fake_fail_mark(int error);
        void fake_short_log(long long pages);
        uint64_t fake_resumes(void);
        uint64_t fake_told(void);
        """
    )
    return ffi, ffi.dlopen(str(library))


class Guest:
    """Its pages 0, 256, 512 and 768 may be canaries; it has 1000."""

    NR_PFNS = 1000

    def __init__(self, fake: Any) -> None:
        self.ffi, self.lib = fake
        assert self.lib.fake_new(self.NR_PFNS) != self.ffi.NULL
        self.table = self.lib.fake_table()
        self.domain = self.lib.fake_domain()
        self._asked = self.ffi.new("uint64_t *")
        self.lib.xen_domain_keep(self.domain, self._asked)

    def suspend(self, timeout_ns: int = 10 * SECOND) -> int:
        return int(self.table.suspend(self.domain, timeout_ns))

    def resume(self) -> int:
        return int(self.table.resume(self.domain))

    def begin_log(self) -> int:
        return int(self.lib.xen_log_begin(self.domain))

    def harvest(self, mode: int = CLEAN, nr_pfns: int = NR_PFNS) -> tuple[int, set[int]]:
        bitmap = self.ffi.new("uint64_t[16]")
        status = int(self.table.harvest(self.domain, bitmap, nr_pfns, mode))
        return status, {pfn for pfn in range(1024) if bitmap[pfn // 64] >> pfn % 64 & 1}

    def context(self, capacity: int = 4096) -> bytes | int:
        buffer = self.ffi.new("uint8_t[]", capacity)
        size = int(self.table.context(self.domain, buffer, capacity))
        return bytes(self.ffi.buffer(buffer, size)) if size >= 0 else size

    def static_records(self, capacity: int = 4096) -> bytes | int:
        buffer = self.ffi.new("uint8_t[]", capacity)
        size = int(self.lib.xen_static_records(self.domain, 4, 17, buffer, capacity))
        return bytes(self.ffi.buffer(buffer, size)) if size >= 0 else size

    def close_output(self) -> tuple[int, int]:
        closed = self.ffi.new("uint64_t *")
        return int(self.table.output_close(self.domain, closed)), int(closed[0])

    @property
    def node(self) -> bytes:
        """control/shutdown."""
        return bytes(self.ffi.string(self.lib.fake_node()))

    def inherit(self) -> None:
        """A request of a dead engine's is out."""
        self._asked[0] = 10 * SECOND
        self.lib.xen_domain_keep(self.domain, self._asked)

    @property
    def asked(self) -> int:
        """ns within which the guest was to stop; 0: no request is out."""
        return int(self._asked[0])

    @property
    def foreign(self) -> bool:
        return bool(self._signs().foreign)

    @property
    def late(self) -> bool:
        return bool(self._signs().late)

    @property
    def thefts(self) -> int:
        return int(self._signs().thefts)

    def _signs(self) -> Any:
        signs = self.ffi.new("struct xen_signs *")
        self.lib.xen_domain_signs(self.domain, signs)
        return signs
