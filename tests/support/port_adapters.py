"""The adapters of the hypervisor port, each with the toolstack that its conformance tests need."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hosts import PATIENCE, SECOND, stop_host, wait_step
from plain_bitmap import PlainBitmap

from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.fresh import FreshGuest
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.lib import ffi, lib
from checkpointd.hypervisor.port import PAGE_SIZE

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from checkpointd.hypervisor.port import Domain, DomainInfo

PEEK, CLEAN, FINAL = lib.CK_HARVEST_PEEK, lib.CK_HARVEST_CLEAN, lib.CK_HARVEST_FINAL
NOTAB, XTAB = 0x0, 0xF
CONTEXT_ROOM = 1 << 16  # octets; a Xen guest's takes some 2 KiB a vcpu


class Table:
    """Calls the native table as the pause does."""

    def __init__(self, domain: Domain) -> None:
        self.table = ffi.cast("struct ck_hypervisor *", domain.table)
        self.nr_pfns = domain.info.nr_pfns

    def suspend(self, timeout_ns: int = 10 * SECOND) -> int:
        return int(self.table.suspend(self.table.domain, timeout_ns))

    def resume(self) -> int:
        return int(self.table.resume(self.table.domain))

    def harvest(self, mode: int, into: PlainBitmap | None = None) -> set[int]:
        bitmap = into or self.bitmap()
        assert self.table.harvest(self.table.domain, bitmap.pointer, mode) == 0
        return bitmap.bits()

    def harvest_status(self, mode: int, nr_pfns: int | None = None) -> int:
        bitmap = PlainBitmap(ffi, nr_pfns or self.nr_pfns)
        return int(self.table.harvest(self.table.domain, bitmap.pointer, mode))

    def p2m_changes(self) -> set[int]:
        bitmap = self.bitmap()
        count = self.table.p2m_changes(self.table.domain, bitmap.pointer)
        assert count == len(bitmap.bits())
        return bitmap.bits()

    def types(self, *pfns: int) -> list[int]:
        words = ffi.new("uint64_t[]", list(pfns))
        assert self.table.types(self.table.domain, words, len(pfns)) == 0
        assert [word & ((1 << 52) - 1) for word in words] == list(pfns)
        return [word >> 60 for word in words]

    def map(self, first: int, count: int) -> Any:
        base = ffi.new("void **")
        status = self.table.map(self.table.domain, first, count, base)
        assert status == 0, os.strerror(-status)
        return base[0]

    def unmap(self, base: Any, count: int) -> int:
        return int(self.table.unmap(self.table.domain, base, count))

    def context(self) -> bytes:
        buffer = ffi.new("uint8_t[]", CONTEXT_ROOM)
        size = self.table.context(self.table.domain, buffer, CONTEXT_ROOM)
        assert size > 0
        return bytes(ffi.buffer(buffer, size))

    def close_output(self) -> int:
        closed = ffi.new("uint64_t *")
        assert self.table.output_close(self.table.domain, closed) == 0
        return int(closed[0])

    def epoch(self) -> int:
        assert self.suspend() == 0
        closed = self.close_output()
        assert self.resume() == 0
        return closed

    def bitmap(self) -> PlainBitmap:
        return PlainBitmap(ffi, self.nr_pfns)


def page(base: Any, index: int) -> bytes:
    return bytes(ffi.buffer(ffi.cast("uint8_t *", base) + index * PAGE_SIZE, PAGE_SIZE))


class Adapter:
    """The embedded hypervisor with the toolstack that the tests need."""

    def __init__(self, run_dir: Path) -> None:
        self.hypervisor = EmbeddedHypervisor("primary", run_dir)
        self.processes: list[subprocess.Popen[str]] = []
        self.domains: list[Domain] = []

    def guest(self, program: str = "kv", pages: int = 1024, **options: Any) -> DomainInfo:
        guest = FreshGuest(
            str(self.hypervisor.namespace), program, pages * PAGE_SIZE,
            **{"address": "127.0.0.1:0", **options},
        )  # fmt: skip
        process, info = toolstack.create(guest)
        self.processes.append(process)
        return info

    def attach(self, info: DomainInfo) -> tuple[Domain, Table]:
        domain = self.hypervisor.attach(info.domid)
        self.domains.append(domain)
        return domain, Table(domain)

    def stop(self, info: DomainInfo) -> None:
        """So that it answers nothing until go_on()."""
        stop_host(info)

    def go_on(self, info: DomainInfo) -> None:
        os.kill(info.host.pid, signal.SIGCONT)

    def wait_running(self, info: DomainInfo) -> None:
        wait_step(info, toolstack.look(info).step + 100)

    def destroy(self, info: DomainInfo) -> None:
        toolstack.destroy(info)

    def close(self) -> None:
        for domain in self.domains:
            domain.close()
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
            process.communicate(timeout=PATIENCE)
        assert self.hypervisor.domains() == []


def talk(client: socket.socket, port: int) -> Callable[[str], None]:
    return lambda text: (client.sendto(text.encode(), ("127.0.0.1", port)), None)[1]


def wait_held(domain: Domain, packets: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while domain.output.stats().held_packets < packets:
        assert time.monotonic() < deadline, f"{packets} packets are not held"
        os.sched_yield()


def silent(client: socket.socket) -> bool:
    return not select.select([client], [], [], 0)[0]
