"""The two sides of an embedded guest's life: its namespaces, its whole state, its clients."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hosts import PATIENCE, SECOND, free_port, wait_exit

from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.fresh import FreshGuest
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.kv import KvClient, UdpTransport
from checkpointd.hypervisor.embedded.lib import ffi
from checkpointd.hypervisor.port import PAGE_SIZE

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from checkpointd.hypervisor.port import Domain, DomainInfo


@dataclass
class Image:
    """A guest's whole state, read through the port while it stood still."""

    memory: bytes
    populated: bytes
    context: bytes
    static: bytes

    @property
    def step(self) -> int:
        return int.from_bytes(self.memory[8:16], "little")

    def memfd(self) -> int:
        fd = os.memfd_create("test-replica", os.MFD_CLOEXEC)
        with open(fd, "wb", closefd=False) as file:
            file.write(self.memory)
        return fd


def capture(domain: Domain, *, resume: bool = True) -> Image:
    table = ffi.cast("struct ck_hypervisor *", domain.table)
    nr = domain.info.nr_pfns
    assert table.suspend(table.domain, 10 * SECOND) == 0
    memory, populated = bytearray(nr * PAGE_SIZE), bytearray((nr + 63) // 64 * 8)
    base = ffi.new("void **")
    for first in range(0, nr, 512):
        count = min(512, nr - first)
        words = ffi.new("uint64_t[]", list(range(first, first + count)))
        assert table.types(table.domain, words, count) == 0
        assert table.map(table.domain, first, count, base) == 0
        for index, word in enumerate(words):
            if word >> 60 == 0:
                pfn = first + index
                address = ffi.cast("uint8_t *", base[0]) + index * PAGE_SIZE
                memory[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE] = ffi.buffer(address, PAGE_SIZE)
                populated[pfn // 8] |= 1 << pfn % 8
        assert table.unmap(table.domain, base[0], count) == 0
    buffer = ffi.new("uint8_t[]", 4096)
    size = table.context(table.domain, buffer, 4096)
    assert size > 0
    if resume:
        assert table.resume(table.domain) == 0
    return Image(
        bytes(memory), bytes(populated), bytes(ffi.buffer(buffer, size)), domain.static_records()
    )


class Side:
    """A namespace with guests in it, all gone when it is closed."""

    def __init__(self, run_dir: Path, namespace: str) -> None:
        self.hypervisor = EmbeddedHypervisor(namespace, run_dir)
        self.processes: list[subprocess.Popen[str]] = []

    def guest(self, program: str = "kv", pages: int = 1024, **options: Any) -> DomainInfo:
        options = {"address": f"127.0.0.1:{free_port()}", **options}
        guest = FreshGuest(str(self.hypervisor.namespace), program, pages * PAGE_SIZE, **options)
        process, info = toolstack.create(guest)
        self.processes.append(process)
        return info

    def log(self, info: DomainInfo) -> Path:
        return self.hypervisor.namespace / str(info.domid) / "input.log"

    def close(self) -> None:
        for info in self.hypervisor.domains():
            wait_exit(info.host.pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate(timeout=PATIENCE)


def client_of(info: DomainInfo, transports: list[UdpTransport], name: str = "c") -> KvClient:
    transports.append(UdpTransport(str(info.config["address"])))
    return KvClient(transports[-1], name, patience=PATIENCE)
