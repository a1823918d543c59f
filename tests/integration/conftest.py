"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--adapter",
        choices=["embedded", "xen"],
        default="embedded",
        help="which adapter the conformance tests of the hypervisor port run on; xen: in dom0",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "embedded_only(reason): what the toolstack of a Xen guest cannot be told to do, or does elsewhere",
    )


def make_adapter(kind: str, directory: Path) -> Any:
    """Any: the tests use what both have, and each its own where they are marked so."""
    if kind == "embedded":
        return Adapter(directory)
    from xen_adapter import XenAdapter  # only where there is a Xen

    return XenAdapter(directory)


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Of the hypervisor port: what its conformance tests (test_port_*.py) run on."""
    kind = request.config.getoption("--adapter", "embedded")
    mark = request.node.get_closest_marker("embedded_only")
    if kind != "embedded" and mark is not None:
        pytest.skip(mark.args[0])
    if kind != "embedded":
        make_adapter(kind, tmp_path)  # Xen's libraries are opened once a process
    before = open_fds()
    adapter = make_adapter(kind, tmp_path)
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
