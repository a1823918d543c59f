"""Power failures: the plug of host a is pulled while its guest is under load, and the guest goes on on host b."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from lab import machine
from lab.guests import Guest
from report import commit, write_section
from report import machine as this_machine
from xen_rig import FAILOVER_LIMIT, Rig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lab.machine import Machine

INTERVALS = ("500ms", "100ms")
LOAD = Guest("loaded", pages=2048, rate=500)
TWO = replace(LOAD, vcpus=2)
# s of the guest's own time that a failover may take from it: what it ran after its last acked epoch. That is some
# intervals and one ack; in software emulation, with everything at once on two cores, an ack may take seconds.
LOST = 30.0
# s. A guest's clock cannot be ahead of the time that has passed, but lines come late; and it counts its sleep by the
# wall clock of its host, of which two in software emulation drift apart by seconds an hour (clock(), which asks through
# ssh and may be wrong by a second).
AHEAD = 5.0
TICKS_AFTER = 3


@dataclass(frozen=True, slots=True)
class Failover:
    kill_to_tick: float  # s, of the machine that holds the lab
    lost: float  # s of the guest's own time, from its last tick here to its first there; less than 0: none
    acked: int  # epochs when the plug was pulled


def clock(host: Machine) -> float:
    """By how many seconds its wall clock is ahead of that of this machine."""
    began = time.time()
    said = float(host.ssh("date +%s.%N").out)
    return said - (began + time.time()) / 2


def fail_over(rig: Rig, guest: Guest, interval: str, delay: float, *standby: str) -> Failover:
    """Protects a new guest of host a, pulls the plug `delay` seconds later, and checks what comes of it. `standby`:
    further words for the secondary.
    """
    living = rig.create(guest)
    secondary = rig.secondary(*standby)
    primary = rig.primary(living, interval=interval)
    rig.protected(living, primary, epochs=5)
    there = rig.console(rig.b, guest.name)
    time.sleep(delay)  # not for something to happen: it chooses the moment of an epoch
    acked = int(rig.domain(rig.b, "secondary")["acked_epoch"])
    jump = clock(rig.b) - clock(rig.a)
    seen, before = living.console.ticks[-1]

    killed = time.monotonic()
    rig.a.pull_plug()
    ticks = there.wait_ticks(TICKS_AFTER, FAILOVER_LIMIT)

    at, first = ticks[0]
    numbers = [tick.number for _, tick in ticks]
    assert all(tick.ok for _, tick in ticks), there.text
    assert numbers == list(range(first.number, first.number + len(ticks)))
    assert -LOST < first.uptime - before.uptime - jump < at - seen + AHEAD
    assert rig.uuid(rig.b, guest.name) == living.uuid
    assert rig.domain(rig.b, "secondary")["acked_epoch"] >= acked, "an acked epoch was lost"
    assert secondary.alive()
    return Failover(at - killed, before.uptime - (first.uptime - jump), acked)


def moments(config: pytest.Config) -> random.Random:
    return random.Random(config.getoption("--seed"))


@pytest.mark.loses_host
@pytest.mark.parametrize(
    ("interval", "guest", "standby"),
    [
        pytest.param("500ms", LOAD, (), id="500ms", marks=pytest.mark.short),
        pytest.param("100ms", LOAD, (), id="100ms"),
        pytest.param("500ms", TWO, (), id="two-vcpus"),
        pytest.param(
            "500ms", LOAD, ("--image", "disk", "--image-dir", "/var/tmp"), id="image-on-disk"
        ),
    ],
)
def test_power_failure(
    rig: Rig,
    interval: str,
    guest: Guest,
    standby: tuple[str, ...],
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    """kill -9 of host a's QEMU: the guest runs on host b from an acked epoch. Its own check passes there, over all its
    memory; its uptime goes on where it was; no tick is missing or comes twice.
    """
    done = fail_over(rig, guest, interval, moments(pytestconfig).uniform(0, 2), *standby)
    record_property("kill_to_tick_s", round(done.kill_to_tick, 1))


@pytest.mark.loses_host
@pytest.mark.campaign
def test_power_failures(
    hosts: Mapping[str, Machine],
    pytestconfig: pytest.Config,
    power_again: Callable[[], Mapping[str, Machine]],
) -> None:
    """As above, --rounds times at each interval (judged: ten), host a switched on again each time."""
    choose, rounds = moments(pytestconfig), pytestconfig.getoption("--rounds")
    done: dict[str, list[Failover]] = {interval: [] for interval in INTERVALS}
    for _ in range(rounds):
        for interval in INTERVALS:
            hosts = power_again()
            with Rig(hosts["a"], hosts["b"]) as rig:
                done[interval].append(fail_over(rig, LOAD, interval, choose.uniform(0, 2)))
    suites = {name: machine.suite_of(host) for name, host in hosts.items()}
    section = "failover" if suites["a"] == suites["b"] else "failover onto a newer Xen"
    write_section(section, report(done, suites, pytestconfig.getoption("--seed")))


def report(done: Mapping[str, list[Failover]], suites: Mapping[str, str], seed: int) -> str:
    lines = [
        f"Commit {commit()}; {this_machine()}; host a {suites['a']}, host b {suites['b']}; seed {seed}.",
        "",
        f"PVH guest, {LOAD.memory} MiB, {LOAD.rate} changes a second over {LOAD.pages * 4 // 1024} MiB.",
        "",
        "| interval | plugs pulled | guest runs on host b, all checks passed | from kill to next tick, s: median"
        " | least | most | of its own time lost, s, at most |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for interval, all_ in done.items():
        times = [one.kill_to_tick for one in all_]
        lines.append(
            f"| {interval} | {len(all_)} | {len(all_)} | {statistics.median(times):.1f} | {min(times):.1f}"
            f" | {max(times):.1f} | {max(0.0, *(one.lost for one in all_)):.1f} |"
        )
    return "\n".join([*lines, ""])
