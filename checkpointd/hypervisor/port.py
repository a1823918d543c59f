"""The hypervisor port, Python half: what the roles need of a hypervisor, and no more.

The C half is csrc/hypervisor.h: the function table that the native pause calls through. Everything here is
off the pause. Adapters: `embedded` and `xen`, beside this file. The port's own conformance tests run on
every adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from checkpointd.authority.processes import HostIdentity as HostIdentity  # noqa: TC001 - part of the port, for its users

if TYPE_CHECKING:
    from collections.abc import Mapping

    from checkpointd.output.port import OutputBuffer
    from checkpointd.wire.keys import KeyPair
    from checkpointd.wire.messages import End, Retire
    from checkpointd.wire.sockets import Endpoint

PAGE_SIZE = 4096  # octets; the only page size of the stream (libxc stream, domain header)
EXTENT_PAGES = 512  # CK_EXTENT_PAGES in hypervisor.h


class EndReason(StrEnum):
    """Why a domain is no more. Only HOST_LOST is a failure that a standby answers by activation."""

    POWEROFF = "poweroff"
    REBOOT = "reboot"
    CRASH = "crash"
    DESTROYED = "destroyed"
    MOVED = "moved"  # somebody else saves or migrates it: it is his now
    HOST_LOST = "host-lost"


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """What both sides know about a domain. It travels in HELLO, so every field is plain JSON."""

    uuid: str  # who it is
    domid: int  # where it lives today
    name: str
    nr_pfns: int  # size of the p2m in frames, holes included
    ram_pages: int  # pages that have memory behind them, at attach
    hypervisor: str  # "embedded" or "xen"
    host: HostIdentity
    # What the adapter on the other side needs to build the domain (NIC address, guest program, ...).
    config: Mapping[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contact:
    """Whom to tell that an engine was lost, and in whose name (docs/wire-protocol.md, 4.8)."""

    session: int
    term: int
    endpoint: Endpoint  # of the secondary
    keys: KeyPair  # of this side


class Domain(Protocol):
    """One guest, attached to by one engine. Closing it, or dying, detaches: the host then drops all mappings,
    ends the dirty log, resumes the guest if it was suspended, and leaves its output shut if it was.
    """

    @property
    def info(self) -> DomainInfo: ...

    @property
    def table(self) -> int:
        """Address of its `struct ck_hypervisor`; valid until close()."""
        ...

    @property
    def output(self) -> OutputBuffer: ...

    @property
    def unsafe(self) -> list[str]:
        """What of this guest is not protected, though the user allowed it: for status, as long as it holds."""
        ...

    def tell_of_loss(self, contact: Contact) -> None:
        """From now on the secondary of this session has to hear of it should this engine die. Nothing to do where
        the guest's host says so itself.
        """
        ...

    def leave_word(self, word: Retire | End) -> None:
        """The secondary has not answered this last word: whoever outlives close() says it for a while. Nothing to do
        where nobody does.
        """
        ...

    def static_records(self) -> bytes:
        """Image header, domain header, static records and STATIC_DATA_END: what begins the stream."""
        ...

    def enable_log(self) -> None:
        """Begin the dirty log, all clean. Whoever calls this sends every page: no earlier log is trusted."""
        ...

    def ended(self) -> EndReason | None:
        """Why the guest is no more, None while it lives (running, suspended or paused)."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why this guest, which lives, cannot be protected any longer: one sentence. None: it can."""
        ...

    def fileno(self) -> int:
        """Readable (as for poll) once the guest may have ended; ask ended() then."""
        ...

    def pause(self) -> None:
        """Stop the guest until unpause(), also beyond this process's death (an operator's pause)."""
        ...

    def unpause(self) -> None: ...

    def close(self) -> None: ...


class Incoming(Protocol):
    """A domain built from a replica, not running yet; if its creator dies it vanishes."""

    def start(self, context: bytes, populated: bytes, *, paused: bool = False) -> DomainInfo:
        """Load the tail records `context`, take the guest's network address, run it, and let go of it: from
        here on it outlives this process. `populated` has bit p (little endian u64 words) for each pfn with
        memory behind it. Raises HypervisorError if the address is not free.
        """
        ...

    def discard(self) -> None: ...


class Hypervisor(Protocol):
    """One side's hypervisor with its toolstack."""

    @property
    def name(self) -> str: ...

    def domains(self) -> list[DomainInfo]: ...

    def find(self, *, domid: int | None = None, uuid: str | None = None) -> DomainInfo:
        """Raises NoSuchDomainError, whose message lists what there is."""
        ...

    def attach(self, domid: int) -> Domain:
        """Raises NoSuchDomainError, DomainBusyError (another engine is attached), HypervisorError."""
        ...

    def settle(self, info: DomainInfo, reason: EndReason | None) -> None:
        """Once nobody is attached any more: do the toolstack's part of the domain's end (destroy it, create it anew) if
        nobody else does. `reason` None: it lives on. Raises HypervisorError. May take minutes.
        """
        ...

    def prepare(self, info: DomainInfo, memory_fd: int) -> Incoming:
        """Build a domain like `info` over the replica image `memory_fd` (pfn p at octet p * PAGE_SIZE, the
        file at least nr_pfns pages long). The image may still change until start() is called.
        """
        ...
