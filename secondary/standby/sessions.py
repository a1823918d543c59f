"""What a primary says, and its epochs: taken, acked, committed, or refused. See standby/machine.py. Pure."""

from __future__ import annotations

from checkpointd.authority.terms import Role
from checkpointd.hypervisor.port import EndReason

from .events import (
    Alarm,
    BeginSession,
    Commit,
    CommitDone,
    CommitFailed,
    DropReplica,
    EndReceived,
    Heard,
    HelloReceived,
    Instruction,
    MemoryShort,
    PartWhole,
    ProtocolFault,
    RetireReceived,
    SendAck,
    SendCommitted,
    SendFullCopyWanted,
    SendRefused,
    SendRetired,
    SendWelcome,
    StoreTerm,
    SuspendSession,
)
from .failover import Failover
from .states import State

_HOLDING = (State.FENCING, State.FAILED)
_WITH_REPLICA = (State.STANDBY, State.PROBING, State.ENGINE_LOST)


class Sessions(Failover):
    """The half of a standby that answers its primary. What it does with a word depends on how far a failover is."""

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
            if self.taken_over and self.state is not State.ACTIVE:
                return "term", f"your term {hello.term} is over: {self._taken_over()}"
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

    def _commit_failed(self, event: CommitFailed, out: list[Instruction]) -> None:
        if event.epoch in self.pending:
            self._reject(f"the commit of epoch {event.epoch} failed: {event.text}", out)

    def _reject(self, reason: str, out: list[Instruction]) -> None:
        """The replica is wrong: worse than none."""
        self._drop(reason, out)
        self._anew = reason
        out.append(Alarm(f"the replica is retired: {reason}"))
        self._ask_anew(out)

    def _memory_short(self, event: MemoryShort, out: list[Instruction]) -> None:
        if event.session != self.session or self.state is not State.STANDBY or not self._open:
            return
        text = f"no replica until the copy under way is whole: {event.text}"
        self.pending.clear()
        self.committed = None
        self._enter(State.SYNCING, text)
        out += [Alarm(text), DropReplica(event.text, keep_pages=True)]

    def _protocol_fault(self, event: ProtocolFault, out: list[Instruction]) -> None:
        if event.session == self.session and self._open:
            self._open = False
            out += [SuspendSession(), Alarm(f"the session is suspended: {event.text}")]

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
