"""The lab itself: what the other tests lean on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from lab.guests import ADDRESS, ECHO_PORT, Guest
from lab.places import LabError

if TYPE_CHECKING:
    from lab.machine import Machine
    from xen_rig import Rig

# From dom0, whose bridge the guest is on.
ASK = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(60);"
    f"s.connect(('{ADDRESS}', {ECHO_PORT})); s.send(b'hello'); print(s.recv(2000).decode())"
)


def test_the_hosts_reach_each_other_and_have_checkpointd(hosts: dict[str, Machine]) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        hosts[name].ssh(f"ping -c 1 -W 30 {hosts[other].address}")
        assert "checkpointd" in hosts[name].ssh("checkpointd --version").out
        assert hosts[name].ssh("hostname").out.strip() == name


@pytest.mark.short
def test_a_guest_checks_its_memory_its_disk_and_answers(rig: Rig) -> None:
    living = rig.create(Guest("whole", vcpus=2, network=True, disk=True, pressure=8))
    assert rig.a.ssh(f'python3 -c "{ASK}"', timeout=120).out.startswith("tick ")
    _, last = living.console.wait_ticks(4)[-1]
    assert last.ops > 0
    assert last.disk > 0
    assert last.churn > 0
    living.console.wait(
        lambda _lines: any(tick.echo for _, tick in living.console.ticks), 60, "the echo in a tick"
    )


@pytest.mark.loses_host
def test_the_fence_answers_only_when_the_host_is_off(hosts: dict[str, Machine]) -> None:
    """Host b pulls host a's plug, as its secondary will."""
    a, b = hosts["a"], hosts["b"]
    record = a.record
    assert record
    before = time.monotonic()
    answer = b.ssh(f"CHECKPOINTD_FENCE_HOST={a.address} lab-fence")
    assert time.monotonic() - before < 60
    assert "off" in answer.out
    assert not record.process.alive()
    with pytest.raises(LabError, match="host a is off"):
        a.ssh("true")
    assert "off" in b.ssh("lab-fence a").out, "what is off already is fenced, too"
    assert b.ssh("lab-fence nobody", check=False).code != 0
