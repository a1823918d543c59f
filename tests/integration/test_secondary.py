"""Sessions and epochs of a whole secondary over real sockets: what is taken, committed, asked for and refused."""

from __future__ import annotations

import struct
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from secondary_rig import INFO, KEY, LIMIT_S, NR_PFNS, OTHER, SILENCE_NS, Lab, eventually, lab_in

from checkpointd import faults
from checkpointd.secondary.standby import State
from checkpointd.wire import messages as m
from checkpointd.wire.frames import Header, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.secondary.epochs import Load


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with lab_in(tmp_path) as lab:
        yield lab


def test_a_missed_page_is_found_and_a_new_session_begins_with_a_full_copy(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    audit = struct.pack("<Q", 2) + KEY.digest(b"\7" * 4096)
    engine.send(engine.frames(2, {1: 5}, audit=audit))
    assert "pfn 0x2" in engine.wait(m.FullCopyWanted).reason
    lab.secondary.wait_state(State.RETIRED)
    again = lab.engine(session=8)
    assert again.wait(m.Welcome).has_image is False
    again.protect(3)
    lab.secondary.wait_state(State.STANDBY)


def test_a_commit_that_fails_all_the_same_retires_the_replica(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    faults.arm("secondary.mid-commit=fail")
    engine.send(engine.frames(2, {1: 5}))
    assert "injected" in engine.wait(m.FullCopyWanted).reason
    lab.secondary.wait_state(State.RETIRED)


def test_a_new_engine_learns_what_is_here_already(lab: Lab) -> None:
    lab.engine().protect(fill=6)
    again = lab.engine(session=8)
    assert again.wait(m.Welcome).has_image
    again.bulk.send(Header(Kind.DIGESTS_WANTED, 8, 1), timeout_s=LIMIT_S)
    received = again.bulk.receive(LIMIT_S)
    assert received is not None
    header, payload = received
    assert header.flags == 1
    digests = bytes(payload[8:])
    assert len(digests) == 16 * NR_PFNS
    assert digests[16:48] == KEY.digest(b"\6" * 4096) * 2
    assert not any(digests[:16]) and not any(digests[48:])  # noqa: PT018 - one statement


def test_a_guest_that_began_anew_is_not_taken_back_to_what_it_was_before(lab: Lab) -> None:
    """A reboot whose End was lost: the new domain's output is open, and the replica is of the old one."""
    lab.engine().protect()
    again = lab.engine(session=8, info=replace(INFO, domid=INFO.domid + 1))
    welcome = again.wait(m.Welcome)
    assert (welcome.committed_epoch, welcome.has_image) == (None, False)
    again.close()
    eventually(lambda: lab.secondary.domain()["silent_ns"] > 2 * SILENCE_NS, "silence")
    assert lab.secondary.domain()["state"] == State.SYNCING
    assert lab.secondary.fence.calls == []


def test_what_is_lost_on_the_way_is_asked_for(lab: Lab) -> None:
    engine = lab.engine()
    engine.wait(m.Welcome)
    first, *rest = engine.frames(1, {1: 1})
    engine.send(rest)
    assert engine.wait(m.Missing) == m.Missing(1, 0, ((0, 0),))
    assert engine.control.send(m.Query(1, 0))
    assert engine.wait(m.Missing, 2) == m.Missing(1, 0, ((0, 0),))
    engine.send([first])
    assert engine.wait(m.Ack) == m.Ack(1, 0, final=True)
    assert engine.control.send(m.Query(1, 0))
    assert engine.wait(m.Ack, 2) == m.Ack(1, 0, final=True)


def test_an_epoch_given_up_while_it_is_made_ready_is_not_acked(lab: Lab) -> None:
    """Else its commit would come after parts of the next one had touched the replica."""
    engine = lab.engine()
    engine.protect()
    worker = lab.secondary.service._drivers[INFO.uuid]._worker
    admit, going_on, waiting = worker.admit, threading.Event(), threading.Event()

    def slowly(load: Load) -> None:
        waiting.set()
        assert going_on.wait(LIMIT_S)
        admit(load)

    worker.admit = slowly  # type: ignore[method-assign]  # to stop it at the right place
    engine.send(engine.frames(2, {1: 5}))
    assert waiting.wait(LIMIT_S)
    engine.send(engine.frames(3, {3: 6}, final=False))
    eventually(lambda: lab.secondary.service._drivers[INFO.uuid]._discarded, "epoch 2 given up")
    going_on.set()
    eventually(lambda: m.Ack(3, 0, final=False) in list(engine.got), "ack of epoch 3")
    assert m.Ack(2, 0, final=True) not in engine.got
    assert lab.secondary.domain()["committed_epoch"] == 1
    engine.send(engine.frames(3, {1: 7}, part=1))
    eventually(lambda: lab.secondary.domain()["committed_epoch"] == 3, "commit of 3")


@pytest.mark.parametrize("disk", [False, True])
def test_a_copy_that_does_not_fit_beside_the_replica_costs_it_and_goes_on(
    lab: Lab, disk: bool
) -> None:
    """300 pages of live parts, where --epoch-memory has room for 256."""
    on_disk = {"image": "disk", "image_dir": lab.directory / "images"} if disk else {}
    lab.restart_secondary(epoch_memory=1 << 20, **on_disk)
    engine = lab.engine()
    engine.protect()
    for part in range(3):
        pages = dict.fromkeys(range(part * 100, part * 100 + 100), 5 + part)
        engine.send(engine.frames(2, pages, part=part, final=False))
        engine.wait(m.Ack, 2 + part)
    assert lab.secondary.domain()["state"] == State.SYNCING
    assert "--epoch-memory" in lab.secondary.domain()["alarm"]
    assert lab.secondary.service.not_ready()
    engine.send(engine.frames(2, {900: 9}, part=3))
    lab.secondary.wait_state(State.STANDBY)
    assert lab.secondary.service.not_ready() == []
    assert lab.secondary.service.status()["epoch_memory_used"] == 0
    engine.close()
    lab.secondary.wait_state(State.ACTIVE)
    ((_, memory, _),) = lab.secondary.hypervisor.started
    assert [memory[pfn * 4096] for pfn in (0, 99, 100, 299, 300, 900)] == [5, 5, 6, 7, 0, 9]


def test_a_bad_frame_harms_its_own_session_only_and_not_its_replica(lab: Lab) -> None:
    engine, other = lab.engine(), lab.engine(session=17, info=OTHER)
    engine.protect()
    other.protect()
    (header, payload), *rest = engine.frames(2, {1: 5})
    engine.send([(header, payload[:-1] + b"\0"), *rest])
    eventually(lambda: lab.secondary.domain()["alarm"], "an alarm")
    assert "digest" in lab.secondary.domain()["alarm"]
    other.protect(2)
    assert lab.secondary.domain()["committed_epoch"] == 1
    back = lab.engine(resume=True)
    back.protect(2)
    assert lab.secondary.domain(OTHER)["committed_epoch"] == 2


def test_a_secondary_that_restarted_acks_nothing_of_an_old_session(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    lab.restart_secondary()
    back = lab.engine(resume=True)
    welcome = back.wait(m.Welcome)
    assert (welcome.last_epoch, welcome.committed_epoch, welcome.has_image) == (0, None, False)
    back.send(back.frames(2, {1: 5}))
    assert back.control.send(m.Query(2, 0))
    back.wait(m.FullCopyWanted)
    assert not any(isinstance(got, m.Ack) for got in back.got)
    back.close()
    eventually(lambda: lab.secondary.domain()["silent_ns"] > 2 * SILENCE_NS, "silence")
    assert lab.secondary.fence.calls == []


def test_an_unexpected_error_on_any_thread_ends_the_daemon_and_is_told(lab: Lab) -> None:
    lab.secondary.fence.probe = lambda timeout: 1 // 0  # type: ignore[method-assign,assignment,return-value]  # planted
    lab.engine().protect()
    lab.engines[0].close()
    eventually(lambda: lab.secondary.failures, "the end of run()")
    (failure,) = lab.secondary.failures
    assert isinstance(failure, ZeroDivisionError)
    lab.secondary.failures.clear()


def test_a_guest_that_could_hardly_be_activated_is_not_ready_though_acks_go_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the restorer cannot do for long, such as keep a domain warm, is not the replica's fault."""
    engine = lab.engine()
    engine.protect()
    worker = lab.secondary.service._drivers[INFO.uuid]._worker
    monkeypatch.setattr(worker, "trouble", lambda: "xl has taken in no epoch in 2 tries")
    assert lab.secondary.service.not_ready() == [
        f"{INFO.uuid}: standby: xl has taken in no epoch in 2 tries"
    ]
    engine.protect(2)
    monkeypatch.undo()
    assert lab.secondary.service.not_ready() == []
