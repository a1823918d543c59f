"""What a guest that has its processor for itself loses by being protected."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from checkpointd.bench.guests import Guest
from checkpointd.bench.scenarios import Size
from checkpointd.bench.turns import Goal, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure

TEXT = "the rate of a guest that writes as fast as it can, protected at 50 ms, against the same unprotected"

# (memory, dirty pages, turns, seconds of each)
SIZES = {Size.SMALL: ("16MiB", 500, 1, 0.5), Size.FULL: ("1GiB", 2_000, 8, 10.0)}
INTERVAL = "50ms"
ENDLESS = 100_000  # rewrites a second of each page: more than there is time for, and a step takes a nanosecond at least
KEPT = Goal(0.95, least=True)


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    memory, pages, turns, seconds = SIZES[size]
    alone, protected = [], []
    with Guest(f"dirty:{pages}@{ENDLESS}", memory) as guest:
        for _ in range(turns):
            alone.append(rate(guest, seconds))
            guest.protect(INTERVAL)
            guest.epochs(10)
            protected.append(rate(guest, seconds))
            guest.unprotect()
    yield compare(
        f"{pages:,} pages every {INTERVAL}",
        "steps/s",
        protected,
        "unprotected",
        alone,
        KEPT,
        pages=pages,
    )


def rate(guest: Guest, seconds: float) -> float:
    """Steps a second."""
    first, began = guest.step(), time.monotonic()
    time.sleep(seconds)
    last, ended = guest.step(), time.monotonic()
    return (last - first) / (ended - began)
