"""What every adapter of the hypervisor port must do: hold output, and let it go in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hosts import free_port, wait_step
from port_adapters import silent, talk, wait_held

if TYPE_CHECKING:
    import socket

    from port_adapters import Adapter

pytestmark = pytest.mark.embedded_only("the output of a Xen guest is not held yet")


def test_output_leaves_by_release_in_epoch_order(adapter: Adapter, client: socket.socket) -> None:
    port = free_port()
    send = talk(client, port)
    domain, table = adapter.attach(adapter.guest(address=f"127.0.0.1:{port}"))
    output = domain.output
    assert output.depth > 1
    assert not output.stats().shut
    send("a 1 ping")
    assert client.recv(2048) == b"a 1 1 ok"  # never shut yet
    assert table.epoch() == 1
    assert output.stats().shut
    for seq in (2, 3):
        send(f"a {seq} ping")
        wait_held(domain, seq - 1)
        assert table.epoch() == seq
    send("a 4 ping")
    wait_held(domain, 3)
    assert silent(client)
    output.release(1)
    assert output.stats().held_packets == 3  # epoch 1 had none
    output.release(2)
    assert client.recv(2048) == b"a 2 2 ok"
    output.release(99)  # nothing beyond what is closed
    assert client.recv(2048) == b"a 3 3 ok"
    assert output.stats().held_packets == 1
    assert table.epoch() == 4
    output.release(4)
    assert client.recv(2048) == b"a 4 4 ok"
    assert output.stats().released_packets == 4


def test_open_lets_all_out_and_stays_open_until_the_next_epoch(
    adapter: Adapter, client: socket.socket
) -> None:
    port = free_port()
    send = talk(client, port)
    domain, table = adapter.attach(adapter.guest(address=f"127.0.0.1:{port}"))
    table.epoch()
    send("a 1 ping")
    wait_held(domain, 1)
    domain.output.open()
    assert client.recv(2048) == b"a 1 1 ok"
    assert not domain.output.stats().shut
    send("a 2 ping")
    assert client.recv(2048) == b"a 2 2 ok"
    table.epoch()
    send("a 3 ping")
    wait_held(domain, 1)
    assert domain.output.stats().shut


def test_output_beyond_the_limit_is_dropped_and_counted_never_sent(
    adapter: Adapter, client: socket.socket
) -> None:
    port = free_port()
    info = adapter.guest(address=f"127.0.0.1:{port}", output_limit=1000)
    domain, table = adapter.attach(info)
    table.epoch()
    for seq in range(1, 11):
        talk(client, port)(f"a {seq} ping")
        wait_step(info, seq)
    stats = domain.output.stats()
    assert stats.held_bytes <= stats.limit_bytes == 1000
    assert stats.held_packets + stats.dropped_packets == 10
    assert stats.dropped_packets > 0
    domain.output.release(table.epoch())
    received = [client.recv(2048) for _ in range(stats.held_packets)]
    assert received == [f"a {seq} {seq} ok".encode() for seq in range(1, stats.held_packets + 1)]
    assert domain.output.stats().dropped_packets == stats.dropped_packets
