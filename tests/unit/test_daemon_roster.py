from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from checkpointd.authority.processes import start_time
from checkpointd.daemon import roster
from checkpointd.daemon.roster import Registration

if TYPE_CHECKING:
    from pathlib import Path


def test_a_daemon_is_listed_while_it_lives(tmp_path: Path) -> None:
    assert roster.running(tmp_path) == []
    with Registration(tmp_path, "primary", "4", domid=4, http="http://127.0.0.1:11004") as mine:
        assert roster.running(tmp_path) == [mine.entry]
        with Registration(tmp_path, "secondary", "10946", domid=None, http=None) as other:
            assert roster.running(tmp_path) == [mine.entry, other.entry]
    assert roster.running(tmp_path) == []
    assert list((tmp_path / "daemons").iterdir()) == []
    assert mine.entry.pid == os.getpid()


def test_a_killed_daemon_and_a_reused_pid_are_passed_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = start_time(process.pid)
        with Registration(tmp_path, "primary", "4", domid=4, http=None) as mine:
            entry = json.loads(mine.path.read_text())
            for name, time in {"alive": started, "reused": 1}.items():
                other = {**entry, "id": name, "pid": process.pid, "start_time": time}
                (tmp_path / "daemons" / f"{name}.json").write_text(json.dumps(other))
            assert [found.id for found in roster.running(tmp_path)] == ["alive", "4"]
            process.kill()
            process.wait()
            assert [found.id for found in roster.running(tmp_path)] == ["4"]


def test_what_is_no_entry_is_passed_over(tmp_path: Path) -> None:
    with Registration(tmp_path, "primary", "4", domid=4, http=None) as mine:
        whole = mine.path.read_text()
        for number, text in enumerate(
            [
                "",
                "{",
                "[]",
                "3",
                whole[:-9],
                '{"schema": 1}',
                "[" * 5000,
                whole.replace(": 1,", ": 2,", 1),
            ]
        ):
            (tmp_path / "daemons" / f"x{number}.json").write_text(text)
        (tmp_path / "daemons" / "directory.json").mkdir()
        assert roster.running(tmp_path) == [mine.entry]


def test_closing_leaves_a_successor_alone(tmp_path: Path) -> None:
    first = Registration(tmp_path, "primary", "4", domid=4, http=None)
    second = Registration(tmp_path, "primary", "4", domid=4, http="http://127.0.0.1:1")
    first.close()
    assert roster.running(tmp_path) == [second.entry]
    second.close()
    second.close()
    assert roster.running(tmp_path) == []
