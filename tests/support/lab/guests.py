"""Guests of the lab: their xl configurations, and what they say on their consoles (tests/xen/guest/work.c)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lab.places import GUEST_NET

DISK = "xvda"
ADDRESS = f"{GUEST_NET}.2"  # of a guest with a network card; it answers UDP at ECHO_PORT
ECHO_PORT = 7
MEMORY = 160  # MiB; the least that Debian's kernel starts in with some room

# As on processors whose time stamp counter is invariant, which QEMU's is not: Xen would emulate each reading of it, and
# a guest that looks at the clock all the time would do little else. QEMU's emulation of AMD-V breaks a guest once in
# so many million entries (tests/xen/conftest.py): under such a load it lived for a minute.
TSC = 'tsc_mode="native"'

_TICK = re.compile(
    r"^tick (?P<number>\d+) uptime (?P<uptime>[\d.]+) checked (?P<checked>OK|CORRUPT) ops (?P<ops>\d+)"
    r" stalls (?P<stalls>\d+) stall_ms (?P<stall_ms>[\d.]+) longest_ms (?P<longest_ms>[\d.]+)"
    r" mem_kb (?P<mem_kb>\d+) churn (?P<churn>\d+) echo (?P<echo>\d+) disk (?P<disk>\d+)\s*$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Tick:
    """One line of a guest that checked all its memory since the one before."""

    number: int
    uptime: float  # s, of the guest's kernel
    ok: bool
    ops: int  # changes since the last tick
    stalls: int
    stall_ms: float
    longest_ms: float
    mem_kb: int  # what the guest's kernel calls its memory
    churn: int  # pages taken and given back under pressure, since the start
    echo: int  # datagrams answered
    disk: int  # blocks read and checked


def ticks(console: str) -> list[Tick]:
    return [
        Tick(
            *(
                int(m["number"]),
                float(m["uptime"]),
                m["checked"] == "OK",
                int(m["ops"]),
                int(m["stalls"]),
            ),
            *(float(m["stall_ms"]), float(m["longest_ms"]), int(m["mem_kb"])),
            *(int(m["churn"]), int(m["echo"]), int(m["disk"])),
        )
        for m in _TICK.finditer(console.replace("\r", ""))
    ]


@dataclass(frozen=True, slots=True)
class Guest:
    """What a guest is made of; the words are those of work.c."""

    name: str
    vcpus: int = 1
    memory: int = MEMORY  # MiB
    pages: int = 1024
    rate: int = 500
    pressure: int = 0  # MiB
    spin: bool = False
    network: bool = False
    disk: bool = False  # read-only
    persistent_grants: bool = False  # of the disk: a guest that has them is not protected

    def config(self) -> str:
        """For xl."""
        extra = f"console=hvc0 quiet rdinit=/init pages={self.pages} rate={self.rate}"
        lines = [
            f'name="{self.name}"',
            'type="pvh"',
            TSC,
            'kernel="/root/vmlinuz"',
            'ramdisk="/root/initrd.gz"',
            f"memory={self.memory}",
            f"vcpus={self.vcpus}",
        ]
        if self.pressure:
            extra += f" pressure={self.pressure}"
        if self.spin:
            extra += " spin=1"
        if self.network:
            extra += f" address={ADDRESS}/24 echo={ECHO_PORT}"
            lines.append("vif=['bridge=guests,mac=00:16:3e:00:00:02']")
        if self.disk:
            extra += f" disk={DISK} persistent={int(self.persistent_grants)}"
            lines.append(f"disk=['format=raw,vdev={DISK},access=ro,target=/root/disk.img']")
        return "\n".join([*lines, f'extra="{extra}"', ""])


# Lying in dom0's /root for whoever plays by hand: `xl create pvh.cfg`.
SAMPLES = {
    guest.name: guest.config()
    for guest in (
        Guest("pvh"),
        Guest("pvh2", vcpus=2),
        Guest("pvh-idle", pages=64, rate=0),
        Guest("pvh-net", network=True),
        Guest("pvh-disk", disk=True),
    )
}
