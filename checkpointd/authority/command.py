"""Fencing by a command of the operator's: --fence-command, such as one that switches the other machine off.

It runs without a shell, split into words as a shell would, and learns of whom it is about by its environment:

    CHECKPOINTD_FENCE_UUID      the guest
    CHECKPOINTD_FENCE_NAME
    CHECKPOINTD_FENCE_DOMID     of the guest on its host
    CHECKPOINTD_FENCE_HOST      IP address from which its primary came
    CHECKPOINTD_FENCE_BOOT_ID   which boot of that machine: after a reboot the guest is gone

Exit code 0 is taken as proof that the guest runs no more and sends nothing more: the command must wait until it knows.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Final

from checkpointd.authority.fence import FenceResult, HostView

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checkpointd.hypervisor.port import DomainInfo

OUTPUT_KEPT: Final = 1024  # octets: the last lines of what it said, for a person
READ: Final = 64 << 10  # octets at a time: all that a pipe holds

# Becomes the command, after it has left behind, as nobody's child, one that waits for a line on standard input: if the
# end of the file comes in its place, then this daemon is dead, and the command must not switch off a machine that the
# next daemon may have accepted again. Group 0 is the command's own.
LEASH: Final = """
exec 3<&0 </dev/null
( { read -r line <&3 || kill -KILL 0; } >/dev/null 2>&1 & )
exec 3<&-
exec "$@"
"""
UNLEASH: Final = b"\n"


class CommandFence:
    """Fenced is only an exit code of 0 within the time. After anything else whatever the command has started is
    killed: it must not switch a machine off that was found alive meanwhile. So it is if this process dies.
    """

    def __init__(self, command: Sequence[str], info: DomainInfo, address: str) -> None:
        """`address`: of the primary, as this side sees it."""
        self._command = list(command)
        self._address = address
        self._environment = {
            "CHECKPOINTD_FENCE_UUID": info.uuid,
            "CHECKPOINTD_FENCE_NAME": info.name,
            "CHECKPOINTD_FENCE_DOMID": str(info.domid),
            "CHECKPOINTD_FENCE_HOST": address,
            "CHECKPOINTD_FENCE_BOOT_ID": info.host.boot_id,
        }

    def probe(self, timeout: float) -> HostView:
        return HostView(
            None, None, f"nothing is heard of {self._address}, and it cannot be looked at"
        )

    def fence(self, timeout: float) -> FenceResult:
        name = self._command[0]
        if shutil.which(name) is None:
            return FenceResult(
                False, f"--fence-command: {name} cannot be run: no such command, or not executable"
            )
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", LEASH, "sh", *self._command],
                env={**os.environ, **self._environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to be killed whole
            )
        except OSError as error:  # no process, descriptor or memory to be had
            return FenceResult(False, f"--fence-command: {name} cannot be run: {error.strerror}")
        said = b""
        code: int | None = None
        try:
            said, code = _watch(process, timeout)
        finally:
            _let_go(process) if code == 0 else _kill_group(process)
        tail = " | ".join(said.decode("utf-8", "replace").split("\n")).strip(" |")
        tail = f": {tail}" if tail else ""
        if code == 0:
            return FenceResult(True, f"{name} has fenced {self._address}{tail}")
        how = f"did not end within {timeout:g} s" if code is None else f"failed (exit code {code})"
        return FenceResult(False, f"--fence-command {name} for {self._address} {how}{tail}")

    def close(self) -> None:
        pass


def _watch(process: subprocess.Popen[bytes], timeout: float) -> tuple[bytes, int | None]:
    """The end of its output, and its exit code; None: it did not end in time.

    Its end counts, not that of its output, which a child in the background may keep open.
    """
    assert process.stdout is not None, "it is a pipe"
    output = process.stdout.fileno()
    os.set_blocking(output, False)
    deadline = time.monotonic() + timeout
    said = b""
    pidfd = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(output, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(left * 1000))
            data = _read(output)
            said = (said + data)[-OUTPUT_KEPT:]
            if pidfd in ready:
                return said, process.wait()
            if output in ready and not data:
                poll.unregister(output)  # closed
        return said, None
    finally:
        os.close(pidfd)
        process.stdout.close()


def _read(output: int) -> bytes:
    try:
        return os.read(output, READ)
    except BlockingIOError:
        return b""


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """What it has left in the background lives on."""
    assert process.stdin is not None, "it is a pipe"
    with contextlib.suppress(BrokenPipeError), process.stdin as leash:
        leash.write(UNLEASH)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None, "it is a pipe"
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
