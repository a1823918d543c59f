"""What protection adds to a request and its answer: the answer is held until its epoch is acked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from checkpointd.bench.guests import Guest
from checkpointd.bench.scenarios import Size
from checkpointd.bench.turns import Figure, Goal, Spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine
    from checkpointd.hypervisor.embedded.kv import KvClient

TEXT = "what protection adds to a request's answer: half an interval, and what the epoch takes"

# (memory, intervals in ms, requests)
SIZES = {
    Size.SMALL: ("16MiB", (25,), 20),
    Size.FULL: ("256MiB", (5, 25, 100), 1000),
}
BESIDE = 3.0  # ms over half the interval: pause, wire, ack


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    memory, intervals, requests = SIZES[size]
    for interval in intervals:
        with Guest("kv", memory) as guest:
            client = guest.client()
            alone = answers(client, requests, interval)
            guest.protect(f"{interval}ms")
            answers(
                client, requests // 10, interval
            )  # the first ones meet the end of the first copy
            held = answers(client, requests, interval)
        before = sum(alone) / len(alone)
        added = [one - before for one in held]
        mean = sum(added) / len(added)
        yield Figure(
            f"added at {interval} ms, mean", "ms", Spread.of([mean]), goal=Goal(interval / 2 + BESIDE),
            notes={"interval_ms": interval, "unprotected_ms": round(before, 3)},
        )  # fmt: skip
        yield Figure(f"added at {interval} ms, each", "ms", Spread.of(added))


def answers(client: KvClient, requests: int, interval: int) -> list[float]:
    """One request after the other: the ms until each answer. Between them is a part of the interval that is never the
    same, so that they come at all moments of an epoch.
    """
    found = []
    for i in range(requests):
        time.sleep(interval / 1000 * (i * 0.618 % 1))
        began = time.monotonic()
        client.incr("bench")
        found.append((time.monotonic() - began) * 1000)
    return found
