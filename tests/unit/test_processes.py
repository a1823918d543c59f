"""One process, and no other that has its pid: seen to go, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from checkpointd.authority.processes import (
    HostIdentity,
    ProcessWatch,
    boot_id,
    identify,
    kill,
    start_time,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 30.0  # s


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def test_a_process_is_seen_to_go(sleeper: subprocess.Popen[bytes]) -> None:
    watch = ProcessWatch(identify(sleeper.pid))
    assert watch.gone(0) is False
    assert not watch.fence(0).fenced
    os.kill(sleeper.pid, signal.SIGKILL)
    assert watch.gone(PATIENCE) is True
    assert watch.fence(0).fenced
    watch.close()


def test_another_process_with_the_same_pid_is_not_it(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    assert started is not None
    watch = ProcessWatch(HostIdentity(boot_id(), sleeper.pid, started - 1))
    assert watch.gone(0) is True
    watch.close()


def test_nobody_here_knows_of_another_machine(sleeper: subprocess.Popen[bytes]) -> None:
    watch = ProcessWatch(HostIdentity("another boot", sleeper.pid, 1))
    assert watch.gone(0) is None
    assert not watch.fence(0).fenced
    watch.close()


def test_one_is_killed_and_nobody_in_its_place(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identify(sleeper.pid)
    kill(replace(identity, start_time=identity.start_time - 1))
    kill(replace(identity, boot_id="of another machine"))
    assert sleeper.poll() is None
    kill(identity)
    assert sleeper.wait(PATIENCE) == -signal.SIGKILL
    kill(identity)  # it is gone: nothing happens
