"""What this secondary says of itself when a preflight asks (CHECK)."""

from __future__ import annotations

import logging
import shutil
import time
from typing import TYPE_CHECKING

import checkpointd
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.capacity import Capacity, available_memory, measure
from checkpointd.hypervisor.xen.autostart import starts_at_boot
from checkpointd.wire.checks import UNSAFE, Checked

from .fences import Way, way_to_fence

if TYPE_CHECKING:
    from pathlib import Path

    from checkpointd.daemon.config import SecondaryOptions
    from checkpointd.wire.checks import Check

log = logging.getLogger(__name__)


def answer(
    check: Check, options: SecondaryOptions, hypervisor: str, *, guest_here: bool
) -> Checked:
    """Of this moment. It looks at files and asks the hypervisor, which takes milliseconds."""
    try:
        capacity = measure(hypervisor)
    except HypervisorError as error:
        log.warning("a preflight asks, and the hypervisor does not say what it has: %s", error)
        capacity = Capacity(available_memory(), 0)
    return Checked(
        release=checkpointd.__version__,
        hypervisor=hypervisor,
        xen=capacity.xen,
        memory_free=capacity.memory_free,
        guest_memory_free=capacity.guest_memory_free,
        image=options.image,
        disk_free=_free(options.image_dir) if options.image_dir else 0,
        epoch_memory=options.epoch_memory,
        cpu_features=":".join(f"{word:08x}" for word in capacity.cpu_features),
        fence=_fence(check, options, hypervisor),
        guest_here=guest_here,
        starts_at_boot=hypervisor == "xen" and starts_at_boot(check.uuid, check.name) is not None,
        clock_ns=time.time_ns(),
    )


def _free(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def _fence(check: Check, options: SecondaryOptions, hypervisor: str) -> str:
    """What the service would choose for the guest of him who asks."""
    match way_to_fence(options, hypervisor, check.boot_id):
        case Way.NONE_WANTED:
            return f"{UNSAFE}: nothing stops the old guest (--unsafe-no-fencing): both may run"
        case Way.PROCESS:
            return "the guest's process is stopped, on this machine"
        case Way.COMMAND:
            assert options.fence_command is not None, "it is the way"
            return f"the command {options.fence_command[0]}"
        case Way.NO_WAY:
            return ""
