"""The standby's state machine from silence to a guest that runs, and what comes in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from standby_stories import (
    DEAD,
    ENGINE_GONE,
    FENCED,
    NOT_FENCED,
    RESTART,
    SECOND,
    STUCK,
    UUID,
    activating,
    active,
    committed,
    fencing,
    final,
    hello,
    machine,
    of_kind,
    refused,
    silence,
    standing_by,
    state,
    tell,
)  # fmt: skip

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import Role, TermRecord, TermStore
from checkpointd.hypervisor.port import EndReason
from checkpointd.secondary.activations import Activation, Activations, Phase
from checkpointd.secondary.standby import RETRY_NS, Policy, Standby, State
from checkpointd.secondary.standby import events as ev

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_silence_alone_leads_to_activation_step_by_step() -> None:
    standby = standing_by()
    assert tell(standby, ev.Tick(0, 0)) == []
    assert tell(standby, silence()) == [ev.Probe(1)]
    assert tell(standby, silence()) == []
    assert tell(standby, ev.ProbeDone(1, DEAD, 0)) == [ev.Fence(2)]
    assert tell(standby, ev.FenceDone(2, FENCED, 0)) == [ev.StoreTerm(2, Role.SECONDARY_ACTIVE, 2)]
    assert tell(standby, ev.TermStored(2, Role.SECONDARY_ACTIVE)) == [ev.StartGuest(1)]
    assert state(standby) is State.ACTIVATING
    tell(standby, ev.GuestStarted(7))
    assert state(standby) is State.ACTIVE


@pytest.mark.parametrize("view", [DEAD, STUCK, HostView(None, None, ""), HostView(True, None, "")])
def test_whatever_else_the_probe_sees_it_fences(view: HostView) -> None:
    standby = standing_by()
    tell(standby, silence())
    assert tell(standby, ev.ProbeDone(1, view, 0)) == [ev.Fence(2)]


def test_a_standby_that_is_syncing_is_never_activated() -> None:
    standby = machine()
    tell(standby, hello(), ev.PartWhole(1, 1, 0, final=False))
    (alarm,) = tell(standby, silence())
    assert isinstance(alarm, ev.Alarm)
    assert tell(standby, silence(100 * SECOND)) == []  # told once
    assert state(standby) is State.SYNCING


def test_planted_activation_waits_for_acked_epochs() -> None:
    """Epoch 2 is acked, so it was promised: nothing is fenced, let alone started, before it is committed."""
    standby = standing_by(pending=True)
    tell(standby, silence())
    assert tell(standby, ev.ProbeDone(1, DEAD, 0)) == []
    assert of_kind(ev.Fence, tell(standby, committed(2))) == [ev.Fence(2)]
    tell(standby, ev.FenceDone(2, FENCED, 0))
    assert tell(standby, ev.TermStored(2, Role.SECONDARY_ACTIVE)) == [ev.StartGuest(2)]


def test_planted_an_epoch_that_is_whole_and_not_acked_is_not_activated() -> None:
    standby = fencing()
    assert tell(standby, final(2)) == []  # held: no ack while the fence is under way
    out = tell(standby, ev.FenceDone(2, FENCED, 0))
    assert not of_kind(ev.SendAck, out)
    assert not of_kind(ev.Commit, out)
    assert tell(standby, ev.TermStored(2, Role.SECONDARY_ACTIVE)) == [ev.StartGuest(1)]


def test_a_replica_that_fails_its_last_audit_is_not_activated() -> None:
    standby = standing_by(pending=True)
    tell(standby, silence(), ev.ProbeDone(1, DEAD, 0))
    out = tell(standby, committed(2, 77))
    assert not of_kind(ev.Fence, out)
    assert state(standby) is State.RETIRED
    assert tell(standby, silence(), silence(100 * SECOND)) == []


def test_a_lost_engine_is_waited_for_within_its_limit() -> None:
    standby = standing_by()
    tell(standby, silence(), ev.ProbeDone(1, ENGINE_GONE, 5 * SECOND))
    assert state(standby) is State.ENGINE_LOST
    assert tell(standby, silence(6 * SECOND)) == [ev.Probe(2)]
    assert tell(standby, ev.ProbeDone(2, ENGINE_GONE, 6 * SECOND)) == []
    assert tell(standby, silence(15 * SECOND)) == [ev.Fence(3)]


def test_a_lost_engine_whose_host_dies_is_not_waited_for() -> None:
    standby = standing_by()
    tell(standby, silence(), ev.ProbeDone(1, ENGINE_GONE, 0), silence(SECOND))
    assert tell(standby, ev.ProbeDone(2, DEAD, SECOND)) == [ev.Fence(3)]


def test_an_engine_that_is_started_again_goes_on() -> None:
    standby = standing_by()
    tell(standby, silence(), ev.ProbeDone(1, ENGINE_GONE, 0))
    assert of_kind(ev.SendWelcome, tell(standby, hello(session=2)))
    assert state(standby) is State.STANDBY
    assert standby.committed == 1


@pytest.mark.parametrize("word", [ev.Heard(1), hello(resume=True)])
def test_a_primary_that_returns_before_the_fence_goes_on(word: ev.Event) -> None:
    standby = standing_by()
    tell(standby, silence(), word)
    assert state(standby) is State.STANDBY
    assert tell(standby, ev.ProbeDone(1, DEAD, 0)) == []  # of the silence that is over
    assert state(standby) is State.STANDBY


def test_a_primary_that_returns_during_the_fence_is_answered_when_it_is_decided() -> None:
    standby = fencing()
    assert tell(standby, hello(resume=True)) == []
    out = tell(standby, ev.FenceDone(2, FENCED, 0))
    assert [step.code for step in out if isinstance(step, ev.SendRefused)] == ["active"]

    standby = fencing()
    assert tell(standby, final(2), hello(resume=True)) == []
    out = tell(standby, ev.FenceDone(2, NOT_FENCED, 0))
    assert of_kind(ev.SendAck, out) == [ev.SendAck(2, 0, True)]
    assert of_kind(ev.SendWelcome, out)
    assert state(standby) is State.STANDBY


def test_an_epoch_given_up_while_a_fence_is_under_way_is_not_acked_after_it() -> None:
    standby = fencing()
    tell(standby, final(2), ev.EpochGivenUp(), final(3))
    tell(standby, ev.FenceDone(2, NOT_FENCED, 0))
    assert of_kind(ev.SendAck, tell(standby, ev.Heard(1))) == [ev.SendAck(3, 0, True)]


def test_a_failed_fence_says_why_and_is_tried_again_while_silence_lasts() -> None:
    standby = fencing()
    (alarm,) = tell(standby, ev.FenceDone(2, NOT_FENCED, 0))
    assert alarm == ev.Alarm("not fenced, so not activated: it does not answer")
    assert state(standby) is State.FAILED
    assert tell(standby, silence(RETRY_NS - 1)) == []
    assert tell(standby, ev.Tick(RETRY_NS, 0)) == []
    assert tell(standby, silence(RETRY_NS)) == [ev.Fence(3)]
    assert tell(standby, ev.FenceDone(3, NOT_FENCED, RETRY_NS)) == []  # the same: no second alarm
    assert tell(standby, ev.Heard(1)) == [ev.ForgetActivation()], (
        "it was not stopped: its note goes"
    )
    assert state(standby) is State.STANDBY


def test_the_note_of_a_failed_fence_goes_when_the_replica_does() -> None:
    standby = fencing()
    tell(standby, ev.FenceDone(2, NOT_FENCED, 0))
    out = tell(standby, ev.RetireReceived(1, "stopped by its operator"))
    assert ev.ForgetActivation() in out


def test_a_result_of_an_earlier_fence_is_not_taken_for_a_later_one() -> None:
    standby = fencing()
    tell(standby, ev.FenceDone(2, NOT_FENCED, 0), silence(RETRY_NS))
    assert tell(standby, ev.FenceDone(2, FENCED, 0)) == []
    assert state(standby) is State.FENCING


def test_a_failed_term_or_start_is_resumed_where_it_stood_and_never_fenced_again() -> None:
    standby = activating()
    tell(standby, ev.TermFailed("disk full", 0))
    assert state(standby) is State.FAILED
    assert tell(standby, ev.Tick(RETRY_NS, 0)) == [ev.StoreTerm(2, Role.SECONDARY_ACTIVE, 2)]
    assert tell(standby, ev.TermStored(2, Role.SECONDARY_ACTIVE)) == [ev.StartGuest(1)]
    tell(standby, ev.StartFailed("address in use", 0))
    assert state(standby) is State.FAILED
    assert tell(standby, ev.Tick(RETRY_NS, 0)) == [ev.StartGuest(1)]
    assert tell(standby, ev.GuestStarted(7)) == [ev.ForgetActivation()]
    assert state(standby) is State.ACTIVE


def test_a_guest_that_is_fenced_and_runs_nowhere_is_owed_until_it_runs_here() -> None:
    """Its old domain is gone and its start may fail for long: to end meanwhile would throw away its only copy."""
    standby = standing_by()
    assert not standby.owes_guest
    tell(standby, silence())
    assert not standby.owes_guest, "its host may live"
    tell(standby, ev.ProbeDone(1, DEAD, 0))
    assert standby.owes_guest, "it is being stopped"
    tell(standby, ev.FenceDone(2, NOT_FENCED, 0))
    assert not standby.owes_guest, "nothing was proved, and the primary may go on"
    tell(standby, silence(RETRY_NS), ev.FenceDone(3, FENCED, 0))
    assert standby.owes_guest
    tell(standby, ev.TermFailed("disk full", 0))
    assert (state(standby), standby.owes_guest) == (State.FAILED, True)
    tell(standby, ev.Tick(RETRY_NS, 0), ev.TermStored(2, Role.SECONDARY_ACTIVE))
    tell(standby, ev.StartFailed("no memory", RETRY_NS))
    assert (state(standby), standby.owes_guest) == (State.FAILED, True)
    tell(standby, ev.Tick(2 * RETRY_NS, 0), ev.GuestStarted(7))
    assert not standby.owes_guest


@pytest.mark.parametrize("make", [activating, active])
def test_once_fenced_the_old_primary_is_refused(make: Callable[[], Standby]) -> None:
    standby = make()
    assert refused(tell(standby, hello(resume=True)))
    assert refused(tell(standby, hello(session=5)))
    assert refused(tell(standby, ev.Heard(1))) == ["active"]
    assert refused(tell(standby, ev.RetireReceived(1, "stop"))) == ["active"]
    assert refused(tell(standby, ev.EndReceived(1, EndReason.DESTROYED))) == ["active"]
    assert tell(standby, final(2)) == []


def test_an_active_guest_is_given_up_to_a_higher_term_only_and_only_if_it_is_not_here() -> None:
    standby = active()
    assert refused(tell(standby, hello(session=5, term=2))) == ["active"]
    assert refused(tell(standby, hello(session=5, term=3, guest_here=True))) == ["active"]
    out = tell(standby, hello(session=5, term=3))
    assert of_kind(ev.SendWelcome, out) == [ev.SendWelcome(5, 0, None)]
    assert state(standby) is State.SYNCING
    assert standby.committed is None


def test_a_retire_that_meets_a_fence_is_answered_only_if_nothing_was_fenced() -> None:
    standby = fencing()
    assert tell(standby, ev.RetireReceived(1, "stop")) == []
    out = tell(standby, ev.FenceDone(2, NOT_FENCED, 0))
    assert of_kind(ev.SendRetired, out)
    assert state(standby) is State.RETIRED

    standby = fencing()
    tell(standby, ev.RetireReceived(1, "stop"))
    assert not of_kind(ev.SendRetired, tell(standby, ev.FenceDone(2, FENCED, 0)))


@pytest.mark.parametrize("reason", [EndReason.POWEROFF, EndReason.REBOOT, EndReason.CRASH])
@pytest.mark.parametrize("make", [standing_by, fencing])
def test_a_guest_that_ended_is_not_brought_back(
    make: Callable[[], Standby], reason: EndReason
) -> None:
    standby = make()
    assert of_kind(ev.SendRetired, tell(standby, ev.EndReceived(1, reason)))
    out = tell(standby, ev.FenceDone(2, FENCED, 0))
    assert out == [ev.ForgetActivation()] * (make is fencing)
    assert tell(standby, silence(), silence(100 * SECOND)) == []
    assert state(standby) is State.RETIRED


@pytest.mark.parametrize("result", [FENCED, NOT_FENCED])
def test_one_who_begins_anew_under_a_fence_that_is_under_way_is_answered_after_it(
    result: FenceResult,
) -> None:
    """The guest has rebooted meanwhile: nothing is activated, but its host may be switched off this moment."""
    standby = fencing()
    tell(standby, ev.EndReceived(1, EndReason.REBOOT))
    assert tell(standby, ev.EngineLostHeard(1, "killed", 0)) == []
    assert tell(standby, hello(session=2)) == []
    out = tell(standby, ev.FenceDone(2, result, 0))
    assert of_kind(ev.SendWelcome, out) == [ev.SendWelcome(2, 0, None)]
    assert state(standby) is State.SYNCING


def test_a_guest_that_has_lived_on_in_a_higher_term_is_not_taken_back() -> None:
    """Its output was open there: what is here is older, and is neither fenced for nor kept."""
    standby = standing_by()
    tell(standby, silence())
    assert standby.handle(hello(session=2, term=2)) == [ev.StoreTerm(2, Role.NONE, 2)]
    assert standby.handle(ev.ProbeDone(1, DEAD, 0)) == [], "no fence for the old one meanwhile"
    tell(standby, hello())  # the old engine comes between: the word that is kept is the last one
    (dropped, refusal) = standby.handle(ev.TermStored(2, Role.NONE))
    assert isinstance(dropped, ev.DropReplica)
    assert refused([refusal]) == ["term"]
    assert tell(standby, silence(100 * SECOND)) == []
    assert of_kind(ev.SendWelcome, tell(standby, hello(session=2, term=2))) == [
        ev.SendWelcome(2, 0, None)
    ]
    assert state(standby) is State.SYNCING


def test_a_higher_term_that_cannot_be_stored_puts_no_fence_off() -> None:
    standby = standing_by()
    tell(standby, silence())
    standby.handle(hello(session=2, term=2))
    standby.handle(ev.ProbeDone(1, DEAD, 0))
    out = standby.handle(ev.TermFailed("disk full", 0))
    assert refused(out) == ["state"]
    assert of_kind(ev.Fence, out) == [ev.Fence(2)]


def test_an_engine_whose_host_is_lost_is_silent_from_there_on() -> None:
    standby = standing_by()
    assert tell(standby, ev.EndReceived(1, EndReason.HOST_LOST)) == []
    assert standby.deaf
    assert tell(standby, silence()) == [ev.Probe(1)]
    assert tell(standby, ev.Heard(1)) == []
    assert tell(standby, ev.ProbeDone(1, DEAD, 0)) == [ev.Fence(2)]


def test_a_guest_destroyed_by_our_own_fence_has_not_ended() -> None:
    """The fence destroyed it, its answer was lost, and the engine tells what it sees."""
    standby = fencing()
    tell(standby, ev.FenceDone(2, NOT_FENCED, 0))
    assert tell(standby, ev.EndReceived(1, EndReason.DESTROYED)) == []
    assert tell(standby, silence(RETRY_NS)) == [ev.Fence(3)]
    out = tell(standby, ev.FenceDone(3, FENCED, RETRY_NS))
    assert of_kind(ev.StoreTerm, out)


def test_a_restarted_secondary_knows_what_it_took_over() -> None:
    standby = machine(TermRecord(UUID, 2, Role.SECONDARY_ACTIVE, 9))
    assert state(standby) is State.ACTIVE
    assert refused(tell(standby, hello(term=1))) == ["term"]
    assert refused(tell(standby, hello(term=2))) == ["active"]
    assert tell(standby, silence(100 * SECOND)) == []


# ---------------------------------------------------------------- interrupted everywhere


def test_every_crash_during_activation_leaves_at_most_one_runner(tmp_path: Path) -> None:
    """The whole story from Hello to a running guest, cut off after each instruction in turn; then both
    daemons come back. Whatever was done before the crash, the old primary runs on only if it was
    neither fenced nor superseded, and the new life starts nothing that it did not commit itself.
    """
    crashes = 0
    for crash_at in range(1, 100):
        store = TermStore(tmp_path / str(crash_at))
        notes = Activations(tmp_path / str(crash_at) / "activations")
        done = perform_story(store, notes, crash_at)
        record, note = store.load(UUID), notes.load(UUID)
        store.close()
        if len(done) < crash_at:
            break
        crashes += 1
        started = any(isinstance(step, ev.StartGuest) for step in done)
        assert (record.role is Role.SECONDARY_ACTIVE) or not started
        again = Standby(Policy(RESTART), record, note)
        fenced = any(isinstance(step, ev.Fence) for step in done)
        finished = isinstance(done[-1], ev.ForgetActivation)
        assert (note is None) == (finished or not fenced)
        assert again.state is not State.WAITING or not fenced, "a fenced guest waits for nobody"
        again_silent = tell(again, silence(), silence(100 * SECOND))
        assert not of_kind(ev.StartGuest, again_silent)
        assert not of_kind(ev.Fence, again_silent)
        out = tell(again, hello(resume=True, guest_here=started))
        if record.role is Role.SECONDARY_ACTIVE:
            assert refused(out) == ["term"]
        else:
            assert of_kind(ev.SendWelcome, out)
            assert not of_kind(ev.SendAck, tell(again, final(3)))
            assert not of_kind(ev.Probe, tell(again, silence(200 * SECOND)))
    assert crashes == 14  # each instruction of the story below


def perform_story(store: TermStore, notes: Activations, crash_at: int) -> list[ev.Instruction]:
    """Play it with a real term store; gives the instructions performed until the crash."""
    standby = Standby(Policy(RESTART), store.load(UUID))
    done: list[ev.Instruction] = []
    events: list[ev.Event] = [hello(), final(1), final(2), silence()]
    while events:
        for step in standby.handle(events.pop(0)):
            answer = perform(step, store, notes)
            done.append(step)
            if len(done) == crash_at:
                return done
            if answer is not None:
                events.insert(0, answer)
    assert state(standby) is State.ACTIVE
    return done


def perform(step: ev.Instruction, store: TermStore, notes: Activations) -> ev.Event | None:
    match step:
        case ev.StoreTerm(term, role, next_epoch):
            store.store(TermRecord(UUID, term, role, next_epoch))
            return ev.TermStored(term, role)
        case ev.Commit(epoch):
            return committed(epoch)
        case ev.Probe(attempt):
            return ev.ProbeDone(attempt, DEAD, 0)
        case ev.Fence(attempt):
            notes.begin(Activation(UUID, "g", "192.0.2.1", 2, 2, Phase.FEEDING, "boot"))
            return ev.FenceDone(attempt, FENCED, 0)
        case ev.StartGuest():
            return ev.GuestStarted(7)
        case ev.ForgetActivation():
            notes.forget(UUID)
    return None
