"""Hosts of embedded guests as processes: their ports, their steps, their stops and ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd.hypervisor.embedded import toolstack

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import DomainInfo

PATIENCE = 20.0  # s; generous, and only ever waited out by a failing test
SECOND = 1_000_000_000  # ns


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        return int(udp.getsockname()[1])


def wait_exit(pid: int, kill: int | None = None) -> None:
    """Until the process `pid` has exited, reaped or not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if kill is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, kill)
        assert select.select([pidfd], [], [], PATIENCE)[0]
    finally:
        os.close(pidfd)


def wait_step(info: DomainInfo, step: int) -> None:
    """Until the guest has come so far; each look is a round trip to its host."""
    deadline = time.monotonic() + PATIENCE
    while toolstack.look(info).step < step:
        assert time.monotonic() < deadline, f"the guest does not come to step {step}"


def stop_host(info: DomainInfo) -> None:
    """SIGSTOP, and wait until every thread has stopped."""
    os.kill(info.host.pid, signal.SIGSTOP)
    tasks = list(Path(f"/proc/{info.host.pid}/task").iterdir())
    while not all(") T" in (task / "stat").read_text() for task in tasks):
        os.sched_yield()
