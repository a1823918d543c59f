"""The pause for each dirty page, its mapping cached, against plain copies of the same pages."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from checkpointd.bench.scenarios import Size
from checkpointd.bench.standin import Copies, Evictor, Standin, scattered
from checkpointd.bench.turns import Goal, compare, in_turns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure

TEXT = "the pause for each dirty page, mappings cached, against a cold memcpy of the same pages"

# (pages of the guest, dirty pages, rounds)
SIZES = {
    Size.SMALL: (1 << 14, (200, 2_000), 3),
    Size.FULL: (1 << 19, (200, 2_000, 10_000, 50_000), 40),
}
SCATTERED, CONTIGUOUS = Goal(1.15), Goal(0.6)
FROM = 2_000  # pages, from which on the goal is meant: below, what an epoch costs at least outweighs them


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    nr_pfns, counts, rounds = SIZES[size]
    choose = random.Random(1)
    evictor = Evictor(machine.eviction)
    with Standin(nr_pfns, arena_pages=max(counts)) as domain:
        domain.map_all()
        copies = Copies(domain, max(counts))
        try:
            for count in counts:
                pfns = scattered(choose, nr_pfns, count)
                yield _figure(domain, copies, evictor, pfns, rounds, contiguous=False)
            for count in counts:
                first = choose.randrange(nr_pfns - count)
                pfns = list(range(first, first + count))
                yield _figure(domain, copies, evictor, pfns, rounds, contiguous=True)
        finally:
            copies.close()


def _figure(
    domain: Standin, copies: Copies, evictor: Evictor, pfns: Sequence[int], rounds: int, *, contiguous: bool
) -> Figure:  # fmt: skip
    staged: list[int] = []

    def ours() -> float:
        domain.dirty(pfns)
        evictor.evict()
        outcome = domain.pause()
        staged.append(outcome.stage_ns)
        return outcome.pause_ns

    def floor() -> float:
        evictor.evict()
        return copies.one(pfns[0], len(pfns)) if contiguous else copies.scattered(pfns)

    taken = in_turns({"ours": ours, "floor": floor}, rounds)
    kind = "contiguous" if contiguous else "scattered"
    return compare(
        f"{len(pfns):,} pages, {kind}", "us/page", taken["ours"],
        "one memcpy" if contiguous else "memcpy, page by page", taken["floor"],
        (CONTIGUOUS if contiguous else SCATTERED) if len(pfns) >= FROM else None,
        scale=1e-3 / len(pfns), pages=len(pfns), kind=kind, staging_share=round(sum(staged) / sum(taken["ours"]), 3),
    )  # fmt: skip
