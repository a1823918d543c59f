"""The far end of a connection, a process that reads and forgets: `python -m checkpointd.bench.sink KIND OCTETS`.

KIND is tcp, zmq (plain), curve (encrypted as ours is) or curve2, two such connections at once, each with an I/O thread
of its own. It prints its port and, for curve, its public key; once it has had so many octets
it says so on each connection, so that the near end knows what time they took.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import zmq

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAME = 1 << 20  # octets; as large as ours
WAITING = 16  # frames that may wait in one direction, as on ours
READY, DONE = b"ready", b"done"
CONNECTIONS = {"zmq": 1, "curve": 1, "curve2": 2}


def main(kind: str, octets: int) -> None:
    if kind == "tcp":
        _tcp(octets)
    else:
        _zmq(octets, encrypted=kind.startswith("curve"), io_threads=CONNECTIONS[kind])


def _tcp(octets: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sys.stdout.write(f"{server.getsockname()[1]} -\n")
        sys.stdout.flush()
        connection, _ = server.accept()
    with connection:
        buffer = bytearray(FRAME)
        while octets > 0:
            octets -= connection.recv_into(buffer)
        connection.sendall(DONE)


def _zmq(octets: int, *, encrypted: bool, io_threads: int) -> None:
    context: zmq.Context[Any] = zmq.Context(io_threads)
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVHWM, WAITING)
    public = b"-"
    if encrypted:
        public, secret = zmq.curve_keypair()
        router.setsockopt(zmq.CURVE_SECRETKEY, secret)
        router.setsockopt(zmq.CURVE_SERVER, 1)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    sys.stdout.write(f"{port} {public.decode()}\n")
    sys.stdout.flush()
    peers = set()
    while octets > 0:
        peer, *_, frame = router.recv_multipart(copy=False)
        peers.add(peer.bytes)
        if len(frame) == len(READY) and frame.bytes == READY:
            router.send_multipart([peer, READY])
        else:
            octets -= len(frame)
    for one in peers:
        router.send_multipart([one, DONE])
    router.close(linger=5000)
    context.term()


@contextmanager
def process(kind: str, octets: int) -> Iterator[tuple[int, str]]:
    """Such a process: its port and its public key."""
    with subprocess.Popen(
        [sys.executable, "-m", "checkpointd.bench.sink", kind, str(octets)],
        stdout=subprocess.PIPE,
        text=True,
    ) as sink:
        assert sink.stdout is not None
        port, public = sink.stdout.readline().split()
        yield int(port), public


def rate(kind: str, octets: int) -> float:
    """Octets a second of a plain sender into such a process: frames that do not change, sent without a copy."""
    frame = bytearray(FRAME)
    frames = octets // FRAME
    with process(kind, frames * FRAME) as (port, public):
        if kind == "tcp":
            taken = _tcp_seconds(port, frame, frames)
        else:
            taken = _zmq_seconds(port, public, frame, frames, CONNECTIONS[kind])
    return frames * FRAME / taken


def _tcp_seconds(port: int, frame: bytearray, frames: int) -> float:
    with socket.create_connection(("127.0.0.1", port)) as near:
        began = time.monotonic()
        for _ in range(frames):
            near.sendall(frame)
        near.recv(len(DONE))
        return time.monotonic() - began


def _zmq_seconds(
    port: int, public: str, frame: bytearray, frames: int, connections: int
) -> float:
    context: zmq.Context[Any] = zmq.Context(connections)
    with ExitStack() as stack:
        stack.callback(context.term)
        nears = []
        for _ in range(connections):
            near = stack.enter_context(closing(context.socket(zmq.DEALER)))
            near.setsockopt(zmq.SNDHWM, WAITING)
            near.setsockopt(zmq.LINGER, 0)
            if public != "-":
                own, secret = zmq.curve_keypair()
                near.setsockopt(zmq.CURVE_SERVERKEY, public.encode())
                near.setsockopt(zmq.CURVE_PUBLICKEY, own)
                near.setsockopt(zmq.CURVE_SECRETKEY, secret)
            near.connect(f"tcp://127.0.0.1:{port}")
            near.send(READY)  # the handshake does not count
            near.recv()
            nears.append(near)
        began = time.monotonic()
        for i in range(frames):
            nears[i % connections].send(frame, copy=False)
        for near in nears:
            near.recv()
        return time.monotonic() - began


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
