"""The Xen adapter's pause on the fake Xen (fake_pause.c), and the guest that it is attached to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_hypervisor import SECOND
from fake_library import TABLE
from fake_xen import NODE, adapter, compile_fake_xen
from plain_bitmap import PlainBitmap

PEEK, CLEAN, FINAL = 0, 1, 2  # CK_HARVEST_*


def compile_fake_pause(directory: Path) -> Any:
    """The adapter's suspend, log and context on the fake, compiled into `directory`: (ffi, lib)."""
    sources = adapter("domain", "suspend", "aside", "log", "context", "libs")
    return compile_fake_xen(
        directory / "fake_pause.so",
        [Path(__file__).with_suffix(".c"), *sources],
        TABLE
        + """
        struct xen_signs { uint64_t thefts; bool suspended, late, foreign; };
        void xen_domain_signs(const void *domain, struct xen_signs *signs);
        void xen_domain_keep(void *domain, uint64_t *asked_ns);
        int xen_log_begin(void *domain);
        int64_t xen_static_records(void *domain, uint32_t major, uint32_t minor, uint8_t *buffer,
                                   uint64_t capacity);
        struct ck_hypervisor *xen_domain_table(void *domain);
        void *fake_attach(uint64_t nr_pfns);
        void fake_detach(void);
        void fake_request(void);
        """,
    )


class Guest:
    """Its pages 0, 256, 512 and 768 may be canaries; it has 1000."""

    NR_PFNS = 1000

    def __init__(self, fake: Any) -> None:
        self.ffi, self.lib = fake
        self.facts = self.lib.guest
        self.domain = self.lib.fake_attach(self.NR_PFNS)
        assert self.domain != self.ffi.NULL
        self.table = self.lib.xen_domain_table(self.domain)
        self._asked = self.ffi.new("uint64_t *")
        self.lib.xen_domain_keep(self.domain, self._asked)

    def suspend(self, timeout_ns: int = 10 * SECOND) -> int:
        return int(self.table.suspend(self.domain, timeout_ns))

    def resume(self) -> int:
        return int(self.table.resume(self.domain))

    def begin_log(self) -> int:
        return int(self.lib.xen_log_begin(self.domain))

    def harvest(self, mode: int = CLEAN, nr_pfns: int = NR_PFNS) -> tuple[int, set[int]]:
        bitmap = PlainBitmap(self.ffi, nr_pfns)
        status = int(self.table.harvest(self.domain, bitmap.pointer, mode))
        return status, bitmap.bits()

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
        return bytes(self.ffi.string(self.lib.fake_get(NODE.encode())))

    def ask(self, word: bytes) -> None:
        """Somebody else writes control/shutdown; or the guest, that it has answered: b""."""
        self.lib.fake_put(NODE.encode(), word)

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
