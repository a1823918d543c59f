"""What happens to a protection in its life, with both services in this process (real processes: test_daemons.py)."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from pair import MS, Engine, Guest, Pair, Standby, eventually, pair_in
from proxy import Proxy

from checkpointd import faults
from checkpointd.errors import HypervisorError, ProtectionLostError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.lib import ENGINE_POINTS
from checkpointd.output.port import OutputStats
from checkpointd.primary import service
from checkpointd.wire.frames import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pair import Table

MIB = 1 << 20
PAGE = 4096
# Calls after which the fault acts: beyond the first copy, so that it meets a guest that is protected.
SETTLED = 12


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_in(tmp_path) as made:
        yield made


def protected(
    pair: Pair, program: str = "kv", *, memory: int = 2 * MIB, domid: int = 4, **options: Any
) -> tuple[Guest, Standby, Engine]:
    guest = pair.guest(program, memory, domid)
    standby = pair.standby()
    engine = pair.engine(guest, standby, **options)
    engine.wait("protected")
    engine.committed()
    return guest, standby, engine


def test_dropped_output_is_an_alarm_once_for_each_burst(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "OUTPUT_STATS_EVERY", math.inf)  # only this test looks
    guest, _, engine = protected(pair)

    def alarms() -> float:
        labels = {"domain": guest.info.name}
        return engine.metrics.registry.get_sample_value("checkpointd_alarms_total", labels) or 0

    before, raised = alarms(), []
    with caplog.at_level("ERROR", "checkpointd"):
        for dropped in (3, 5, 5, 6):  # a burst of two looks, a quiet one, another burst
            engine.service._figures.output(OutputStats(9, 900, 1000, dropped, 0, shut=True))
            raised.append(alarms() - before)
    assert raised == [1, 1, 1, 2]
    assert "dropped 3 packets" in caplog.text
    assert engine.service.status()["output_dropped"] == 6


def test_what_was_allowed_in_spite_of_its_danger_shows_in_status(pair: Pair) -> None:
    guest = pair.guest()
    standby = pair.standby(unsafe_no_fencing=True, unsafe_untested_xen=True)
    engine = pair.engine(guest, standby, unsafe_disk=True, unsafe_output=True)
    assert engine.service.status()["unsafe"] == ["--unsafe-disk", "--unsafe-output"]
    assert standby.service.status()["unsafe"] == ["--unsafe-untested-xen", "--unsafe-no-fencing"]


def again(pair: Pair, guest: Guest, standby: Standby) -> None:
    """A new engine, as after the old one's end, makes the replica what the guest is."""
    engine = pair.engine(guest, standby)
    engine.wait("protected")
    engine.committed()
    assert standby.replica(guest).equal


def steps_go_on(guest: Guest) -> None:
    step = guest.step
    eventually(lambda: guest.step > step, "a step of the guest")


def test_a_guest_smaller_than_the_arena_is_protected(pair: Pair) -> None:
    """The default arena has room for 32 MiB: a guest of 1 MiB once ended the engine with a traceback."""
    guest, standby, _ = protected(pair, memory=MIB, arena=32 * MIB)
    assert standby.replica(guest).equal


# -------------------------------------------------------------------- failing calls


@pytest.mark.parametrize("point", sorted(set(ENGINE_POINTS) - {"hv.resume"}))
def test_one_failing_call_loses_no_dirt(pair: Pair, point: str) -> None:
    """A budget of one extent makes each epoch map and unmap."""
    faults.arm(f"{point}@{SETTLED}=fail")
    guest, standby, engine = protected(
        pair, "dirty:256@20", memory=6 * MIB, mapping_budget=2 * MIB, audit_pages=0
    )
    eventually(lambda: _failed(engine), f"a failure of {point}")
    engine.wait("protected")
    engine.committed()
    assert standby.replica(guest).equal
    assert not standby.alarm(guest)


@pytest.mark.parametrize("point", sorted(set(ENGINE_POINTS) - {"hv.resume"}))
def test_a_call_that_always_fails_loses_no_dirt(pair: Pair, point: str) -> None:
    """The guest runs on, its output shut; the next engine makes the replica right."""
    faults.arm(f"{point}@{SETTLED}=fail+again")
    guest = pair.guest("dirty:256@20", 6 * MIB)
    standby = pair.standby()
    engine = pair.engine(guest, standby, mapping_budget=2 * MIB, audit_pages=0)
    eventually(lambda: _failed(engine) >= 3, f"failures of {point}")
    steps_go_on(guest)
    engine.stop()
    assert engine.thread.error is None
    faults.arm("")
    again(pair, guest, standby)


def _failed(engine: Engine) -> int:
    value = engine.metrics.registry.get_sample_value(
        "checkpointd_epochs_total", {"domain": engine.domain.info.name, "result": "failed"}
    )
    assert value is not None
    return int(value)


def test_a_guest_that_cannot_be_resumed_is_left_to_its_host(pair: Pair) -> None:
    """The engine ends, which makes the host resume the guest with its output shut (invariant 5)."""
    faults.arm(f"hv.resume@{SETTLED}=fail")
    guest = pair.guest("dirty:256@20", 6 * MIB)
    standby = pair.standby(engine_restart=10_000 * MS)
    engine = pair.engine(guest, standby)
    eventually(lambda: engine.thread.over, "the engine's end")
    assert isinstance(engine.thread.error, HypervisorError)
    faults.arm("")
    engine.stop()
    steps_go_on(guest)
    assert toolstack.look(guest.info).shut
    again(pair, guest, standby)
    assert toolstack.look(guest.info).shut


def test_a_host_that_stands_still_is_waited_for(pair: Pair) -> None:
    """Its guest does not stop within the limit: the epoch fails, nothing is lost, and it goes on where it was."""
    guest, standby, engine = protected(pair, "dirty:64@20", suspend_timeout=50 * MS)
    os.kill(guest.info.host.pid, signal.SIGSTOP)
    try:
        eventually(lambda: _failed(engine) >= 2, "pauses that time out")
    finally:
        os.kill(guest.info.host.pid, signal.SIGCONT)
    engine.acked_beyond(2)
    steps_go_on(guest)
    engine.committed()
    assert engine.states == ["syncing", "protected"]
    assert standby.replica(guest).equal


@pytest.mark.parametrize("call", ["p2m_changes", "unmap"])
def test_a_call_that_fails_without_a_standby_does_not_end_the_engine(pair: Pair, call: str) -> None:
    """While no epoch is taken the mappings are looked after all the same; what fails there waits."""
    failing: list[int] = []
    on = threading.Event()

    def fail(original: Any, *arguments: Any) -> int:
        if on.is_set():
            failing.append(1)
            return -errno.EIO
        return int(original(*arguments))

    guest, standby, engine = protected(
        pair, "dirty:64@20", standby_timeout=200 * MS, tap=lambda table: table.replace(call, fail)
    )
    voice = standby.acks(guest)
    voice.mute = True
    engine.wait("holding")
    on.set()
    toolstack.balloon_out(guest.info, [300, 301])
    eventually(lambda: failing, f"a failure of {call}")
    turns = engine.service._progress
    eventually(lambda: engine.service._progress > turns + 5 or engine.thread.over, "more turns")
    assert not engine.thread.over, repr(engine.thread.error)
    on.clear()
    voice.mute = False
    engine.wait("protected")
    engine.committed()
    assert standby.replica(guest).equal


# -------------------------------------------------------------------- the guest's memory


def test_a_guest_balloons_while_it_is_protected(pair: Pair) -> None:
    guest, standby, engine = protected(pair, "dirty:256@20", memory=4 * MIB)
    pages = list(range(100, 300))
    assert toolstack.balloon_out(guest.info, pages) == len(pages)
    engine.committed()
    assert standby.replica(guest).equal
    # What was given back is free again, since the engine has let go of it.
    assert toolstack.balloon_in(guest.info, pages[:150]) == 150
    engine.committed()
    assert standby.replica(guest).equal
    assert not standby.alarm(guest)


def test_a_mapping_budget_smaller_than_the_guest(pair: Pair) -> None:
    guest, standby, engine = protected(
        pair, "dirty:512@20", memory=8 * MIB, mapping_budget=2 * MIB, audit_pages=64
    )
    engine.acked_beyond(2048 // 64 + 1)  # a whole round of the audit
    stats = engine.service._taker.mappings.stats()
    assert stats.evicted > 0
    assert stats.mapped_bytes <= 2 * MIB
    assert standby.replica(guest).equal
    assert not standby.alarm(guest)


def test_a_history_smaller_than_what_the_guest_writes(pair: Pair) -> None:
    """Two sets of pages, for 512 that are written: what made room for another page travels whole."""
    guest, standby, engine = protected(
        pair, "dirty:512@20", memory=8 * MIB, reduce="always", delta_history=MIB, audit_pages=64
    )
    engine.acked_beyond(2048 // 64 + 1)
    shipper = engine.service._shipper
    assert shipper._reducer is not None
    assert shipper._reducer._history.capacity < 512
    assert shipper.sent_bytes < shipper.staged_bytes / 2
    assert standby.replica(guest).equal
    assert not standby.alarm(guest)


def test_a_burst_larger_than_the_arena_comes_through_live_rounds(pair: Pair) -> None:
    guest, standby, engine = protected(pair, "dirty:2000@4", memory=8 * MIB, arena=MIB)
    with engine.no_epochs():
        start = guest.step
        eventually(lambda: guest.step > start + 2000, "all its pages rewritten")
    engine.committed()
    sample = engine.metrics.registry.get_sample_value(
        "checkpointd_epochs_total", {"domain": guest.info.name, "result": "too-large"}
    )
    assert sample
    assert engine.machine.state == "protected"
    assert standby.replica(guest).equal


@pytest.mark.parametrize("target", [{"pause_share": 0.2}, {"added_latency": 400 * MS}])
def test_an_engine_chooses_its_interval(pair: Pair, target: dict[str, Any]) -> None:
    """From 100 ms on: down to where the guest would stand still for a fifth of the time, or up to what answers may
    wait.
    """
    guest, standby, engine = protected(pair, "dirty:64@20", interval=None, **target)
    least, most = (0, 50 * MS) if "pause_share" in target else (200 * MS, 1000 * MS)
    eventually(
        lambda: least <= engine.service.status()["interval_ns"] <= most, "an interval that suits it"
    )
    engine.committed()
    assert standby.replica(guest).equal


def test_a_guest_that_always_rewrites_everything_is_given_up(pair: Pair) -> None:
    """The replica is retired first; then the output opens, and the guest runs unprotected."""
    everything: list[bool] = []

    def dirty_all(table: Table) -> None:
        def harvest(original: Any, domain: Any, bitmap: Any, mode: int) -> int:
            rc = int(original(domain, bitmap, mode))
            for word in range(bitmap.nr_bits // 64 if everything else 0):
                bitmap.words[word] = bitmap.blocks[word // 4096] = (1 << 64) - 1
            return rc

        table.replace("harvest", harvest)

    guest, standby, engine = protected(
        pair, "dirty:64@20", memory=4 * MIB, arena=MIB, max_live_rounds=2, tap=dirty_all
    )
    opened_when: list[str] = []
    open_ = engine.domain.output.open

    def noted() -> None:
        opened_when.append(standby.state(guest))
        open_()

    engine.domain.output.open = noted  # type: ignore[method-assign]  # the tap
    everything.append(True)
    eventually(lambda: engine.thread.over, "the engine's end")
    assert engine.thread.ending is not None, engine.thread.error
    assert engine.thread.ending.exit_code == ProtectionLostError.exit_code
    assert opened_when == ["retired"]
    assert not toolstack.look(guest.info).shut
    steps_go_on(guest)


# -------------------------------------------------------------------- several guests, several engines


def test_three_guests_into_one_standby(pair: Pair) -> None:
    """One of them dies and is activated; the others do not notice."""
    standby = pair.standby()
    guests = [pair.guest("dirty:64@50", 2 * MIB, domid) for domid in (4, 5, 6)]
    engines = [pair.engine(guest, standby) for guest in guests]
    for engine in engines:
        engine.wait("protected")
    guests[1].kill()
    standby.wait(guests[1], "active")
    assert engines[1].thread.ending is not None or not engines[1].thread.over
    for guest, engine in ((guests[0], engines[0]), (guests[2], engines[2])):
        engine.committed()
        assert engine.machine.state == "protected"
        assert standby.state(guest) == "standby"
        assert standby.replica(guest).equal


def test_a_returning_engine_sends_only_what_differs(pair: Pair) -> None:
    guest = pair.guest("dirty:1500@20", 8 * MIB)
    standby = pair.standby(engine_restart=10_000 * MS)
    faults.arm("hv.resume@30=fail")  # the engine dies without a word
    engine = pair.engine(guest, standby)
    eventually(lambda: engine.thread.over, "the engine's end")
    faults.arm("")
    engine.stop()
    sent = engine.service._shipper.sent_bytes
    assert sent > 1500 * PAGE
    toolstack.pause(guest.info)  # it changes no more
    step = toolstack.look(guest.info).step
    engine = pair.engine(guest, standby)
    engine.wait("protected")
    engine.committed()
    found = standby.replica(guest)
    assert found.equal
    assert found.step == step
    assert 0 < engine.service._shipper.sent_bytes < sent


# -------------------------------------------------------------------- the network


def test_a_cut_shorter_than_the_silence_resumes_the_session(pair: Pair) -> None:
    """In mid-epoch: all pages are there, the end is not. Only what is missing is sent again."""
    guest = pair.guest("dirty:600@20", 4 * MIB)
    standby = pair.standby(silence=30_000 * MS)
    control, bulk = standby.ports
    with closing(Proxy(control)) as first, closing(Proxy(bulk)) as second:
        engine = pair.engine(
            guest, standby, via=(first.port, second.port), interval=100 * MS,
            standby_timeout=20_000 * MS,
        )  # fmt: skip
        engine.wait("protected")
        engine.committed()
        session = engine.service._session
        with engine.no_epochs():
            eventually(lambda: engine.machine.in_flight == 0, "an engine with nothing in flight")
            held = engine.epoch
            engine.gate.hold(lambda header: header.epoch == held and header.kind is Kind.PART_END)
        eventually(lambda: engine.gate.waiting, "an epoch held at its end")
        on_wire = engine.machine._flights.head
        assert on_wire is not None
        frames = len(engine.service._taker.frames(on_wire.arena))
        driver = standby.driver(guest)
        eventually(
            lambda: driver._assembler and len(driver._assembler._frames) == frames, "its frames"
        )
        first.cut()
        second.cut()
        eventually(lambda: not engine.service._control.connected, "the loss of the connection")
        sent = engine.service._shipper.sent_bytes
        first.mend()
        second.mend()
        engine.gate.hold(lambda header: header.epoch > held)
        eventually(lambda: engine.acked == held, "the ack of the epoch that was cut")
        assert engine.service._session is session
        assert engine.service._shipper.sent_bytes - sent < PAGE
        engine.gate.let_go()
        engine.committed()
        assert standby.replica(guest).equal
        engine.stop()


def test_a_standby_that_cannot_fence_does_not_activate(pair: Pair) -> None:
    """The guest's host is one of another boot: nothing here can stop it, or see that it is gone."""
    guest = pair.guest()
    standby = pair.standby()
    elsewhere = replace(guest.info, host=replace(guest.info.host, boot_id="another"))
    engine = pair.engine(guest, standby, info=elsewhere)
    engine.wait("protected")
    engine.committed()
    guest.kill()
    standby.wait(guest, "failed")
    assert "--fence-command" in standby.alarm(guest)
    assert "not activated" in standby.alarm(guest)
    assert "active" not in standby.states
