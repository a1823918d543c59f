"""Activation from an image: the hypervisor's toolstack gets the replica's memory as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd.errors import StateError
from checkpointd.secondary.activations import lost
from checkpointd.secondary.replica import State

from . import NothingWholeError

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import DomainInfo, Hypervisor, Incoming
    from checkpointd.secondary.activations import Activation
    from checkpointd.secondary.replica import Replica


class ImageRestorer:
    """Builds the domain early, over the image while it still changes, so that a start is quick."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._incoming: Incoming | None = None

    def begin(self, info: DomainInfo, static_records: bytes) -> None:
        """Nothing: start() is told."""

    def prepare(self, info: DomainInfo, replica: Replica) -> None:
        if self._incoming is None:
            self._incoming = self._hypervisor.prepare(info, replica.fd)

    def committed(self, replica: Replica) -> None:
        """Nothing: the domain's memory is the image."""

    def start(self, info: DomainInfo, replica: Replica, *, paused: bool) -> DomainInfo:
        if replica.state is not State.WHOLE:
            raise StateError(
                f"the replica is {replica.state}, not one whole epoch: it is not started"
            )
        self.prepare(info, replica)
        assert self._incoming is not None
        try:
            started = self._incoming.start(replica.context, bytes(replica.populated), paused=paused)
        except BaseException:
            self.discard()  # a start that is tried again begins with a domain that nothing was done to
            raise
        self._incoming = None
        return started

    def resume(self, left: Activation) -> int:
        """A domain that was not started has died with its creator, so one that is here is the guest."""
        for info in self._hypervisor.domains():
            if info.uuid == left.uuid:
                return info.domid
        raise NothingWholeError(lost(left))

    def status(self) -> dict[str, object]:
        return {}

    def trouble(self) -> str:
        return ""

    def discard(self) -> None:
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None
