"""Half an hour of protection at 100 ms: memory, mappings, descriptors and threads stay flat on both hosts.

Of the daemons and of what they keep beside them: the watcher, and xl with its helper.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import pytest
from lab.guests import Guest
from report import commit, machine, write_section
from xen_rig import PROTECT_LIMIT, STATUS_EVERY

if TYPE_CHECKING:
    from lab.daemons import Daemon
    from lab.machine import Machine
    from xen_rig import Living, Rig

pytestmark = pytest.mark.campaign

STEADY = Guest("steady", pages=1024, rate=200)
INTERVAL = "100ms"
SECONDS = 1800.0
SAMPLE_EVERY = 30.0  # s; each look costs a dom0 processes, which are slow in software emulation
WARM_UP = 0.3  # share of the run before which arenas, allocators and xl have not reached their size
GROWTH_MAX_KIB = 4096  # from the middle to the end; 250 octets an epoch


@dataclass(frozen=True, slots=True)
class Vitals:
    rss_kib: int
    own_kib: int  # of it anonymous
    descriptors: int
    threads: int
    mappings: int


# One line: the fields of Vitals, as /proc tells them.
_LOOK = (
    "cd /proc/{pid} && awk '/^VmRSS|^RssAnon/ {{print $2}}' status | tr '\\n' ' '"
    " && echo $(ls fd | wc -l) $(ls task | wc -l) $(wc -l < maps)"
)


@dataclass(frozen=True, slots=True)
class Process:
    host: Machine
    pid: int

    def look(self) -> Vitals:
        return Vitals(*map(int, self.host.ssh(_LOOK.format(pid=self.pid)).out.split()))


def processes(rig: Rig, living: Living, primary: Daemon, secondary: Daemon) -> dict[str, Process]:
    """By what they are called in the report, once xl has taken in an epoch, too."""
    deadline = time.monotonic() + PROTECT_LIMIT
    while rig.domain(rig.b, "secondary")["warm"]["applied_epoch"] is None:
        assert time.monotonic() < deadline, "xl has taken in nothing"
        time.sleep(STATUS_EVERY)
    note = json.loads(rig.a.ssh(f"cat /run/checkpointd/xen/{living.domid}.json").out)
    xl = int(rig.b.ssh("pgrep -o -f '[x]l migrate-receive'").out)  # Debian's runs by its path
    helper = int(rig.b.ssh("pgrep -f '[l]ibxl-save-helper'").out)
    return {
        "primary": Process(rig.a, primary.pid),
        "its watcher": Process(rig.a, note["watcher_pid"]),
        "secondary": Process(rig.b, secondary.pid),
        "its xl": Process(rig.b, xl),
        "xl's helper": Process(rig.b, helper),
    }


def growth(samples: list[Vitals]) -> Vitals:
    """From the first half of what comes after the warm-up to its second half, by medians."""
    warm = samples[int(len(samples) * WARM_UP) :]
    first, second = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    return Vitals(*(
        round(statistics.median(late) - statistics.median(early))
        for early, late in zip(
            zip(*map(astuple, first), strict=True), zip(*map(astuple, second), strict=True), strict=True
        )
    ))  # fmt: skip


def test_half_an_hour(rig: Rig) -> None:
    living = rig.create(STEADY)
    secondary = rig.secondary()
    primary = rig.primary(living, interval=INTERVAL)
    first = rig.protected(living, primary)["acked_epoch"]
    watched = processes(rig, living, primary, secondary)
    samples: dict[str, list[Vitals]] = {name: [] for name in watched}
    ticks = len(living.console.ticks)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(SAMPLE_EVERY)  # seen from outside, so nothing tells when to look
        for name, process in watched.items():
            samples[name].append(process.look())
    last = rig.protected(living, primary)["acked_epoch"]
    seen = [tick for _, tick in living.console.ticks[ticks:]]
    assert seen
    assert all(tick.ok for tick in seen)
    write_section("xen soak", report(samples, last - first, len(seen)))
    for name, taken in samples.items():
        grown = growth(taken)
        assert grown.own_kib <= GROWTH_MAX_KIB, f"{name}: {grown}"
        assert grown.rss_kib <= GROWTH_MAX_KIB, f"{name}: {grown}"
        assert grown.descriptors <= 0, f"{name}: {grown}"
        assert grown.threads <= 0, f"{name}: {grown}"
        assert grown.mappings <= 0, f"{name}: {grown}"


def report(samples: dict[str, list[Vitals]], epochs: int, ticks: int) -> str:
    lines = [
        f"Commit {commit()}; {machine()}, in software emulation. {SECONDS / 60:.0f} minutes at {INTERVAL}: "
        f"{epochs} epochs, {ticks} ticks of the guest, each with all of its memory checked.",
        f"Medians after a warm-up of {WARM_UP:.0%}, and their growth from the first half of the rest to the second.",
        "",
        "| process | "
        + " | ".join(field.name.replace("_", " ") for field in fields(Vitals))
        + " |",
        "|---|" + "---:|" * len(fields(Vitals)),
    ]
    for name, taken in samples.items():
        warm = taken[int(len(taken) * WARM_UP) :]
        middle = [
            round(statistics.median(column)) for column in zip(*map(astuple, warm), strict=True)
        ]
        cells = (
            f"{value} ({grown:+d})"
            for value, grown in zip(middle, astuple(growth(taken)), strict=True)
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
