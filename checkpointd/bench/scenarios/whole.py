"""Whole pauses of a guest that is protected for real, beside the floor, and while everybody looks at the engine."""

from __future__ import annotations

import random
import statistics
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

from checkpointd.bench.guests import Guest, fetch
from checkpointd.bench.scenarios import Size
from checkpointd.bench.standin import Copies, Evictor, Standin, scattered
from checkpointd.bench.turns import Goal, compare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure

TEXT = "whole pauses of a protected guest against a cold memcpy of as many pages; and while metrics are scraped"

# (memory, dirty pages, turns, epochs of each)
SIZES = {Size.SMALL: ("16MiB", 500, 1, 10), Size.FULL: ("8GiB", 2_000, 4, 300)}
RATE = 10  # rewrites a second of each page, so that all are dirty in every epoch
INTERVAL = "100ms"
COPIES = 25  # a turn
FLOOR_PAGES = 1 << 18  # of the memory that the floor is measured in, scattered as the guest's
MEDIAN, MOST, SCRAPED = Goal(1.25), Goal(2.5), Goal(1.2)
SCRAPE_EVERY = 0.1  # s


class Scraper:
    """Gets /metrics and /status of the engine ten times a second; a context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper")

    def _run(self) -> None:
        while not self._end.wait(SCRAPE_EVERY):
            fetch(f"{self._url}/metrics")
            fetch(f"{self._url}/status")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    memory, pages, turns, epochs = SIZES[size]
    evictor = Evictor(machine.eviction)
    pfns = scattered(random.Random(1), FLOOR_PAGES, pages)
    quiet: list[dict[str, Any]] = []
    scraped: list[dict[str, Any]] = []
    floors: list[float] = []
    with (
        Standin(FLOOR_PAGES, arena_pages=pages) as domain,
        closing(Copies(domain, pages)) as copies,
        Guest(f"dirty:{pages}@{RATE}", memory) as guest,
    ):

        def floor() -> float:
            evictor.evict()
            return copies.scattered(pfns)

        for _ in range(turns):
            guest.protect(INTERVAL)
            quiet.append(guest.epochs(epochs))
            guest.unprotect()
            floors.append(statistics.median(floor() for _ in range(COPIES)))
            guest.protect(INTERVAL)
            with Scraper(guest.url("primary")):
                scraped.append(guest.epochs(epochs))
            guest.unprotect()
    p50, p99 = ([one[f"pause_{name}_ns"] for one in quiet] for name in ("p50", "p99"))
    busy = [one["pause_p99_ns"] for one in scraped]
    what = f"{pages:,} pages of {memory}"
    yield compare(f"{what}, median", "ms", p50, "memcpy", floors, MEDIAN, scale=1e-6, pages=pages)
    yield compare(
        f"{what}, 99th percentile", "ms", p99, "memcpy", floors, MOST, scale=1e-6, pages=pages
    )
    yield compare(
        f"{what}, scraped, 99th percentile",
        "ms",
        busy,
        "quiet",
        p99,
        SCRAPED,
        scale=1e-6,
        pages=pages,
    )
