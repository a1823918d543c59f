"""The far end of a connection, a process that reads and forgets: `python -m checkpointd.bench.sink KIND OCTETS`.

KIND is tcp, zmq (plain) or curve (encrypted as ours is). It prints its port and, for curve, its public key; once it has
had so many octets it says so on the connection, so that the near end knows what time they took.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import closing
from typing import Any

import zmq

FRAME = 1 << 20  # octets; as large as ours
WAITING = 16  # frames that may wait in one direction, as on ours
READY, DONE = b"ready", b"done"


def main(kind: str, octets: int) -> None:
    if kind == "tcp":
        _tcp(octets)
    else:
        _zmq(octets, encrypted=kind == "curve")


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


def _zmq(octets: int, *, encrypted: bool) -> None:
    context: zmq.Context[Any] = zmq.Context()
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
    peer, _ = router.recv_multipart()
    router.send_multipart([peer, READY])
    while octets > 0:
        _, frame = router.recv_multipart(copy=False)
        octets -= len(frame)
    router.send_multipart([peer, DONE])
    router.close(linger=5000)
    context.term()


def rate(kind: str, octets: int) -> float:
    """Octets a second of a plain sender into such a process: frames that do not change, sent without a copy."""
    frame = bytearray(FRAME)
    frames = octets // FRAME
    with subprocess.Popen(
        [sys.executable, "-m", "checkpointd.bench.sink", kind, str(frames * FRAME)],
        stdout=subprocess.PIPE,
        text=True,
    ) as sink:
        assert sink.stdout is not None
        port, public = sink.stdout.readline().split()
        send = _tcp_rate if kind == "tcp" else _zmq_rate
        taken = send(int(port), public, frame, frames)
    return frames * FRAME / taken


def _tcp_rate(port: int, public: str, frame: bytearray, frames: int) -> float:
    with socket.create_connection(("127.0.0.1", port)) as near:
        began = time.monotonic()
        for _ in range(frames):
            near.sendall(frame)
        near.recv(len(DONE))
        return time.monotonic() - began


def _zmq_rate(port: int, public: str, frame: bytearray, frames: int) -> float:
    context: zmq.Context[Any] = zmq.Context()
    with closing(context.socket(zmq.DEALER)) as near:
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
        began = time.monotonic()
        for _ in range(frames):
            near.send(frame, copy=False)
        near.recv()
        taken = time.monotonic() - began
    context.term()
    return taken


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
