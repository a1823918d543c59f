"""Shipping alone, off the pause: parts of noise through our shipper, into a process that reads and forgets."""

from __future__ import annotations

import queue
import random
import struct
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq

from checkpointd.bench import sink
from checkpointd.bench.scenarios import Size
from checkpointd.bench.turns import Goal, compare, in_turns
from checkpointd.native import DigestKey
from checkpointd.primary.epoch import Frame
from checkpointd.primary.events import Ship, Shipped
from checkpointd.primary.reducing import Reducer
from checkpointd.primary.shipping import Session, Shipper
from checkpointd.primary.worth import WARM, Worth
from checkpointd.wire.bulk import BulkLink
from checkpointd.wire.frames import FrameError, Kind
from checkpointd.wire.keys import KeyPair
from checkpointd.wire.sockets import Contexts, Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure

TEXT = "parts shipped off the pause, against plain senders of frames of 1 MiB"

# (frames of a part, parts, rounds)
SIZES = {Size.SMALL: (4, 2, 1), Size.FULL: (32, 32, 8)}
PAGES = 256  # of a frame
PAGE = 4096
FIRST = WARM + 4  # parts that do not count
PART_END = 16  # octets that end each part
PATIENCE = 60.0  # s, for one part
HISTORY = 64 << 20  # octets; --delta-history as it is by default
LIMITS = {
    "curve": ("CURVE alone", Goal(0.85, least=True)),
    "curve2": ("CURVE alone, two connections", None),
    "zmq": ("plain pyzmq", None),
    "tcp": ("plain TCP", None),
}


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    frames, parts, rounds = SIZES[size]
    # Two of each, in turn, of the same pages: what is sent again has changed throughout.
    records = [[_record(i, kind) for i in range(frames)] for kind in (0, 1)]
    octets = parts * sum(map(len, records[0]))
    found = in_turns(
        {
            "ours": lambda: octets / _seconds(records, parts, Reducer(Worth(), HISTORY)),
            "off": lambda: octets / _seconds(records, parts, None),
            **{kind: partial(sink.rate, kind, octets) for kind in LIMITS},
        },
        rounds,
    )
    for kind, (name, goal) in LIMITS.items():
        yield compare("parts of noise", "GB/s", found["ours"], name, found[kind], goal, scale=1e-9)
    yield compare(
        "parts of noise", "GB/s", found["ours"], "--reduce off", found["off"], Goal(1.0, least=True), scale=1e-9
    )  # fmt: skip
    yield compare(
        "CURVE alone, two connections", "GB/s", found["curve2"], "CURVE alone", found["curve"], scale=1e-9
    )  # fmt: skip


def _record(number: int, kind: int) -> bytes:
    words = struct.pack(f"<{PAGES}Q", *range(number * PAGES, (number + 1) * PAGES))
    data = random.Random(2 * number + kind).randbytes(PAGES * PAGE)
    return struct.pack("<IIII", 1, 8 + len(words) + len(data), PAGES, 0) + words + data


def _seconds(records: list[list[bytes]], parts: int, reducer: Reducer | None) -> float:
    """From the order of the first part that counts to the sink's word that all is there. Those before it open the
    connection, and teach what there is to be learnt.
    """
    public, secret = zmq.curve_keypair()
    session = Session(1, 1, DigestKey(bytes(32)))
    frames = [
        [Frame(Kind.PAGES, memoryview(one), session.key.digest(one)) for one in kind]
        for kind in records
    ]
    octets = parts * sum(map(len, records[0]))
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    contexts = Contexts.make()
    with sink.process("curve", (FIRST + parts) * (octets // parts + PART_END)) as (port, key):
        link = BulkLink(
            contexts.bulk,
            Endpoint("127.0.0.1", key.encode(), bulk_port=port),
            KeyPair(public, secret),
        )
        shipper = Shipper(link, events.put, events.put, lambda staged, octets: None, reducer)
        shipper.start()
        for part in range(FIRST + parts):
            if part == FIRST:
                began = time.monotonic()
            shipper.ship(session, Ship(0, part + 1, 0, final=True), frames[part % 2])
            done = events.get(timeout=PATIENCE)
            assert done == Shipped(part + 1, 0), done
        with suppress(FrameError):  # its word is none of ours
            link.receive(timeout_s=PATIENCE)
        taken = time.monotonic() - began
        shipper.close()
    contexts.close()
    return taken
