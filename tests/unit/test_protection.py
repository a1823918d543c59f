"""The protection machine, one story at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from policies import ARENA_PAGES, BASE, MS, PAGES

from checkpointd.errors import HostLostError, ProtectionLostError, RefusedError
from checkpointd.hypervisor.port import EndReason
from checkpointd.primary import events as e
from checkpointd.primary import protection as p
from checkpointd.primary.pacing import AddedLatency


def welcomed(**changes: Any) -> p.Protection:
    machine = p.Protection(replace(BASE, **changes), 1, 0)
    machine.handle(e.Welcomed(same_standby=False, has_image=False), 0)
    return machine


def protected(**changes: Any) -> p.Protection:
    """A machine that has just had its first epoch acked."""
    machine = welcomed(**changes)
    steps = machine.handle(e.Staged(0, 0, 0), 0)
    (pause,) = [step for step in steps if isinstance(step, e.Pause)]
    machine.handle(e.Staged(pause.arena, 1, 0, closed=1), 0)
    machine.handle(e.Shipped(pause.epoch, pause.part), 0)
    machine.handle(e.Acked(pause.epoch, pause.part), 0)
    assert machine.state is p.State.PROTECTED
    return machine


def kinds(steps: list[e.Instruction]) -> list[type]:
    return [type(step) for step in steps]


def test_a_new_engine_sends_everything() -> None:
    steps = p.Protection(BASE, 7, 0).handle(
        e.Welcomed(same_standby=False, has_image=True, last_epoch=40), 0
    )
    assert kinds(steps) == [e.Abandon, e.BeginAnew, e.FetchKnown]


def test_abandoning_frees_every_arena() -> None:
    machine = protected()
    for at in (100, 200):
        (pause,) = [s for s in machine.handle(e.Tick(at * MS), at * MS) if isinstance(s, e.Pause)]
        machine.handle(e.Staged(pause.arena, 1, 0, closed=at), at * MS)
    assert kinds(machine.handle(e.Welcomed(same_standby=False, has_image=False), 300 * MS)) == [
        e.Abandon,
        e.NewSession,
    ]
    arenas = {
        step.arena
        for step in machine.handle(e.Welcomed(same_standby=True, has_image=False), 300 * MS)
        if isinstance(step, e.LiveRound)
    }
    machine.handle(e.Staged(0, 1, ARENA_PAGES), 300 * MS)
    arenas |= {
        step.arena for step in machine.handle(e.Tick(), 300 * MS) if isinstance(step, e.LiveRound)
    }
    assert arenas == {0, 1}


def test_a_guest_that_cannot_be_protected_any_longer_is_let_go_in_order() -> None:
    """Such as for a device that was attached: the replica is retired first, and only once."""
    machine = protected()
    steps = machine.handle(e.Unprotectable("vif0: its output is not held"), 0)
    assert kinds(steps) == [e.Alarm, e.Abandon, e.SayRetire]
    assert "vif0" in str(steps[0])
    assert not any(
        isinstance(step, e.Alarm | e.SayRetire | e.OpenOutput)
        for step in machine.handle(e.Unprotectable("vif0: its output is not held"), 1)
    )
    steps = machine.handle(e.Retired(), 2)
    assert kinds(steps) == [e.OpenOutput, e.Finish]
    assert isinstance(steps[1], e.Finish)
    assert steps[1].exit_code == ProtectionLostError.exit_code


def test_a_failed_audit_opens_a_new_session_and_copies_everything() -> None:
    machine = protected()
    assert kinds(machine.handle(e.ReplicaRejected("differs"), 0)) == [
        e.Alarm,
        e.OpenOutput,
        e.Abandon,
        e.NewSession,
    ]
    steps = machine.handle(e.Welcomed(same_standby=True, has_image=False), 0)
    assert kinds(steps)[:3] == [e.Abandon, e.BeginAnew, e.LiveRound]


def test_what_another_standby_lacks_opens_no_output() -> None:
    """A new secondary says that our earlier epochs are not there; the old one, silent, may still hold them."""
    machine = protected()
    machine.handle(e.Welcomed(same_standby=False, has_image=False), 0)
    assert machine.state is p.State.CONNECTING
    assert machine.handle(e.ReplicaRejected("its earlier epochs are not here"), 0) == []
    assert machine.output_shut


def test_epoch_numbers_go_on_above_what_the_standby_has_seen() -> None:
    machine = p.Protection(BASE, 7, 0)
    machine.handle(e.Welcomed(same_standby=False, has_image=False, last_epoch=40), 0)
    assert machine.epoch > 40


def test_a_round_of_known_pages_leaves_its_arena_free_and_its_dirt_ours() -> None:
    machine = welcomed()
    steps = machine.handle(e.Staged(0, 0, ARENA_PAGES), 0)
    assert steps[0] == e.KeepDirt(0)
    assert kinds(steps[1:]) == [e.LiveRound]


def test_the_interval_is_between_starts() -> None:
    machine = protected()
    assert machine.deadline() == 100 * MS
    assert not machine.handle(e.Tick(99 * MS), 99 * MS)
    assert kinds(machine.handle(e.Tick(100 * MS), 100 * MS)) == [e.Pause]


def test_what_did_not_fit_is_taken_as_soon_as_rounds_have_made_it_fit() -> None:
    """Not an interval later, when it would have grown anew."""
    machine = protected()
    machine.handle(e.Tick(100 * MS), 100 * MS)
    assert kinds(machine.handle(e.Overflow(PAGES), 101 * MS)) == [e.Alarm, e.LiveRound]
    steps = machine.handle(e.Staged(0, ARENA_PAGES, 0), 102 * MS)
    assert e.Pause in kinds(steps)


def test_an_interval_is_chosen_by_what_epochs_take() -> None:
    machine = protected(pace=AddedLatency(1000 * MS))
    before = machine.pacer.interval.ns
    (pause,) = machine.handle(e.Tick(before), before)
    assert isinstance(pause, e.Pause)
    machine.handle(e.Staged(pause.arena, 0, 0, 2, pause_ns=MS), before)
    assert machine.pacer.interval.ns > before


def test_a_time_without_a_standby_is_no_ack_that_took_so_long() -> None:
    machine = protected(pace=AddedLatency(200 * MS))
    (pause,) = machine.handle(e.Tick(100 * MS), 100 * MS)
    assert isinstance(pause, e.Pause)
    machine.handle(e.Staged(pause.arena, 0, 0, closed=2, pause_ns=MS), 100 * MS)
    machine.handle(e.Tick(100 * MS), 1200 * MS)
    assert machine.state is p.State.HOLDING
    machine.handle(e.Welcomed(same_standby=True, has_image=True), 60_000 * MS)
    machine.handle(e.Shipped(pause.epoch, pause.part), 60_010 * MS)
    machine.handle(e.Acked(pause.epoch, pause.part), 60_010 * MS)
    (again,) = machine.handle(e.Tick(60_200 * MS), 60_200 * MS)
    assert isinstance(again, e.Pause)
    machine.handle(e.Staged(again.arena, 0, 0, closed=3, pause_ns=MS), 60_200 * MS)
    assert machine.pacer.interval.ns < 400 * MS


def test_no_arena_no_epoch() -> None:
    machine = protected()
    for at in (100, 200):
        (pause,) = [s for s in machine.handle(e.Tick(at * MS), at * MS) if isinstance(s, e.Pause)]
        machine.handle(e.Staged(pause.arena, 1, 0, closed=at), at * MS)
    assert machine.deadline() is None
    assert not [s for s in machine.handle(e.Tick(300 * MS), 300 * MS) if isinstance(s, e.Pause)]


def test_an_ack_before_zeromq_let_go_does_not_free_the_arena() -> None:
    machine = protected()
    (pause,) = machine.handle(e.Tick(100 * MS), 100 * MS)
    assert isinstance(pause, e.Pause)
    machine.handle(e.Staged(pause.arena, 1, 0, closed=2), 100 * MS)
    assert machine.handle(e.Acked(pause.epoch, pause.part), 101 * MS) == []
    assert kinds(machine.handle(e.Shipped(pause.epoch, pause.part), 102 * MS)) == [
        e.Settle,
        e.Release,
    ]


def test_silence_holds_and_the_standby_returns_with_its_memory() -> None:
    machine = protected()
    (pause,) = machine.handle(e.Tick(100 * MS), 100 * MS)
    assert isinstance(pause, e.Pause)
    machine.handle(e.Staged(pause.arena, 1, 0, closed=2), 100 * MS)
    assert kinds(machine.handle(e.Tick(100 * MS), 1200 * MS)) == [e.Alarm]
    assert machine.state is p.State.HOLDING
    steps = machine.handle(e.Welcomed(same_standby=True, has_image=True), 1300 * MS)
    assert e.AskMissing(pause.epoch, pause.part) in steps
    assert machine.state.value == "protected"


def test_giving_up_waits_for_the_replica_to_be_retired() -> None:
    machine = welcomed(max_live_rounds=1)
    for _ in range(4):
        steps = machine.handle(e.Staged(0, ARENA_PAGES, 0), 0)
        machine.handle(e.Shipped(machine.epoch, machine.part - 1), 0)
        machine.handle(e.Acked(machine.epoch, machine.part - 1), 0)
        steps = machine.handle(e.Overflow(PAGES), 0)
        if machine.state is p.State.RETIRING:
            break
    assert e.SayRetire in kinds(steps)
    assert e.OpenOutput not in kinds(steps)
    steps = machine.handle(e.Retired(), 1)
    assert kinds(steps) == [e.OpenOutput, e.Finish]
    assert isinstance(steps[1], e.Finish)
    assert steps[1].exit_code == ProtectionLostError.exit_code


def test_a_new_standby_cannot_retire_the_old_one_s_replica() -> None:
    machine = protected()
    machine.handle(e.StopAsked(), 10 * MS)
    assert machine.handle(e.Welcomed(same_standby=False, has_image=False), 20 * MS) == []
    assert machine.handle(e.Retired(), 30 * MS) == []
    steps = machine.handle(e.Tick(30 * MS), 6000 * MS)
    assert kinds(steps) == [e.Finish]
    assert isinstance(steps[0], e.Finish)
    assert steps[0].unanswered is None


def test_unconfirmed_retirement_leaves_the_output_shut() -> None:
    machine = protected()
    machine.handle(e.StopAsked(), 10 * MS)
    steps = machine.handle(e.Tick(10 * MS), 6000 * MS)
    assert kinds(steps) == [e.Finish]
    assert isinstance(steps[0], e.Finish)
    assert steps[0].exit_code == 1
    assert "stays shut" in steps[0].text
    assert steps[0].unanswered == e.SayRetire("stopped by its operator"), "others say it on"


@pytest.mark.parametrize(
    "reason", [EndReason.POWEROFF, EndReason.DESTROYED, EndReason.REBOOT, EndReason.CRASH]
)
def test_a_guest_that_ends_on_purpose_is_announced(reason: EndReason) -> None:
    machine = protected()
    assert e.SayEnd(reason) in machine.handle(e.GuestEnded(reason), 0)
    steps = machine.handle(e.Retired(), 0)
    assert kinds(steps) == [e.Finish]


def test_a_lost_host_is_met_with_silence() -> None:
    (finish,) = protected().handle(e.GuestEnded(EndReason.HOST_LOST), 0)
    assert isinstance(finish, e.Finish)
    assert finish.exit_code == HostLostError.exit_code


def test_where_the_other_side_runs_the_guest_it_stays_paused_here() -> None:
    steps = protected().handle(e.Refused("active", "term 2 runs it"), 0)
    assert kinds(steps) == [e.PauseGuest, e.Finish]
    assert isinstance(steps[1], e.Finish)
    assert steps[1].exit_code == RefusedError.exit_code


def test_digests_that_come_while_the_standby_is_silent_are_not_lost() -> None:
    """They come once: were they passed over, no part would ever be staged after its return."""
    machine = p.Protection(BASE, 1, 0)
    machine.handle(e.Welcomed(same_standby=False, has_image=True), 0)
    machine.handle(e.Tick(1), 2000 * MS)
    assert machine.state is p.State.HOLDING
    machine.handle(e.KnownPages(), 2100 * MS)
    steps = machine.handle(e.Welcomed(same_standby=True, has_image=True), 2200 * MS)
    assert kinds(steps) == [e.LiveRound]


def test_a_standby_that_lives_and_never_acks_does_not_hold_the_output_for_ever() -> None:
    """It says hello again and again; that is no progress (invariant 9)."""
    machine = protected()
    (pause,) = machine.handle(e.Tick(100 * MS), 100 * MS)
    assert isinstance(pause, e.Pause)
    machine.handle(e.Staged(pause.arena, 1, 0, closed=2), 100 * MS)
    machine.handle(e.Shipped(pause.epoch, pause.part), 100 * MS)
    now = 100 * MS
    while machine.state is not p.State.RETIRING:
        now += 100 * MS
        assert now < 2 * BASE.give_up_after_ns, "never given up"
        steps = machine.handle(e.Tick(now), now)
        if e.SayHello(resume=True) in steps:
            machine.handle(e.Welcomed(same_standby=True, has_image=True), now)
    assert now > BASE.give_up_after_ns


def test_the_time_of_a_silence_does_not_count_as_lack_of_progress() -> None:
    machine = protected()
    silent = 2 * BASE.give_up_after_ns
    machine.handle(e.Tick(1), 1200 * MS)
    assert machine.state.value == "holding"
    machine.handle(e.Welcomed(same_standby=True, has_image=True), silent)
    machine.handle(e.Tick(silent), silent)
    assert machine.state is p.State.PROTECTED


def test_nor_does_a_silence_that_came_while_an_ack_was_awaited_in_vain() -> None:
    machine = protected()
    (pause,) = machine.handle(e.Tick(100 * MS), 100 * MS)
    assert isinstance(pause, e.Pause)
    machine.handle(e.Staged(pause.arena, 1, 0, closed=2), 100 * MS)
    machine.handle(e.Shipped(pause.epoch, pause.part), 100 * MS)
    machine.handle(e.Tick(5200 * MS), 5200 * MS)
    assert machine.reason.startswith("no ack")
    silent = 2 * BASE.give_up_after_ns
    machine.handle(e.Tick(5200 * MS), 7000 * MS)
    machine.handle(e.Welcomed(same_standby=True, has_image=True), silent)
    machine.handle(e.Tick(silent), silent)
    assert machine.state is p.State.PROTECTED


@pytest.mark.parametrize("reason", [EndReason.POWEROFF, EndReason.REBOOT])
def test_the_end_of_a_guest_is_said_to_a_silent_standby_too(reason: EndReason) -> None:
    """It may be back in a moment, with its replica: it would run a guest that was switched off."""
    machine = protected()
    machine.handle(e.Tick(1), 1200 * MS)
    assert machine.state is p.State.HOLDING
    assert e.SayEnd(reason) in machine.handle(e.GuestEnded(reason), 1300 * MS)
    assert e.SayEnd(reason) in machine.handle(e.Tick(1), 2000 * MS)
    (finish,) = machine.handle(e.Tick(1), 9000 * MS)
    assert isinstance(finish, e.Finish)
    assert finish.exit_code == 1


def test_where_nobody_has_a_replica_the_end_of_the_guest_is_the_end() -> None:
    (finish,) = p.Protection(BASE, 1, 0).handle(e.GuestEnded(EndReason.POWEROFF), 0)
    assert isinstance(finish, e.Finish)
    assert finish.exit_code == 0
    earlier = p.Protection(BASE, 1, 0, output_shut=True)  # by an engine whose standby may have one
    assert e.SayEnd(EndReason.POWEROFF) in earlier.handle(e.GuestEnded(EndReason.POWEROFF), 0)


def test_a_silent_standby_is_looked_for_until_it_is_gone_or_back() -> None:
    """It may be stopped first and killed later."""
    machine = protected(run_without_standby=True)
    assert e.ProveStandbyGone() in machine.handle(e.Tick(1), 1200 * MS)
    alarms = kinds(machine.handle(e.StandbyGone(proved=False, detail="stopped"), 1300 * MS))
    assert alarms == [e.Alarm]
    asked = [
        at
        for at in range(1300, 20_000, 100)
        if machine.handle(e.Tick(1), at * MS) == [e.ProveStandbyGone()]
    ]
    assert len(asked) in (3, 4)
    assert machine.handle(e.StandbyGone(proved=False, detail="stopped"), 20_000 * MS) == []
    assert e.OpenOutput in kinds(
        machine.handle(e.StandbyGone(proved=True, detail="gone"), 21_000 * MS)
    )
