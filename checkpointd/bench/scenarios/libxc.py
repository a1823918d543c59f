"""The same epoch as libxc's save code takes it (csrc/libxc.h), of the same domain, into the same sink."""

from __future__ import annotations

import random
import socket
import statistics
import threading
from contextlib import closing
from typing import TYPE_CHECKING

from checkpointd.bench.scenarios import Size
from checkpointd.bench.standin import Evictor, Standin, scattered
from checkpointd.bench.turns import Goal, compare, in_turns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure

TEXT = "the pause beside libxc's way: a bit at a time, arrays and mappings for each batch, sent inside the pause"

# (pages of the guest, dirty pages, rounds)
SIZES = {
    Size.SMALL: (1 << 14, (2_000,), 3),
    Size.FULL: (1 << 21, (200, 2_000, 10_000, 50_000), 15),
}
LESS = Goal(0.1)
READ = 1 << 20  # octets at a time


class Sink:
    """A TCP connection of this machine, whose other end reads and forgets; a context manager."""

    def __init__(self) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as server:
            self.socket = socket.create_connection(server.getsockname())
            self._far, _ = server.accept()
        self._thread = threading.Thread(target=self._drain, name="sink", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        buffer = bytearray(READ)
        while self._far.recv_into(buffer):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()
        self._thread.join()
        self._far.close()


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    nr_pfns, counts, rounds = SIZES[size]
    choose = random.Random(1)
    evictor = Evictor(machine.eviction)
    with Standin(nr_pfns, arena_pages=max(counts)) as domain, Sink() as sink:
        domain.map_all()
        for count in counts:
            yield _figure(domain, sink, evictor, scattered(choose, nr_pfns, count), rounds)


def _figure(domain: Standin, sink: Sink, evictor: Evictor, pfns: list[int], rounds: int) -> Figure:
    parts: list[tuple[float, float]] = []

    def ours() -> float:
        domain.dirty(pfns)
        evictor.evict()
        outcome = domain.pause()
        for record in domain.arena.records:  # the guest runs by now
            sink.socket.sendall(record)
        return outcome.pause_ns

    def theirs() -> float:
        domain.dirty(pfns)
        evictor.evict()
        pause, mapping, writing = domain.libxc_epoch(sink.socket.fileno())
        parts.append((mapping / pause, writing / pause))
        return pause

    taken = in_turns({"ours": ours, "theirs": theirs}, rounds)
    mapping, writing = (statistics.median(part) for part in zip(*parts, strict=True))
    return compare(
        f"{len(pfns):,} pages of {domain.nr_pfns * 4 >> 20} GiB", "ms", taken["ours"], "libxc's way", taken["theirs"],
        LESS, scale=1e-6, pages=len(pfns), its_mapping=round(mapping, 2), its_sending=round(writing, 2),
    )  # fmt: skip
