"""What turns a committed replica into a running guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from checkpointd.errors import HypervisorError

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.secondary.activations import Activation
    from checkpointd.secondary.replica import Replica


class NothingWholeError(HypervisorError):
    """What is here of an unfinished activation is nothing, or is not certain to be the whole last acked epoch."""


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

    def resume(self, left: Activation) -> int:
        """Finish the activation that an earlier life of this process left, if what it left is certainly the whole last
        acked epoch; its term is ours. Gives the domid. Raises HypervisorError, which says what is wrong and what to
        do; NothingWholeError if only an image could help. It may be called again.
        """
        ...

    def status(self) -> dict[str, object]:
        """How far what is prepared has come, for people; from any thread."""
        ...

    def trouble(self) -> str:
        """Why an activation is likely to fail though the replica is whole, as far as that lasts; "": it is not. From
        any thread.
        """
        ...

    def discard(self) -> None:
        """Undo prepare(): this replica will not be started, or is about to change in another way than by
        commits.
        """
        ...
