"""A whole secondary over real sockets when its primary is silent: probe, fence, start, and what holds them up."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from secondary_rig import INFO, LIMIT_S, SILENCE_NS, TAIL, Lab, eventually, lab_in, page_of

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import Role
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.port import EndReason
from checkpointd.secondary.standby import State
from checkpointd.wire import messages as m

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.wire.notices import Notices


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with lab_in(tmp_path) as lab:
        yield lab


def test_a_silent_primarys_guest_goes_on_from_the_last_acked_epoch(lab: Lab) -> None:
    engine = lab.engine()
    engine.wait(m.Welcome)
    engine.send(engine.frames(1, {1: 1, 2: 1}, final=False))
    assert engine.wait(m.Ack) == m.Ack(1, 0, final=False)
    engine.send(engine.frames(1, {2: 2}, part=1))
    assert engine.wait(m.Ack, 2) == m.Ack(1, 1, final=True)
    engine.protect(2, fill=3)
    engine.send(engine.frames(3, {1: 9})[:-1])  # never whole
    lab.secondary.wait_state(State.STANDBY)
    assert lab.secondary.fence.calls == []
    engine.close()
    domain = lab.secondary.wait_state(State.ACTIVE)
    assert (domain["committed_epoch"], domain["term"]) == (2, 2)
    assert lab.secondary.fence.calls == ["probe", "fence"]
    ((info, memory, context),) = lab.secondary.hypervisor.started
    assert (info, context) == (INFO, TAIL)
    assert page_of(memory, 1) == page_of(memory, 2) == b"\3" * 4096
    assert page_of(memory, 0) == bytes(4096)
    assert lab.secondary.terms.load(INFO.uuid).role is Role.SECONDARY_ACTIVE

    back = lab.engine(resume=True)
    assert back.wait(m.Refused).code == "term"
    lab.restart_secondary()
    again = lab.engine(session=8)
    assert again.wait(m.Refused).code == "term"
    assert lab.engine(session=9, term=2).wait(m.Refused).code == "active"
    assert lab.engine(session=10, term=3).wait(m.Refused).code == "active"  # it runs here
    assert not any(isinstance(got, m.Welcome) for got in back.got + again.got)


@pytest.mark.parametrize("whole", [True, False])
def test_what_came_while_the_old_guest_was_fenced_is_let_go(lab: Lab, whole: bool) -> None:
    """It was not acked; its memory is that of all guests."""
    fencing, going_on = threading.Event(), threading.Event()

    def slowly(timeout: float) -> FenceResult:
        fencing.set()
        assert going_on.wait(LIMIT_S)
        return FenceResult(True, "it has exited")

    lab.secondary.fence.fence = slowly  # type: ignore[method-assign]  # to stop it at the right place
    engine = lab.engine()
    engine.protect()
    engine.control.close()
    assert fencing.wait(LIMIT_S)
    frames = engine.frames(2, {1: 5})
    engine.send(frames if whole else frames[:-1])
    used = lab.secondary.service._budget
    eventually(lambda: used.used, "the frames")
    if whole:
        eventually(lambda: lab.secondary.service._drivers[INFO.uuid].machine._held, "the part")
    going_on.set()
    lab.secondary.wait_state(State.ACTIVE)
    eventually(lambda: used.used == 0, "memory given back")


def test_without_a_fence_nothing_is_activated_and_a_returning_primary_goes_on(lab: Lab) -> None:
    lab.secondary.fence.result = FenceResult(False, "it does not answer; pull its plug")
    engine = lab.engine()
    engine.protect()
    engine.close()
    domain = lab.secondary.wait_state(State.FAILED)
    assert "pull its plug" in domain["reason"]
    assert lab.secondary.service.not_ready()
    back = lab.engine(resume=True)
    welcome = back.wait(m.Welcome)
    assert (welcome.last_epoch, welcome.committed_epoch) == (1, 1)
    back.protect(2, fill=2)
    lab.secondary.wait_state(State.STANDBY)
    assert lab.secondary.hypervisor.started == []


@pytest.mark.parametrize(
    "trouble", [HypervisorError("not enough free memory"), KeyError("a mistake of ours")]
)
def test_a_fenced_guest_that_cannot_be_started_holds_up_the_end(
    lab: Lab, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    """`systemctl restart` of a standby that has the only copy of a guest there is."""
    hypervisor = lab.secondary.hypervisor
    hypervisor.trouble = trouble
    engine = lab.engine()
    engine.protect()
    engine.close()
    lab.secondary.wait_state(State.FAILED)
    lab.secondary.service.stop()
    failed = hypervisor.failed
    lives = lab.secondary._thread.is_alive
    eventually(lambda: hypervisor.failed > failed + 1 or not lives(), "two more starts")
    (told,) = [
        text for text in caplog.messages if "not ending yet: its old guest is stopped" in text
    ]
    assert "epoch 1 is here alone; mend this" in told
    assert str(trouble) in told
    note = lab.directory / "activations" / f"{INFO.uuid}.json"
    assert "for good: `B fenced A and cannot start the guest` in docs/operating.md" in told
    assert note.exists()
    assert lab.secondary.service.status()["stopping"]
    hypervisor.trouble = None
    eventually(lambda: not lives(), "the end")
    ((info, memory, _),) = hypervisor.started
    assert (info, page_of(memory, 1)) == (INFO, b"\1" * 4096)


def test_that_a_guest_could_not_be_fenced_is_told_from_the_beginning(lab: Lab) -> None:
    lab.restart_secondary(own_fence=True)
    engine = lab.engine()
    engine.protect()
    domain = lab.secondary.domain()
    assert "nothing here can stop g on 127.0.0.1: give --fence-command" in domain["no_fence"]
    assert domain["no_fence"] in domain["alarm"]
    engine.close()
    assert "--fence-command" in lab.secondary.wait_state(State.FAILED)["reason"]


def test_a_fence_command_lets_the_guest_go_on(lab: Lab) -> None:
    lab.restart_secondary(own_fence=True, fence_command=("/bin/echo", "outlet 4 is off"))
    engine = lab.engine()
    engine.protect()
    assert lab.secondary.domain()["no_fence"] is None
    engine.close()
    lab.secondary.wait_state(State.ACTIVE)


LOST = m.EngineLost(INFO.uuid, m.LeftGuest.RUNNING, "engine 4711 died")


def answered(watcher: Notices, word: m.FromPrimary, kind: type[m.Message]) -> Any:
    """Say it as a watcher does until there is such an answer."""
    found: list[m.Message] = []

    def said() -> bool:
        watcher.say(word)
        time.sleep(0.05)
        found.extend(answer for answer in watcher.heard() if isinstance(answer, kind))
        return bool(found)

    eventually(said, kind.__name__)
    return found[0]


def test_a_watcher_keeps_the_standby_waiting_for_a_new_engine(lab: Lab) -> None:
    lab.restart_secondary(engine_restart=3600 * SILENCE_NS)
    lab.secondary.fence.view = HostView(None, None, "it cannot be looked at")
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        answered(watcher, LOST, m.EngineLostHeard)
        domain = lab.secondary.wait_state(State.ENGINE_LOST)
        assert "the guest is running; engine 4711 died" in domain["reason"]
        silent_at = time.monotonic() + 2 * SILENCE_NS / 1e9
        eventually(
            lambda: answered(watcher, LOST, m.EngineLostHeard) and time.monotonic() > silent_at,
            "more than the silence",
        )
        assert lab.secondary.domain()["state"] == State.ENGINE_LOST
        lab.engine(session=8).protect(2)
        lab.secondary.wait_state(State.STANDBY)
        watcher.say(LOST)  # of the old session: dropped
    dropped = lab.secondary.service.status
    eventually(lambda: dropped()["dropped"].get("ENGINE_LOST"), "the old session's word")
    assert lab.secondary.domain()["state"] == State.STANDBY
    assert lab.secondary.fence.calls == []


def test_a_watcher_that_falls_silent_too_is_a_lost_host(lab: Lab) -> None:
    lab.restart_secondary(engine_restart=3600 * SILENCE_NS)
    lab.secondary.fence.view = HostView(None, None, "it cannot be looked at")
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        answered(watcher, LOST, m.EngineLostHeard)
        lab.secondary.wait_state(State.ENGINE_LOST)
    lab.secondary.wait_state(State.ACTIVE)
    assert lab.secondary.fence.calls == ["probe", "fence"]


def test_a_watcher_learns_that_its_guest_was_taken_over(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        refused = answered(watcher, LOST, m.Refused)  # after the limit, which is 0 here
        assert refused.code == "active"
    lab.secondary.wait_state(State.ACTIVE)
    lab.restart_secondary()
    with closing(lab.watcher()) as watcher:
        assert answered(watcher, LOST, m.Refused).code == "active"  # of a session before this life


def test_a_guest_that_ends_after_its_engine_is_not_activated(lab: Lab) -> None:
    lab.restart_secondary(engine_restart=3600 * SILENCE_NS)
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        answered(watcher, m.End(EndReason.POWEROFF), m.Retired)
    lab.secondary.wait_state(State.RETIRED)


@pytest.mark.parametrize("word", [m.Retire("stopped"), m.End(EndReason.POWEROFF)])
def test_what_is_retired_is_never_activated(lab: Lab, word: m.Retire | m.End) -> None:
    engine = lab.engine()
    engine.protect()
    assert engine.control.send(word)
    engine.wait(m.Retired)
    engine.close()
    eventually(lambda: lab.secondary.domain()["silent_ns"] > 2 * SILENCE_NS, "silence")
    assert lab.secondary.domain()["state"] == State.RETIRED
    assert lab.secondary.fence.calls == []
    kept = sorted(path.name for path in (lab.directory / "keep").iterdir())
    assert (
        kept == []
    )  # static records are empty here, so no image could be written: logged, no more
