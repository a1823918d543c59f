"""Telling one process from all others, and seeing that it is gone."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

from checkpointd.authority.fence import FenceResult, HostView


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Names a process, such as the one that runs a guest, so that nothing else can be mistaken for it.

    A pid alone is reused; with the boot id and the start time it is not. `control` is where the process takes
    orders (for an embedded host the path of its socket), empty where it takes none from outside.
    """

    boot_id: str  # /proc/sys/kernel/random/boot_id: which boot of which machine
    pid: int
    start_time: int  # clock ticks since boot: field 22 of /proc/PID/stat
    control: str = ""


def boot_id() -> str:
    """Which boot of which machine this is: proc(5), /proc/sys/kernel/random/boot_id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`; None: there is none, or it has ended.

    proc(5), field 22 of /proc/PID/stat.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command's name (field 2) is in parentheses and may hold anything, so count from its end.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def identify(pid: int | None = None, control: str = "") -> HostIdentity:
    """The identity of process `pid`, or of this one."""
    pid = os.getpid() if pid is None else pid
    started = start_time(pid)
    if started is None:
        raise ProcessLookupError(f"no process {pid}")
    return HostIdentity(boot_id(), pid, started, control)


def kill(identity: HostIdentity) -> None:
    """SIGKILL to that process if it is there yet, and to no other that has its pid by now."""
    if identity.boot_id != boot_id():
        return
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        if start_time(identity.pid) == identity.start_time:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended meanwhile
    finally:
        os.close(pidfd)


class ProcessWatch:
    """Sees whether one process has gone, however its pid is used afterwards. Does nothing to it.

    As a Fence it succeeds only by finding the process gone: that is proof for a standby, since a secondary never
    activates what it has not itself acknowledged in its own life.
    """

    def __init__(self, identity: HostIdentity) -> None:
        self._pidfd: int | None = None
        self._elsewhere = identity.boot_id != boot_id()
        self._text = f"process {identity.pid}"
        if self._elsewhere:
            return
        try:
            pidfd = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            return
        if start_time(identity.pid) == identity.start_time:
            self._pidfd = pidfd
        else:
            os.close(pidfd)  # the pid has been given to another: ours is gone

    def gone(self, timeout: float) -> bool | None:
        """Whether it has gone within `timeout` seconds; None: it is on another machine, nobody here can tell."""
        if self._elsewhere:
            return None
        if self._pidfd is None:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(0, round(timeout * 1000))))

    def probe(self, timeout: float) -> HostView:
        gone = self.gone(0)
        return HostView(None if gone is None else not gone, None, self._text)

    def fence(self, timeout: float) -> FenceResult:
        match self.gone(timeout):
            case True:
                return FenceResult(True, f"{self._text} is gone")
            case False:
                return FenceResult(False, f"{self._text} is still there, and silent")
            case None:
                return FenceResult(False, f"{self._text} is on another machine, out of sight")

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
            self._elsewhere = True  # nothing can be told any more
