"""Parts that come reduced, on the replica's thread: what is reserved for them, and what comes of failures."""

from __future__ import annotations

import random
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.native import DigestKey
from checkpointd.secondary.epochs import FRAME_OVERHEAD, Arrived, Budget, Load
from checkpointd.secondary.expander import NotHeldError
from checkpointd.secondary.replica import NoRoomError
from checkpointd.secondary.worker import ReplicaWorker
from checkpointd.stream.records import RecordType
from checkpointd.stream.writer import record
from checkpointd.wire.messages import Hello
from checkpointd.wire.reduced import ZSTD, Codec, Reduced

if TYPE_CHECKING:
    from collections.abc import Iterator

UUID = "11111111-2222-4333-8444-555555555555"
NR_PFNS = 2048
SEED = bytes(range(32))
KEY = DigestKey(SEED)
MIB = 1 << 20
TAIL = record(RecordType.HVM_CONTEXT, b"registers" * 9)


class Bench:
    def __init__(self, limit: int) -> None:
        self.budget = Budget(limit)
        restorer: Any = SimpleNamespace(
            begin=lambda *_: None, committed=lambda *_: None, discard=lambda: None
        )
        nothing: Any = None
        self.worker = ReplicaWorker(
            self.budget, restorer, nothing, UUID, image_dir=None, keeper=None
        )
        info = DomainInfo(UUID, 4, "web", NR_PFNS, NR_PFNS, "embedded", HostIdentity("b", 0, 0))
        self.worker.begin(Hello(7, 1, info, 1, SEED, b"", 1, resume=False))
        self.loads: list[Load] = []

    def load(
        self, epoch: int, part: int, first: int, count: int, *, final: bool, reduced: bool
    ) -> Load:
        """Pages of noise with some order in it, as the assembler would hand them over."""
        words = struct.pack(f"<{count}Q", *range(first, first + count))
        data = random.Random(first).randbytes(count * 3500) + bytes(count * 596)
        page_data = record(RecordType.PAGE_DATA, struct.pack("<II", count, 0) + words + data)
        load = Load(epoch, part, final, len(page_data) + FRAME_OVERHEAD, context=TAIL if final else b"")
        if reduced:
            body = Codec().compress(page_data)
            came = Reduced(KEY.digest(page_data), len(page_data), len(page_data), ZSTD, body)
            load.reduced.append(Arrived(came))
            load.surplus = came.octets
            load.octets += came.octets
        else:
            load.pages.append(page_data)
        assert self.budget.take(load.octets)
        self.loads.append(load)
        return load

    def close(self) -> None:
        self.worker.drop(keep_pages=False)
        for load in self.loads:
            self.budget.give_back(load.octets)
        assert self.budget.used == 0


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(6 * MIB)
    yield bench
    bench.close()


def committed(bench: Bench) -> None:
    first = bench.load(1, 0, 0, 8, final=True, reduced=False)
    bench.worker.admit(first)
    bench.worker.commit(first)


@pytest.mark.parametrize("reduced", [False, True], ids=["as it is", "reduced"])
def test_a_live_part_that_fits_as_it_is_fits_reduced(bench: Bench, reduced: bool) -> None:
    """What it came as makes room for what it is laid into: else the committed epoch would be given up for it."""
    committed(bench)
    live = bench.load(2, 0, 0, 700, final=False, reduced=reduced)
    bench.worker.admit(live)
    assert live.octets == 0
    assert bench.budget.used == 700 * 4096  # in the overlay


def test_a_part_that_did_not_fit_may_come_again(bench: Bench) -> None:
    committed(bench)
    other = 2_300_000  # too much for both the part and what it is laid into
    assert bench.budget.take(other)
    live = bench.load(2, 0, 0, 500, final=False, reduced=True)
    with pytest.raises(NoRoomError):
        bench.worker.admit(live)
    assert (live.surplus, len(live.pages)) == (0, 1)
    bench.budget.give_back(other)
    bench.worker.admit(live)
    assert bench.budget.used == 500 * 4096


def test_a_part_that_is_not_what_was_staged_leaves_no_trace(bench: Bench) -> None:
    """Its second frame: what the first one was made to is thrown away with the load."""
    committed(bench)
    load = bench.load(2, 0, 0, 8, final=False, reduced=True)
    good = load.reduced[0].reduced
    load.reduced.append(
        Arrived(Reduced(bytes([1] * 16), good.length, good.body_length, ZSTD, good.body))
    )
    before = bench.worker.digests(0, 64)
    with pytest.raises(NotHeldError, match="differ from what the primary staged"):
        bench.worker.admit(load)
    assert bench.worker.digests(0, 64) == before


def test_what_was_foreseen_is_not_made_twice(bench: Bench) -> None:
    committed(bench)
    load = bench.load(2, 0, 0, 8, final=True, reduced=True)
    (arrived,) = load.reduced
    bench.worker.foresee(8, 2, arrived)  # of another session
    assert arrived.record is None
    bench.worker.foresee(7, 2, arrived)
    made = arrived.record
    assert made is not None
    bench.worker.admit(load)
    assert load.pages[-1] is made
    bench.worker.commit(load)


def test_foreseeing_what_will_fail_fails_when_it_is_due(bench: Bench) -> None:
    committed(bench)
    load = bench.load(2, 0, 0, 8, final=True, reduced=True)
    good = load.reduced[0].reduced
    load.reduced[0] = bad = Arrived(Reduced(bytes([1] * 16), good.length, 8, ZSTD, good.body))
    bench.worker.foresee(7, 2, bad)
    assert bad.record is None
    with pytest.raises(NotHeldError, match="octets, not 8"):
        bench.worker.admit(load)
