"""What an operator, or a test in his place, does to an embedded guest: no part of the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.embedded import protocol
from checkpointd.hypervisor.embedded.place import parse_info, read_domains

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checkpointd.hypervisor.embedded.fresh import FreshGuest
    from checkpointd.hypervisor.port import DomainInfo

BALLOON_BATCH = 4096  # pfns an order: below 48 KiB of JSON, within MESSAGE_MAX


def create(guest: FreshGuest) -> tuple[subprocess.Popen[str], DomainInfo]:
    """Run a fresh guest in a process of its own; returns once it runs. The process is the caller's to wait for.

    HypervisorError with what the process said if it ends instead.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "checkpointd.hypervisor.embedded.fresh", json.dumps(asdict(guest))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        said = process.communicate()[1].strip()
        raise HypervisorError(
            said.rpartition("\n")[2] or f"the guest ended with code {process.returncode}"
        )
    # By its process: its domid may have been left to it.
    domains = read_domains(Path(guest.namespace))
    return process, next(info for info in domains if info.host.pid == process.pid)


@dataclass(frozen=True, slots=True)
class GuestView:
    """A guest from outside."""

    info: DomainInfo
    engine: bool  # an engine is attached
    step: int
    paused: bool  # by the operator
    shut: bool  # the output is held
    held: int  # packets
    dropped: int  # packets, over the limit


def _order(info: DomainInfo, request: protocol.Message, timeout: float) -> protocol.Message:
    try:
        connection = protocol.connect(Path(info.host.control), timeout)
    except OSError as error:
        raise HypervisorError(
            f"the host of domain {info.domid} (pid {info.host.pid}) does not answer: {error}"
        ) from error
    with closing(connection):
        return protocol.call(connection, request)[0]


def look(info: DomainInfo, timeout: float = protocol.TIMEOUT) -> GuestView:
    fields = _order(info, {"op": "info"}, timeout)
    return GuestView(**{**fields, "info": parse_info(fields["info"])})


def pause(info: DomainInfo) -> None:
    """Stop the guest until unpause(), whatever engines come and go."""
    _order(info, {"op": "pause"}, protocol.TIMEOUT)


def unpause(info: DomainInfo) -> None:
    _order(info, {"op": "unpause"}, protocol.TIMEOUT)


def destroy(info: DomainInfo, timeout: float = protocol.TIMEOUT) -> None:
    """When this returns the guest runs no more; its host is about to exit."""
    _order(info, {"op": "destroy"}, timeout)


def balloon_out(info: DomainInfo, pfns: Sequence[int], timeout: float = protocol.TIMEOUT) -> int:
    """Have the guest give these pages back; how many it gave. It keeps those that its program lives in."""
    return _balloon(info, pfns, inwards=False, timeout=timeout)


def balloon_in(info: DomainInfo, pfns: Sequence[int], timeout: float = protocol.TIMEOUT) -> int:
    """Give the guest memory behind these pages; how many it got. None for a page that is there already, and none
    beyond its charge: a page given back counts until the engine has unmapped it.
    """
    return _balloon(info, pfns, inwards=True, timeout=timeout)


def _balloon(info: DomainInfo, pfns: Sequence[int], *, inwards: bool, timeout: float) -> int:
    return sum(
        int(_order(info, {"op": "balloon", "in": inwards, "pfns": list(batch)}, timeout)["changed"])
        for batch in (pfns[at : at + BALLOON_BATCH] for at in range(0, len(pfns), BALLOON_BATCH))
    )
