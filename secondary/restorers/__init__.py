"""What turns a committed replica into a running guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.secondary.replica import Replica


class Restorer(Protocol):
    """One domain's way to activation. Called by one thread at a time."""

    def prepare(self, info: DomainInfo, replica: Replica) -> None:
        """Do beforehand what can be done, after a commit. Idempotent. Raises HypervisorError."""
        ...

    def start(self, info: DomainInfo, replica: Replica, *, paused: bool) -> DomainInfo:
        """Run the guest from the replica, which must be whole. Raises HypervisorError, StateError."""
        ...

    def discard(self) -> None:
        """Undo prepare(): this replica will not be started."""
        ...
