"""From silence to a guest that runs here: probe, fence, term, start. See standby/machine.py. Pure."""

from __future__ import annotations

from checkpointd.authority.terms import Role

from .events import (
    Alarm,
    EngineLostHeard,
    Event,
    Fence,
    FenceDone,
    ForgetActivation,
    GuestStarted,
    HelloReceived,
    Instruction,
    PartWhole,
    Probe,
    ProbeDone,
    ResumeActivation,
    SendEngineLostHeard,
    SendRefused,
    StartFailed,
    StartGuest,
    StoreTerm,
    TermFailed,
    TermStored,
    Tick,
)
from .states import Books, State


class Failover(Books):
    """The half of a standby that acts when its primary is silent, or its engine lost."""

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
                self._handle(word, out)
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

    def _guest_started(self, event: GuestStarted, out: list[Instruction]) -> None:
        if self.state is State.ACTIVATING:
            self._fenced = self._term_taken = self._resumed = False  # done with
            self._enter(State.ACTIVE, f"the guest was started here as domain {event.domid}")
            out.append(ForgetActivation())

    def _start_failed(self, event: StartFailed, out: list[Instruction]) -> None:
        if self.state is State.ACTIVATING:
            text = f"fenced, but the guest could not be started: {event.text}"
            self._fail(text, event.now_ns, out)

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

    def _back(self, out: list[Instruction]) -> None:
        """The primary is there again, before anything was done to its guest."""
        if self.state not in (State.PROBING, State.ENGINE_LOST, State.FAILED):
            return
        self._told = False
        self._forget_fence(out)
        self._call_off(State.STANDBY, "", out)

    def _taken_over(self) -> str:
        if self.state is not State.ACTIVE:
            return (
                "this side has stopped the old guest and not got it to run here yet; before you stop or start any, see "
                "`checkpointd status` there"
            )
        return f"this side took the guest over in term {self.term}: stop the old one"


def _ms(ns: int) -> str:
    return f"{ns // 1_000_000} ms"
