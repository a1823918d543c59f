"""From the death of a guest's host to the first answer of its replica."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from checkpointd.bench.guests import Guest
from checkpointd.bench.scenarios import Size
from checkpointd.bench.turns import Figure, Goal, Spread, percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine

TEXT = "SIGKILL of a guest's host and its engine, until the replica answers; heartbeats every 20 ms"

RUNS = {Size.SMALL: 1, Size.FULL: 200}
HEARTBEAT = "20ms"
# Five heartbeats: two may be late, as on a busy machine they are, without a failover that nobody needs.
SILENCE = "100ms"
MEDIAN, MOST = Goal(250), Goal(500)  # ms
RETRY = 0.005  # s; how exactly the first answer is seen


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    taken = sorted(once() for _ in range(RUNS[size]))
    yield Figure("until the first answer", "ms", Spread.of(taken), goal=MEDIAN)
    yield Figure(
        "99th percentile",
        "ms",
        Spread.of([percentile(taken, 99)]),
        goal=MOST,
        notes={"runs": len(taken)},
    )


def once() -> float:
    with Guest("kv", "64MiB") as guest:
        guest.protect("25ms", secondary=("--silence", SILENCE), primary=("--heartbeat", HEARTBEAT))
        guest.epochs(4)
        client = guest.client(retry=RETRY)
        began = time.monotonic()
        guest.process.kill()
        guest.engine.kill()
        client.request("ping")
        return (time.monotonic() - began) * 1000
