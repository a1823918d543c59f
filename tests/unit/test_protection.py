"""The protection machine against a model of guest, arenas, wire and standby, under every order of events.

The model performs the machine's instructions the way service.py does, on a guest of six pages, and checks after
each one that no dirt is lost, no output leaves early, and no arena is staged into while it is in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from checkpointd.errors import HostLostError, ProtectionLostError, RefusedError
from checkpointd.hypervisor.port import EndReason
from checkpointd.primary import events as e
from checkpointd.primary import protection as p
from checkpointd.primary.policy import Policy

MS = 1_000_000
PAGES = 6
ARENA_PAGES = 3


BASE = Policy(
    interval_ns=100 * MS,
    arenas=2,
    arena_pages=ARENA_PAGES,
    ram_pages=PAGES,
    output_depth=8,
    run_without_standby=False,
    standby_timeout_ns=1000 * MS,
    ack_timeout_ns=5000 * MS,
    give_up_after_ns=60_000 * MS,
    max_live_rounds=30,
)


@dataclass
class Part:
    epoch: int
    part: int
    final: bool
    pages: dict[int, int]
    closed: int | None


@dataclass
class Standby:
    """Buffers parts, acks them, commits whole epochs."""

    committed: dict[int, int] | None = None
    overlay: dict[int, int] = field(default_factory=dict)
    making: int = 0
    retired: bool = False

    def receive(self, part: Part) -> None:
        if part.epoch != self.making:
            self.overlay = {}
            self.making = part.epoch
        self.overlay.update(part.pages)
        if part.final:
            self.committed = (self.committed or {}) | self.overlay
            self.overlay = {}


class Driver(RuleBasedStateMachine):
    """Guest, driver and standby around one machine."""

    depth = 8
    run_without = False

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000 * MS
        self.guest = dict.fromkeys(range(PAGES), 0)
        self.version = 0
        self.log: set[int] = set()
        self.pending: set[int] = set()
        self.carried: list[set[int]] = [set(), set()]
        self.unsettled: set[int] = set()
        self.arenas: list[Part | None] = [None, None]
        self.in_use = [False, False]  # held by a flight, or by ZeroMQ
        self.wire: Part | None = None  # handed to the shipper, not yet arrived
        self.unreported: Part | None = None  # arrived; Shipped not yet reported
        self.acks: list[Part] = []
        self.standby = Standby()
        self.standby_alive = True
        self.heard = self.now
        self.closed = 0
        self.snapshots: dict[int, dict[int, int]] = {}  # output epoch -> guest at its close
        self.released = 0
        self.shut = False
        self.finished: e.Finish | None = None
        self.synced = False  # the standby holds every page the engine does not
        self.machine = p.Protection(
            replace(BASE, output_depth=self.depth, run_without_standby=self.run_without),
            1,
            self.now,
        )
        self.prove_gone = 0
        self.said_last = False
        self.fetching = False  # the standby's page digests were asked for
        self.known: dict[int, int] = {}

    # ---------------------------------------------------------------- performing

    def feed(self, event: e.Event) -> None:
        todo = list(self.machine.handle(event, self.now))
        while todo:
            follow = self.perform(todo.pop(0))
            if follow is not None:
                todo += self.machine.handle(follow, self.now)

    def stage(self, arena: int, part: int, epoch: int, *, final: bool, close: bool) -> e.Event:
        assert not self.in_use[arena], "staged into an arena that is in use"
        assert not self.carried[arena], "an arena is staged into while it owns dirt"
        self.pending |= self.log
        self.log = set()
        if final and len(self.pending) > ARENA_PAGES:
            return e.Overflow(len(self.pending))
        taken = set(sorted(self.pending)[:ARENA_PAGES])
        self.pending -= taken
        self.carried[arena] = set(taken)
        if (
            not final
        ):  # a page that the standby has as it is now is not staged, yet its bit is consumed
            taken = {n for n in taken if self.known.get(n) != self.guest[n]}
        closed = None
        if final and close:
            self.closed += 1
            closed = self.closed
            self.shut = True
            self.snapshots[closed] = dict(self.guest)
        if taken or final:
            self.in_use[arena] = True
            self.arenas[arena] = Part(epoch, part, final, {n: self.guest[n] for n in taken}, closed)
        return e.Staged(arena, len(taken), len(self.pending), closed)

    def perform(self, step: e.Instruction) -> e.Event | None:
        match step:
            case e.LiveRound(arena, epoch, part):
                return self.stage(arena, part, epoch, final=False, close=False)
            case e.Pause(arena, epoch, part, close):
                return self.stage(arena, part, epoch, final=True, close=close)
            case e.Ship(arena, epoch, part, final):
                staged = self.arenas[arena]
                assert staged is not None
                assert (staged.epoch, staged.part, staged.final) == (epoch, part, final)
                assert self.wire is None, "two parts on the wire at once"
                self.wire = staged
            case e.KeepDirt(arena):
                self.unsettled |= self.carried[arena]
                self.carried[arena] = set()
                self.free(arena)
            case e.Settle(arena):
                self.carried[arena] = set()
                self.unsettled = set()
                self.free(arena)
            case e.Release(closed):
                assert self.standby.committed is not None
                snapshot = self.snapshots[closed]
                assert closed > self.released
                self.released = closed
                newest = max(
                    (n for n, s in self.snapshots.items() if s == self.standby.committed), default=0
                )
                assert snapshot == self.standby.committed or newest > closed, (
                    "output released before its ack"
                )
            case e.Abandon():
                self.wire = self.unreported = None
                self.acks = []
                self.pending |= self.carried[0] | self.carried[1] | self.unsettled
                self.carried = [set(), set()]
                self.unsettled = set()
                for arena in (0, 1):
                    self.free(arena)
            case e.FetchKnown():
                self.fetching = True
            case e.BeginAnew():
                self.fetching = False
                self.known = {}
                self.pending = set(range(PAGES))
                self.synced = True
            case e.OpenOutput():
                assert self.standby.retired or not self.standby_alive, (
                    "output opened beside a live replica"
                )
                self.shut = False
            case e.ProveStandbyGone():
                self.prove_gone += 1
            case e.SayRetire() | e.SayEnd():
                self.said_last = True
            case e.Finish():
                self.finished = step
        return None

    def free(self, arena: int) -> None:
        self.in_use[arena] = self.unreported is not None and self.arenas[arena] is self.unreported
        assert not self.in_use[arena], "freed before ZeroMQ let go"
        self.arenas[arena] = None

    # ---------------------------------------------------------------- what may happen

    @initialize(image=st.booleans())
    def meet(self, image: bool) -> None:
        if image:  # of an engine before us
            self.standby.committed = dict(self.guest)
        self.feed(e.Welcomed(same_standby=False, has_image=image))

    @rule(page=st.integers(0, PAGES - 1))
    def guest_writes(self, page: int) -> None:
        self.version += 1
        self.guest[page] = self.version
        self.log.add(page)

    @rule(ms=st.sampled_from([1, 50, 100, 600, 1500]), heard=st.booleans())
    def time_passes(self, ms: int, heard: bool) -> None:
        self.now += ms * MS
        if heard and self.standby_alive:
            self.heard = self.now
        self.feed(e.Tick(self.heard))

    @precondition(lambda self: self.fetching)
    @rule()
    def digests_arrive(self) -> None:
        self.fetching = False
        self.known = dict(self.standby.committed or {})
        self.feed(e.KnownPages())

    @precondition(lambda self: self.wire and self.standby_alive and not self.standby.retired)
    @rule(report_first=st.booleans())
    def part_arrives(self, report_first: bool) -> None:
        assert self.wire is not None
        part, self.wire = self.wire, None
        self.standby.receive(part)
        if report_first:
            self.feed(e.Shipped(part.epoch, part.part))
        else:
            self.unreported = part
        self.acks.append(part)

    @precondition(lambda self: self.wire)
    @rule()
    def part_is_lost(self) -> None:
        assert self.wire is not None
        part, self.wire = self.wire, None
        self.feed(e.ShipFailed(part.epoch, part.part, "cut"))

    @precondition(lambda self: self.unreported)
    @rule()
    def shipper_reports(self) -> None:
        assert self.unreported is not None
        part, self.unreported = self.unreported, None
        self.feed(e.Shipped(part.epoch, part.part))

    @precondition(lambda self: self.acks and self.standby_alive)
    @rule(keep=st.booleans())
    def ack_arrives(self, keep: bool) -> None:
        part = self.acks[0] if keep else self.acks.pop(0)
        self.feed(e.Acked(part.epoch, part.part))

    @precondition(lambda self: self.standby_alive and not self.standby.retired)
    @rule()
    def standby_asks_again(self) -> None:
        head = self.machine._flights.head
        if head and self.wire is None and self.unreported is None and not self.acks:
            self.feed(e.Lacking(head.epoch, head.part, None))

    @precondition(lambda self: self.standby_alive and not self.standby.retired)
    @rule()
    def connection_returns(self) -> None:
        self.heard = self.now
        self.feed(e.Welcomed(same_standby=True, has_image=True))

    @precondition(lambda self: self.standby_alive)
    @rule()
    def standby_dies(self) -> None:
        self.standby_alive = False
        self.wire = None
        self.acks = []

    @precondition(lambda self: not self.standby_alive)
    @rule(image=st.booleans())
    def standby_is_replaced(self, image: bool) -> None:
        self.standby, self.standby_alive, self.heard = Standby(), True, self.now
        self.synced = False
        self.feed(e.Welcomed(same_standby=False, has_image=image))
        if self.machine.state is p.State.CONNECTING:  # it wants a session of its own
            self.feed(e.Welcomed(same_standby=True, has_image=image))

    @precondition(lambda self: self.prove_gone)
    @rule()
    def standby_is_looked_for(self) -> None:
        self.prove_gone = 0
        self.feed(e.StandbyGone(proved=not self.standby_alive, detail="looked"))

    @precondition(
        lambda self: (
            self.standby_alive and self.standby.committed is not None and not self.said_last
        )
    )
    @rule()
    def audit_fails(self) -> None:
        self.standby = Standby(retired=True)
        self.acks = []
        self.feed(e.ReplicaRejected("digest differs"))
        self.standby.retired = False
        self.synced = False
        if self.machine.state is p.State.CONNECTING:
            self.feed(e.Welcomed(same_standby=True, has_image=False))

    @rule()
    def hypervisor_fails(self) -> None:
        self.feed(e.StageFailed("harvest failed: Input/output error"))

    @precondition(lambda self: self.said_last and self.standby_alive)
    @rule()
    def standby_retires(self) -> None:
        self.standby = Standby(retired=True)
        self.feed(e.Retired())

    @precondition(lambda self: self.version > 12)
    @rule()
    def operator_stops(self) -> None:
        self.feed(e.StopAsked())

    # ---------------------------------------------------------------- what must hold

    @invariant()
    def no_dirt_is_lost(self) -> None:
        if not self.synced or not self.standby_alive or self.standby.retired or self.said_last:
            return
        owned = self.log | self.pending | self.carried[0] | self.carried[1] | self.unsettled
        replica = self.standby.committed or {}
        for page, version in self.guest.items():
            assert replica.get(page) == version or page in owned, f"page {page} is lost"

    @invariant()
    def held_while_protected(self) -> None:
        if self.machine.state is p.State.PROTECTED:
            assert self.shut


class DepthOne(Driver):
    depth = 1


class RunWithout(Driver):
    run_without = True


TestDriver = Driver.TestCase
TestDepthOne = DepthOne.TestCase
TestRunWithout = RunWithout.TestCase
for case in (TestDriver, TestDepthOne, TestRunWithout):
    case.settings = settings(
        max_examples=150, stateful_step_count=60, deadline=None, derandomize=True
    )
del case  # or it would be collected as a test, again


# -------------------------------------------------------------------- single stories


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


def test_unconfirmed_retirement_leaves_the_output_shut() -> None:
    machine = protected()
    machine.handle(e.StopAsked(), 10 * MS)
    steps = machine.handle(e.Tick(10 * MS), 6000 * MS)
    assert kinds(steps) == [e.Finish]
    assert isinstance(steps[0], e.Finish)
    assert steps[0].exit_code == 1
    assert "stays shut" in steps[0].text


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
