"""The words between the protection machine and its driver: what has happened, and what is to be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import EndReason

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; `heard_ns` is when the standby was last heard (0: never)."""

    heard_ns: int = 0


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The standby takes the session. `same_standby`: the process that we spoke with last, its memory intact."""

    same_standby: bool
    has_image: bool
    last_epoch: int = 0  # the highest number the standby has seen; ours go on above it


@dataclass(frozen=True, slots=True)
class Refused:
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class KnownPages:
    """The standby's page digests are here, or were given up: the copying may begin."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A part lies in its arena. `pages` counts all its entries; `left` is what is still pending (live rounds)."""

    arena: int
    pages: int
    left: int = 0
    closed: int | None = None  # the output epoch it closed, by a pause that did
    pause_ns: int = 0  # how long the guest stood still for it


@dataclass(frozen=True, slots=True)
class Overflow:
    """The dirty set did not fit the arena: nothing was staged, the guest runs, every bit is pending."""

    dirty: int


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A hypervisor call failed; the guest runs, every bit is pending."""

    where: str
    pause_ns: int = 0  # how long the guest stood still for nothing


@dataclass(frozen=True, slots=True)
class Shipped:
    """Every frame of the part has left, and ZeroMQ has let go of the arena."""

    epoch: int
    part: int


@dataclass(frozen=True, slots=True)
class ShipFailed:
    epoch: int
    part: int
    why: str


@dataclass(frozen=True, slots=True)
class Acked:
    epoch: int
    part: int


@dataclass(frozen=True, slots=True)
class Lacking:
    """The standby says which frames of a part it has not: [first, last] sequences, None for all."""

    epoch: int
    part: int
    ranges: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True, slots=True)
class ReplicaRejected:
    """The standby's audit found a difference: it has retired its replica and wants a full copy."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retired:
    """The standby has thrown its replica away and will never activate it."""


@dataclass(frozen=True, slots=True)
class StandbyGone:
    """Whether the standby's process is proved to be gone for good."""

    proved: bool
    detail: str


@dataclass(frozen=True, slots=True)
class GuestEnded:
    reason: EndReason


@dataclass(frozen=True, slots=True)
class Unprotectable:
    """The guest lives, and its hypervisor can hold the promise no longer, such as for a device that was attached."""

    why: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """SIGTERM or SIGINT."""


Event: TypeAlias = (
    Tick | Welcomed | Refused | KnownPages | Staged | Overflow | StageFailed | Shipped | ShipFailed | Acked
    | Lacking | ReplicaRejected | Retired | StandbyGone | GuestEnded | Unprotectable
    | StopAsked
)  # fmt: skip

# ---------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class SayHello:
    resume: bool


@dataclass(frozen=True, slots=True)
class NewSession:
    """Draw a new session and say hello in it; answered by Welcomed."""


@dataclass(frozen=True, slots=True)
class BeginAnew:
    """Trust no dirty log: make every page pending. Always after Abandon, or at the very start.

    `bare`: the standby has no page at all, so that it need not be told where the guest has none.
    """

    bare: bool = False


@dataclass(frozen=True, slots=True)
class FetchKnown:
    """Ask the standby for the digests of the pages it has; answered by KnownPages."""


@dataclass(frozen=True, slots=True)
class LiveRound:
    arena: int
    epoch: int
    part: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Take an epoch. `close_output` is false where the buffer cannot tell one more closed epoch apart."""

    arena: int
    epoch: int
    part: int
    close_output: bool


@dataclass(frozen=True, slots=True)
class Ship:
    arena: int
    epoch: int
    part: int
    final: bool
    ranges: tuple[tuple[int, int], ...] | None = None  # None: all of it


@dataclass(frozen=True, slots=True)
class AskMissing:
    epoch: int
    part: int


@dataclass(frozen=True, slots=True)
class KeepDirt:
    """A live part was acked: its arena is free, but its dirt stays ours until the epoch is acked."""

    arena: int


@dataclass(frozen=True, slots=True)
class Settle:
    """An epoch was acked: the dirt of all its parts is the standby's now, and its arena is free."""

    arena: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop shipping, drop all that is in flight, and give all its dirt back to pending."""


@dataclass(frozen=True, slots=True)
class Release:
    closed: int


@dataclass(frozen=True, slots=True)
class OpenOutput:
    why: str


@dataclass(frozen=True, slots=True)
class SayRetire:
    reason: str


@dataclass(frozen=True, slots=True)
class SayEnd:
    reason: EndReason


@dataclass(frozen=True, slots=True)
class ProveStandbyGone:
    """Answered by StandbyGone."""


@dataclass(frozen=True, slots=True)
class PauseGuest:
    """Stop the guest for good on this side: the other side runs it."""


@dataclass(frozen=True, slots=True)
class Alarm:
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    exit_code: int
    text: str
    unanswered: SayRetire | SayEnd | None = (
        None  # the last word, if the standby may yet hear it from somebody else
    )


Instruction: TypeAlias = (
    SayHello | NewSession | BeginAnew | FetchKnown | LiveRound | Pause | Ship | AskMissing | KeepDirt | Settle | Abandon
    | Release | OpenOutput | SayRetire | SayEnd | ProveStandbyGone | PauseGuest | Alarm | Finish
)  # fmt: skip
