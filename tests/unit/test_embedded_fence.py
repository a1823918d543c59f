"""A fence never raises: what it raised would end the secondary in the middle of a failover."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING, Any

from checkpointd.authority.processes import identify
from checkpointd.hypervisor.embedded.fence import EmbeddedFence

if TYPE_CHECKING:
    import pytest

LIMIT = 30.0  # s


def test_a_host_that_exits_between_the_order_and_the_kill_is_fenced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    assert host.stdin is not None
    with host.stdin, closing(EmbeddedFence(identify(host.pid))) as fence:
        looked: list[float] = []
        gone = fence._gone

        def exits_after_the_look(timeout: float) -> bool:
            looked.append(timeout)
            if (
                len(looked) == 2
            ):  # after the order: the polite wait is over, and it has not gone yet
                host.kill()
                host.wait()
                return False
            return gone(timeout)

        def obeys(op: str, timeout: float) -> dict[str, Any]:
            return {}

        monkeypatch.setattr(fence, "_gone", exits_after_the_look)
        monkeypatch.setattr(fence, "_order", obeys)
        assert fence.fence(LIMIT).fenced


def test_a_host_that_may_not_be_killed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that took the order to go, and then does not."""

    def refuse(pidfd: int, number: int) -> None:
        raise PermissionError

    def obeys(op: str, timeout: float) -> dict[str, Any]:
        return {}

    with closing(EmbeddedFence(identify(os.getpid()))) as fence:
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
        monkeypatch.setattr(fence, "_order", obeys)
        result = fence.fence(0.1)
    assert not result.fenced
    assert "another user" in result.detail
