"""What the driver of one domain needs of the daemon around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.authority.fence import Fence
    from checkpointd.authority.terms import TermStore
    from checkpointd.hypervisor.port import DomainInfo, HostIdentity
    from checkpointd.wire import messages
    from checkpointd.wire.acceptor import Peer, Sent
    from checkpointd.wire.frames import Header, Octets

    from .activations import Activations
    from .epochs import Budget
    from .standby import State


class Link(Protocol):
    """What the driver needs of checkpointd.wire.acceptor.Acceptor."""

    def send(
        self, peer: Peer, message: messages.FromSecondary, *, session: int, term: int
    ) -> Sent: ...
    def send_bulk(self, peer: Peer, header: Header, payload: Octets = b"") -> Sent: ...
    def post(self, call: Callable[[], None]) -> None: ...


class DomainMetrics(Protocol):
    """The series of one domain (checkpointd.daemon.metrics.StandbyMetrics)."""

    def received(self, octets: int) -> None: ...
    def committed(self, nanoseconds: int) -> None: ...
    def discarded(self) -> None: ...
    def not_held(self) -> None: ...
    def lag(self, epochs: int) -> None: ...
    def replica_bytes(self, octets: int) -> None: ...
    def audited(self, pages: int, mismatches: int) -> None: ...
    def peer_connected(self, connected: bool) -> None: ...
    def failover(self, reason: str) -> None: ...
    def fence_attempt(self, fenced: bool) -> None: ...
    def alarm(self) -> None: ...
    def state(self, state: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in ns unless said otherwise."""

    silence_ns: int
    engine_restart_ns: int
    stuck_ns: int  # alive without progress for so long is an alarm
    tick_ns: int
    fence_timeout: float  # s
    activate_paused: bool


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the drivers of all domains share."""

    limits: Limits
    budget: Budget
    terms: TermStore
    activations: Activations
    make_fence: Callable[[DomainInfo, str], Fence]  # the guest, and its primary's address
    identity: HostIdentity  # of this daemon
    clock: Callable[[], int]  # monotonic, ns
    image_exists: Callable[[str], bool]  # an image file of this UUID, of an earlier life
    on_state: Callable[[str, State], None]  # UUID, new state
