"""The pause per page, metrics being scraped all the while, against a plain cold memcpy of as many pages."""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from cffi import FFI
from report import commit, machine, write_section
from vitals import get, metrics_of, status_of, url_of

from checkpointd.demo.rig import Rig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.campaign

PAGES, RATE, MEMORY_MIB, INTERVAL_MS = 2000, 10, 256, 100
RATIO_MAX = 1.5
TURNS = 12  # of engine and memcpy, one after the other, so that both meet the same machine
EPOCHS_A_TURN = 25
COPIES_A_TURN = 15
SCRAPE_EVERY = 0.1  # s
PATIENCE = 120.0  # s for a first copy, or for a turn's epochs

SOURCE = r"""
#include <string.h>
#include <time.h>

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

/* What the copy takes, in ns, after every line of `flush` was written, which is larger than all caches. */
double cold_copy(char *to, const char *from, const unsigned *pages, unsigned n, char *flush, size_t size)
{
    for (size_t i = 0; i < size; i += 64)
        flush[i]++;
    double began = now_ns();
    for (unsigned i = 0; i < n; i++)
        memcpy(to + i * 4096ul, from + pages[i] * 4096ul, 4096);
    return now_ns() - began;
}
"""
# Octets; several times the largest last-level cache there is.
FLUSH = 1 << 30


class Memcpy:
    """The same pages as the guest's, of a mapping as large, into a buffer; all of it present beforehand."""

    def __init__(self, directory: Path) -> None:
        ffi = FFI()
        ffi.cdef(
            "double cold_copy(char *, const char *, const unsigned *, unsigned, char *, size_t);"
        )
        ffi.set_source("cold_copy", SOURCE, extra_compile_args=["-O2"])
        self._ffi, self._lib = ffi, _load(ffi.compile(str(directory)))
        nr_pages = MEMORY_MIB << 8
        self._from = ffi.new("char[]", b"\1" * (MEMORY_MIB << 20))
        self._to = ffi.new("char[]", b"\1" * (PAGES * 4096))
        self._flush = ffi.new("char[]", b"\1" * FLUSH)
        # As `dirty` scatters them: near the golden section of the memory. The engine copies in ascending order.
        stride = (nr_pages - 1) * 618 // 1000 | 1
        scattered = sorted(1 + i * stride % (nr_pages - 1) for i in range(PAGES))
        self._pages = ffi.new("unsigned[]", scattered)

    def ns_a_page(self) -> float:
        taken = self._lib.cold_copy(
            self._to, self._from, self._pages, PAGES, self._flush, len(self._flush) - 1
        )
        return float(taken) / PAGES


def _load(path: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("cold_copy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.lib


class Scraper(threading.Thread):
    """What a monitoring system does, and more often than any."""

    def __init__(self, url: str) -> None:
        super().__init__(name="scraper")
        self._url = url
        self._end = threading.Event()
        self.scrapes = 0

    def run(self) -> None:
        while not self._end.wait(SCRAPE_EVERY):
            get(f"{self._url}/metrics")
            self.scrapes += 1

    def stop(self) -> None:
        self._end.set()
        self.join()


def _turns(url: str, memcpy: Memcpy) -> Iterator[tuple[float, float, float]]:
    """(pause, memcpy) in ns a page, in turns, and how many pages an epoch had."""
    for _ in range(TURNS):
        before = after = _pauses(url)
        deadline = time.monotonic() + PATIENCE
        while after[1] < before[1] + EPOCHS_A_TURN:
            assert time.monotonic() < deadline, "the epochs do not go on"
            time.sleep(INTERVAL_MS / 1000)
            after = _pauses(url)
        seconds, epochs, pages = (now - then for now, then in zip(after, before, strict=True))
        copies = [memcpy.ns_a_page() for _ in range(COPIES_A_TURN)]
        yield seconds * 1e9 / pages, statistics.median(copies), pages / epochs


def _pauses(url: str) -> tuple[float, float, float]:
    """Seconds and number of pauses so far, and pages staged in them."""
    metrics = metrics_of(url)
    return (
        metrics["checkpointd_epoch_pause_seconds_sum"],
        metrics["checkpointd_epoch_pause_seconds_count"],
        metrics["checkpointd_epoch_dirty_pages_sum"],
    )


def test_pause_per_page(tmp_path: Path) -> None:
    memcpy = Memcpy(tmp_path)
    with Rig(tmp_path) as rig:
        guest = rig.guest(
            4, "--memory", f"{MEMORY_MIB}MiB", "--program", f"dirty:{PAGES}@{RATE}",
            "--listen", f"127.0.0.1:{rig.udp_port()}",
        )  # fmt: skip
        rig.guest_is_up(guest)
        rig.secondary().ready()
        primary = rig.primary(4, "--interval", f"{INTERVAL_MS}ms")
        primary.state("protected", timeout=PATIENCE)
        url = url_of(rig, primary)
        scraper = Scraper(url)
        scraper.start()
        try:
            turns = list(_turns(url, memcpy))
        finally:
            scraper.stop()
        status = status_of(rig, primary)
    pauses, copies, sizes = zip(*turns, strict=True)
    ratios = [pause / copy for pause, copy, _ in turns]
    pages = statistics.median(sizes)
    ratio = statistics.median(ratios)
    write_section(
        "pause",
        f"Commit {commit()}; {machine()}.\n\n"
        f"`dirty:{PAGES}@{RATE}`, {MEMORY_MIB} MiB, {INTERVAL_MS} ms; {TURNS} turns of {EPOCHS_A_TURN} epochs and "
        f"{COPIES_A_TURN} copies, {scraper.scrapes} scrapes meanwhile.\n\n"
        "| | median | least | most |\n|---|---:|---:|---:|\n"
        f"| pause, ns a page | {_spread(pauses, 0)} |\n"
        f"| cold memcpy, ns a page | {_spread(copies, 0)} |\n"
        f"| ratio, turn by turn | {_spread(ratios, 2)} |\n\n"
        f"Dirty pages an epoch: {_spread(sizes, 0)} (median, least and most of the turns).\n"
        f"Whole pauses: p50 {status['pause_p50_ns'] / 1000:.0f} µs, p99 {status['pause_p99_ns'] / 1000:.0f} µs; "
        f"the p50 is {status['pause_p50_ns'] / pages:.0f} ns a page.\n"
        f"Required: a median ratio of at most {RATIO_MAX}.\n",
    )
    assert ratio <= RATIO_MAX, ratios


def _spread(values: tuple[float, ...] | list[float], digits: int) -> str:
    figures = (statistics.median(values), min(values), max(values))
    return " | ".join(f"{figure:.{digits}f}" for figure in figures)
