"""The replica against a dict of pages, in memory and on disk."""

from __future__ import annotations

import json
import os
import random
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd import faults
from checkpointd.errors import StateError
from checkpointd.native import DigestKey
from checkpointd.secondary.epochs import Budget, Load
from checkpointd.secondary.keep import ImageKeeper
from checkpointd.secondary.replica import NoRoomError, Replica, State
from checkpointd.secondary.restorers.image import ImageRestorer
from checkpointd.stream.image import read_image
from checkpointd.stream.records import DomainType, RecordType
from checkpointd.stream.verify import verify
from checkpointd.stream.writer import headers, record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.hypervisor.port import DomainInfo, Incoming

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
NR_PFNS = 700  # more than one extent, and not a multiple of 64
KEY = DigestKey(bytes(range(32)))
XTAB = 0xF << 60
TAIL = record(RecordType.HVM_CONTEXT, b"registers" * 8)
STATIC = headers(DomainType.HVM) + record(RecordType.STATIC_DATA_END)

Pages = dict[int, bytes]  # the oracle: contents of each populated pfn


def words(pfns: list[int]) -> bytes:
    return struct.pack(f"<{len(pfns)}Q", *pfns)


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(4096)


def load(
    epoch: int,
    part: int = 0,
    *,
    final: bool = True,
    data: Pages | None = None,
    zero: list[int] | None = None,
    gone: list[int] | None = None,
    audit: bytes = b"",
) -> Load:
    made = Load(epoch, part, final, 0, context=TAIL if final else b"", audit=audit)
    if data:
        body = struct.pack("<II", len(data), 0) + words(list(data)) + b"".join(data.values())
        made.pages.append(record(RecordType.PAGE_DATA, body))
    if zero:
        made.zero.append(words(zero))
    if gone:
        made.gone.append(words([XTAB | pfn for pfn in gone]))
    return made


def apply(pages: Pages, data: Pages, zero: list[int], gone: list[int]) -> None:
    for pfn in gone:
        pages.pop(pfn, None)
    pages.update(dict.fromkeys(zero, bytes(4096)))
    pages.update(data)


def contents(replica: Replica) -> Pages:
    found = {}
    for pfns, data in replica.pages():
        for i, pfn in enumerate(pfns):
            found[pfn] = bytes(data[i * 4096 : (i + 1) * 4096])
    # What is not populated is zero in the image itself, which the hypervisor gets.
    raw = os.pread(replica.fd, NR_PFNS * 4096, 0)
    for pfn in range(NR_PFNS):
        assert raw[pfn * 4096 : (pfn + 1) * 4096] == found.get(pfn, bytes(4096))
    return found


@pytest.fixture
def budget() -> Iterator[Budget]:
    budget = Budget(1 << 22)
    yield budget
    assert budget.used == 0


@pytest.fixture(params=["memory", "disk"])
def replica(request: pytest.FixtureRequest, tmp_path: Path, budget: Budget) -> Iterator[Replica]:
    directory = tmp_path if request.param == "disk" else None
    descriptors = len(os.listdir("/proc/self/fd"))
    replica = Replica(UUID, NR_PFNS, budget, directory=directory)
    yield replica
    replica.close()
    replica.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def commit(replica: Replica, part: Load) -> tuple[int, tuple[int, ...]]:
    replica.admit(part)
    return replica.commit(part, KEY)


def test_the_first_copy_goes_straight_into_the_image(replica: Replica, budget: Budget) -> None:
    replica.admit(load(1, 0, final=False, data={1: page(1), 699: page(2)}, zero=[3]))
    assert budget.used == 0
    assert replica.state is State.COPYING
    assert replica.has_pages
    commit(replica, load(1, 1, data={1: page(5)}, gone=[699]))
    assert (replica.state, replica.epoch, replica.context) == (State.WHOLE, 1, TAIL)
    assert contents(replica) == {1: page(5), 3: bytes(4096)}


def test_live_parts_leave_the_committed_epoch_alone_until_theirs_is_whole(
    replica: Replica, budget: Budget
) -> None:
    commit(replica, load(1, data={1: page(1), 2: page(2)}))
    before = contents(replica)
    replica.admit(load(2, 0, final=False, data={1: page(3), 5: page(4)}, gone=[2]))
    replica.admit(load(2, 1, final=False, data={2: page(6)}, gone=[5], zero=[7]))
    last = load(2, 2, data={9: page(7)})
    replica.admit(last)
    assert budget.used > 0
    assert (replica.epoch, contents(replica)) == (1, before)
    replica.commit(last, KEY)
    expected = {1: page(3), 2: page(6), 7: bytes(4096), 9: page(7)}
    assert (replica.epoch, contents(replica)) == (2, expected)
    assert budget.used == 0


def test_an_epoch_that_was_given_up_leaves_no_trace(replica: Replica) -> None:
    commit(replica, load(1, data={1: page(1)}))
    replica.admit(load(2, 0, final=False, data={1: page(2), 2: page(3)}))
    commit(replica, load(3, data={4: page(4)}))
    assert contents(replica) == {1: page(1), 4: page(4)}


def test_an_epoch_is_never_mixed_with_parts_of_another(replica: Replica) -> None:
    commit(replica, load(1, data={1: page(1)}))
    replica.admit(load(2, 0, final=False, data={2: page(2)}))
    late = load(2, 1, data={3: page(3)})
    replica.admit(late)
    replica.admit(load(3, 0, final=False, data={4: page(4)}))
    with pytest.raises(StateError, match="mixed with parts of epoch 3"):
        replica.commit(late, KEY)
    assert (replica.state, contents(replica)) == (State.WHOLE, {1: page(1)})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_any_epochs_leave_what_a_dict_says(seed: int) -> None:
    dice = random.Random(seed)
    budget = Budget(64 << 20)
    replica = Replica(UUID, NR_PFNS, budget)
    committed: Pages = {}
    last = 0
    for epoch in range(1, 8):
        making = dict(committed)
        parts = dice.randrange(4)
        for part in range(parts + 1):
            pfns = dice.sample(range(NR_PFNS), dice.randrange(3, 60))
            third = len(pfns) // 3
            data = {pfn: page(dice.randrange(1 << 30)) for pfn in pfns[:third]}
            zero, gone = pfns[third : 2 * third], pfns[2 * third :]
            final = part == parts
            made = load(epoch, part, final=final, data=data, zero=zero, gone=gone)
            apply(making, data, zero, gone)
            replica.admit(made)
            if replica.state is State.WHOLE:
                assert replica.epoch == last
        if dice.random() < 0.3 and replica.state is State.WHOLE:
            continue  # given up before its commit
        replica.commit(made, KEY)
        committed, last = making, epoch
        assert contents(replica) == committed
    replica.close()
    assert budget.used == 0


def entries(pages: Pages) -> bytes:
    return b"".join(struct.pack("<Q", pfn) + KEY.digest(data) for pfn, data in pages.items())


def test_the_audit_finds_missed_dirt_and_nothing_else(replica: Replica) -> None:
    pages = {pfn: page(pfn) for pfn in range(20)}
    assert commit(replica, load(1, data=pages, audit=entries(pages))) == (20, ())
    dirtied = {**pages, 7: page(100), 11: bytes(4096)}  # on the primary, and never shipped
    assert commit(replica, load(2, data={30: page(1)}, audit=entries(dirtied))) == (20, (7, 11))
    absent = entries({5: page(5), 50: bytes(4096)})
    assert commit(replica, load(3, data={31: page(1)}, audit=absent)) == (2, (50,))


def test_digests_are_of_what_is_here(replica: Replica) -> None:
    fresh = any(replica.digests(KEY, 0, NR_PFNS))
    assert not fresh
    commit(replica, load(1, data={3: page(1), 64: page(2), 65: page(3)}, zero=[200]))
    expected = {3: page(1), 64: page(2), 65: page(3), 200: bytes(4096)}
    for first, count in ((0, NR_PFNS), (64, 100), (192, 9)):
        found = replica.digests(KEY, first, count)
        for i in range(count):
            here = expected.get(first + i)
            digest = KEY.digest(here) if here is not None else bytes(16)
            assert found[16 * i : 16 * i + 16] == digest


def test_a_part_that_does_not_fit_beside_the_replica_is_refused_and_changes_nothing() -> None:
    budget = Budget(10 * 4096)
    replica = Replica(UUID, NR_PFNS, budget)
    commit(replica, load(1, data={1: page(1)}))
    replica.admit(load(2, 0, final=False, data={2: page(2)}))
    used = budget.used
    big = load(2, 1, final=False, data={pfn: page(pfn) for pfn in range(20)})
    with pytest.raises(NoRoomError, match="--epoch-memory"):
        replica.admit(big)
    assert budget.used == used
    assert contents(replica) == {1: page(1)}
    replica.give_up_epoch()  # what the standby decides then
    assert budget.used == 0
    assert replica.state is State.COPYING
    replica.admit(big)
    commit(replica, load(2, 2, data={40: page(40)}))
    assert contents(replica) == {**{pfn: page(pfn) for pfn in range(20)}, 40: page(40)}
    replica.close()


def test_what_the_commit_writes_is_reserved_before_the_ack(replica: Replica) -> None:
    """After admit() a commit takes no more memory or disk: it overwrites what is there."""
    part = load(1, data={1: page(1), 600: page(2)}, zero=[690])
    replica.admit(part)
    taken = replica.octets
    assert taken >= 690 // 512 * 4096
    replica.commit(part, KEY)
    assert replica.octets == taken


def test_an_image_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    with pytest.raises(NoRoomError, match="no room for a replica"):
        Replica(UUID, 1 << 40, Budget(1))
    with pytest.raises(NoRoomError, match="no room for a replica"):
        Replica(UUID, NR_PFNS, Budget(1), directory=tmp_path / "missing")


def note(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / f"{UUID}.json").read_text())
    return found


def test_an_image_of_an_earlier_life_is_stale_before_it_is_touched(
    tmp_path: Path, budget: Budget
) -> None:
    first = Replica(UUID, NR_PFNS, budget, directory=tmp_path)
    commit(first, load(5, data={1: page(1), 2: page(2)}))
    first.close()
    assert note(tmp_path) == {"uuid": UUID, "nr_pfns": NR_PFNS, "state": "committed", "epoch": 5}

    second = Replica(UUID, NR_PFNS, budget, directory=tmp_path)
    assert (second.state, second.epoch) == (State.COPYING, None)  # good for its digests only
    assert second.digests(KEY, 0, 64)[16:48] == KEY.digest(page(1)) + KEY.digest(page(2))
    part = load(9, data={2: page(3)}, gone=[pfn for pfn in range(NR_PFNS) if pfn not in (1, 2)])
    second.admit(part)
    assert note(tmp_path)["state"] == "stale"
    second.commit(part, KEY)
    assert contents(second) == {1: page(1), 2: page(3)}  # page 1 was known, and not shipped
    second.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_another_size_is_begun_anew(tmp_path: Path, budget: Budget) -> None:
    first = Replica(UUID, NR_PFNS, budget, directory=tmp_path)
    commit(first, load(5, data={1: page(1)}))
    first.close()
    second = Replica(UUID, NR_PFNS + 1, budget, directory=tmp_path)
    assert not second.has_pages
    second.close()


class Built:
    """A hypervisor whose domains start if they are told to."""

    name = "fake"

    def __init__(self) -> None:
        self.started: list[tuple[bytes, bytes, bool]] = []
        self.made = 0
        self.discarded = 0

    def prepare(self, info: DomainInfo, memory_fd: int) -> Incoming:
        self.made += 1
        return self  # type: ignore[return-value]  # one object plays both

    def start(self, context: bytes, populated: bytes, *, paused: bool = False) -> str:
        self.started.append((context, populated, paused))
        return "started"

    def discard(self) -> None:
        self.discarded += 1


def test_only_a_whole_replica_is_started(replica: Replica) -> None:
    hypervisor = Built()
    restorer = ImageRestorer(hypervisor)  # type: ignore[arg-type]  # what it uses is there
    info: DomainInfo = None  # type: ignore[assignment]  # passed through only
    with pytest.raises(StateError, match="not one whole epoch"):
        restorer.start(info, replica, paused=False)
    part = load(1, data={0: page(1), 65: page(2)})
    replica.admit(part)
    faults.arm("secondary.mid-commit=fail")
    with pytest.raises(faults.InjectedFault):
        replica.commit(part, KEY)
    faults.arm("")
    assert replica.state is State.TORN
    with pytest.raises(StateError, match="torn"):
        restorer.start(info, replica, paused=False)
    replica.commit(part, KEY)
    restorer.prepare(info, replica)
    restorer.start(info, replica, paused=True)
    populated = struct.pack("<2Q", 1, 2) + bytes((NR_PFNS + 63) // 64 * 8 - 16)
    assert hypervisor.started == [(TAIL, populated, True)]
    assert (hypervisor.made, hypervisor.discarded) == (1, 0)


def test_a_kept_image_is_a_stream_that_verifies_and_holds_the_guest(
    replica: Replica, tmp_path: Path
) -> None:
    keeper = ImageKeeper(tmp_path / "keep")
    assert keeper.keep(UUID, STATIC, replica) is None  # nothing is committed
    pages = {pfn: page(pfn) for pfn in (0, 1, 2, 300, 699)}
    for epoch in (1, 2):
        commit(replica, load(epoch, data=pages))
        path = keeper.keep(UUID, STATIC, replica)
        assert path is not None
    assert sorted(entry.name for entry in (tmp_path / "keep").iterdir()) == [
        f"{UUID}.2.xen",
        f"{UUID}.latest",
    ]
    assert (tmp_path / "keep" / f"{UUID}.latest").resolve() == path
    report = verify([path.read_bytes()])
    assert report.ok, report
    found: Pages = {}
    read_image(path, lambda pfn, _, data: found.update({pfn: bytes(data or b"")}))
    assert found == pages
