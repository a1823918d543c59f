from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from checkpointd.daemon import systemd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = str(tmp_path / "n") if request.param == "path" else f"@checkpointd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(name.replace("@", "\0"))
        ours.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield ours


def test_messages_arrive_together(manager: socket.socket) -> None:
    assert systemd.notify(systemd.READY, systemd.status("epoch 7,\nall well"))
    assert manager.recv(1000) == b"READY=1\nSTATUS=epoch 7, all well"


def test_a_manager_that_does_not_read_blocks_nobody(manager: socket.socket) -> None:
    sent = 0
    while systemd.notify(systemd.STOPPING):
        sent += 1
    assert sent > 0
    assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize(
    "name", ["", "relative", "/nonexistent/socket", "@nobody\0", "@" + "x" * 200]
)
def test_nobody_to_notify(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "environ", {"NOTIFY_SOCKET": name})
    assert not systemd.notify(systemd.READY)
