"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
from embedded_sides import Side
from hosts import PATIENCE
from port_adapters import Adapter

from checkpointd import faults

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.hypervisor.embedded.kv import UdpTransport


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=[Adapter], ids=["embedded"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Adapter]:
    """Of the hypervisor port: what its conformance tests (test_port_*.py) run on."""
    before = open_fds()
    adapter = request.param(tmp_path)
    try:
        yield adapter
    finally:
        adapter.close()
    assert open_fds() == before


@pytest.fixture
def client() -> Iterator[socket.socket]:
    """A UDP socket of a user of a guest."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(PATIENCE)
        yield udp


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    """The primary's namespace of embedded guests, and the secondary's (test_embedded_*.py)."""
    before = open_fds()
    primary, secondary = Side(tmp_path, "primary"), Side(tmp_path, "secondary")
    try:
        yield primary, secondary
    finally:
        primary.close()
        secondary.close()
        faults.arm("")
    assert open_fds() == before


@pytest.fixture
def primary(sides: tuple[Side, Side]) -> Side:
    return sides[0]


@pytest.fixture
def secondary(sides: tuple[Side, Side]) -> Side:
    return sides[1]


@pytest.fixture
def transports() -> Iterator[list[UdpTransport]]:
    opened: list[UdpTransport] = []
    yield opened
    for transport in opened:
        transport.close()
