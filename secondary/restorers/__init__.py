"""What turns a committed replica into a running guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.secondary.replica import Replica


class Restorer(Protocol):
    """One domain's way to activation. Called by one thread at a time."""

    def begin(self, info: DomainInfo, static_records: bytes) -> None:
        """A session begins: its guest's description, and what its stream begins with, hold from now on."""
        ...

    def prepare(self, info: DomainInfo, replica: Replica) -> None:
        """Do beforehand what can be done, after a commit. Idempotent. Raises HypervisorError."""
        ...

    def committed(self, replica: Replica) -> None:
        """Another epoch is the replica now. Quick, and never fails: commits do not wait for it."""
        ...

    def start(self, info: DomainInfo, replica: Replica, *, paused: bool) -> DomainInfo:
        """Run the guest from the replica, which must be whole. Raises HypervisorError, StateError."""
        ...

    def status(self) -> dict[str, object]:
        """How far what is prepared has come, for people; from any thread."""
        ...

    def discard(self) -> None:
        """Undo prepare(): this replica will not be started, or is about to change in another way than by
        commits.
        """
        ...
