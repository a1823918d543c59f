"""Fencing an embedded host on this machine. See Fence in authority/fence.py."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.processes import boot_id, start_time
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.embedded import protocol

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import HostIdentity


class EmbeddedFence:
    """Fenced is only what has been seen to have exited: with its process, a guest's threads and its socket are
    gone, so it neither runs nor sends.

    Order that keeps it: a pidfd is opened first and the start time compared after, so the pidfd is that of the
    host and of no later process with its number; then destroy is asked for, then SIGKILL sent; then, in any
    case, the exit is waited for on the pidfd.
    """

    def __init__(self, host: HostIdentity) -> None:
        self._host = host
        self._here = host.boot_id == boot_id()
        self._pidfd = -1  # -1 and _here: it was gone when we came
        if not self._here:
            return
        try:
            self._pidfd = os.pidfd_open(host.pid)
        except ProcessLookupError:
            return
        if start_time(host.pid) != host.start_time:
            os.close(self._pidfd)
            self._pidfd = -1

    def probe(self, timeout: float) -> HostView:
        if not self._here:
            return HostView(
                None, None, "the host is on another machine, or of another boot of this one"
            )
        if self._gone(0):
            return HostView(False, False, f"the host (pid {self._host.pid}) has exited")
        answer = self._order("info", timeout)
        if isinstance(answer, str):
            return HostView(True, None, f"the host (pid {self._host.pid}) lives, but {answer}")
        engine = bool(answer["engine"])
        return HostView(
            True,
            engine,
            f"the host lives, {'an' if engine else 'no'} engine is attached, step {answer['step']}",
        )

    def fence(self, timeout: float) -> FenceResult:
        host = self._host
        if not self._here:
            return FenceResult(
                False,
                "the guest's host is on another machine, or of another boot of this one, and cannot be stopped "
                "from here: make sure that it is off, then activate by hand",
            )
        if self._gone(0):
            return FenceResult(True, f"the host (pid {host.pid}) had exited")
        deadline = time.monotonic() + timeout
        # Half of the time for the polite way: one that is stopped or stuck needs the other.
        answer = self._order("destroy", timeout / 2)
        how = "destroyed the guest at our order" if not isinstance(answer, str) else "was killed"
        # One that obeys should exit by itself now; let it, but not for ever.
        if isinstance(answer, str) or not self._gone(timeout / 4):
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has exited meanwhile: seen below
            except PermissionError:
                return FenceResult(
                    False,
                    f"the host (pid {host.pid}) belongs to another user: stop it, or run as its user or root",
                )
        if self._gone(max(0.0, deadline - time.monotonic())):
            return FenceResult(True, f"the host (pid {host.pid}) {how} and has exited")
        return FenceResult(
            False,
            f"the host (pid {host.pid}) did not exit within {timeout:g} s: kill it, then try again",
        )

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1
        self._here = False  # a closed fence proves nothing any more

    def _gone(self, timeout: float) -> bool:
        """True once the process has exited, reaped or not."""
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def _order(self, op: str, timeout: float) -> dict[str, Any] | str:
        """The host's answer, or why there is none."""
        if not self._host.control:
            return "it takes no orders"
        try:
            with closing(protocol.connect(Path(self._host.control), timeout)) as connection:
                return protocol.call(connection, {"op": op})[0]
        except (OSError, HypervisorError) as error:
            return f"does not answer ({error})"
