"""Bugs planted on purpose: each must be found by the system's own checks or by the oracle, and the same scenario
without the bug must pass. A check that no planted bug has ever tripped is not known to work.

Each scenario gives what was found, in words; nothing may be found without the bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pair import MS, Pair, Standby, eventually, pair_in

from checkpointd import faults
from checkpointd.errors import NativeError
from checkpointd.hypervisor.embedded import inputlog, toolstack
from checkpointd.hypervisor.embedded.kv import Answer, Checker
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.embedded.replay import replay
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.primary.dirty import DirtySet
from checkpointd.primary.events import Settle, Staged
from checkpointd.primary.protection import Protection
from checkpointd.secondary.epochs import Arrived, Load
from checkpointd.wire import messages
from checkpointd.wire.frames import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pair import Engine, Guest, Table

    from checkpointd.primary.epoch import Frame
    from checkpointd.primary.events import Event, Instruction, ShipFailed, Shipped

planted_or_not = pytest.mark.parametrize("planted", [False, True], ids=["sound", "planted"])


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_in(tmp_path) as made:
        yield made


def protect(
    pair: Pair, program: str = "kv", *, memory: int = 2 << 20, **options: Any
) -> tuple[Guest, Standby, Engine]:
    guest = pair.guest(program, memory)
    standby = pair.standby()
    engine = pair.engine(guest, standby, **options)
    engine.wait("protected")
    engine.committed()
    return guest, standby, engine


def verdict(found: str, planted: bool) -> None:
    assert bool(found) == planted, found or "the planted bug was not found"


# -------------------------------------------------------------------- the mapping cache


class Stale:
    """The p2m changes, and the cache is not told: what is mapped stays mapped. The dirt is told all the same."""

    on = False

    def __init__(self, table: Table) -> None:
        self._changes: Callable[..., int] | None = None
        table.replace("p2m_changes", self._p2m_changes)
        table.replace("harvest", self._harvest)

    def _p2m_changes(self, original: Any, domain: Any, bitmap: Any) -> int:
        self._changes = original
        return 0 if self.on else int(original(domain, bitmap))

    def _harvest(self, original: Any, domain: Any, bitmap: Any, mode: int) -> int:
        if self.on and self._changes:
            self._changes(domain, bitmap)
        return int(original(domain, bitmap, mode))


@planted_or_not
def test_mapping_cache_without_invalidation(pair: Pair, planted: bool) -> None:
    """A page that is ballooned out and in again has another frame; a mapping kept shows the old one."""
    plants: list[Stale] = []
    guest, standby, engine = protect(
        pair, "dirty:64@50", tap=lambda table: plants.append(Stale(table))
    )
    (plant,) = plants
    # A guest may not have more than its charge, so it gives one page up for good, to have a frame to spare.
    spare = _unwritten(guest)
    assert toolstack.balloon_out(guest.info, [spare]) == 1
    engine.committed()
    plant.on = planted
    page = _written(guest)
    with engine.no_epochs():
        assert toolstack.balloon_out(guest.info, [page]) == 1
        assert toolstack.balloon_in(guest.info, [page]) == 1
    engine.committed()
    verdict(standby.replica(guest).difference, planted)


def _written(guest: Guest) -> int:
    """A page that `dirty:` writes all the time."""
    return _dirty_pages(guest)[0]


def _unwritten(guest: Guest) -> int:
    written = _dirty_pages(guest)
    return next(pfn for pfn in range(1, guest.info.nr_pfns) if pfn not in written)


def _dirty_pages(guest: Guest) -> list[int]:
    """By the oracle: what `dirty:64` has written once it has gone over its 64 pages."""
    zero = bytes(PAGE_SIZE)
    with replay(guest.logs, 64) as memory:
        return [pfn for pfn in range(1, memory.nr_pfns) if memory.page(pfn) != zero]


# -------------------------------------------------------------------- what the standby is thought to hold


@planted_or_not
def test_a_history_of_pages_that_the_standby_does_not_have(pair: Pair, planted: bool) -> None:
    """Found by the digest of what was staged, before anything is taken in; the part then comes as it is."""
    guest, standby, engine = protect(pair, "dirty:64@50", reduce="always")
    reducer = engine.service._shipper._reducer
    assert reducer is not None
    reduce = reducer.reduce

    def twice(frame: Frame) -> bytes | None:
        """The history goes along with what does not leave."""
        reduce(frame)
        return reduce(frame)

    engine.committed()
    if planted:
        reducer.reduce = twice  # type: ignore[method-assign]  # the plant
    engine.committed()
    engine.committed()
    assert standby.replica(guest).equal
    assert engine.machine.state == "protected"
    labels = {"domain": guest.info.name}
    refused = standby.metrics.registry.get_sample_value(
        "checkpointd_reduced_parts_refused_total", labels
    )
    verdict("refused" if refused else "", planted)


# -------------------------------------------------------------------- arenas


@planted_or_not
def test_an_arena_free_at_the_ship_and_not_at_the_ack(
    pair: Pair, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the native call, which refuses an arena whose epoch is not acked."""
    guest, standby, engine = protect(pair, "dirty:16@50")
    acks = standby.acks(guest)
    shipped = Protection._shipped

    def too_early(self: Protection, event: Shipped, now: int, out: list[Instruction]) -> None:
        shipped(self, event, now, out)
        if acks.lose:
            head = self._flights.head
            assert head is not None
            self._flights._free.append(head.arena)

    if planted:
        monkeypatch.setattr(Protection, "_shipped", too_early)
    with engine.no_epochs():
        eventually(lambda: engine.machine.in_flight == 0, "an engine with nothing in flight")
        acks.lose = True
    if planted:
        eventually(lambda: engine.thread.over, "the engine's end")
        assert isinstance(engine.thread.error, NativeError)
        verdict(str(engine.thread.error), planted)
        return
    eventually(lambda: engine.machine.in_flight == 2, "both arenas in flight")
    acks.lose = False
    engine.committed()
    verdict(standby.replica(guest).difference, planted)


@planted_or_not
def test_an_arena_overwritten_before_it_is_sent(pair: Pair, planted: bool) -> None:
    """Below the native check: two epochs are staged into the same memory. Found by the digest of what was staged."""
    guest, standby, engine = protect(pair, "dirty:16@200", reduce="off")  # as it lies in the arena
    taker = engine.service._taker
    with engine.no_epochs():
        eventually(lambda: engine.machine.in_flight == 0, "an engine with nothing in flight")
        held = engine.epoch
        engine.gate.hold(lambda header: header.kind is Kind.PAGES and header.epoch == held)
        if planted:
            taker.arenas[1] = taker.arenas[0]
    eventually(lambda: engine.epoch == held + 2, "a second epoch staged")
    engine.gate.let_go()
    if planted:
        eventually(lambda: standby.alarm(guest), "an alarm of the standby")
        assert held not in (standby.driver(guest).machine.committed, engine.acked)
    else:
        engine.committed()
    verdict(standby.alarm(guest) or standby.replica(guest).difference, planted)


# -------------------------------------------------------------------- dirty bits


@planted_or_not
@pytest.mark.parametrize("audit_pages", [0, 64], ids=["oracle", "audit"])
def test_dirt_dropped_after_a_failed_ship(
    pair: Pair, planted: bool, audit_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch that was cut short counts as shipped: its pages are nobody's. The oracle misses them, and where there
    is an audit, that does.
    """
    guest, standby, engine = protect(pair, audit_pages=audit_pages)

    def landed(self: Protection, event: ShipFailed, now: int, out: list[Instruction]) -> None:
        head = self._flights.land()
        out.append(Settle(head.arena, head.epoch))

    if planted:
        monkeypatch.setattr(Protection, "_ship_failed", landed)
    with engine.no_epochs():
        eventually(lambda: engine.machine.in_flight == 0, "an engine with nothing in flight")
        guest.consume("writer 1 set key value")
        faults.arm("ship.end=fail")
    engine.acked_beyond(2)
    assert faults.armed()[0].passed >= 1, "no ship was cut short"
    if planted and audit_pages:
        eventually(lambda: standby.alarm(guest), "an alarm of the standby")
        verdict(standby.alarm(guest), planted)
        return
    engine.committed()
    verdict(standby.alarm(guest) or standby.replica(guest).difference, planted)


@planted_or_not
def test_dirt_dropped_with_a_lost_session(
    pair: Pair, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session ends with an epoch in flight, and the next one trusts the old log. The oracle misses its pages."""
    guest, standby, engine = protect(pair, audit_pages=0)
    if planted:
        monkeypatch.setattr(DirtySet, "begin_anew", lambda _: None)
        monkeypatch.setattr(DirtySet, "give_back", _drop)
    with engine.no_epochs():
        eventually(lambda: engine.machine.in_flight == 0, "an engine with nothing in flight")
        guest.consume("writer 1 set key value")
        held = engine.epoch
        engine.gate.hold(lambda header: header.epoch == held and header.kind is Kind.PART_END)
    eventually(lambda: engine.gate.waiting, "an epoch held at its end")
    session = engine.service._session
    driver = standby.driver(guest)
    standby.service._acceptor.post(lambda: driver._send(messages.FullCopyWanted("a test asks")))
    eventually(lambda: engine.service._session is not session, "a new session")
    engine.gate.let_go()
    engine.wait("protected")
    engine.committed()
    verdict(standby.replica(guest).difference, planted)


def _drop(dirty: DirtySet) -> None:
    for carried in dirty.carried:
        carried.clear()
    dirty.unsettled.clear()


class Blind:
    """A hypervisor that forgets the dirty bits of one harvest: all but the guest's first page, which tells the step."""

    on = False
    missed = 0

    def __init__(self, table: Table) -> None:
        table.replace("harvest", self._harvest)

    def _harvest(self, original: Any, domain: Any, bitmap: Any, mode: int) -> int:
        before = [int(bitmap.words[word]) for word in range(bitmap.nr_bits // 64)]
        rc = int(original(domain, bitmap, mode))
        if self.on:
            for word, old in enumerate(before):
                seen = int(bitmap.words[word])
                kept = old | (seen & 1 if word == 0 else 0)
                self.missed += (seen & ~kept).bit_count()
                bitmap.words[word] = kept
            self.on = not self.missed
        return rc


@planted_or_not
def test_a_missed_dirty_bit(pair: Pair, planted: bool) -> None:
    """Found by the audit: the replica is retired, copied anew, and right in the end."""
    plants: list[Blind] = []
    guest, standby, engine = protect(
        pair, tap=lambda table: plants.append(Blind(table)), audit_pages=32, interval=10 * MS
    )
    (plant,) = plants
    session = engine.service._session
    with engine.no_epochs():
        plant.on = planted
        guest.consume("writer 1 set key value")
    if planted:
        eventually(lambda: engine.service._session is not session, "a new session")
        assert plant.missed
        assert "retired" in standby.states
    else:
        engine.acked_beyond(guest.info.nr_pfns // 32 + 1)  # each page's turn has come
    found = standby.alarm(guest)
    engine.wait("protected")
    engine.committed()
    assert standby.replica(guest).equal
    verdict(found, planted)


# -------------------------------------------------------------------- output and activation


@planted_or_not
def test_output_released_before_its_ack(pair: Pair, planted: bool) -> None:
    """A client sees the answer of an epoch that dies with its host: after the failover the write has vanished."""
    guest, standby, engine = protect(pair)
    checker = Checker()
    client, checked = guest.client("writer"), "writer.key"
    checker.answer("set", checked, "old", client.set(checked, "old"))
    if planted:
        pause = engine.service._pause

        def leaking(arena: int, epoch: int, *, close_output: bool) -> Event:
            staged = pause(arena, epoch, close_output=close_output)
            if isinstance(staged, Staged) and staged.closed is not None:
                engine.domain.output.release(staged.closed)
            return staged

        engine.service._pause = leaking  # type: ignore[method-assign]  # the plant
    with engine.no_epochs():
        eventually(lambda: engine.machine.in_flight == 0, "an engine with nothing in flight")
        held = engine.epoch
        engine.gate.hold(lambda header: header.epoch >= held)
        sniffer = guest.transport()
        sniffer.send(f"writer 2 set {checked} new".encode())
        eventually(lambda: engine.domain.output.stats().held_packets, "an answer held")
    eventually(lambda: engine.epoch == held + 2, "its epoch closed, and the next")
    answer = sniffer.receive(10.0 if planted else 0.0)
    if answer is not None:
        assert engine.acked < held
        step, version = int(answer.split()[2]), int(answer.split()[4])
        checker.answer("set", checked, "new", Answer(step, "", version, "new"))
    else:
        checker.silence("set", checked, "new")
    guest.kill()
    standby.wait(guest, "active")
    checker.answer("get", checked, "", guest.client("reader").get(checked))
    verdict("; ".join(checker.violations), planted)


def _steps(standby: Standby, guest: Guest) -> dict[int, int]:
    """Filled from now on: the guest's step at each epoch that the standby commits."""
    worker, steps = standby.driver(guest)._worker, {}
    commit = worker.commit

    def noted(load: Load) -> Any:
        steps[load.epoch] = Context.parse(load.context).step
        return commit(load)

    worker.commit = noted  # type: ignore[method-assign]  # the tap
    return steps


def _commit_at_start(standby: Standby, guest: Guest) -> None:
    """The plant: what has arrived of the unacked epoch is applied before the guest is started."""
    driver = standby.driver(guest)
    worker = driver._worker
    start = worker.start

    def hasty(*, paused: bool) -> Any:
        assembler, replica, key = driver._assembler, worker._replica, worker._key
        assert assembler is not None
        assert replica is not None
        assert key is not None
        frames = assembler._frames.values()
        assert frames, "nothing of an unacked epoch has arrived"
        context = b"".join(bytes(part) for kind, part in frames if kind is Kind.CONTEXT)  # type: ignore[arg-type]
        load = Load(assembler.under_way[0], 0, True, 0, context=context or replica.context)
        for _, content in frames:
            if isinstance(content, Arrived):
                load.reduced.append(content)
        load.pages = [part for kind, part in frames if kind is Kind.PAGES]  # type: ignore[misc]
        replica.expand(load, key)
        replica.admit(load)
        replica.commit(load, key)
        return start(paused=paused)

    worker.start = hasty  # type: ignore[method-assign]  # the plant


@planted_or_not
@pytest.mark.parametrize("cut", [Kind.PART_END, Kind.CONTEXT], ids=["before-its-end", "torn"])
def test_activation_from_an_unacked_epoch(pair: Pair, planted: bool, cut: Kind) -> None:
    """All pages of an epoch are there, its end is not. Whoever starts from it starts where nobody promised to; and if
    its context is missing, the pages and the context are of two moments, which the hypervisor refuses to start.
    """
    guest, standby, engine = protect(pair, "dirty:64@200", audit_pages=0)
    acks, steps = standby.acks(guest), _steps(standby, guest)
    if planted:
        _commit_at_start(standby, guest)
    engine.acked_beyond(2)
    with engine.no_epochs():
        eventually(lambda: engine.machine.in_flight == 0, "an engine with nothing in flight")
        held = engine.epoch
        engine.gate.hold(
            lambda header: header.epoch > held or (header.epoch == held and header.kind is cut)
        )
    eventually(lambda: engine.gate.waiting, "an epoch cut short")
    driver = standby.driver(guest)
    eventually(lambda: _arrived(driver._assembler, held), "its pages at the standby")
    guest.kill()
    standby.wait(guest, "active", "failed")
    found = ""
    if standby.state(guest) == "failed":
        found = standby.alarm(guest)
        assert "torn" in found
        standby.owe_nobody()  # it would wait for the guest, which never starts
    else:
        began = inputlog.read(guest.logs[1]).base_step
        if began != steps[max(acks.sent)]:
            found = f"began at step {began}, and the last acked epoch is of {steps[max(acks.sent)]}"
    verdict(found, planted)


def _arrived(assembler: Any, epoch: int) -> bool:
    return bool(assembler.under_way[0] == epoch and assembler._frames)
