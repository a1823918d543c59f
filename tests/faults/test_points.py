"""A process that is stopped at a point stands exactly there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from processes import stops

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSAGES = 30
# A thread that passes a point and then says so, beside a main thread that would take the process's signals.
PROGRAM = f"""
import os, threading
from checkpointd import faults

def work():
    for _ in range({PASSAGES}):
        faults.point("here")
        os.write(1, b"x")

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.fixture
def stopping() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        env={**os.environ, "CHECKPOINTD_FAULTS": "here=stop+again"},
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        yield process
        process.kill()


def test_the_thread_that_stops_its_process_does_not_go_on(
    stopping: subprocess.Popen[bytes],
) -> None:
    for passed in range(PASSAGES):
        assert stops(stopping.pid)
        # Take the news, or the next wait would see this stop again.
        os.waitid(os.P_PID, stopping.pid, os.WSTOPPED)
        assert stopping.stdout is not None
        assert (stopping.stdout.read() or b"") == (b"x" if passed else b"")
        stopping.send_signal(signal.SIGCONT)
    assert stopping.wait(60) == 0
