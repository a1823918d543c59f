"""What one domain's standby knows, and the steps that all of its parts take. See standby/machine.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from checkpointd.authority.terms import Role, TermRecord

from .events import (
    Alarm,
    DropReplica,
    Event,
    ForgetActivation,
    Instruction,
    PartWhole,
)

if TYPE_CHECKING:
    from checkpointd.secondary.activations import Activation


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


@dataclass(frozen=True, slots=True)
class Policy:
    engine_restart_ns: int  # how long a lost engine is waited for while its host lives


class Books:
    """The state of the machine. Pure: no I/O, no clock."""

    def __init__(self, policy: Policy, record: TermRecord, left: Activation | None = None) -> None:
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
    def at_end(self) -> str:
        """For people, when the process is to end: what it waits for, or leaves to its next life; "": nothing."""
        if self._resumed:
            return (
                "not waited for, though nobody runs this guest yet; the next start of this secondary goes on with it: "
                f"{self.reason}"
            )
        if not self.owes_guest:
            return ""
        if self.state is State.FENCING:
            why = "its old guest is being stopped"
        elif self.state is State.ACTIVATING:
            why = f"it is being started from epoch {self.committed}"
        else:
            why = (
                f"its old guest is stopped, and epoch {self.committed} is here alone; mend this, and it is started "
                f"within a second: {self.reason}"
            )
        return (
            f"not ending yet: {why}. To give this guest up for good: `B fenced A and cannot start the guest` in "
            "docs/operating.md"
        )

    @property
    def taken_over(self) -> bool:
        """Whether the guest's term is this side's, be it that the guest runs here or is to."""
        return self.state is State.ACTIVE or self._term_taken

    def _handle(self, event: Event, out: list[Instruction]) -> None:
        """Any event, such as one that was held."""
        raise NotImplementedError

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

    def _forget_fence(self, out: list[Instruction]) -> None:
        """The old guest was not stopped by one that failed: it is heard of again."""
        if self._fence_tried and not self._fencing and not self._fenced:
            out.append(ForgetActivation())

    def _drop(self, reason: str, out: list[Instruction]) -> None:
        self._forget_fence(out)
        self.pending.clear()
        self.committed = None
        self._open = self._fence_wanted = self._probing = False
        self._held.clear()
        self._enter(State.RETIRED, reason)
        out.append(DropReplica(reason))

    def _fail(self, text: str, now_ns: int, out: list[Instruction]) -> None:
        if text != self._last_alarm:
            out.append(Alarm(text))
        self._last_alarm = text
        self._retry_ns = now_ns + (RESUME_RETRY_NS if self._resumed else RETRY_NS)
        self._enter(State.FAILED, text)

    def _enter(self, state: State, reason: str) -> None:
        self.state = state
        self.reason = reason
