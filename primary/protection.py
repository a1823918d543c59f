"""The state machine of protection: what the engine does next, and why. Pure: no I/O, no clock.

    connecting ─► syncing ─► protected ◄─► holding ─► unprotected
                     ▲            │           │           │     holding: the standby is silent; dirt kept, output shut
                     └────────────┴───────────┴───────────┘     unprotected: --standby-loss run, standby proved gone
                       a new standby begins with a full copy
    any ─► retiring ─► over       (SIGTERM, or protection given up: the standby drops its replica first)
    any ─► over                   (guest ended, refused by a higher term, host lost)

Invariants kept here (docs/architecture.md has all ten):

1. *Output commit.* `Release(n)` is given only by `Acked(final)` of the epoch that closed n, and flights are acked in
   the order they were staged; `OpenOutput` only after the standby has retired its replica (`Retired`,
   `ReplicaRejected`) or was proved gone (`StandbyGone`).
3. *No lost dirt.* A flight's dirt is settled only by the ack of its epoch's final part. Whatever ends a flight
   otherwise goes through `Abandon`, which gives all dirt back, and precedes any reuse of an arena.
   An arena is free again only when its part is acked *and* shipped (ZeroMQ has let go of the memory).

The driver (service.py) performs the instructions in order and reports back with events. At most one part is on the wire
at a time; others wait staged, one to an arena.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from checkpointd.errors import HostLostError, ProtectionLostError, RefusedError
from checkpointd.hypervisor.port import EndReason

from . import events as e
from .farewell import Farewell
from .flights import Flight, Flights
from .pacing import Pacer
from .rounds import LiveRounds

if TYPE_CHECKING:
    from .policy import Policy


class State(StrEnum):
    CONNECTING = "connecting"
    SYNCING = "syncing"
    PROTECTED = "protected"
    HOLDING = "holding"
    UNPROTECTED = "unprotected"
    RETIRING = "retiring"
    OVER = "over"


class Protection:
    """See the module's docstring. Drive it with handle(); read `state`, `deadline()`, `reason`."""

    def __init__(
        self, policy: Policy, first_epoch: int, now: int, *, output_shut: bool = False
    ) -> None:
        """`output_shut`: an engine before us left the guest's output shut."""
        self.policy = policy
        self.state = State.CONNECTING
        self.reason = "waiting for the secondary"
        self.epoch = first_epoch  # the epoch in the making
        self.part = 0
        self.acked_epoch: int | None = None
        self.output_shut = output_shut
        self.pacer = Pacer(policy.pace, now)
        self._rounds = self._new_rounds()  # for the epoch in the making
        self._live = True  # copying while the guest runs, until the dirty set fits an arena
        self._copying = False  # the standby has said what it has; parts may be staged
        self._flights = Flights(policy.arenas)
        self._standby_up = False
        self._met = False  # a standby has taken a session of this engine
        self._progress_ns = now
        self._silent_since: int | None = None  # until the next welcome
        self._looked_ns = now  # when it was last asked whether the standby is gone
        self._not_gone_told = False
        self._not_before = now  # of a live round, after one that failed
        self._hello_ns = now
        self._farewell: Farewell | None = None  # of the state retiring

    # ------------------------------------------------------------ what the driver reads

    @property
    def in_flight(self) -> int:
        """Parts staged and not yet acked."""
        return len(self._flights)

    @property
    def standby_up(self) -> bool:
        """The standby has taken the session and is heard."""
        return self._standby_up

    def deadline(self) -> int | None:
        """When (ns, the driver's clock) the next Tick is wanted at the latest."""
        if self._farewell is not None:
            return self._farewell.deadline
        if self._may_stage():
            return self._not_before if self._live else self.pacer.next_start
        return None

    # ------------------------------------------------------------ events

    def handle(self, event: e.Event, now: int) -> list[e.Instruction]:
        if self.state is State.OVER:
            return []
        out: list[e.Instruction] = []
        match event:
            case e.Tick():
                self._tick(event, now, out)
            case e.Welcomed():
                self._welcomed(event, now, out)
            case e.Refused():
                self._refused(event, out)
            case e.KnownPages():
                # Also while holding: they come once.
                self._copying = self.state in (State.SYNCING, State.HOLDING)
            case e.Staged():
                self._staged(event, now, out)
            case e.Overflow():
                self._overflow(event, now, out)
            case e.StageFailed():
                out.append(e.Alarm(f"epoch {self.epoch}: {event.where}; every dirty page is kept"))
                if event.pause_ns:
                    self.pacer.interval.paused(event.pause_ns, 0)
                self.pacer.failed(now)
                self._not_before = self.pacer.next_start
            case e.Shipped():
                self._shipped(event, now, out)
            case e.ShipFailed():
                self._ship_failed(event, now, out)
            case e.Acked():
                self._acked(event, now, out)
            case e.Lacking():
                self._lacking(event, now, out)
            case e.ReplicaRejected():
                self._rejected(event, now, out)
            case e.Retired():
                self._retired(out)
            case e.StandbyGone():
                self._standby_gone(event, out)
            case e.GuestEnded():
                self._guest_ended(event, now, out)
            case e.Unprotectable(why):
                if self.state is not State.RETIRING:
                    self._give_up(why, now, out)
            case e.StopAsked():
                self._retire(
                    "stopped by its operator", 0, "stopped: the guest runs unprotected", now, out
                )
        self._ship_head(now, out)
        self._stage(now, out)
        return out

    def _tick(self, event: e.Tick, now: int, out: list[e.Instruction]) -> None:
        if self._farewell is not None:
            if now >= self._farewell.deadline:
                self._finish(*self._farewell.unconfirmed(), out, self._farewell.unanswered)
            elif self._farewell.due(now):
                out.append(self._farewell.say(now))
            return
        silent_ns = now - event.heard_ns
        silent = silent_ns > self.policy.standby_timeout_ns
        if silent and self._silent_since is None:
            self._silent_since = now
        if self._standby_up and silent:
            why = f"the secondary has been silent for {silent_ns // 1_000_000} ms"
            self._lose_standby(why, now, out)
        elif (
            not self._standby_up
            and event.heard_ns
            and silent_ns < self.policy.standby_timeout_ns // 2
        ) and (
            self.state in (State.HOLDING, State.UNPROTECTED)
            and now - self._hello_ns > self.policy.ask_every_ns
        ):
            self._hello_ns = now
            out.append(e.SayHello(resume=True))
        head = self._flights.head
        if self._standby_up and head and head.shipped:
            if now - head.first_sent_ns > self.policy.ack_timeout_ns:
                self._lose_standby(f"no ack of epoch {head.epoch} within the limit", now, out)
            elif now - head.asked_ns > self.policy.ask_every_ns:
                self._ask(now, out)
        if (
            self.state in (State.SYNCING, State.PROTECTED)
            and now - self._progress_ns > self.policy.give_up_after_ns
        ):
            self._give_up("no progress within --give-up-after", now, out)
        if (
            self.state is State.HOLDING
            and silent
            and self.policy.run_without_standby
            and now - self._looked_ns > self.policy.look_every_ns
        ):
            self._looked_ns = now
            out.append(e.ProveStandbyGone())

    def _welcomed(self, event: e.Welcomed, now: int, out: list[e.Instruction]) -> None:
        self._standby_up = True
        if self._silent_since is not None:
            # Nobody could make progress then. A welcome by itself is none.
            self._progress_ns += now - self._silent_since
            self._silent_since = None
        if self._farewell is not None:
            if self._met and not event.same_standby:
                self._farewell.answerable = False
            elif self._farewell.answerable:
                # The first time it may have been lost with the connection.
                out.append(self._farewell.say(now))
            return
        self._met = True
        if self.state is not State.CONNECTING:
            if not event.same_standby:
                self._new_session("a new secondary: copying all memory", out)
                return
            if self.state is State.HOLDING:
                synced = self.acked_epoch is not None
                self._enter(State.PROTECTED if synced else State.SYNCING, "the secondary is back")
            self._flights.outlived(now)
            head = self._flights.head
            if head and head.sent:
                self._ask(now, out)
            return
        self._progress_ns = now
        self.epoch = max(self.epoch, event.last_epoch)
        self._begin_anew("copying all memory", out, bare=not event.has_image)
        if event.has_image:
            out.append(e.FetchKnown())
        else:
            self._copying = True

    def _refused(self, event: e.Refused, out: list[e.Instruction]) -> None:
        if event.code in ("active", "term"):
            out.append(e.PauseGuest())
            text = f"refused: {event.text}; the guest stays paused here, for the other side runs it"
        else:
            text = f"refused: {event.text}"
        self._finish(RefusedError.exit_code, text, out)

    def _staged(self, event: e.Staged, now: int, out: list[e.Instruction]) -> None:
        self._progress_ns = now
        final = not self._live
        if final or event.pages:
            flight = Flight(event.arena, self.epoch, self.part, final, event.closed, now)
            self._flights.take_off(flight)
            self.part += 1
        else:
            # Nothing to ship, yet the arena owns the dirt of the pages that the standby has already. No earlier
            # epoch is in flight that could settle it: a pause voids what is known (epoch.py).
            out.append(e.KeepDirt(event.arena))
        if final:
            if event.closed is not None:
                self.output_shut = True
            self.epoch += 1
            self.part = 0
            self._rounds = self._new_rounds()
            self.pacer.interval.paused(event.pause_ns, event.pages / self.policy.arena_pages)
            self.pacer.started(now)
        else:
            # Once the rounds are used up it is stopped all the same: either it fits now, or it is given up.
            enough = self._rounds.enough(event.pages, event.left)
            self._live = not (enough or self._rounds.used_up)

    def _overflow(self, event: e.Overflow, now: int, out: list[e.Instruction]) -> None:
        self._progress_ns = now
        if not self._live:
            self.pacer.interval.overflowed(event.dirty / self.policy.arena_pages)
            self.pacer.again(now)
        if not self._live and self.state is State.PROTECTED:
            out.append(
                e.Alarm(
                    f"epoch {self.epoch}: {event.dirty} dirty pages do not fit an arena of {self.policy.arena_pages}; "
                    "copying while the guest runs, its output held"
                )
            )
        self._live = True
        if self._rounds.used_up:
            self._give_up(
                f"the guest dirties memory faster than it can be shipped: {event.dirty} pages after "
                f"{self.policy.max_live_rounds} rounds; enlarge --arena or use a faster link",
                now,
                out,
            )

    def _new_rounds(self) -> LiveRounds:
        policy = self.policy
        return LiveRounds(policy.arena_pages, policy.max_live_rounds * max(policy.ram_pages, 1))

    def _shipped(self, event: e.Shipped, now: int, out: list[e.Instruction]) -> None:
        if self._flights.shipped(event.epoch, event.part, now) and self._flights.may_land:
            self._land(now, out)

    def _ship_failed(self, event: e.ShipFailed, now: int, out: list[e.Instruction]) -> None:
        # All of it is still in the arena: what arrived and what did not, the standby will say.
        if self._flights.shipped(event.epoch, event.part, now):
            text = f"shipping epoch {event.epoch} was cut short: {event.why}; will ship what is missing"
            out.append(e.Alarm(text))

    def _acked(self, event: e.Acked, now: int, out: list[e.Instruction]) -> None:
        if self._flights.acked(event.epoch, event.part) and self._flights.may_land:
            self._land(now, out)

    def _land(self, now: int, out: list[e.Instruction]) -> None:
        head = self._flights.land()
        self._progress_ns = now
        if not head.final:
            out.append(e.KeepDirt(head.arena))
            return
        out.append(e.Settle(head.arena, head.epoch))
        self.acked_epoch = head.epoch
        self.pacer.interval.acked(now - head.staged_ns)
        if head.closed is not None:
            out.append(e.Release(head.closed))
        if self.state is State.SYNCING:
            self._enter(State.PROTECTED, "")

    def _lacking(self, event: e.Lacking, now: int, out: list[e.Instruction]) -> None:
        ship = self._flights.ship_again(event.epoch, event.part, event.ranges, now)
        if ship is not None:
            out.append(ship)

    def _ask(self, now: int, out: list[e.Instruction]) -> None:
        ask = self._flights.ask(now)
        if ask is not None:
            out.append(ask)

    def _rejected(self, event: e.ReplicaRejected, now: int, out: list[e.Instruction]) -> None:
        # Connecting: the word is of a session that we have given up already. It may be of a new standby, and then
        # says nothing of the replica that the old one has.
        if self.state in (State.RETIRING, State.CONNECTING):
            return
        out.append(
            e.Alarm(
                f"the secondary retired its replica: {event.reason}; beginning again with a full copy"
            )
        )
        self._open("the replica was retired", out)
        self._new_session("beginning again after a failed audit", out)
        self._progress_ns = now

    def _retired(self, out: list[e.Instruction]) -> None:
        farewell = self._farewell
        if farewell is None or not farewell.answerable:
            return
        if not farewell.guest_ended:
            self._open("the replica was retired", out)
        self._finish(farewell.code, farewell.text, out)

    def _standby_gone(self, event: e.StandbyGone, out: list[e.Instruction]) -> None:
        if self.state is not State.HOLDING or not self.policy.run_without_standby:
            return
        if not event.proved:
            if not self._not_gone_told:
                out.append(
                    e.Alarm(f"output stays shut: the secondary may still live ({event.detail})")
                )
            self._not_gone_told = True
            return
        out.append(e.Abandon())
        self._reset_flights()
        self._open(f"--standby-loss run, and {event.detail}", out)
        self._enter(State.UNPROTECTED, "the secondary is gone")

    def _guest_ended(self, event: e.GuestEnded, now: int, out: list[e.Instruction]) -> None:
        if self._farewell is not None and self._farewell.guest_ended:
            return
        if event.reason is EndReason.HOST_LOST:
            # Say nothing: silence is what lets the standby act.
            self._finish(HostLostError.exit_code, "the guest's host is gone", out)
            return
        if self._nobody_has_it():
            self._finish(0, f"the guest has ended: {event.reason}", out)
            return
        code = 1 if event.reason is EndReason.CRASH else 0
        text = f"the guest has ended: {event.reason}"
        farewell = Farewell(e.SayEnd(event.reason), code, text, now, self.policy)
        self._say_last(farewell, str(event.reason), out)

    # ------------------------------------------------------------ moves

    def _enter(self, state: State, reason: str) -> None:
        self.state = state
        self.reason = reason

    def _may_stage(self) -> bool:
        return (
            self._copying
            and self._standby_up
            and self._flights.free_arena is not None
            and self.state in (State.SYNCING, State.PROTECTED)
        )

    def _stage(self, now: int, out: list[e.Instruction]) -> None:
        """Ask for the next part if its time has come; the driver performs it before the next event."""
        arena = self._flights.free_arena
        if arena is None or not self._may_stage():
            return
        if now < (self._not_before if self._live else self.pacer.next_start):
            return
        if self._live:
            out.append(e.LiveRound(arena, self.epoch, self.part))
            return
        self.pacer.due(now)
        close = self._flights.unreleased < self.policy.output_depth
        out.append(e.Pause(arena, self.epoch, self.part, close))

    def _ship_head(self, now: int, out: list[e.Instruction]) -> None:
        if self._standby_up and self.state in (State.SYNCING, State.PROTECTED):
            ship = self._flights.ship(now)
            if ship is not None:
                out.append(ship)

    def _nobody_has_it(self) -> bool:
        """No standby can have a replica: it was proved gone, or none was ever acked by it (which shuts the output)."""
        return self.state is State.UNPROTECTED or (
            self.state is State.CONNECTING and not self.output_shut
        )

    def _lose_standby(self, why: str, now: int, out: list[e.Instruction]) -> None:
        self._standby_up = False
        if self.state not in (State.SYNCING, State.PROTECTED):
            return
        self._enter(State.HOLDING, why)
        out.append(
            e.Alarm(f"{why}; the guest runs on, its output held" if self.output_shut else why)
        )
        if self.policy.run_without_standby:
            self._looked_ns = now
            self._not_gone_told = False
            out.append(e.ProveStandbyGone())

    def _new_session(self, reason: str, out: list[e.Instruction]) -> None:
        out.append(e.Abandon())
        self._reset_flights()
        out.append(e.NewSession())
        self._copying = False
        self._enter(State.CONNECTING, reason)

    def _begin_anew(self, reason: str, out: list[e.Instruction], *, bare: bool = False) -> None:
        out.append(e.Abandon())
        out.append(e.BeginAnew(bare))
        self._reset_flights()
        self.acked_epoch = None
        self._copying = False
        self._enter(State.SYNCING, reason)

    def _reset_flights(self) -> None:
        """After Abandon: what was in flight is pending again, and its epoch number is never used again."""
        self._flights.clear()
        self.epoch += 1
        self.part = 0
        self._rounds = self._new_rounds()
        self._live = True

    def _open(self, why: str, out: list[e.Instruction]) -> None:
        self.output_shut = False
        out.append(e.OpenOutput(why))

    def _give_up(self, why: str, now: int, out: list[e.Instruction]) -> None:
        out.append(e.Alarm(f"protection is given up: {why}"))
        text = f"protection was given up: {why}"
        self._retire(why, ProtectionLostError.exit_code, text, now, out)

    def _retire(
        self, reason: str, code: int, text: str, now: int, out: list[e.Instruction]
    ) -> None:
        if self.state is State.RETIRING:
            return
        if self._nobody_has_it():
            self._finish(code, text, out)
            return
        farewell = Farewell(e.SayRetire(reason), code, text, now, self.policy)
        self._say_last(farewell, reason, out)

    def _say_last(self, farewell: Farewell, reason: str, out: list[e.Instruction]) -> None:
        out.append(e.Abandon())
        self._reset_flights()
        self._farewell = farewell
        out.append(farewell.word)
        self._enter(State.RETIRING, reason)

    def _finish(
        self,
        code: int,
        text: str,
        out: list[e.Instruction],
        unanswered: e.SayRetire | e.SayEnd | None = None,
    ) -> None:
        self._farewell = None
        self._enter(State.OVER, text)
        out.append(e.Finish(code, text, unanswered))
