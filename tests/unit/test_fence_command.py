"""--fence-command with real commands: only exit code 0 within the time is proof, and nothing is left running."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from processes import state_of, until

from checkpointd.authority.command import CommandFence
from checkpointd.authority.processes import ProcessWatch, identify
from checkpointd.daemon.settings import command
from checkpointd.daemon.units import BadValueError
from checkpointd.hypervisor.port import DomainInfo, HostIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INFO = DomainInfo(
    "12345678-1234-4234-8234-123456789abc",
    4,
    "web; rm -rf /",
    9,
    9,
    "xen",
    HostIdentity("b0", 0, 0),
)
LIMIT = 30.0  # s; for what should take a moment
SHORT = 0.2  # s; for what must not end in time


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):  # no child is left, not even a dead one
        os.waitpid(-1, os.WNOHANG)


def fence(*words: str) -> CommandFence:
    return CommandFence(words, INFO, "192.0.2.7")


def shell(script: str) -> CommandFence:
    return fence("/bin/sh", "-c", script)


def test_exit_code_0_is_proof_and_its_last_words_are_kept() -> None:
    result = shell("echo asking the PDU; echo outlet 4 is off >&2").fence(LIMIT)
    assert result.fenced
    assert "asking the PDU | outlet 4 is off" in result.detail
    assert "192.0.2.7" in result.detail


def test_it_learns_whom_to_fence_by_its_environment_alone() -> None:
    names = ("UUID", "NAME", "DOMID", "HOST", "BOOT_ID")
    script = "; ".join(f'echo "$CHECKPOINTD_FENCE_{name}"' for name in names)
    assert (
        shell(script)
        .fence(LIMIT)
        .detail.endswith(
            "12345678-1234-4234-8234-123456789abc | web; rm -rf / | 4 | 192.0.2.7 | b0"
        )
    )


def test_there_is_no_shell_but_one_that_is_asked_for() -> None:
    words = command().parse("/bin/echo 'two words' $HOME ; false")
    result = CommandFence(words, INFO, "192.0.2.7").fence(LIMIT)
    assert result.detail.endswith(": two words $HOME ; false")


@pytest.mark.parametrize("text", ["", "  ", "echo 'open", "a\0b"])
def test_what_is_no_command_line_is_refused_at_start(text: str) -> None:
    with pytest.raises(BadValueError, match="not a command line"):
        command().parse(text)


@pytest.mark.parametrize("script", ["exit 1", "exit 143", "kill -9 $$"])
def test_any_other_end_is_no_proof(script: str) -> None:
    result = shell(f"echo no answer; {script}").fence(LIMIT)
    assert not result.fenced
    assert result.detail.endswith(": no answer")


def test_a_command_that_is_not_there_is_no_proof() -> None:
    result = fence("/nonexistent/fence").fence(LIMIT)
    assert not result.fenced
    assert "/nonexistent/fence cannot be run" in result.detail


def test_a_machine_that_has_no_process_for_it_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again; the daemon, with the only copy there may be, must not end."""

    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    result = shell("true").fence(LIMIT)
    assert not result.fenced
    assert result.detail.endswith("cannot be run: Resource temporarily unavailable")


def test_one_that_takes_too_long_is_killed_with_all_it_started(tmp_path: Path) -> None:
    note = tmp_path / "child"
    script = f"sleep 600 & echo $! > {shlex.quote(str(note))}; echo waiting; wait"
    result = shell(script).fence(SHORT)
    while not note.exists() or not note.read_text(encoding="ascii").strip():  # a busy machine
        result = shell(script).fence(1.0)
    assert not result.fenced
    assert "did not end within" in result.detail
    child = int(note.read_text(encoding="ascii"))
    until(lambda: state_of(child) in ("", "Z"), "end of what the command had started")


DAEMON = f"""
import sys
from checkpointd.authority.command import CommandFence
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
info = DomainInfo("12345678-1234-4234-8234-123456789abc", 4, "web", 9, 9, "xen", HostIdentity("b0", 0, 0))
CommandFence(sys.argv[1:], info, "192.0.2.7").fence({LIMIT})
"""


def test_one_whose_daemon_dies_dies_with_all_it_started(tmp_path: Path) -> None:
    """It would switch off a machine that the next daemon has found alive."""
    note = tmp_path / "pids"
    script = f"sleep 600 & echo $$ $! > {shlex.quote(str(note))}; wait"
    with subprocess.Popen([sys.executable, "-c", DAEMON, "/bin/sh", "-c", script]) as daemon:
        until(lambda: note.exists() and note.read_text(encoding="ascii").endswith("\n"), "fence")
        daemon.kill()
    first, child = map(int, note.read_text(encoding="ascii").split())
    until(lambda: state_of(first) in ("", "Z"), "end of a fence that nobody waits for")
    until(lambda: state_of(child) in ("", "Z"), "end of what the fence had started")


def test_what_it_leaves_in_the_background_lives_on() -> None:
    result = shell("exec sleep 600 >&- 2>&- & echo $!").fence(LIMIT)
    child = int(result.detail.rpartition(": ")[2])
    assert result.fenced
    with contextlib.closing(ProcessWatch(identify(child))) as left:
        assert left.gone(SHORT) is False
        os.kill(child, signal.SIGKILL)
        assert left.gone(LIMIT)


def test_it_has_no_children_that_it_does_not_know_of() -> None:
    """Such as one that waits for all of its own."""
    script = "import os\ntry: os.waitpid(-1, 0)\nexcept ChildProcessError: print('none')"
    assert fence(sys.executable, "-c", script).fence(LIMIT).detail.endswith(": none")


def test_a_child_in_the_background_keeps_nobody_waiting() -> None:
    began = time.monotonic()
    result = shell("sleep 20 & echo $!").fence(LIMIT)
    assert result.fenced
    assert time.monotonic() - began < 20
    os.kill(int(result.detail.rpartition(": ")[2]), 9)


def test_endless_output_is_read_and_its_end_kept() -> None:
    script = "import sys; sys.stdout.write('x' * 3_000_000 + ' the end')"
    result = fence(sys.executable, "-c", script).fence(LIMIT)
    assert result.fenced
    assert result.detail.endswith("xx the end")
    assert len(result.detail) < 2000


def test_nothing_can_be_seen_of_the_other_machine() -> None:
    assert fence("/bin/true").probe(1.0).alive is None
