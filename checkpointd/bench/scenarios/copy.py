"""The first full copy of a guest: all of its pages, digested, encrypted, checked and put into the replica."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from checkpointd.bench import sink
from checkpointd.bench.guests import Guest
from checkpointd.bench.scenarios import Size
from checkpointd.bench.turns import Goal, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure

TEXT = "the first full copy, against what a connection of this machine takes that only reads and forgets"

# (memory in MiB, pages with something in them, rounds)
SIZES = {Size.SMALL: (16, 2_000, 1), Size.FULL: (2048, 400_000, 5)}
PAGE = 4096
LOOK_EVERY = 0.01  # s
LIMITS = {
    "curve": ("CURVE alone", Goal(0.6, least=True)),
    "zmq": ("plain pyzmq", None),
    "tcp": ("plain TCP", None),
}


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    memory, pages, rounds = SIZES[size]
    octets = pages * PAGE
    ours: list[float] = []
    reduced: list[float] = []
    limits: dict[str, list[float]] = {kind: [] for kind in LIMITS}
    zeros: list[float] = []
    with Guest(f"dirty:{pages}@1", f"{memory}MiB") as guest:
        while guest.step() < 2 * pages:  # each has something in it
            time.sleep(LOOK_EVERY)
        guest.pause()
        for _ in range(rounds):
            ours.append(octets / _seconds(guest, "off"))
            reduced.append(octets / _seconds(guest, "auto"))
            for kind, found in limits.items():
                found.append(sink.rate(kind, octets))
    with Guest("dirty:1@1", f"{memory}MiB") as empty:
        empty.pause()
        zeros = [_seconds(empty, "auto") for _ in range(rounds)]
    what = f"{pages:,} pages"
    for kind, (name, goal) in LIMITS.items():
        yield compare(what, "GB/s", ours, name, limits[kind], goal, scale=1e-9, pages=pages)
    name, _ = LIMITS["curve"]
    what_reduced = f"{pages:,} pages, a line in each, reduced"
    yield compare(what_reduced, "GB/s", reduced, name, limits["curve"], scale=1e-9, pages=pages)
    yield compare(
        f"{memory:,} MiB of zeros",
        "s",
        zeros,
        what,
        [octets / rate for rate in ours],
        pages=memory << 8,
    )


def _seconds(guest: Guest, reduce: str) -> float:
    """From an engine that is ready to one that protects the guest, which stands still."""
    engine = guest.begin("100ms", primary=("--reduce", reduce))
    began = time.monotonic()
    engine.state("protected", timeout=600.0)
    taken = time.monotonic() - began
    guest.unprotect()
    return taken
