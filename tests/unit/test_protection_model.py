"""The protection machine against a model of guest, arenas, wire and standby, under every order of events.

The model performs the machine's instructions the way service.py does, on a guest of six pages, and checks after
each one that no dirt is lost, no output leaves early, and no arena is staged into while it is in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from policies import ARENA_PAGES, BASE, MS, PAGES

from checkpointd.primary import events as e
from checkpointd.primary import protection as p


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
