"""What an epoch costs at least: nothing is dirty, and only the size of the guest's map counts."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from checkpointd.bench.scenarios import Size
from checkpointd.bench.standin import Evictor, Standin
from checkpointd.bench.turns import Figure, Goal, Spread, compare, in_turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine

TEXT = "an epoch with nothing dirty, of sparse maps of up to 64 GiB"

# (frames of the maps, memory behind each in pages, rounds)
SIZES = {
    Size.SMALL: ((1 << 14, 1 << 20), 1 << 12, 5),
    Size.FULL: ((1 << 18, 1 << 20, 1 << 22, 1 << 24), 1 << 18, 200),  # 1, 4, 16 and 64 GiB
}
ARENA = 4096  # pages
AT_MOST = Goal(0.3)  # ms, of the largest
FLAT = Goal(1.5)  # of each to the smallest


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    frames, memory, rounds = SIZES[size]
    evictor = Evictor(machine.eviction)
    with ExitStack() as stack:
        domains = {
            nr_pfns: stack.enter_context(
                Standin(nr_pfns, memory_pages=min(memory, nr_pfns), arena_pages=ARENA)
            )
            for nr_pfns in frames
        }
        for domain in domains.values():
            domain.map_all()
        ways = {str(nr_pfns): partial(_pause, domain) for nr_pfns, domain in domains.items()}
        taken = in_turns(ways, rounds, between=evictor.evict)
    smallest = taken[str(frames[0])]
    for nr_pfns in frames:
        pauses = taken[str(nr_pfns)]
        what = f"nothing dirty, {nr_pfns >> 10:,} Ki frames"
        goal = AT_MOST if nr_pfns == frames[-1] else None
        yield Figure(
            what,
            "ms",
            Spread.of([ns * 1e-6 for ns in pauses]),
            goal=goal,
            notes={"frames": nr_pfns},
        )
        if nr_pfns != frames[0]:
            yield compare(
                f"{what}, to the smallest", "ms", pauses, "the smallest", smallest, FLAT, scale=1e-6
            )


def _pause(domain: Standin) -> float:
    return domain.pause().pause_ns
