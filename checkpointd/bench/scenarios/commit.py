"""What the standby does with a whole epoch: room for it made sure of, and its commit into the image."""

from __future__ import annotations

import random
import time
from contextlib import closing
from typing import TYPE_CHECKING

from checkpointd import native
from checkpointd.bench.scenarios import Size
from checkpointd.bench.standin import Copies, Evictor, Standin, scattered
from checkpointd.bench.turns import Figure, Goal, Spread, compare, in_turns
from checkpointd.secondary.epochs import Budget, Load
from checkpointd.secondary.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from checkpointd.bench.machine import Machine

TEXT = "the standby's commit of an epoch, against a memcpy of its pages to where they go"

# (pages of the guest, dirty pages, rounds)
SIZES = {
    Size.SMALL: (1 << 14, (2_000,), 3),
    Size.FULL: (1 << 19, (200, 2_000, 10_000, 50_000), 30),
}
SHARE = Goal(0.7, least=True)  # of memcpy's speed
LINE = 10e9 / 8  # octets/s of a line of 10 Gbit/s, which the standby must not be slower than
FROM = 2_000  # pages; below, what a commit costs at least outweighs them


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    nr_pfns, counts, rounds = SIZES[size]
    choose = random.Random(1)
    evictor = Evictor(machine.eviction)
    with (
        Standin(nr_pfns, arena_pages=max(counts)) as domain,
        closing(Replica("bench", nr_pfns, Budget(1 << 40))) as replica,
    ):
        _commit(domain, replica, range(nr_pfns), max(counts))
        for followed in (False, True):
            replica.changed = native.Bitmap(nr_pfns) if followed else None
            for count in counts:
                pfns = scattered(choose, nr_pfns, count)
                yield from _figures(domain, replica, evictor, pfns, rounds)


def _commit(domain: Standin, replica: Replica, pfns: Sequence[int], at_once: int) -> None:
    """So that all of the image is there, and is reserved."""
    for at in range(0, len(pfns), at_once):
        domain.dirty(pfns[at : at + at_once])
        domain.pause()
        _take(domain, replica)


def _take(domain: Standin, replica: Replica) -> float:
    """What is in the arena, as an epoch; takes so many ns."""
    records = domain.arena.records
    assert records, "pages with nothing in them are no load"
    load = Load(
        epoch=(replica.epoch or 0) + 1, part=0, final=True, octets=sum(map(len, records)),
        pages=[*records], context=bytes(domain.arena.context),
    )  # fmt: skip
    began = time.monotonic_ns()
    replica.admit(load)
    replica.commit(load, domain.key)
    taken = time.monotonic_ns() - began
    for record in records:  # else the arena could not be closed
        record.release()
    return taken


def _figures(
    domain: Standin, replica: Replica, evictor: Evictor, pfns: list[int], rounds: int
) -> Iterator[Figure]:
    def ours() -> float:
        domain.dirty(pfns)
        domain.pause()
        evictor.evict()
        return _take(domain, replica)

    with closing(Copies(domain, len(pfns))) as copies:

        def floor() -> float:
            evictor.evict()
            return copies.back(pfns)

        taken = in_turns({"ours": ours, "floor": floor}, rounds)
    what = f"{len(pfns):,} pages" + ", followed by xl" * (replica.changed is not None)
    rates = [len(pfns) * 4096 / ns for ns in taken["ours"]]
    floors = [len(pfns) * 4096 / ns for ns in taken["floor"]]
    goal = SHARE if len(pfns) >= FROM else None
    yield compare(what, "GB/s", rates, "memcpy", floors, goal, pages=len(pfns))
    if len(pfns) == max(SIZES[Size.FULL][1]):
        yield Figure(
            f"{what}, a line of 10 Gbit/s",
            "GB/s",
            Spread.of(rates),
            goal=Goal(LINE / 1e9, least=True),
        )
