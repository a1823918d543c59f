"""By what a standby stops an old guest: chosen in one place, for the guest itself and for a preflight that asks."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from checkpointd.authority.command import CommandFence
from checkpointd.authority.fence import NoFence
from checkpointd.authority.processes import boot_id
from checkpointd.errors import FenceError
from checkpointd.hypervisor.embedded.fence import EmbeddedFence

if TYPE_CHECKING:
    from checkpointd.authority.fence import Fence
    from checkpointd.daemon.config import SecondaryOptions
    from checkpointd.hypervisor.port import DomainInfo


class Way(Enum):
    NONE_WANTED = auto()  # --unsafe-no-fencing
    PROCESS = auto()  # an embedded guest is a process of this machine
    COMMAND = auto()
    NO_WAY = auto()  # so that nothing is activated


def way_to_fence(options: SecondaryOptions, hypervisor: str, host_boot: str) -> Way:
    """For a guest of `hypervisor` on the machine whose boot this is: a process of another one is out of reach."""
    if options.unsafe_no_fencing:
        return Way.NONE_WANTED
    if hypervisor == "embedded" and host_boot == boot_id():
        return Way.PROCESS
    return Way.COMMAND if options.fence_command else Way.NO_WAY


def fence_of(options: SecondaryOptions, info: DomainInfo, address: str) -> Fence:
    """`address`: of the guest's primary. Raises FenceError, which says what is missing."""
    match way_to_fence(options, info.hypervisor, info.host.boot_id):
        case Way.NONE_WANTED:
            return NoFence()
        case Way.PROCESS:
            return EmbeddedFence(info.host)
        case Way.COMMAND:
            assert options.fence_command is not None, "it is the way"
            return CommandFence(options.fence_command, info, address)
        case Way.NO_WAY:
            raise FenceError(
                f"nothing here can stop {info.name} on {address}: give --fence-command, a command that "
                "switches that machine off, or --unsafe-no-fencing, which activates without"
            )
