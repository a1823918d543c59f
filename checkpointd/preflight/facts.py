"""What a preflight knows before it judges: plain values, so that the judgement is tested without any host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpointd.errors import CheckpointdError
    from checkpointd.hypervisor.capacity import Capacity
    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.hypervisor.xen.devices import Device
    from checkpointd.wire.checks import Checked


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine that is attached to a domain, or that has left its state behind."""

    pid: int | None  # None: its host does not say
    alive: bool


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """The guest, and what stands around it on its own host."""

    info: DomainInfo
    kind: str  # "pvh", "hvm", "pv"; "embedded"
    state: str  # "running", "paused", "suspended", "ended", "crashed"
    engine: Engine | None = None
    says_it_suspends: bool = True  # its kernel has said that it can
    log_trouble: str | None = ""  # why the dirty log cannot begin; None: not tried
    devices: tuple[Device, ...] = ()
    pod_pages: int = 0  # promised to the guest, not populated
    vnuma_nodes: int = 0
    nested: bool = False  # it may run guests of its own
    vcpus: int = 1
    features: tuple[int, ...] = ()  # words of the CPU that it sees; empty: not known
    boot_file: str = ""  # the configuration by which this host starts it at boot


@dataclass(frozen=True, slots=True)
class Peer:
    """The secondary, as it answered."""

    checked: Checked
    clock_ahead_ns: int  # how far its wall clock is ahead of ours
    bulk_trouble: str = ""  # why the bulk port does not answer


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for, as far as it is judged. Sizes in octets."""

    arena: int
    arenas: int
    mapping_budget: int
    delta_history: int  # 0: there is none
    unsafe_disk: bool
    unsafe_output: bool
    unsafe_untested_xen: bool
    secondary: str  # its address, for messages


@dataclass(frozen=True, slots=True)
class Facts:
    """Each part is there, or the error that kept it from being seen, which `primary` would meet, too."""

    wanted: Wanted
    hypervisor: str  # "xen" or "embedded"
    release: str  # of checkpointd
    tested: tuple[str, ...]  # releases of Xen that tests have run on
    may_call_xen: bool = True  # this process may open Xen's door
    libraries: tuple[str, ...] = ()  # of Xen's, as they were found here
    native_trouble: CheckpointdError | None = None
    hypervisor_trouble: CheckpointdError | None = None
    domain: DomainFacts | CheckpointdError | None = None  # None: there is no hypervisor to ask
    here: Capacity | CheckpointdError | None = None
    keys_trouble: CheckpointdError | None = None
    peer: Peer | CheckpointdError | None = None  # None: it was not asked
    not_asked: str = ""  # why
