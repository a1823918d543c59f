"""`checkpointd save`: attach, copy, and let go in the way that was asked for."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd import native, node
from checkpointd.archive.signals import ending_orderly
from checkpointd.errors import StateError, UsageError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.hypervisor.xen.devices import Allowances
from checkpointd.primary.capture import Limits
from checkpointd.primary.saving import save
from checkpointd.stream import files

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.primary.saving import Saved

# How often over its memory a guest is copied while it runs. A guest that outruns that needs a larger arena.
LIVE_ROUNDS = 10
SUSPEND_TIMEOUT_NS = 60_000_000_000  # as long as libxl waits for a guest that saves itself
MAPPING_BUDGET = 256 << 20  # octets of guest memory mapped at a time
# What a stream has beside the guest's memory, as a part of it: pages that were dirtied while they were copied.
REPEATED = 16
DESTROY_TIMEOUT = 30.0  # s; `xl destroy` waits for the backends of the devices


class After(StrEnum):
    """What becomes of the guest once the file is there."""

    RUN = "run"
    PAUSE = "pause"
    DESTROY = "destroy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """What `checkpointd save` was asked."""

    target: str
    domid: int | None = None
    uuid: str | None = None
    after: After = After.RUN
    force: bool = False
    arena: int = 64 << 20  # octets
    hypervisor: str = "auto"
    namespace: str = "primary"
    run_dir: Path = Path()
    unsafe_disk: bool = False
    unsafe_untested_xen: bool = False


def run_save(wanted: Save, progress: Callable[[int, int], None]) -> Saved:
    """Raises UsageError, HypervisorError, ProtectionLostError, StateError, StreamError; the guest runs on then."""
    native.self_test()
    stays = wanted.after is not After.RUN
    # Disk and image fit each other as long as the guest does nothing after the image.
    allow = Allowances(
        disk=wanted.unsafe_disk or stays, output=True, untested=wanted.unsafe_untested_xen
    )
    hypervisor = node.choose_hypervisor(
        wanted.hypervisor, wanted.run_dir, wanted.namespace, allow
    )
    info = hypervisor.find(domid=wanted.domid, uuid=wanted.uuid)
    _check_target(wanted, info)
    with ExitStack() as stack:
        stack.enter_context(ending_orderly())
        domain = hypervisor.attach(info.domid)
        stack.callback(domain.close)  # which lets a suspended guest go on
        with files.replacing(wanted.target) as sink:
            saved = save(
                domain,
                sink.write,
                Limits(wanted.arena, MAPPING_BUDGET, SUSPEND_TIMEOUT_NS, LIVE_ROUNDS),
                stay=stays,
                progress=progress,
            )
        # Only now that the file has its name: until then a failure must leave a guest that runs.
        if wanted.after is After.PAUSE:
            domain.pause()
        elif wanted.after is After.DESTROY:
            _destroy(info, untested=wanted.unsafe_untested_xen)
    if wanted.after is not After.DESTROY:
        hypervisor.settle(info, None)
    return saved


def _check_target(wanted: Save, info: DomainInfo) -> None:
    path = wanted.target
    if path == "-":
        if sys.stdout.isatty():
            raise UsageError("a guest's memory does not go to a terminal: redirect standard output")
        return
    if os.path.exists(path) and not wanted.force:
        raise UsageError(f"{path} exists already: --force replaces it")
    directory = os.path.dirname(os.path.realpath(path))
    memory = info.ram_pages * PAGE_SIZE
    needed = memory + memory // REPEATED
    try:
        found = os.statvfs(directory)
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}") from error
    free = found.f_bavail * found.f_frsize
    if free < needed and not path.endswith(".zst"):  # what compression leaves nobody knows
        raise StateError(
            f"{directory} has {free >> 20} MiB free, and the image of {info.name} takes about "
            f"{needed >> 20} MiB: free some, or save elsewhere"
        )


def _destroy(info: DomainInfo, *, untested: bool) -> None:
    if info.hypervisor == "xen":
        from checkpointd.hypervisor.xen import lib
        from checkpointd.hypervisor.xen.incoming import Domains

        domains = Domains(lib.open_libs(untested=untested))
        try:
            domains.destroy(info.domid, DESTROY_TIMEOUT)
        finally:
            domains.close()
        return
    from checkpointd.hypervisor.embedded import toolstack

    toolstack.destroy(info)
