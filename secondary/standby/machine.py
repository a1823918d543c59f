"""The state machine of one domain's standby: when to ack, commit and activate. Pure: no I/O, no
clock.

    waiting ─► syncing ─► standby ─► probing ─► fencing ─► activating ─► active
                  ▲          ▲ ▲        │ ▲        │            │
                  │          │ └────────┤ │        ▼            ▼
               retired ◄─────┘    engine_lost   failed ◄────────┘     (failed: tried again)

A life of the process that finds an activation unfinished begins in `activating`, or, if its term was not stored, in
`unfinished`.

The driver performs the instructions in order and reports what came of them as events. An event that
belongs to a session, an attempt or an epoch that is over changes nothing.
"""

from __future__ import annotations

from .events import (
    CommitDone,
    CommitFailed,
    EndReceived,
    EngineLostHeard,
    EpochGivenUp,
    Event,
    FenceDone,
    GuestStarted,
    Heard,
    HelloReceived,
    Instruction,
    MemoryShort,
    PartWhole,
    ProbeDone,
    ProtocolFault,
    Queried,
    RetireReceived,
    StartFailed,
    TermFailed,
    TermStored,
    Tick,
)
from .sessions import Sessions


class Standby(Sessions):
    """Invariants kept here, and in the modules that this is made of (docs/architecture.md has all ten):

    1. *An ack is a promise.* SendAck is given only by PartWhole: whole, verified, memory reserved.
       The acked epoch is in `pending` until its commit is done, and the guest is not started before
       `pending` is empty.
    2. *Whole epochs.* Only a committed epoch is activated: never from syncing, and never one of an
       earlier life of this process, whose acked epochs died with its memory. (An activation that an
       earlier life had begun is finished if its domain, which outlives us on Xen, is certainly that
       epoch; the restorer tells, by the note.) A session that says it
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
                self._commit_failed(event, out)
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
                self._guest_started(event, out)
            case StartFailed():
                self._start_failed(event, out)
            case RetireReceived():
                self._retire(event, out)
            case EndReceived():
                self._end(event, out)
            case EngineLostHeard():
                self._engine_lost(event, out)
            case ProtocolFault():
                self._protocol_fault(event, out)
            case MemoryShort():
                self._memory_short(event, out)
