"""What a machine has for guests and for us: asked by a preflight, and told to one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from checkpointd.errors import HypervisorError

_MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Capacity:
    """Sizes in octets."""

    memory_free: int  # that a process could take here; in dom0: dom0's
    guest_memory_free: int  # that a new guest could take: Xen's own, elsewhere the same
    xen: str = ""  # version of the Xen that runs, "4.17"; empty: none does
    cpu_features: tuple[
        int, ...
    ] = ()  # the most that a guest here can have, in words; empty: not known
    ballooned: bool = (
        False  # mapping a guest's page takes a page of ours (dom0 is a PVH guest itself)
    )


def measure(hypervisor: str) -> Capacity:
    """Of the machine that this runs on; `hypervisor` is "xen" or "embedded". Raises HypervisorError."""
    memory = available_memory()
    if hypervisor != "xen":
        return Capacity(memory, memory)
    from checkpointd.hypervisor.xen import survey  # only where there is a Xen to ask

    return survey.capacity(memory)


def available_memory() -> int:
    """Octets that new processes could take without swapping: proc(5), MemAvailable."""
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise HypervisorError(f"{_MEMINFO} does not say how much memory is available")
