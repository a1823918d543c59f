from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import checkpointd
from checkpointd.cli import main as cli
from checkpointd.cli import status
from checkpointd.cli.progress import Progress
from checkpointd.errors import FenceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def run(*argv: str) -> int:
    """main()'s exit code, also where argparse ends the process itself."""
    try:
        return cli.main(argv)
    except SystemExit as ending:
        return int(ending.code or 0)


def python(code: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], input=stdin, capture_output=True, text=True, timeout=60
    )


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text or f"  {name}\n" in text
    assert " 13  The other side could not be fenced" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"checkpointd {checkpointd.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_is_what_the_list_says(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"checkpointd.cli.{command}")
    assert callable(module.run)
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: checkpointd {command}")
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "required: COMMAND"),
        (["sttus"], "invalid choice: 'sttus'"),
        (["status", "--jso"], "unknown arguments: --jso"),
        (["--jso", "status"], "unknown arguments: --jso"),
        (["primary", "--domid"], "argument --domid: expected one argument"),
        (["primary", "--frob", "4"], "--frob: no such option"),
        (["secondary", "--silence", "1"], "--silence: '1' is not a duration"),
        (["demo", "--memory", "3"], "--memory: '3' is not a size"),
    ],
)
def test_wrong_usage(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert told in capsys.readouterr().err


def test_a_demo_whose_guest_cannot_start_says_what_the_guest_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("demo", "--memory", "4KiB", "--work-dir", str(tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.startswith("checkpointd: guest4 did not start\n")
    assert "--memory must be a multiple of 4KiB, from 64KiB" in said


@pytest.mark.parametrize(
    ("failure", "code", "told"),
    [
        (UsageError("no\n  and no"), 2, "checkpointd: no\n  and no\n"),
        (FenceError("not fenced: ask the operator"), 13, "checkpointd: not fenced: ask the oper"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_a_command_ends(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    told: str,
) -> None:
    def fail(args: object) -> int:
        raise failure

    monkeypatch.setattr(status, "run", fail)
    assert run("status") == code
    assert capsys.readouterr().err.startswith(told)


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(status, "run", fail)
    with pytest.raises(ZeroDivisionError):
        run("status")


def test_a_reader_that_has_gone_is_no_error() -> None:
    ended = python(
        "import os, sys\n"
        "from checkpointd.cli import main, status\n"
        "status.run = lambda args: print('x' * 100_000) or 0\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(main.main(['status']))\n"
    )
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    ("argv", "loaded"),
    [
        (["--help"], ()),
        (["status", "--help"], ("checkpointd.cli.status",)),
        (["primary", "--help"], ("checkpointd.cli.primary",)),
    ],
)
def test_a_command_imports_only_what_it_needs(argv: list[str], loaded: tuple[str, ...]) -> None:
    """Help comes at once, and works where the compiled modules or a dependency are missing."""
    ended = python(
        "import sys\n"
        "from checkpointd.cli import main\n"
        "try:\n"
        f"    main.main({argv})\n"
        "except SystemExit:\n"
        "    print('LOADED', *sorted(sys.modules))\n"
    )
    modules = ended.stdout.splitlines()[-1].split()
    assert modules[0] == "LOADED", ended.stderr
    assert not {"zmq", "prometheus_client", "checkpointd.native"}.intersection(modules)
    commands = {f"checkpointd.cli.{name}" for name in cli.COMMANDS}
    assert commands.intersection(modules) == set(loaded)


def drawn(act: Callable[[Progress], None]) -> str:
    read, write = os.pipe()
    with Progress("first copy", write) as progress:
        act(progress)
    os.close(write)
    with open(read, encoding="ascii", newline="") as file:
        return file.read()


def test_progress_ends_full() -> None:
    def act(progress: Progress) -> None:
        progress.update(1, 4)
        progress.update(4, 4)

    assert drawn(act).endswith("\rfirst copy [" + "#" * 30 + "] 100%\n")


def test_progress_that_was_cut_off_says_how_far_it_came() -> None:
    text = drawn(lambda progress: progress.update(1, 4))
    assert text.endswith("]  25%\n")
    assert "first copy [#######   " in text


def test_progress_of_nothing_is_silent() -> None:
    assert drawn(lambda progress: None) == ""
