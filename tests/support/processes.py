"""What tests need of processes beyond subprocess: a stop that can be waited for, and nobody left behind."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# s; for what should be there in a moment, on a machine that is ten times slower than it should be
PATIENCE = 60.0
# s; between two looks at what tells of itself by no event
LOOK_EVERY = 0.01


class NotSeenError(Exception):
    """What a test waited for did not come."""


def until(there: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    """Look until it is there: only for what can be seen but not waited for."""
    deadline = time.monotonic() + timeout
    while not there():
        if time.monotonic() > deadline:
            raise NotSeenError(f"{what}: not within {timeout:.0f} s")
        time.sleep(LOOK_EVERY)


def stops(child: int, timeout: float = PATIENCE) -> bool:
    """Wait until a child of ours has stopped (SIGSTOP): True; False if it has ended instead.

    The child is not reaped, and the news of its stop stays for others to see.
    """
    found: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def wait() -> None:
        # waitid() has no time limit of its own; the thread ends with the child at the latest.
        with suppress(ChildProcessError):
            news = os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            found.put(news is not None and news.si_code == os.CLD_STOPPED)
            return
        found.put(False)

    threading.Thread(target=wait, name=f"stop-of-{child}", daemon=True).start()
    try:
        return found.get(timeout=timeout)
    except queue.Empty:
        raise NotSeenError(f"process {child} did not stop within {timeout:.0f} s") from None


def state_of(pid: int) -> str:
    """As /proc names it: R, S, T (stopped), Z, ...; "" if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def with_environment(assignment: str) -> list[int]:
    """The live processes, other than this one, that were started with this variable set so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with suppress(OSError):  # it has ended, or is somebody else's
            assignments = path.read_bytes().split(b"\0")
            if assignment.encode() in assignments and pid != os.getpid() and state_of(pid) != "Z":
                found.append(pid)
    return found


def command(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""


def end(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
