from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry

from checkpointd.cli import main
from checkpointd.daemon.health import HealthServer
from checkpointd.daemon.roster import Registration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PRIMARY = {
    "role": "primary",
    "domain": "kv",
    "domid": 4,
    "state": "protected",
    "epoch": 812,
    "acked_epoch": 810,
    "in_flight": 2,
    "pause_p50_ns": 1_234_567,
    "pause_p99_ns": 2_000_000,
    "unsafe": [],
}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Start a stand-in for a daemon: its entry, and an HTTP server that tells the given status."""
    with ExitStack() as stack:

        def start(document: dict[str, Any], *unready: str, role: str = "primary") -> None:
            server = HealthServer(
                "127.0.0.1",
                0,
                registry=CollectorRegistry(),
                live=list,
                ready=lambda: list(unready),
                status=lambda: document,
            )
            stack.enter_context(server)
            domid = document.get("domid")
            stack.enter_context(
                Registration(tmp_path, role, str(domid), domid=domid, http=server.url)
            )

        yield start


@pytest.fixture
def status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*argv: str) -> tuple[int, str]:
        code = main.main(["status", "--run-dir", str(tmp_path), *argv])
        return code, capsys.readouterr().out

    return run


def test_nothing_runs(status: Callable[..., tuple[int, str]]) -> None:
    assert status() == (0, "")
    assert status("--exit-code") == (1, "")
    code, text = status("--json")
    assert (code, json.loads(text)) == (0, {"schema": 1, "daemons": []})


def test_a_table_of_both_roles(
    daemon: Callable[..., None], status: Callable[..., tuple[int, str]]
) -> None:
    daemon(PRIMARY)
    daemon(
        {
            "role": "secondary",
            "unsafe": ["unsafe-no-fencing"],
            "domains": [
                {
                    "domain": "a",
                    "domid": 4,
                    "state": "standby",
                    "acked_epoch": 811,
                    "uncommitted": 0,
                },
                {"domain": "b", "domid": 5, "state": "syncing", "reason": "first", "alarm": "slow"},
            ],
        },
        role="secondary",
    )
    code, text = status("--exit-code")
    assert code == 0
    assert [line.split(maxsplit=8) for line in text.splitlines()[1:]] == [
        ["primary", "kv", "4", "protected", "810", "2", "1.234ms", "2ms"],
        ["secondary", "a", "4", "standby", "811", "0", "-", "-", "UNSAFE: unsafe-no-fencing"],
        [
            "secondary",
            "b",
            "5",
            "syncing",
            "-",
            "-",
            "-",
            "-",
            "first; slow; UNSAFE: unsafe-no-fencing",
        ],
    ]


def test_why_a_daemon_is_not_ready(
    daemon: Callable[..., None], status: Callable[..., tuple[int, str]]
) -> None:
    daemon(PRIMARY, "standby lost: output is held")
    code, text = status("--exit-code")
    assert code == 1
    assert text.splitlines()[1].endswith("2ms  standby lost: output is held")
    assert status()[0] == 0  # only --exit-code asks


def test_the_json_of_a_daemon(
    daemon: Callable[..., None], status: Callable[..., tuple[int, str]]
) -> None:
    daemon(PRIMARY, "a reason")
    _, text = status("--json")
    document = json.loads(text)
    (found,) = document["daemons"]
    assert document["schema"] == 1
    assert found["role"] == "primary"
    assert found["not_ready"] == ["a reason"]
    assert found["domains"][0]["acked_epoch"] == 810
    assert found["unsafe"] == []


@pytest.mark.parametrize("domains", [3, "text", [3], ["x"], None])
def test_a_daemon_that_talks_nonsense(
    daemon: Callable[..., None], status: Callable[..., tuple[int, str]], domains: object
) -> None:
    daemon({"domid": 4, "domains": domains})
    code, text = status("--exit-code")
    assert code == 1
    assert "does not answer as a daemon does" in text


def test_a_daemon_that_does_not_answer(
    tmp_path: Path, status: Callable[..., tuple[int, str]]
) -> None:
    with Registration(tmp_path, "primary", "4", domid=4, http="http://127.0.0.1:1"):
        code, text = status("--exit-code")
    assert code == 1
    assert "does not answer at http://127.0.0.1:1: [Errno 111] Connection refused" in text


def test_a_daemon_without_http_is_listed(
    tmp_path: Path, status: Callable[..., tuple[int, str]]
) -> None:
    with Registration(tmp_path, "primary", "4", domid=4, http=None):
        code, text = status("--exit-code")
    assert code == 0
    assert text.splitlines()[1].split() == ["primary", "-", "4", "-", "-", "-", "-", "-"]


def test_no_proxy_comes_between(
    daemon: Callable[..., None],
    status: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    daemon(PRIMARY)
    assert status("--exit-code")[0] == 0


def test_a_name_cannot_break_the_table(
    daemon: Callable[..., None], status: Callable[..., tuple[int, str]]
) -> None:
    daemon({**PRIMARY, "domain": "x\n\x1b[2Jprimary y"})
    lines = status()[1].splitlines()
    assert len(lines) == 2
    assert "x??[2Jprimary y" in lines[1]
