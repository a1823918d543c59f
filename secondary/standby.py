"""The state machine of one domain's standby: when to ack, commit and activate. Pure: no I/O, no
clock.

    waiting ─► syncing ─► standby ─► probing ─► fencing ─► activating ─► active
                  ▲          ▲ ▲        │ ▲        │            │
                  │          │ └────────┤ │        ▼            ▼
               retired ◄─────┘    engine_lost   failed ◄────────┘     (failed: tried again)

The driver performs the instructions in order and reports what came of them as events. An event that
belongs to a session, an attempt or an epoch that is over changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from checkpointd.authority.terms import Role, TermRecord
from checkpointd.hypervisor.port import EndReason

from .events import (
    Alarm,
    BeginSession,
    Commit,
    CommitDone,
    CommitFailed,
    DropReplica,
    EndReceived,
    EngineLostHeard,
    EpochGivenUp,
    Event,
    Fence,
    FenceDone,
    ForgetActivation,
    GuestStarted,
    Heard,
    HelloReceived,
    Instruction,
    MemoryShort,
    PartWhole,
    Probe,
    ProbeDone,
    ProtocolFault,
    Queried,
    ResumeActivation,
    RetireReceived,
    SendAck,
    SendCommitted,
    SendEngineLostHeard,
    SendFullCopyWanted,
    SendRefused,
    SendRetired,
    SendWelcome,
    StartFailed,
    StartGuest,
    StoreTerm,
    SuspendSession,
    TermFailed,
    TermStored,
    Tick,
)

if TYPE_CHECKING:
    from .activations import Activation


class State(StrEnum):
    WAITING = "waiting"  # no session in this life, no replica
    SYNCING = "syncing"  # a session, but no committed epoch: never activated
    STANDBY = "standby"  # the replica is one committed epoch
    PROBING = "probing"  # the primary is silent: what is there of its host?
    ENGINE_LOST = "engine-lost"  # the host lives, the engine is gone: it may be started again
    FENCING = "fencing"  # the old guest is being stopped: there is no way back but its failure
    ACTIVATING = "activating"  # fenced: the term is being stored, then the guest started
    ACTIVE = "active"  # the guest was started here, in this life or an earlier one
    RETIRED = "retired"  # the replica is thrown away and will never be activated
    FAILED = "failed"  # fence, term or start failed: `reason` says why; tried again
    UNFINISHED = "unfinished"  # an earlier life fenced, or began to, and died: there is no replica


# A failed fence, term or start is tried again after this time: soon enough for a standby that alone
# can go on, seldom enough not to hammer a toolstack that is in trouble.
RETRY_NS = 1_000_000_000
# What an earlier life left is looked at again so often: what is missing, an operator mends by hand.
RESUME_RETRY_NS = 10_000_000_000

_HOLDING = (State.FENCING, State.FAILED)
_WITH_REPLICA = (State.STANDBY, State.PROBING, State.ENGINE_LOST)


@dataclass(frozen=True, slots=True)
class Policy:
    engine_restart_ns: int  # how long a lost engine is waited for while its host lives


class Standby:
    """Invariants kept here (docs/architecture.md has all ten):

    1. *An ack is a promise.* SendAck is given only by PartWhole: whole, verified, memory reserved.
       The acked epoch is in `pending` until its commit is done, and the guest is not started before
       `pending` is empty.
    2. *Whole epochs.* Only a committed epoch is activated: never from syncing, and never one of an
       earlier life of this process, whose acked epochs died with its memory. A session that says it
       resumes, and that this life does not know, ships changes to a replica that is not here:
       nothing of it is acked, it has to begin anew.
    4. *One runner.* Activation goes: silence, probe (host alive and engine gone: wait for a restart
       within the limit), every acked epoch committed and audited, fence proved, term on stable
       storage, guest started. Each step is an instruction whose success is an event, and the next
       is given by that event only. Once Fence is given, a returning primary gets no answer until
       its result is known: proved means "active" for ever, failed means that nothing has happened
       and the primary goes on.
    9. *Silence alone* leads to Probe, or the word of the watcher on the primary's host that the
       engine is gone: then a new one is waited for, within the limit, for as long as the watcher is
       heard; its silence leads to Probe like any other. An engine that says that its guest's host is lost is deaf to
       us from there on, no more; so is one whose guest was destroyed after we tried to fence it,
       for that may have been our own doing.

    Never activated: after Retired was sent (or the guest's End taken), after a failed audit, after a
    higher term than the replica's was taken on.
    A Retire that comes while a fence is under way is held like any other word: it was not answered,
    so the primary has opened nothing.
    """

    def __init__(
        self, policy: Policy, record: TermRecord, left: Activation | None = None
    ) -> None:
        """What stable storage says of this domain: `record`, and `left`, an activation that an earlier life of this
        process began and did not finish.
        """
        self.state = State.WAITING
        self.reason = "no primary has been here yet"
        self.term = record.term
        self.session: int | None = None
        self.acked = 0  # of this session
        self.committed: int | None = None
        self.pending: list[int] = []  # acked, not committed
        self.deaf = False  # the engine said that its host is lost: what it says is no sign of life
        self._policy = policy
        self._next_epoch = record.next_epoch
        self._open = False  # epochs of the session are taken
        self._anew = ""  # why the session is worth nothing, and a new one has to begin
        self._held: list[Event] = []
        self._adopting = False  # a StoreTerm for a Hello is under way
        self._attempt = 0  # of probes and fences
        self._probing = False
        self._fence_wanted = False
        self._engine_lost_ns = 0
        self._told = False  # by the watcher, of this session: its words count, not only silence
        self._fencing = False  # a Fence is under way, also if its guest has ended meanwhile
        self._fence_tried = False  # in this session
        self._fenced = False
        self._term_taken = False  # the activation's term is on stable storage
        self._last_alarm = ""  # one alarm for a failure that repeats
        self._retry_ns: int | None = None
        self._resumed = False  # the activation is one that an earlier life began
        self._untold = ""  # the alarm of what an earlier life left, until the first tick
        if left is not None and left.is_of(record):
            self._resumed = self._fenced = self._term_taken = True
            self._untold = (
                f"an earlier process died while it activated epoch {left.epoch} in term {left.term} "
                f"({left.phase})"
            )
            self._enter(State.ACTIVATING, self._untold)
        elif left is not None and left.is_ahead_of(record):
            self._untold = left.what_is_lost()
            self._enter(State.UNFINISHED, self._untold)
        elif record.role is Role.SECONDARY_ACTIVE:
            self._enter(State.ACTIVE, f"taken over in term {record.term}, by an earlier process")

    @property
    def taking(self) -> bool:
        """Whether frames of the session's epochs are taken at all."""
        return self._open

    @property
    def wants_copy(self) -> bool:
        """Whether the session is worth nothing, and the primary has to begin a new one."""
        return bool(self._anew)

    @property
    def owes_guest(self) -> bool:
        """The old guest is being stopped, or is stopped for sure, and does not run here yet: the replica may be all
        that is left of it. What an earlier life left is not in this process, and the next one finds it, too.
        """
        owed = self._fenced or self.state in (State.FENCING, State.ACTIVATING)
        return owed and not self._resumed

    @property
    def taken_over(self) -> bool:
        """Whether the guest's term is this side's, be it that the guest runs here or is to."""
        return self.state is State.ACTIVE or self._term_taken

    def handle(self, event: Event) -> list[Instruction]:
        out: list[Instruction] = []
        self._handle(event, out)
        return out

    def _handle(self, event: Event, out: list[Instruction]) -> None:
        match event:
            case HelloReceived():
                self._hello(event, out)
            case PartWhole():
                self._part_whole(event, out)
            case CommitDone():
                self._commit_done(event, out)
            case CommitFailed():
                if event.epoch in self.pending:
                    self._reject(f"the commit of epoch {event.epoch} failed: {event.text}", out)
            case Heard():
                self._heard(event, out)
            case Queried():
                if event.session == self.session:
                    self._ask_anew(out)
            case EpochGivenUp():
                self._held = [word for word in self._held if not isinstance(word, PartWhole)]
            case Tick():
                self._tick(event, out)
            case ProbeDone():
                self._probe_done(event, out)
            case FenceDone():
                self._fence_done(event, out)
            case TermStored():
                self._term_stored(event, out)
            case TermFailed():
                self._term_failed(event, out)
            case GuestStarted():
                if self.state is State.ACTIVATING:
                    self._fenced = self._term_taken = self._resumed = False  # done with
                    self._enter(State.ACTIVE, f"the guest was started here as domain {event.domid}")
                    out.append(ForgetActivation())
            case StartFailed():
                if self.state is State.ACTIVATING:
                    text = f"fenced, but the guest could not be started: {event.text}"
                    self._fail(text, event.now_ns, out)
            case RetireReceived():
                self._retire(event, out)
            case EndReceived():
                self._end(event, out)
            case EngineLostHeard():
                self._engine_lost(event, out)
            case ProtocolFault():
                if event.session == self.session and self._open:
                    self._open = False
                    out += [SuspendSession(), Alarm(f"the session is suspended: {event.text}")]
            case MemoryShort():
                self._memory_short(event, out)

    # ------------------------------------------------------------ sessions

    def _hello(self, hello: HelloReceived, out: list[Instruction]) -> None:
        if self._fencing or self._adopting:
            self._hold(hello)
            return
        refusal = self._refusal(hello)
        if refusal is not None:
            out.append(SendRefused(hello.session, *refusal))
            return
        if hello.term > self.term:
            # Should this process die, an engine of a lower term must not be let in by the next one.
            self._adopting = True
            self._hold(hello)
            out.append(StoreTerm(hello.term, Role.NONE, self._next_epoch))
            return
        if hello.session == self.session:
            self._back(out)
            self._open = self.state in (State.SYNCING, State.STANDBY) and not self._anew
            out.append(SendWelcome(hello.session, self.acked, self.committed))
            self._ask_anew(out)
        else:
            self._begin(hello, out)
            out.append(SendWelcome(hello.session, self.acked, self.committed))

    def _refusal(self, hello: HelloReceived) -> tuple[str, str] | None:
        if hello.term < self.term:
            return "term", (
                f"your term {hello.term} is over: this guest is in term {self.term}; stop the old "
                "guest, and protect the one that runs now from where it runs"
            )
        # A primary of a later term is proof that the guest lives elsewhere, and what was left here is history.
        history = self._resumed and self.state is State.FAILED and hello.term > self.term
        if (self._fenced and not history) or (
            self.state is State.ACTIVE and hello.term == self.term
        ):
            return "active", self._taken_over()
        if self.taken_over and hello.guest_here:
            return "active", "the guest still runs on this side: stop it here first"
        if hello.resume and self.session not in (None, hello.session):
            return "busy", "another engine has begun to protect this guest since: stop one of them"
        return None

    def _begin(self, hello: HelloReceived, out: list[Instruction]) -> None:
        self._back(out)
        self.session = hello.session
        self.acked = 0
        self.deaf = self._fence_tried = self._told = False
        self._untold = ""  # the guest lives, or lives again
        self._anew = "its earlier epochs are not here" if hello.resume else ""
        self._open = not hello.resume
        if (self.state is State.STANDBY or self.pending) and not hello.same_guest:
            self._drop("the guest has begun anew, as another domain or with another size", out)
            self._open = not hello.resume
        if self.state is not State.STANDBY:
            self._enter(State.SYNCING, "receiving the first full copy")
        out.append(BeginSession(hello.session))

    def _ask_anew(self, out: list[Instruction]) -> None:
        if self._anew:
            out.append(SendFullCopyWanted(self._anew))

    def _heard(self, event: Heard, out: list[Instruction]) -> None:
        if event.session != self.session or self.deaf:
            return
        if self._fenced or self.state is State.ACTIVE:
            out.append(SendRefused(event.session, "active", self._taken_over()))
            return
        self._back(out)

    def _taken_over(self) -> str:
        return f"this side took the guest over in term {self.term}: stop the old one"

    def _back(self, out: list[Instruction]) -> None:
        """The primary is there again, before anything was done to its guest."""
        if self.state not in (State.PROBING, State.ENGINE_LOST, State.FAILED):
            return
        self._told = False
        self._call_off(State.STANDBY, "", out)

    def _call_off(self, state: State, reason: str, out: list[Instruction]) -> None:
        """No fence for now: go on with the replica in `state`."""
        self._fence_wanted = self._probing = False
        self._enter(state, reason)
        self._release_held(out)

    def _hold(self, event: Event) -> None:
        """Keep a word until fence or term is decided; a repeated word replaces the first."""
        kind = type(event)
        once = kind is not PartWhole
        self._held = [old for old in self._held if type(old) is not kind or not once]
        self._held.append(event)

    def _release_held(self, out: list[Instruction]) -> None:
        held, self._held = self._held, []
        for event in held:
            self._handle(event, out)

    # ------------------------------------------------------------ epochs

    def _part_whole(self, event: PartWhole, out: list[Instruction]) -> None:
        if event.session != self.session:
            return
        if self._anew:
            self._ask_anew(out)
            return
        if self.state in _HOLDING and not self._fenced:
            self._hold(event)
            return
        if not self._open or self.state not in (State.SYNCING, *_WITH_REPLICA):
            return
        if self._fence_wanted:
            self._hold(event)  # else a flood of epochs would put the fence off for ever
            return
        out.append(SendAck(event.epoch, event.part, event.final))
        if event.final:
            self.acked = event.epoch
            self._next_epoch = max(self._next_epoch, event.epoch + 1)
            self.pending.append(event.epoch)
            out.append(Commit(event.epoch))

    def _commit_done(self, event: CommitDone, out: list[Instruction]) -> None:
        if event.epoch not in self.pending:
            return  # of a replica that was dropped meanwhile
        if event.mismatches:
            first = ", ".join(f"{pfn:#x}" for pfn in event.mismatches[:4])
            count = len(event.mismatches)
            self._reject(
                f"after epoch {event.epoch} {count} of {event.audited} audited pages differ from "
                f"the primary's (pfn {first}{', ...' if count > 4 else ''})",
                out,
            )
            return
        self.pending.remove(event.epoch)
        self.committed = event.epoch
        out.append(SendCommitted(event.epoch, event.commit_ns, event.audited))
        if self.state is State.SYNCING:
            self._enter(State.STANDBY, "")
        if self._fence_wanted:
            self._fence(out)

    def _reject(self, reason: str, out: list[Instruction]) -> None:
        """The replica is wrong: worse than none."""
        self._drop(reason, out)
        self._anew = reason
        out.append(Alarm(f"the replica is retired: {reason}"))
        self._ask_anew(out)

    def _drop(self, reason: str, out: list[Instruction]) -> None:
        self.pending.clear()
        self.committed = None
        self._open = self._fence_wanted = self._probing = False
        self._held.clear()
        self._enter(State.RETIRED, reason)
        out.append(DropReplica(reason))

    def _memory_short(self, event: MemoryShort, out: list[Instruction]) -> None:
        if event.session != self.session or self.state is not State.STANDBY or not self._open:
            return
        text = f"no replica until the copy under way is whole: {event.text}"
        self.pending.clear()
        self.committed = None
        self._enter(State.SYNCING, text)
        out += [Alarm(text), DropReplica(event.text, keep_pages=True)]

    # ------------------------------------------------------------ ends

    def _retire(self, event: RetireReceived, out: list[Instruction]) -> None:
        if event.session != self.session:
            return
        if self.state is State.FENCING:
            self._hold(event)
        elif self._fenced or self.state is State.ACTIVE:
            self._heard(Heard(event.session), out)
        else:
            if self.state is not State.RETIRED:
                self._drop(event.reason, out)
            out.append(SendRetired())

    def _end(self, event: EndReceived, out: list[Instruction]) -> None:
        if event.session != self.session:
            return
        if self._fenced or self.state is State.ACTIVE:
            self._heard(Heard(event.session), out)
        elif event.reason is EndReason.HOST_LOST or (
            event.reason is EndReason.DESTROYED and self._fence_tried
        ):
            self.deaf = True
        else:
            if self.state is not State.RETIRED:
                self._drop(f"the guest has ended: {event.reason}", out)
            out.append(SendRetired())

    # ------------------------------------------------------------ silence and activation

    def _engine_lost(self, event: EngineLostHeard, out: list[Instruction]) -> None:
        if event.session != self.session or self.deaf or self._fencing:
            return  # while a fence is under way nothing is answered
        if self._fenced or self.state is State.ACTIVE:
            out.append(SendRefused(event.session, "active", self._taken_over()))
            return
        out.append(SendEngineLostHeard())
        first = not self._told
        if first and self.state is not State.ENGINE_LOST:
            self._engine_lost_ns = event.now_ns
        self._told = True
        reason = f"engine lost, host alive: {event.detail}"
        if self.state is State.SYNCING:
            self.reason = f"{reason}; no epoch is committed: there is nothing to activate"
        elif self.state is State.ENGINE_LOST:
            self._probing = False  # it was for its silence
            self.reason = reason
        elif self.state is State.STANDBY or (
            self.state in (State.PROBING, State.FAILED) and not self._restart_over(event.now_ns)
        ):
            self._call_off(State.ENGINE_LOST, reason, out)
        if first:
            out.append(Alarm(reason))

    def _restart_over(self, now_ns: int) -> bool:
        return now_ns - self._engine_lost_ns >= self._policy.engine_restart_ns

    def _tick(self, event: Tick, out: list[Instruction]) -> None:
        silent = event.silent_ns > 0
        due = self._retry_ns is not None and event.now_ns >= self._retry_ns
        if self._untold:
            out.append(Alarm(self._untold))
            self._untold = ""
            if self._resumed:
                self._activate(out)
            return
        if self.state is State.STANDBY and silent:
            self._enter(State.PROBING, f"the primary is silent for {_ms(event.silent_ns)}")
            self._probe(out)
        elif self.state is State.ENGINE_LOST and (silent or self._told):
            if self._restart_over(event.now_ns):
                self._enter(State.PROBING, "the engine was not started again within its limit")
                self._fence(out)
            elif silent and not self._probing:
                self._probe(out)
        elif self.state is State.SYNCING and silent:
            if not self.reason.startswith("the primary is silent"):
                self.reason = (
                    f"the primary is silent for {_ms(event.silent_ns)}, and no epoch is committed: "
                    "there is nothing to activate"
                )
                out.append(Alarm(self.reason))
        elif self.state is State.FAILED and due and self._fenced and not self._adopting:
            self._retry_ns = None
            self._activate(out)
        elif self.state is State.FAILED and due and (silent or self._told):
            self._fence(out)

    def _probe(self, out: list[Instruction]) -> None:
        self._attempt += 1
        self._probing = True
        out.append(Probe(self._attempt))

    def _probe_done(self, event: ProbeDone, out: list[Instruction]) -> None:
        if event.attempt != self._attempt or not self._probing:
            return
        self._probing = False
        engine_gone = event.view.alive is True and event.view.engine_attached is False
        if self.state is State.PROBING and engine_gone:
            self._engine_lost_ns = event.now_ns
            self._enter(State.ENGINE_LOST, f"engine lost, host alive: {event.view.detail}")
            out.append(Alarm(self.reason))
        elif self.state is State.PROBING or event.view.alive is not True:
            self._enter(State.PROBING, event.view.detail)
            self._fence(out)

    def _fence(self, out: list[Instruction]) -> None:
        """Fence once all that was acked is committed, so that its audit has spoken before the old
        guest is destroyed; and not while a Hello of a higher term waits, whose guest the replica is not.
        """
        self._fence_wanted = bool(self.pending) or self._adopting
        if self._fence_wanted:
            return
        self._retry_ns = None
        self._attempt += 1
        self._fencing = self._fence_tried = True
        self._enter(State.FENCING, self.reason)
        out.append(Fence(self._attempt))

    def _fence_done(self, event: FenceDone, out: list[Instruction]) -> None:
        if not self._fencing or event.attempt != self._attempt:
            return
        self._fencing = False
        if self.state is not State.FENCING:
            out.append(ForgetActivation())  # the guest has ended meanwhile
            self._release_held(out)
            return
        if not event.result.fenced:
            text = f"not fenced, so not activated: {event.result.detail}"
            self._fail(text, event.now_ns, out)
            if any(not isinstance(held, PartWhole) for held in self._held):
                self._back(out)  # it has spoken meanwhile, so it lives
            return
        self._fenced = True
        self._open = False
        self._enter(State.ACTIVATING, event.result.detail)
        held, self._held = self._held, []
        for word in held:
            if isinstance(word, HelloReceived):
                self._hello(word, out)
        self._activate(out)

    def _activate(self, out: list[Instruction]) -> None:
        """The next step of an activation that is fenced; a failed one is resumed where it stood."""
        self._enter(State.ACTIVATING, self.reason)
        if not self._term_taken:
            term = self.term + 1
            out.append(StoreTerm(term, Role.SECONDARY_ACTIVE, self._next_epoch))
        elif self._resumed:
            out.append(ResumeActivation())
        else:
            assert self.committed is not None and not self.pending, "fenced with work left"  # noqa: PT018 - one state
            out.append(StartGuest(self.committed))

    def _term_stored(self, event: TermStored, out: list[Instruction]) -> None:
        if self._adopting and event.role is Role.NONE:
            self._adopting = False
            self.term = event.term
            if self.taken_over:
                self.committed = None  # it became the guest
                self._fenced = self._term_taken = self._resumed = False
                self._enter(State.WAITING, f"the guest is in term {event.term}, and not here")
            elif self.session is not None and self.state is not State.RETIRED:
                hellos: list[Event] = [w for w in self._held if isinstance(w, HelloReceived)]
                self._drop(f"the guest has lived on elsewhere, in term {event.term}", out)
                self._held = hellos
            self._release_held(out)
        elif self.state is State.ACTIVATING and not self._term_taken:
            self.term = event.term
            self._term_taken = True
            self._activate(out)

    def _term_failed(self, event: TermFailed, out: list[Instruction]) -> None:
        if self._adopting:
            self._adopting = False
            held, self._held = self._held, []
            for word in held:
                if isinstance(word, HelloReceived):
                    out.append(SendRefused(word.session, "state", event.text))
                else:
                    self._handle(word, out)
            out.append(Alarm(event.text))
            if self._fence_wanted:
                self._fence(out)
        elif self.state is State.ACTIVATING:
            text = f"fenced, but the new term could not be stored: {event.text}"
            self._fail(text, event.now_ns, out)

    def _fail(self, text: str, now_ns: int, out: list[Instruction]) -> None:
        if text != self._last_alarm:
            out.append(Alarm(text))
        self._last_alarm = text
        self._retry_ns = now_ns + (RESUME_RETRY_NS if self._resumed else RETRY_NS)
        self._enter(State.FAILED, text)

    def _enter(self, state: State, reason: str) -> None:
        self.state = state
        self.reason = reason


def _ms(ns: int) -> str:
    return f"{ns // 1_000_000} ms"
