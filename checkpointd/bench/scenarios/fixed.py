"""What an epoch costs at least: nothing is dirty, and only the size of the guest's map counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd.bench.scenarios import Size
from checkpointd.bench.standin import Evictor, Standin
from checkpointd.bench.turns import Figure, Goal, Spread, compare, in_turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine

TEXT = "an epoch with nothing dirty, of a sparse map of 16 Mi frames, and against one of a 64th"

# (frames of the large map, memory behind it in pages, rounds)
SIZES = {Size.SMALL: (1 << 20, 1 << 12, 5), Size.FULL: (1 << 24, 1 << 18, 200)}
SMALLER = 64  # times: the other guest's map
ARENA = 4096  # pages
AT_MOST = Goal(0.3)  # ms
FLAT = Goal(1.5)  # of the large map's to the small one's


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    frames, memory, rounds = SIZES[size]
    evictor = Evictor(machine.eviction)
    with (
        Standin(frames, memory_pages=memory, arena_pages=ARENA) as large,
        Standin(frames // SMALLER, memory_pages=min(memory, frames // SMALLER), arena_pages=ARENA) as small,
    ):  # fmt: skip
        for domain in (large, small):
            domain.map_all()
        taken = in_turns(
            {
                "large": lambda: float(large.pause().pause_ns),
                "small": lambda: float(small.pause().pause_ns),
            },
            rounds,
            between=evictor.evict,
        )
    what = f"nothing dirty, {frames >> 20} Mi frames"
    in_ms = [ns * 1e-6 for ns in taken["large"]]
    yield Figure(what, "ms", Spread.of(in_ms), goal=AT_MOST, notes={"frames": frames})
    yield compare(
        what, "ms", taken["large"], f"{frames // SMALLER >> 10} Ki frames", taken["small"], FLAT,
        scale=1e-6, frames=frames,
    )  # fmt: skip
