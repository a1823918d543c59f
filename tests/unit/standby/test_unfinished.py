"""The standby's state machine in a life that finds an activation which an earlier one began."""

from __future__ import annotations

import pytest
from standby_stories import SECOND, UUID, state

from checkpointd.authority.terms import Role, TermRecord
from checkpointd.secondary.activations import Activation, Phase
from checkpointd.secondary.standby import RESUME_RETRY_NS, Policy, Standby, State
from checkpointd.secondary.standby import events as ev

OURS = TermRecord(UUID, 2, Role.SECONDARY_ACTIVE, 9)
BEFORE = TermRecord(UUID, 1, Role.NONE, 9)


def note(phase: Phase = Phase.SEALED) -> Activation:
    return Activation(UUID, "web", "192.0.2.1", 2, 8, phase, "boot")


def life(record: TermRecord, left: Activation) -> Standby:
    return Standby(Policy(10 * SECOND), record, left)


def hello(term: int, *, guest_here: bool = False) -> ev.HelloReceived:
    return ev.HelloReceived(5, term, False, guest_here)


def resuming(phase: Phase = Phase.SEALED) -> Standby:
    standby = life(OURS, note(phase))
    assert state(standby) is State.ACTIVATING
    alarm, resume = standby.handle(ev.Tick(0, 0))
    assert isinstance(alarm, ev.Alarm)
    assert f"activated epoch 8 in term 2 ({phase})" in alarm.text
    assert resume == ev.ResumeActivation()
    return standby


@pytest.mark.parametrize("phase", list(Phase))
def test_an_activation_whose_term_is_ours_is_resumed_at_once(phase: Phase) -> None:
    """FENCING, too: its note was late, and the term tells more."""
    standby = resuming(phase)
    assert standby.handle(ev.Tick(SECOND, 0)) == []
    assert standby.handle(ev.GuestStarted(4)) == [ev.ForgetActivation()]
    assert state(standby) is State.ACTIVE
    assert standby.handle(ev.Tick(100 * SECOND, 0)) == []


def test_an_end_does_not_wait_for_what_the_next_life_finds_too_and_says_so() -> None:
    standby = resuming()
    assert not standby.owes_guest
    assert "the next start of this secondary goes on with it" in standby.at_end
    standby.handle(ev.GuestStarted(4))
    assert standby.at_end == ""


def test_what_cannot_be_resumed_is_told_once_and_looked_at_again() -> None:
    standby = resuming()
    (alarm,) = standby.handle(ev.StartFailed("nothing is left", 0))
    assert alarm == ev.Alarm("fenced, but the guest could not be started: nothing is left")
    assert state(standby) is State.FAILED
    assert standby.handle(ev.Tick(RESUME_RETRY_NS - 1, 0)) == []
    assert standby.handle(ev.Tick(RESUME_RETRY_NS, 0)) == [ev.ResumeActivation()]
    assert standby.handle(ev.StartFailed("nothing is left", RESUME_RETRY_NS)) == []
    standby.handle(ev.Tick(2 * RESUME_RETRY_NS, 0))
    assert standby.handle(ev.GuestStarted(4)) == [ev.ForgetActivation()]


def test_it_holds_up_no_end_for_the_next_life_finds_it_as_well() -> None:
    assert not resuming().owes_guest


@pytest.mark.parametrize("failed", [False, True])
def test_the_old_primary_is_refused(failed: bool) -> None:
    standby = resuming()
    if failed:
        standby.handle(ev.StartFailed("nothing is left", 0))
    for term, code in ((1, "term"), (2, "active")):
        (refused,) = standby.handle(hello(term))
        assert isinstance(refused, ev.SendRefused)
        assert refused.code == code


def test_a_primary_of_a_later_term_makes_it_history_but_not_while_it_is_resumed() -> None:
    standby = resuming()
    (refused,) = standby.handle(hello(3))
    assert isinstance(refused, ev.SendRefused)
    standby.handle(ev.StartFailed("nothing is left", 0))
    (refused,) = standby.handle(hello(3, guest_here=True))
    assert isinstance(refused, ev.SendRefused)
    assert standby.handle(hello(3)) == [ev.StoreTerm(3, Role.NONE, 9)]
    assert standby.handle(ev.Tick(RESUME_RETRY_NS, 0)) == [], "nothing is started meanwhile"
    out = standby.handle(ev.TermStored(3, Role.NONE))
    assert out == [ev.BeginSession(5), ev.SendWelcome(5, 0, None)]
    assert state(standby) is State.SYNCING
    assert standby.handle(ev.Tick(100 * SECOND, 0)) == []


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        (Phase.FENCING, "was being stopped; whether it is stopped is not known. Epoch 8"),
        (Phase.FEEDING, "the old guest at 192.0.2.1 counts as stopped (). Epoch 8"),
    ],
)
def test_a_fence_without_a_term_is_told_and_nothing_is_ever_started(
    phase: Phase, says: str
) -> None:
    standby = life(BEFORE, note(phase))
    assert state(standby) is State.UNFINISHED
    assert says in standby.reason
    assert "Look at 192.0.2.1" in standby.reason
    (alarm,) = standby.handle(ev.Tick(0, 0))
    assert alarm == ev.Alarm(standby.reason)
    for now in range(0, 100 * SECOND, SECOND):
        assert standby.handle(ev.Tick(now, 5 * SECOND)) == []
    assert state(standby) is State.UNFINISHED


def test_a_primary_that_is_back_begins_anew() -> None:
    standby = life(BEFORE, note(Phase.FEEDING))
    out = standby.handle(hello(1))
    assert out == [ev.BeginSession(5), ev.SendWelcome(5, 0, None)]
    assert state(standby) is State.SYNCING
    assert standby.handle(ev.Tick(0, 0)) == [], "no alarm of what is over"


def test_a_note_of_another_term_is_void() -> None:
    assert life(TermRecord(UUID, 3, Role.SECONDARY_ACTIVE, 9), note()).state is State.ACTIVE
    assert life(TermRecord(UUID, 2, Role.NONE, 9), note()).state is State.WAITING
