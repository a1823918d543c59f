"""What happens to a standby (events) and what it is told to do (instructions). See standby/machine.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpointd.authority.fence import FenceResult, HostView
    from checkpointd.authority.terms import Role
    from checkpointd.hypervisor.port import EndReason

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class HelloReceived:
    session: int
    term: int
    resume: bool
    guest_here: bool  # a domain of this UUID lives on this side's hypervisor
    # The same domain, and as large, as that of the replica that is here, if one is. Another domain: it rebooted.
    same_guest: bool = True


@dataclass(frozen=True, slots=True)
class PartWhole:
    """All of a part is here, its digests and structure are right, and the memory its commit needs
    is reserved.
    """

    session: int
    epoch: int
    part: int
    final: bool


@dataclass(frozen=True, slots=True)
class CommitDone:
    epoch: int
    audited: int  # pages compared
    mismatches: tuple[int, ...]  # pfns that differ from the primary's
    commit_ns: int


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """It cannot happen; if it does, the image is torn."""

    epoch: int
    text: str


@dataclass(frozen=True, slots=True)
class Heard:
    """The primary said something on the control connection of this session."""

    session: int


@dataclass(frozen=True, slots=True)
class Queried:
    """The primary asks what is missing."""

    session: int


@dataclass(frozen=True, slots=True)
class EpochGivenUp:
    """The primary has gone on to a higher epoch: no part of the one before is acked any more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. `silent_ns`: how long the primary has been silent, if beyond the limit; else
    0.
    """

    now_ns: int
    silent_ns: int


@dataclass(frozen=True, slots=True)
class ProbeDone:
    attempt: int
    view: HostView
    now_ns: int


@dataclass(frozen=True, slots=True)
class FenceDone:
    attempt: int
    result: FenceResult
    now_ns: int


@dataclass(frozen=True, slots=True)
class TermStored:
    """The term is on stable storage."""

    term: int
    role: Role


@dataclass(frozen=True, slots=True)
class TermFailed:
    text: str
    now_ns: int


@dataclass(frozen=True, slots=True)
class GuestStarted:
    domid: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    text: str
    now_ns: int


@dataclass(frozen=True, slots=True)
class RetireReceived:
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class EndReceived:
    session: int
    reason: EndReason


@dataclass(frozen=True, slots=True)
class EngineLostHeard:
    """The watcher of the primary's host says that the session's engine is gone. Its word is a sign of life, too."""

    session: int
    detail: str
    now_ns: int


@dataclass(frozen=True, slots=True)
class ProtocolFault:
    """A frame of this session was malformed."""

    session: int
    text: str


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """A live part does not fit beside the committed replica."""

    session: int
    text: str


Event = (
    HelloReceived | PartWhole | CommitDone | CommitFailed | Heard | Queried | EpochGivenUp | Tick | ProbeDone
    | FenceDone
    | TermStored | TermFailed | GuestStarted | StartFailed | RetireReceived | EndReceived
    | ProtocolFault | MemoryShort | EngineLostHeard
)  # fmt: skip

# ---------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class BeginSession:
    """Forget the session before and its partial epoch; acked epochs are still committed."""

    session: int


@dataclass(frozen=True, slots=True)
class SendWelcome:
    session: int
    last_epoch: int
    committed_epoch: int | None


@dataclass(frozen=True, slots=True)
class SendRefused:
    session: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class SendAck:
    epoch: int
    part: int
    final: bool


@dataclass(frozen=True, slots=True)
class SendCommitted:
    epoch: int
    commit_ns: int
    audited: int


@dataclass(frozen=True, slots=True)
class SendFullCopyWanted:
    reason: str


@dataclass(frozen=True, slots=True)
class SendRetired:
    pass


@dataclass(frozen=True, slots=True)
class SendEngineLostHeard:
    pass


@dataclass(frozen=True, slots=True)
class Commit:
    epoch: int


@dataclass(frozen=True, slots=True)
class DropReplica:
    """The replica is none any more. `keep_pages`: its pages stay as the beginning of a new copy."""

    reason: str
    keep_pages: bool = False


@dataclass(frozen=True, slots=True)
class SuspendSession:
    """Drop the part in the making, and each frame until the session's next Hello."""


@dataclass(frozen=True, slots=True)
class Probe:
    attempt: int


@dataclass(frozen=True, slots=True)
class Fence:
    attempt: int


@dataclass(frozen=True, slots=True)
class StoreTerm:
    term: int
    role: Role
    next_epoch: int


@dataclass(frozen=True, slots=True)
class StartGuest:
    epoch: int  # the committed one, for the log


@dataclass(frozen=True, slots=True)
class ResumeActivation:
    """Finish what an earlier life left of an activation, if it is certainly the whole last acked epoch."""


@dataclass(frozen=True, slots=True)
class ForgetActivation:
    """No activation is unfinished any more."""


@dataclass(frozen=True, slots=True)
class Alarm:
    text: str


Instruction = (
    BeginSession | SendWelcome | SendRefused | SendAck | SendCommitted | SendFullCopyWanted
    | SendRetired | SendEngineLostHeard | Commit | DropReplica | SuspendSession | Probe | Fence
    | StoreTerm | StartGuest | ResumeActivation | ForgetActivation | Alarm
)  # fmt: skip
