"""Runs a fresh embedded guest in this process: what `checkpointd guest` does, and what a rebooting guest becomes.

A reboot is the end of the domain and the beginning of another, with the next free domid, the same UUID and
address, and fresh RAM. The process stays the same one (exec): so a fence that was made for the old domain still
stops the new one, and no moment of a reboot can leave two guests with one UUID.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from checkpointd.errors import CheckpointdError, UsageError
from checkpointd.hypervisor.embedded.host import OUTPUT_LIMIT, Build, Host
from checkpointd.hypervisor.embedded.lib import ffi, lib
from checkpointd.hypervisor.embedded.place import DOMID_MAX, Place
from checkpointd.hypervisor.port import PAGE_SIZE, DomainInfo, EndReason, HostIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PORT_BASE = 47000  # UDP; a guest listens at 127.0.0.1, this plus its domid, unless told otherwise
MEMORY_MAX = 1 << 44  # octets; frame numbers have 32 bits


@dataclass(frozen=True, slots=True)
class FreshGuest:
    """What to run. `domid` None: the next free one from 1; `next_domid`: the next free one from there."""

    namespace: str  # directory of the namespace
    program: str
    memory: int  # octets
    domid: int | None = None
    next_domid: int = 1
    uuid: str = ""
    name: str = ""
    address: str = ""
    output_limit: int = OUTPUT_LIMIT  # octets held while shut
    paused: bool = False

    def check(self) -> None:
        """UsageError that lists all that is wrong."""
        wrong = []
        if not lib.program_parse(self.program.encode(), ffi.new("struct program *")):
            wrong.append(
                f"--program {self.program!r} is neither kv nor dirty:PAGES or dirty:PAGES@RATE"
            )
        if self.memory % PAGE_SIZE or not 16 * PAGE_SIZE <= self.memory <= MEMORY_MAX:
            wrong.append(
                f"--memory must be a multiple of 4KiB, from 64KiB to 16TiB, not {self.memory} octets"
            )
        if self.domid is not None and not 0 < self.domid <= DOMID_MAX:
            wrong.append(f"--domid must be from 1 to {DOMID_MAX}, not {self.domid}")
        if wrong:
            raise UsageError("; ".join(wrong))


def build(guest: FreshGuest) -> Host:
    """Claim a place, take the address, lay out the RAM; the guest is not started yet."""
    guest.check()
    namespace = Path(guest.namespace)
    if guest.domid is None:
        place = Place.claim_next(namespace, guest.next_domid)
    else:
        place = Place.claim(namespace, guest.domid)
    try:
        info = DomainInfo(
            uuid=guest.uuid or str(uuid4()),
            domid=place.domid,
            name=guest.name or f"guest-{place.domid}",
            nr_pfns=guest.memory // PAGE_SIZE,
            ram_pages=guest.memory // PAGE_SIZE,
            hypervisor="embedded",
            host=HostIdentity("", 0, 0),  # the host fills in its own
            config={
                "program": guest.program,
                "address": guest.address or f"127.0.0.1:{PORT_BASE + place.domid}",
                "output_limit": guest.output_limit,
            },
        )
        memory_fd = os.memfd_create(f"checkpointd-guest-{place.domid}", os.MFD_CLOEXEC)
        try:
            os.truncate(memory_fd, guest.memory)
            host = Host(place, Build(info, memory_fd))
        finally:
            os.close(memory_fd)
    except BaseException:
        place.close()
        raise
    try:
        host.boot()
    except BaseException:
        host.close()
        raise
    return host


def announce(host: Host) -> None:
    """The one line that says that the guest is there."""
    info = host.info
    sys.stdout.write(
        f"guest {info.name} runs: domid {info.domid}, uuid {info.uuid}, {info.nr_pfns * PAGE_SIZE >> 20} MiB, "
        f"program {info.config['program']}, UDP {info.config['address']}\n"
    )
    sys.stdout.flush()


def run(guest: FreshGuest) -> EndReason:
    """Run a guest to its end. Does not return from a reboot: the process goes on as the new guest."""
    host = build(guest)
    return run_host(host, guest, lambda: announce(host))


def run_host(host: Host, guest: FreshGuest, started: Callable[[], None]) -> EndReason:
    """Run a built host to its end; `started` is called once the guest runs; `guest` says what to become at a
    reboot.
    """
    info = host.info
    try:
        host.start(paused=guest.paused)
        started()
        reason = host.run()
    finally:
        host.close()
    if reason is EndReason.REBOOT:
        again = replace(
            guest, domid=None, next_domid=info.domid + 1, uuid=info.uuid, name=info.name,
            address=str(info.config["address"]), paused=False,
        )  # fmt: skip
        sys.stdout.flush()
        program = [sys.executable, "-m", "checkpointd.hypervisor.embedded.fresh"]
        os.execv(sys.executable, [*program, json.dumps(asdict(again))])  # noqa: S606 - no shell is meant
    return reason


def main(argv: Sequence[str]) -> int:
    """Entry point of the process after a reboot: its one argument is a FreshGuest as JSON."""
    try:
        run(FreshGuest(**json.loads(argv[0])))
    except CheckpointdError as error:
        sys.stderr.write(f"checkpointd guest: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
