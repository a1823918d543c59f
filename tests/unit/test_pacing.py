"""The interval: fixed, or chosen so that a target is kept, on recorded traces of what guests write (traces.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from traces import FIRST, Trace

from checkpointd.primary.pacing import (
    LONGEST_NS,
    SHORTEST_NS,
    AddedLatency,
    Fixed,
    Pacer,
    PauseShare,
)

if TYPE_CHECKING:
    from checkpointd.primary.pacing import Pace

MS = 1_000_000
S = 1_000_000_000
# What an epoch takes in the model: at least, and for each dirty page. Of the order of what `checkpointd bench` finds.
PAUSE, PAUSE_A_PAGE = 200_000, 600  # ns
ACK, ACK_A_PAGE = 1_500_000, 8_000  # ns; 4 KiB at 0.5 GB/s
SETTLED = 6.0  # s after the beginning or a change of load
WINDOW = 2.0  # s, over which a target is looked at
STEADY = 1.6  # most of unrest() in a window


@dataclass(frozen=True)
class Epoch:
    at: float  # s
    interval: float  # s, since the one before
    pause: float  # s
    ack: float  # s, from the end of the pause


def test_lateness_is_not_made_up_in_a_burst() -> None:
    pacer = Pacer(Fixed(100), 0)
    pacer.due(0)
    assert pacer.next_start == 100
    pacer.due(250)
    assert (pacer.late_ns, pacer.next_start) == (150, 350)


def test_a_pause_longer_than_the_interval_leaves_the_guest_an_interval() -> None:
    pacer = Pacer(Fixed(100), 0)
    pacer.due(0)
    pacer.started(130)
    assert pacer.next_start == 230


def play(
    pace: Pace, trace: Trace, *, slower: float = 1.0, arena: int = 1 << 20
) -> tuple[list[Epoch], int]:
    """Epochs over the whole trace, and how often one did not fit; one is taken once the one before is acked. `slower`:
    than the model's machine. `arena`: pages.
    """
    pacer = Pacer(pace, 0)
    now = last = acked = overflows = 0
    epochs = []
    while now < trace.seconds * S:
        dirty = trace.dirty(last / S, now / S)
        if dirty > arena:
            overflows += 1
            pacer.interval.overflowed(dirty / arena)
            pacer.again(now)
            last, now = now, now + ACK_A_PAGE * dirty  # copied while the guest runs
            continue
        pause = round(slower * (PAUSE + PAUSE_A_PAGE * dirty))
        ack = round(slower * (ACK + ACK_A_PAGE * dirty))
        pacer.due(now)
        pacer.interval.paused(pause, dirty / arena)
        pacer.started(now + pause)
        epochs.append(Epoch(now / S, (now - last) / S, pause / S, ack / S))
        last, acked = now, now + pause + ack
        pacer.interval.acked(ack)
        now = max(pacer.next_start, acked)
    return epochs[1:], overflows


def windows(epochs: list[Epoch], changes: list[float], length: float = WINDOW) -> list[list[Epoch]]:
    """Those of `length` s in which the load was the same for SETTLED s before."""
    end = epochs[-1].at
    starts = [change + SETTLED for change in [0.0, *changes]]
    ends = [*changes, end]
    found = []
    for start, stop in zip(starts, ends, strict=True):
        for i in range(math.floor((stop - start) / length)):
            begin = start + i * length
            found.append([epoch for epoch in epochs if begin <= epoch.at < begin + length])
    return found


def share(epochs: list[Epoch]) -> float:
    return sum(epoch.pause for epoch in epochs) / sum(epoch.interval for epoch in epochs)


def latency(epochs: list[Epoch]) -> float:
    """What is sent at any moment waits for, on average: more is sent in a longer interval."""
    whole = sum(epoch.interval for epoch in epochs)
    return sum((one.interval / 2 + one.pause + one.ack) * one.interval for one in epochs) / whole


def unrest(epochs: list[Epoch]) -> float:
    """How far the longest of most intervals is from the shortest of most: one in ten at either end does not count."""
    intervals = sorted(epoch.interval for epoch in epochs)
    return intervals[len(intervals) * 9 // 10] / intervals[len(intervals) // 10]


OLTP, IDLE, WRITER = (Trace.load(name) for name in ("oltp", "idle", "writer"))
LOADS: dict[str, tuple[Trace, list[float]]] = {"oltp": (OLTP, []), "idle": (IDLE, []), "writer": (WRITER, [])} | {
    "changing": (IDLE + WRITER + OLTP + WRITER + IDLE, [10.0, 20.0, 30.0, 40.0])
}  # fmt: skip


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("target", [0.005, 0.02, 0.1])
def test_the_guest_stands_still_no_more_than_it_is_to(load: str, target: float) -> None:
    trace, changes = LOADS[load]
    for window in windows(play(PauseShare(target), trace)[0], changes):
        assert share(window) <= target
        shortest = min(epoch.interval for epoch in window)
        if shortest * S > 1.1 * SHORTEST_NS:  # else it cannot be more often
            assert share(window) > target / 2, "its answers wait for nothing"
        assert unrest(window) <= STEADY


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("target_ms", [30, 60, 200])
def test_what_it_sends_waits_no_longer_than_it_is_to(load: str, target_ms: int) -> None:
    trace, changes = LOADS[load]
    target = target_ms / 1000
    for window in windows(play(AddedLatency(target_ms * MS), trace)[0], changes):
        could = (
            min(epoch.pause + epoch.ack for epoch in window) * 1.5
        )  # of the shortest interval that makes sense
        assert latency(window) <= max(target, 1.2 * could)
        if could < target / 2:
            assert latency(window) > target / 2, "it is stopped more often than need be"
        assert unrest(window) <= STEADY


@pytest.mark.parametrize("pace", [PauseShare(0.001), AddedLatency(5 * MS)])
def test_a_target_that_cannot_be_kept_ends_at_a_bound_and_stays_there(pace: Pace) -> None:
    epochs, _ = play(pace, WRITER * 12, slower=20)
    for window in windows(epochs, [], 30.0)[-1:]:
        intervals = [epoch.interval for epoch in window]
        assert unrest(window) <= STEADY
        assert min(intervals) >= SHORTEST_NS / S
        assert max(intervals) <= 1.01 * LONGEST_NS / S


@pytest.mark.parametrize("pace", [PauseShare(0.005), PauseShare(0.02), AddedLatency(1000 * MS)])
def test_it_does_not_outgrow_the_arena(pace: Pace) -> None:
    """A guest that writes 40,000 pages a second, never one again, and an arena of 8192, which the targets would fill in
    more than a second.
    """
    writer = Trace([{FIRST: 200}] * (30 * 200))
    epochs, overflows = play(pace, writer, arena=8192)
    assert overflows == 0
    assert len(epochs) > 100


@pytest.mark.parametrize("pace", [PauseShare(0.001), AddedLatency(2000 * MS)])
def test_a_burst_that_fills_the_arena_shortens_it(pace: Pace) -> None:
    quiet, burst = Trace([{FIRST: 1}] * 4000), Trace([{FIRST: 200}] * 2000)
    epochs, overflows = play(pace, quiet + burst, arena=8192)
    assert 0 < overflows <= 3
    assert all(epoch.interval < 8192 / 40_000 for epoch in epochs if epoch.at > 23)


def test_a_pause_for_nothing_counts() -> None:
    interval = PauseShare(0.01).begin()
    before = interval.ns
    interval.paused(50 * MS, 0)
    assert interval.ns > before


def test_a_lost_load_shortens_it_within_seconds() -> None:
    interval = AddedLatency(30 * MS).begin()
    for _ in range(100):
        interval.paused(MS, 0.1)
        interval.acked(20_000 * MS)
    assert interval.ns == LONGEST_NS
    for _ in range(15):  # of what was expected
        interval.acked(MS)
    waited = 0
    while interval.ns > 60 * MS:
        interval.paused(MS, 0.1)
        interval.acked(MS)
        waited += interval.ns
    assert waited < 30 * S


def test_one_long_epoch_moves_it_little() -> None:
    interval = PauseShare(0.02).begin()
    for _ in range(100):
        interval.paused(MS, 0)
    before = interval.ns
    interval.paused(100 * MS, 0)
    assert interval.ns <= 1.25 * before
    for _ in range(30):
        interval.paused(MS, 0)
    assert abs(interval.ns - before) <= 0.1 * before


def test_epochs_are_not_taken_faster_than_they_are_acked() -> None:
    """Where pause and ack alone take longer than what an answer may wait for."""
    interval = AddedLatency(5 * MS).begin()
    for _ in range(100):
        interval.paused(10 * MS, 0)
        interval.acked(40 * MS)
    assert abs(interval.ns - 50 * MS) <= 5 * MS
