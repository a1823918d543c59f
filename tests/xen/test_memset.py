"""Ballooning under protection, with memory pressure in the guest: pages leave the p2m and come back as other frames."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from lab.guests import Guest
from lab.places import LabError

if TYPE_CHECKING:
    from xen_rig import Living, Rig

# So much is free in a guest of 160 MiB, and taken and given back all the time, that what the balloon takes is what a
# page of the load was a moment ago.
PRESSED = Guest("pressed", pages=1024, rate=500, pressure=48)
FULL, SMALL = 160, 130  # MiB
BACK = 600  # s for the guest's kernel to have so much memory again
NEVER_BACK = 120.0  # s; several times what it takes where it comes back
SLACK = (
    2048  # KiB that may be missing of it: Xen rounds, and keeps some pages of a guest for itself
)
ROUNDS = 3


def mem_set(rig: Rig, living: Living, size: int) -> None:
    rig.a.ssh(f"xl mem-set {living.domid} {size}m")


def memory_is(living: Living, least: int, most: int, limit: float = BACK) -> None:
    """Until the guest's own kernel counts so many KiB; LabError after `limit` seconds."""
    living.console.wait(
        lambda _: (
            bool(living.console.ticks) and least <= living.console.ticks[-1][1].mem_kb <= most
        ),
        limit,
        f"a guest of {least} to {most} KiB",
    )


@pytest.mark.loses_host
def test_mem_set_down_and_up(rig: Rig) -> None:
    """Down and up again, several times over, under 500 ms epochs: the guest gets its memory back, so no frame stays
    charged to it by a mapping of ours; and what host b starts after a power failure passes the guest's own check,
    so no old content of a frame was replicated.
    """
    living = rig.create(PRESSED)
    rig.secondary()
    primary = rig.primary(living)
    document = rig.protected(living, primary)
    full = living.console.ticks[-1][1].mem_kb
    small = full - (FULL - SMALL) * 1024
    for _ in range(ROUNDS):
        mem_set(rig, living, SMALL)
        memory_is(living, 0, small + SLACK)
        mem_set(rig, living, FULL)
        memory_is(living, full - SLACK, full + SLACK)
    assert all(tick.ok for _, tick in living.console.ticks)
    there = rig.console(rig.b, living.guest.name)
    rig.protected(living, primary, epochs=document["acked_epoch"] + 5)
    rig.a.pull_plug()
    ticks = there.wait_ticks(5)
    assert all(tick.ok for _, tick in ticks)


def test_without_invalidation_a_guest_does_not_get_its_memory_back(rig: Rig) -> None:
    """The first round of the test above, with an engine that does not heed what the guest gives back: the frames stay
    mapped, and so charged to the guest. If this passed, the test above would prove nothing of the invalidation.
    """
    living = rig.create(PRESSED)
    rig.secondary()
    primary = rig.primary(living, environment={"CHECKPOINTD_FAULTS": "xen.invalidate=fail"})
    rig.protected(living, primary)
    full = living.console.ticks[-1][1].mem_kb
    mem_set(rig, living, SMALL)
    memory_is(living, 0, full - (FULL - SMALL) * 1024 + SLACK)
    mem_set(rig, living, FULL)
    with pytest.raises(LabError, match="not seen within"):
        memory_is(living, full - SLACK, full + SLACK, NEVER_BACK)


def test_a_killed_engine_does_not_stop_a_guest_that_balloons(rig: Rig) -> None:
    """kill -9 of the engine and then mem-set: an ioreq server that nobody answers would stop the guest for ever."""
    living = rig.create(PRESSED)
    rig.secondary("--engine-restart", "10m")
    primary = rig.primary(living)
    rig.protected(living, primary)
    full = living.console.ticks[-1][1].mem_kb
    primary.kill()
    mem_set(rig, living, SMALL)
    memory_is(living, 0, full - (FULL - SMALL) * 1024 + SLACK)
    mem_set(rig, living, FULL)
    memory_is(living, full - SLACK, full + SLACK)
    rig.runs_on_a(living)


def test_released_by_hand(rig: Rig) -> None:
    """Engine and watcher killed together: `checkpointd release` frees the guest, and does no harm when repeated."""
    living = rig.create(PRESSED)
    secondary = rig.secondary()
    primary = rig.primary(living)
    rig.protected(living, primary)
    secondary.kill()  # it would hear nobody any more, and fence this host
    rig.a.ssh(
        f'pid=$(python3 -c \'import json; print(json.load(open("/run/checkpointd/xen/{living.domid}.json"))'
        f'["watcher_pid"])\'); kill -KILL $pid {primary.pid}'
    )
    rig.a.ssh(f"checkpointd release --domid {living.domid}")
    rig.a.ssh(f"checkpointd release --domid {living.domid}")
    began = time.monotonic()
    mem_set(rig, living, SMALL)
    living.console.wait_ticks(5, after=began)
    assert all(tick.ok for _, tick in living.console.ticks)
