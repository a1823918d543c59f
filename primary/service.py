"""The driver of one domain's protection: threads, sockets and the native calls around the state machine.

The epoch loop runs in the caller's thread; the control link and the shipper have one each. Everything that happens
reaches the loop as an event in one queue, so protection.py sees one event at a time.
"""

from __future__ import annotations

import errno
import logging
import queue
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpointd import faults
from checkpointd.errors import CheckpointdError, HypervisorError, NativeError
from checkpointd.hypervisor.port import EndReason
from checkpointd.native import TOO_MANY, DigestKey
from checkpointd.wire import messages
from checkpointd.wire.messages import SEED_BYTES

from . import events as e
from . import protection as p
from .epoch import EpochTaker
from .figures import Figures
from .policy import Policy, pace_of
from .reducing import Reducer
from .shipping import Known, Session, Shipper
from .watchdog import Watchdog
from .worth import Always, Worth

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.authority.fence import Fence
    from checkpointd.daemon.config import PrimaryOptions
    from checkpointd.daemon.metrics import PrimaryMetrics
    from checkpointd.hypervisor.port import Domain, HostIdentity
    from checkpointd.native import Outcome
    from checkpointd.wire.initiator import BulkLink, ControlLink


log = logging.getLogger(__name__)

_PHASES = {state: number for number, state in enumerate(p.State)}  # as heartbeats carry it
ARENA_PAGE = 4096  # octets
# What a part takes at the secondary beside its pages: 24 octets a page in the lists of pfns and 0.6 KiB in each MiB for
# heads and frames, together less than this part of the arena; and context and audit, less than so many octets.
PART_SHARE = 64
PART_TAIL = 2 << 20
# s; an abandoned send ends within one slice of the shipper's waiting, and closing a socket with linger 0 at once.
ABANDON_TIMEOUT = 30.0
# s; how long finding the secondary's process gone may take: it is silent already, so either it is or it is not.
GONE_TIMEOUT = 1.0
# s; between two readings of the output buffer for the metrics: they cost a call to the host.
OUTPUT_STATS_EVERY = 0.5
# s; between two questions for frames that the guest gave back: it may want them again at once, and a balloon driver
# that gets none waits a second.
GIVE_BACK_EVERY = 0.05


@dataclass(frozen=True, slots=True)
class Ending:
    exit_code: int
    text: str
    guest: EndReason | None  # why the guest is no more, where that is what ended it


@dataclass(frozen=True, slots=True)
class _Word:
    """What the secondary said, and in which session: that may be over by the time that the loop comes to it."""

    session: int
    message: messages.Message


def _reducer_of(options: PrimaryOptions) -> Reducer | None:
    if options.reduce == "off":
        return None
    return Reducer(Always() if options.reduce == "always" else Worth(), options.delta_history)


def _last_word(step: e.SayRetire | e.SayEnd) -> messages.Retire | messages.End:
    if isinstance(step, e.SayRetire):
        return messages.Retire(step.reason)
    return messages.End(step.reason)


class PrimaryService:
    """Protects one attached domain until run() returns. `links` makes the two links once their callbacks are known."""

    def __init__(
        self,
        options: PrimaryOptions,
        domain: Domain,
        *,
        term: int,
        first_epoch: int,
        reserve: Callable[[int], None],
        control: Callable[
            [Callable[[messages.Message], None], Callable[[BaseException], None]], ControlLink
        ],
        bulk: BulkLink,
        watch: Callable[[HostIdentity], Fence],
        metrics: PrimaryMetrics,
        introduce: Callable[[int], object] = lambda session: None,
    ) -> None:
        self._options = options
        self._domain = domain
        self._term = term
        self._reserve = reserve
        self._watch = watch
        self._metrics = metrics
        self._introduce = introduce  # gets each session before its first word goes out
        self._draw_session()
        self._events: queue.SimpleQueue[e.Event | Known | _Word | BaseException] = (
            queue.SimpleQueue()
        )
        info = domain.info
        # Its dirty set cannot be larger than the guest.
        arena_pages = min(options.arena // ARENA_PAGE, info.nr_pfns)
        self._machine = p.Protection(
            Policy(
                pace=pace_of(options),
                arenas=options.arenas,
                arena_pages=arena_pages,
                ram_pages=info.ram_pages,
                output_depth=domain.output.depth,
                run_without_standby=options.standby_loss == "run",
                standby_timeout_ns=options.standby_timeout,
                ack_timeout_ns=options.ack_timeout,
                give_up_after_ns=options.give_up_after,
                max_live_rounds=options.max_live_rounds,
            ),
            first_epoch,
            time.monotonic_ns(),
            output_shut=domain.output.stats().shut,
        )
        self._taker = EpochTaker(
            domain.table,
            info.nr_pfns,
            self._session.key,
            arenas=options.arenas,
            arena_pages=arena_pages,
            mapping_budget=options.mapping_budget,
            audit_pages=options.audit_pages,
            suspend_timeout_ns=options.suspend_timeout,
            detect_zero=options.zero_pages,
        )
        self._control = control(self._deliver, self._events.put)
        self._shipper = Shipper(
            bulk, self._events.put, self._events.put, metrics.sent_bytes, _reducer_of(options)
        )
        self._standby: HostIdentity | None = None
        self._standby_watch: Fence | None = None
        self._log_on = False
        self._progress = 0
        self._ending: Ending | None = None
        self._figures = Figures(metrics, info.ram_pages)
        self._ship_ns = 0
        self._output_read = 0.0
        self._frames_given_back = 0.0
        self.on_progress: Callable[[int, int], None] | None = None  # (pages copied, pages of RAM)
        self.on_state: Callable[[str], object] | None = None

    # ------------------------------------------------------------ from other threads

    def stop(self) -> None:
        """End protection in order; run() returns once the secondary has retired its replica or the limit is over."""
        self._events.put(e.StopAsked())

    def status(self) -> dict[str, Any]:
        """A snapshot for people and programs; safe from any thread."""
        machine, info = self._machine, self._domain.info
        return {
            "role": "primary",
            "uuid": info.uuid,
            "domid": info.domid,
            "domain": info.name,
            "hypervisor": info.hypervisor,
            "state": str(machine.state),
            "reason": machine.reason,
            "term": self._term,
            "epoch": machine.epoch,
            "acked_epoch": machine.acked_epoch,
            "in_flight": machine.in_flight,
            "interval_ns": machine.pacer.interval.ns,
            **self._figures.status(),
            "sent_bytes": self._shipper.sent_bytes,
            "staged_bytes": self._shipper.staged_bytes,
            "output_shut": machine.output_shut,
            "standby_loss": self._options.standby_loss,
            "secondary": str(self._options.secondary),
            "unsafe": [
                *self._options.unsafe,
                *self._domain.unsafe,
                *(f"faults armed: {rule.point}" for rule in faults.armed()),
            ],
        }

    def not_ready(self) -> list[str]:
        """Why the guest is not protected at this moment; empty if it is."""
        machine = self._machine
        if machine.state is p.State.PROTECTED:
            return []
        return [f"{machine.state}: {machine.reason}" if machine.reason else str(machine.state)]

    # ------------------------------------------------------------ the loop

    def run(self) -> Ending:
        options = self._options
        # An idle loop turns once a heartbeat, a pause may last as long as the guest may take to stop.
        limit = (options.suspend_timeout + options.give_up_after + options.heartbeat) / 1e9
        watchdog = Watchdog(limit, lambda: self._progress)
        self._shipper.start()
        self._control.start()
        self._control.hello(self._hello())
        watchdog.start()
        try:
            while self._ending is None:
                self._turn()
            return self._ending
        finally:
            watchdog.stop()
            self._close()

    def _turn(self) -> None:
        now = time.monotonic_ns()
        wait = self._options.heartbeat
        deadline = self._machine.deadline()
        if deadline is not None:
            wait = min(wait, max(0, deadline - now))
        try:
            event = self._events.get(timeout=wait / 1e9) if wait else self._events.get_nowait()
        except queue.Empty:
            event = e.Tick(self._control.last_heard_ns or 0)
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, e.Shipped):
            self._metrics.shipped(time.monotonic_ns() - self._ship_ns)
        if isinstance(event, Known):
            self._taker.known = event.digests
            if event.digests is not None:
                self._taker.mappings.replica_has(event.digests)
            event = e.KnownPages()
        self._progress += 1
        said = self._understand(event) if isinstance(event, _Word) else event
        if said is not None:
            self._handle(said)
        ended = self._domain.ended() if self._ending is None else None
        if ended is not None:
            self._handle(e.GuestEnded(ended))
        elif self._ending is None and (trouble := self._domain.trouble):
            self._handle(e.Unprotectable(trouble))
        self._observe()

    def _handle(self, event: e.Event) -> None:
        before = self._machine.state
        instructions = deque(self._machine.handle(event, time.monotonic_ns()))
        while instructions:
            self._progress += 1  # each has the watchdog's limit for itself
            follow_up = self._perform(instructions.popleft())
            if follow_up is not None:
                instructions.extend(self._machine.handle(follow_up, time.monotonic_ns()))
        if self._machine.state is not before:
            log.info(
                "%s -> %s%s",
                before,
                self._machine.state,
                f": {self._machine.reason}" * bool(self._machine.reason),
            )
            self._metrics.state(str(self._machine.state))
            if self.on_state:
                self.on_state(str(self._machine.state))
            if self._machine.state is p.State.PROTECTED:
                self._taker.known = None

    def _perform(self, step: e.Instruction) -> e.Event | None:
        match step:
            case e.Pause(arena, epoch, _, close_output):
                self._reserve(epoch)
                return self._pause(arena, epoch, close_output=close_output)
            case e.LiveRound(arena, epoch):
                self._reserve(epoch)
                return self._live_round(arena)
            case e.Ship(arena):
                self._ship_ns = time.monotonic_ns()
                self._shipper.ship(self._session, step, self._taker.frames(arena))
            case e.KeepDirt(arena):
                self._taker.dirty.keep(arena)
            case e.Settle(arena, epoch):
                self._taker.dirty.settle(arena)
                self._figures.acked(epoch)
            case e.Release(closed):
                faults.point("primary.before-release")
                self._domain.output.release(closed)
                faults.point("primary.after-release")
            case e.Abandon():
                if not self._shipper.abandon(ABANDON_TIMEOUT):
                    raise CheckpointdError(
                        "the shipping thread is stuck; ending, so that no arena is overwritten"
                    )
                self._taker.dirty.give_back()
                self._figures.abandoned()
            case e.NewSession():
                self._draw_session()
                self._taker.key = self._session.key
                self._control.hello(self._hello())
            case e.BeginAnew(bare):
                self._begin_anew(bare=bare)
            case e.FetchKnown():
                self._shipper.fetch_known(self._session, self._domain.info.nr_pfns)
            case e.OpenOutput(why):
                log.warning("the guest's output is open: %s", why)
                self._domain.output.open()
            case e.SayHello(resume):
                self._control.hello(self._hello(resume=resume))
            case e.AskMissing(epoch, part):
                self._control.send(messages.Query(epoch, part))
            case e.SayRetire() | e.SayEnd():
                self._control.send(_last_word(step))
            case e.ProveStandbyGone():
                return self._prove_gone()
            case e.PauseGuest():
                self._domain.pause()
            case e.Alarm(text):
                log.error("%s", text)
                self._metrics.alarm()
            case e.Finish(code, text, unanswered):
                if unanswered is not None:
                    self._domain.leave_word(_last_word(unanswered))
                self._ending = Ending(code, text, self._domain.ended())
        return None

    # ------------------------------------------------------------ instructions that need more than a line

    def _draw_session(self) -> None:
        self._seed = secrets.token_bytes(SEED_BYTES)
        number = secrets.randbits(64) or 1  # 0 means none
        self._session = Session(number, self._term, DigestKey(self._seed))
        self._introduce(number)

    def _begin_anew(self, *, bare: bool) -> None:
        if not self._log_on:
            self._domain.enable_log()
            self._log_on = True
        self._taker.dirty.begin_anew()
        self._taker.known = None
        if bare:
            self._taker.mappings.replica_has(None)
        self._figures.copied = 0

    def _pause(self, arena: int, epoch: int, *, close_output: bool) -> e.Event:
        faults.point("primary.before-pause")
        outcome = self._taker.take(arena, close_output=close_output)
        self._figures.paused(outcome)
        if outcome.resume_status not in (0, -errno.EHOSTDOWN, -errno.ESHUTDOWN):
            # Our death makes the host resume it, with its output shut: invariant 5.
            raise HypervisorError(f"ending, since the guest could not be resumed: {outcome.fault}")
        if outcome.status:
            return self._failed(outcome)
        faults.point("primary.after-pause")
        self._figures.staged(epoch)
        pages = outcome.pages + outcome.zeros + outcome.gone
        closed = outcome.closed_output if close_output else None
        return e.Staged(arena, pages, outcome.remaining, closed, outcome.pause_ns)

    def _live_round(self, arena: int) -> e.Event:
        faults.point("primary.before-round")
        outcome = self._taker.live_round(arena)
        if outcome.status:
            return self._failed(outcome)
        self._figures.live_round(outcome)
        if self.on_progress:
            self.on_progress(self._figures.copied, self._domain.info.ram_pages)
        return e.Staged(arena, outcome.pages + outcome.zeros + outcome.gone, outcome.remaining)

    def _failed(self, outcome: Outcome) -> e.Event:
        if outcome.status == TOO_MANY:
            return e.Overflow(outcome.dirty)
        ended = self._domain.ended()
        if ended is None and outcome.status in (-errno.ESHUTDOWN, -errno.EHOSTDOWN):
            ended = EndReason.HOST_LOST
        if ended is not None:
            return e.GuestEnded(ended)
        self._metrics.failed()
        return e.StageFailed(outcome.fault, outcome.pause_ns)

    def _prove_gone(self) -> e.StandbyGone:
        if self._standby_watch is None:
            return e.StandbyGone(proved=False, detail="it was never met")
        result = self._standby_watch.fence(GONE_TIMEOUT)
        return e.StandbyGone(proved=result.fenced, detail=result.detail)

    def _hello(self, *, resume: bool = False) -> messages.Hello:
        return messages.Hello(
            session=self._session.number,
            term=self._term,
            info=self._domain.info,
            interval_ns=self._machine.pacer.interval.ns,
            digest_seed=self._seed,
            static_records=self._domain.static_records(),
            first_epoch=self._machine.epoch,
            resume=resume,
        )

    # ------------------------------------------------------------ messages

    def _deliver(self, message: messages.Message) -> None:
        """On the link's thread, which goes on in the old session until it comes to the new Hello."""
        if not isinstance(message, messages.Echo):
            self._events.put(_Word(self._control.session, message))

    def _understand(self, word: _Word) -> e.Event | None:
        if word.session != self._session.number:
            return None  # of a session that was given up: nothing in it is about the new one
        match message := word.message:
            case messages.Welcome():
                return self._welcomed(message)
            case messages.Refused():
                return e.Refused(message.code, message.text)
            case messages.Ack():
                return e.Acked(message.epoch, message.part)
            case messages.Missing():
                return e.Lacking(message.epoch, message.part, message.ranges)
            case messages.FullCopyWanted():
                return e.ReplicaRejected(message.reason)
            case messages.Retired():
                return e.Retired()
            case messages.Committed():
                self._figures.has_committed(message.epoch, message.commit_ns)
        return None

    def _welcomed(self, message: messages.Welcome) -> e.Event:
        same = self._standby == message.secondary
        if not same:
            if self._standby_watch is not None:
                self._standby_watch.close()
            self._standby = message.secondary
            self._standby_watch = self._watch(message.secondary)
        arena = self._taker.arenas[0].capacity * ARENA_PAGE
        most = arena + arena // PART_SHARE + PART_TAIL
        if most > message.epoch_limit_bytes:
            return e.Refused(
                "memory",
                f"the secondary keeps at most {message.epoch_limit_bytes} octets of an epoch, and one may take {most}: "
                "make --arena smaller or its --epoch-memory larger",
            )
        return e.Welcomed(
            same_standby=same, has_image=message.has_image, last_epoch=message.last_epoch
        )

    # ------------------------------------------------------------ looking after things

    def _observe(self) -> None:
        machine = self._machine
        self._control.progress(machine.epoch, _PHASES[machine.state], self._progress)
        now = time.monotonic()
        if now - self._frames_given_back >= GIVE_BACK_EVERY:
            self._frames_given_back = now
            self._give_back_frames()
        if now - self._output_read >= OUTPUT_STATS_EVERY and self._ending is None:
            self._output_read = now
            self._figures.mappings(self._taker.mappings.stats())
            self._metrics.peer_connected(machine.standby_up)
            self._figures.lag(machine.epoch, machine.acked_epoch)
            try:
                self._figures.output(self._domain.output.stats())
            except CheckpointdError as error:
                log.debug("output buffer not read: %s", error)

    def _give_back_frames(self) -> None:
        """What the guest has ballooned out: as long as we map them, frames count as the guest's, and it cannot grow."""
        try:
            self._taker.mappings.refresh()
        except HypervisorError as error:
            # Nothing is lost: what could not be told counts as changed, and what could not be unmapped is not used.
            self._metrics.failed()
            log.warning("mappings stay as they are for now: %s", error)

    def _close(self) -> None:
        self._shipper.close()
        self._control.close()
        if self._standby_watch is not None:
            self._standby_watch.close()
        try:
            self._taker.close()
        except NativeError as error:
            # What ended the shipper holds frames in its traceback. The memory goes with the process.
            log.warning("%s", error)
