"""The standby's state machine when the watcher of the primary's host says that the engine is gone."""

from __future__ import annotations

import pytest
from standby_stories import RESTART, SECOND, UUID, silence, state

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import Role, TermRecord
from checkpointd.hypervisor.port import EndReason
from checkpointd.secondary.standby import RETRY_NS, Policy, Standby, State
from checkpointd.secondary.standby import events as ev

UNSEEN = HostView(None, None, "it cannot be looked at")
FENCED = FenceResult(True, "it is off")
NOT_FENCED = FenceResult(False, "no answer")
HEARD = ev.SendEngineLostHeard()


def word(now: int = 0, session: int = 1) -> ev.EngineLostHeard:
    return ev.EngineLostHeard(session, "killed", now)


def quiet(now: int) -> ev.Tick:
    """Somebody is heard."""
    return ev.Tick(now, 0)


def tell(standby: Standby, *events: ev.Event) -> list[ev.Instruction]:
    """The instructions that the last event gave."""
    out: list[ev.Instruction] = []
    for event in events:
        out = standby.handle(event)
    return out


def syncing() -> Standby:
    standby = Standby(Policy(RESTART), TermRecord(UUID))
    tell(standby, ev.HelloReceived(1, 1, False, False), ev.TermStored(1, Role.NONE))
    assert state(standby) is State.SYNCING
    return standby


def standing_by() -> Standby:
    standby = syncing()
    tell(standby, ev.PartWhole(1, 1, 0, final=True), ev.CommitDone(1, 16, (), 1000))
    assert state(standby) is State.STANDBY
    return standby


def lost(now: int = 0) -> Standby:
    standby = standing_by()
    out = tell(standby, word(now))
    assert [type(step) for step in out] == [ev.SendEngineLostHeard, ev.Alarm]
    assert state(standby) is State.ENGINE_LOST
    return standby


def fencing_after_the_limit() -> Standby:
    standby = lost()
    out = tell(standby, quiet(RESTART))
    assert out == [ev.Fence(1)]
    return standby


def test_the_word_needs_no_silence_and_is_alarmed_once() -> None:
    standby = lost()
    assert "killed" in standby.reason
    assert tell(standby, word(SECOND)) == [HEARD]
    assert state(standby) is State.ENGINE_LOST


def test_while_it_is_repeated_a_new_engine_is_waited_for_within_the_limit() -> None:
    standby = lost()
    for now in range(0, RESTART, SECOND):
        assert tell(standby, word(now)) == [HEARD]
        assert tell(standby, quiet(now)) == []
    assert tell(standby, quiet(RESTART)) == [ev.Fence(1)]
    tell(standby, ev.FenceDone(1, FENCED, RESTART), ev.TermStored(2, Role.SECONDARY_ACTIVE))
    (refused, *_) = tell(standby, word(RESTART))
    assert isinstance(refused, ev.SendRefused)
    assert refused.code == "active"
    assert "stopped the old guest and not got it to run here yet" in refused.text
    tell(standby, ev.GuestStarted(7))
    assert isinstance(tell(standby, word(RESTART))[0], ev.SendRefused)


def test_a_new_engine_ends_the_wait() -> None:
    standby = lost()
    tell(standby, ev.HelloReceived(2, 1, False, False))
    assert state(standby) is State.STANDBY
    assert tell(standby, word(SECOND)) == []  # of the old session
    assert tell(standby, quiet(2 * RESTART)) == []
    assert state(standby) is State.STANDBY


def test_a_watcher_that_falls_silent_has_lost_its_host() -> None:
    standby = lost()
    assert tell(standby, silence(SECOND)) == [ev.Probe(1)]
    assert tell(standby, ev.ProbeDone(1, UNSEEN, SECOND)) == [ev.Fence(2)]


def test_a_watcher_heard_while_the_silent_host_is_probed_calls_the_fence_off() -> None:
    standby = standing_by()
    assert tell(standby, silence(SECOND)) == [ev.Probe(1)]
    assert tell(standby, word(SECOND))[0] == HEARD
    assert tell(standby, ev.ProbeDone(1, UNSEEN, SECOND)) == []
    assert state(standby) is State.ENGINE_LOST


def test_a_watcher_heard_while_it_was_probed_for_its_own_silence_is_waited_for() -> None:
    standby = lost()
    tell(standby, silence(SECOND))
    tell(standby, word(SECOND))
    assert tell(standby, ev.ProbeDone(1, UNSEEN, SECOND)) == []
    assert state(standby) is State.ENGINE_LOST


def test_nothing_is_answered_while_a_fence_is_under_way() -> None:
    standby = fencing_after_the_limit()
    assert tell(standby, word(RESTART)) == []
    assert state(standby) is State.FENCING


def test_a_fence_that_fails_after_the_limit_is_tried_again_though_the_watcher_is_heard() -> None:
    standby = fencing_after_the_limit()
    tell(standby, ev.FenceDone(1, NOT_FENCED, RESTART))
    assert tell(standby, word(RESTART)) == [HEARD]
    assert state(standby) is State.FAILED
    assert tell(standby, quiet(RESTART + RETRY_NS)) == [ev.Fence(2)]


def test_a_fence_for_silence_that_fails_is_not_tried_again_once_the_watcher_is_heard() -> None:
    standby = standing_by()
    tell(standby, silence(SECOND), ev.ProbeDone(1, UNSEEN, SECOND))
    tell(standby, ev.FenceDone(2, NOT_FENCED, SECOND), word(SECOND))
    assert state(standby) is State.ENGINE_LOST
    assert tell(standby, quiet(SECOND + RETRY_NS)) == []
    assert tell(standby, quiet(SECOND + RESTART)) == [ev.Fence(3)]


def test_after_the_limit_a_fence_still_waits_for_the_audit_of_what_was_acked() -> None:
    standby = standing_by()
    tell(standby, ev.PartWhole(1, 2, 0, final=True), word())
    assert tell(standby, quiet(RESTART)) == []
    assert tell(standby, word(RESTART)) == [HEARD]
    assert state(standby) is State.PROBING
    out = tell(standby, ev.CommitDone(2, 16, (), 1000))
    assert out == [ev.SendCommitted(2, 1000, 16), ev.Fence(1)]


def test_an_epoch_that_was_on_its_way_is_taken() -> None:
    standby = lost()
    assert tell(standby, ev.PartWhole(1, 2, 0, final=True)) == [
        ev.SendAck(2, 0, final=True),
        ev.Commit(2),
    ]


def test_without_a_committed_epoch_there_is_nothing_to_activate() -> None:
    standby = syncing()
    out = tell(standby, word())
    assert [type(step) for step in out] == [ev.SendEngineLostHeard, ev.Alarm]
    assert state(standby) is State.SYNCING
    assert "nothing to activate" in standby.reason
    assert tell(standby, word(2 * RESTART), quiet(2 * RESTART)) == []
    assert state(standby) is State.SYNCING


def test_the_first_commit_may_come_after_the_word() -> None:
    standby = syncing()
    tell(standby, ev.PartWhole(1, 1, 0, final=True), word(0), ev.CommitDone(1, 16, (), 1000))
    assert tell(standby, word(SECOND)) == [HEARD]
    assert state(standby) is State.ENGINE_LOST
    assert tell(standby, quiet(RESTART)) == [ev.Fence(1)]


def test_a_retired_replica_stays_retired() -> None:
    standby = standing_by()
    tell(standby, ev.RetireReceived(1, "stopped"))
    assert tell(standby, word())[0] == HEARD
    assert tell(standby, quiet(2 * RESTART)) == []
    assert state(standby) is State.RETIRED


@pytest.mark.parametrize("reason", [EndReason.POWEROFF, EndReason.REBOOT, EndReason.CRASH])
def test_a_guest_that_ends_without_its_engine_is_not_activated(reason: EndReason) -> None:
    standby = lost()
    out = tell(standby, ev.EndReceived(1, reason))
    assert [type(step) for step in out] == [ev.DropReplica, ev.SendRetired]
    assert state(standby) is State.RETIRED


def test_an_engine_heard_after_all_is_back() -> None:
    standby = lost()
    tell(standby, ev.Heard(1))
    assert state(standby) is State.STANDBY
    assert tell(standby, quiet(2 * RESTART)) == []


def test_the_words_of_another_session_change_nothing() -> None:
    standby = standing_by()
    assert tell(standby, word(session=2)) == []
    assert state(standby) is State.STANDBY
