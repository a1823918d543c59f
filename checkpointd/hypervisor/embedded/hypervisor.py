"""One side's embedded hypervisor: a namespace of guests. See Hypervisor in hypervisor/port.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd.errors import NoSuchDomainError
from checkpointd.hypervisor.embedded.domain import EmbeddedDomain
from checkpointd.hypervisor.embedded.incoming import EmbeddedIncoming
from checkpointd.hypervisor.embedded.place import namespace_directory, read_domains

if TYPE_CHECKING:
    from pathlib import Path

    from checkpointd.hypervisor.port import DomainInfo, EndReason


class EmbeddedHypervisor:
    """Both sides of one machine have a namespace of their own, so both may hold domid 4."""

    def __init__(self, namespace: str, run_dir: Path | None = None) -> None:
        self.namespace = namespace_directory(namespace, run_dir)

    @property
    def name(self) -> str:
        return "embedded"

    def domains(self) -> list[DomainInfo]:
        return read_domains(self.namespace)

    def find(self, *, domid: int | None = None, uuid: str | None = None) -> DomainInfo:
        domains = self.domains()
        for info in domains:
            if domid in (None, info.domid) and uuid in (None, info.uuid):
                return info
        wanted = " ".join(
            text
            for text in (
                f"domid {domid}" if domid is not None else "",
                f"UUID {uuid}" if uuid else "",
            )
            if text
        )
        there = ", ".join(f"{info.domid} ({info.name}, {info.uuid})" for info in domains) or "none"
        raise NoSuchDomainError(
            f"no embedded guest with {wanted} in {self.namespace}: start one with `checkpointd guest`. "
            f"Guests there: {there}"
        )

    def attach(self, domid: int) -> EmbeddedDomain:
        return EmbeddedDomain(self.find(domid=domid))

    def settle(self, info: DomainInfo, reason: EndReason | None) -> None:
        """The guest's host has seen to it."""

    def prepare(self, info: DomainInfo, memory_fd: int) -> EmbeddedIncoming:
        return EmbeddedIncoming(info, memory_fd, self.namespace)
