"""A guest must not die of an order to its host, whatever is wrong with it."""

from __future__ import annotations

import json
import os
import resource
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pair import pair_in

from checkpointd.authority.processes import start_time
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.embedded import protocol

if TYPE_CHECKING:
    import socket

    from pair import Guest

DESCRIPTORS = 40  # that the host is left with: some more than it has at its start


def connect(guest: Guest) -> closing[socket.socket]:
    return closing(protocol.connect(Path(guest.info.host.control)))


def lives(guest: Guest) -> bool:
    return start_time(guest.info.host.pid) == guest.info.host.start_time


@pytest.mark.parametrize(
    "order",
    [
        {"op": "balloon", "in": False, "pfns": [1 << 32]},
        {"op": "balloon", "in": False, "pfns": [-1]},
        {"op": "balloon", "in": False, "pfns": ["page"]},
        {"op": ["balloon"]},
        ["balloon"],
        7,
    ],
)
def test_what_is_no_order_is_refused_and_the_next_one_obeyed(tmp_path: Path, order: Any) -> None:
    with pair_in(tmp_path) as pair:
        guest = pair.guest("dirty:1@1")
        with connect(guest) as connection:
            connection.send(json.dumps(order).encode())
            answer = protocol.receive(connection)
        assert answer is not None
        assert "error" in answer[0]
        with connect(guest) as connection:
            request = {"op": "balloon", "in": False, "pfns": [500]}
            assert protocol.call(connection, request)[0] == {"changed": 1}


def test_a_host_out_of_descriptors_refuses_an_engine(tmp_path: Path) -> None:
    with pair_in(tmp_path) as pair, ExitStack() as held:
        guest = pair.guest()
        resource.prlimit(guest.info.host.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        refused = 0
        for _ in range(DESCRIPTORS):  # one descriptor less each time
            connection = held.enter_context(connect(guest))
            connection.settimeout(0.5)
            try:
                _, descriptors = protocol.call(connection, {"op": "attach"})
            except HypervisorError:
                refused += 1
            else:
                with ExitStack() as mine:
                    for fd in descriptors:
                        mine.callback(os.close, fd)
                    protocol.call(connection, {"op": "detach"})
            assert lives(guest)
            if (
                refused == 4
            ):  # for want of one, of two, of three, and then the connection is not taken
                break
        assert refused
