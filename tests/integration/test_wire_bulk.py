"""The bulk link: memory, limits, and fairness to heartbeats."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import zmq
from wire_rig import HELLO, LIMIT_S, MIB, SESSION, TERM, Rig, eventually, pages, wire_rig

from checkpointd.wire.acceptor import _BULK_TURN, Sent
from checkpointd.wire.bulk import LinkTimeoutError
from checkpointd.wire.frames import FrameError, Header, Kind
from checkpointd.wire.sockets import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with wire_rig(tmp_path) as rig:
        yield rig


def test_memory_may_be_written_once_it_is_released(rig: Rig) -> None:
    link = rig.bulk()
    frames = [bytearray(bytes([n]) * MIB) for n in range(1, 33)]
    for number, memory in enumerate(frames):
        tracker = link.send(pages(number), memory, timeout_s=LIMIT_S)
        assert tracker is not None
    assert link.send(pages(99, length=16), bytes(16), timeout_s=LIMIT_S) is None  # copied
    assert link.wait_released(LIMIT_S)
    assert link.in_flight_bytes == 0
    for memory in frames:
        memory[:] = bytes(MIB)
    eventually(lambda: len(rig.secondary.bulk) == 33, "all frames")
    arrived = [(header.sequence, payload[:1], len(set(payload))) for _, header, payload in
               rig.secondary.bulk[:32]]  # fmt: skip
    assert arrived == [(n, bytes([n + 1]), 1) for n in range(32)]


def test_what_is_in_flight_is_bounded_and_abandoned_memory_is_free(rig: Rig) -> None:
    """The secondary takes nothing; the link holds no more than its limit, and lets go when told to."""
    stalled, go = threading.Event(), threading.Event()

    def stall() -> None:
        stalled.set()
        assert go.wait(LIMIT_S)

    rig.secondary.before_bulk = stall
    limit = 4 * MIB
    link = rig.bulk(in_flight_max=limit)
    memory = bytearray(MIB)
    sent = 0
    try:
        while sent < 500:
            link.send(pages(sent), memory, timeout_s=0.5)
            sent += 1
            assert link.in_flight_bytes <= limit
    except LinkTimeoutError as error:
        full = str(error)
    assert "took nothing" in full
    assert stalled.is_set()
    assert link.in_flight_bytes > 0  # so a write now would change what is sent
    assert link.wait_released(0.0) is False
    # Two queues of 16 messages, TCP's own buffers, and what we let into flight.
    assert sent < 200

    link.abandon()
    assert link.in_flight_bytes == 0
    rig.secondary.before_bulk = lambda: None
    go.set()
    link.send(pages(0, epoch=2), memory, timeout_s=LIMIT_S)
    # What the old connection had brought may come after it: the router takes turns.
    eventually(
        lambda: any(header.epoch == 2 for _, header, _ in list(rig.secondary.bulk)),
        "a frame of the next epoch",
    )
    taken = [header.sequence for _, header, _ in rig.secondary.bulk if header.epoch == 1]
    assert taken == list(range(len(taken)))  # whole frames in order, as many as had arrived
    assert len(taken) <= sent


@pytest.mark.slow
def test_a_peer_that_goes_while_its_frames_wait_does_no_harm(rig: Rig) -> None:
    """libzmq's own heartbeats (a second apart, were they on) would abort the process here."""
    router = rig.secondary.acceptor._bulk
    assert router.getsockopt(zmq.HEARTBEAT_IVL) == 0
    ended = threading.Event()

    def stall() -> None:
        assert ended.wait(LIMIT_S)

    rig.secondary.before_bulk = stall
    link = rig.bulk()
    with suppress(LinkTimeoutError):
        for sequence in range(200):
            link.send(pages(sequence), bytes(MIB), timeout_s=0.3)
    link.abandon()
    # Nothing can be waited for here: it is the absence of an abort for longer than that timer would
    # have run.
    assert not rig.secondary.fatal
    threading.Event().wait(1.5)
    rig.secondary.before_bulk = lambda: None
    ended.set()
    eventually(lambda: len(rig.secondary.bulk) >= 16, "what had arrived")


def test_a_bulk_frame_is_checked_before_it_is_sent(rig: Rig) -> None:
    link = rig.bulk()
    with pytest.raises(FrameError, match="length"):
        link.send(pages(0), bytes(16), timeout_s=LIMIT_S)
    with pytest.raises(LinkTimeoutError):
        rig.bulk(Endpoint("127.0.0.1", rig.endpoint.key, 1, 2)).send(
            pages(0, length=16), bytes(16), timeout_s=0.1
        )


def test_digests_come_back_to_who_asked(rig: Rig) -> None:
    link = rig.bulk()
    link.send(Header(Kind.DIGESTS_WANTED, SESSION, TERM), timeout_s=LIMIT_S)
    eventually(lambda: rig.secondary.bulk, "the question")
    peer, header, payload = rig.secondary.bulk[0]
    assert (header.kind, payload) == (Kind.DIGESTS_WANTED, b"")
    answer = bytes(8) + bytes(range(32))

    def speak() -> list[Sent]:
        foreign = Header(Kind.DIGESTS, SESSION, TERM + 1, length=len(answer))
        own = Header(Kind.DIGESTS, SESSION, TERM, flags=1, length=len(answer))
        return [rig.secondary.acceptor.send_bulk(peer, h, answer) for h in (foreign, own)]

    assert rig.secondary.on_its_thread(speak) == [Sent.YES, Sent.YES]
    received = link.receive(LIMIT_S)
    assert received is not None
    assert (received[0].flags, bytes(received[1])) == (1, answer)
    assert link.dropped == 1
    assert link.receive(0.0) is None

    def flood() -> Sent:
        own = Header(Kind.DIGESTS, SESSION, TERM, length=8 + MIB)
        for _ in range(300):
            if (
                sent := rig.secondary.acceptor.send_bulk(peer, own, bytes(8 + MIB))
            ) is not Sent.YES:
                break
        return sent

    assert rig.secondary.on_its_thread(flood) is Sent.FULL


def test_a_heartbeat_waits_for_no_more_than_one_turn_of_bulk(rig: Rig) -> None:
    secondary = rig.secondary
    waited = threading.Event()

    def hold() -> None:  # on the acceptor's thread: until a heartbeat lies there and bulk, too
        if not waited.is_set():
            assert secondary.acceptor._control.poll(int(LIMIT_S * 1000))
            assert secondary.acceptor._bulk.poll(int(LIMIT_S * 1000))
            waited.set()
            secondary.order.clear()

    bulk = rig.bulk()
    bulk.send(pages(0, length=16), bytes(16), timeout_s=LIMIT_S)
    eventually(lambda: secondary.bulk, "a first frame")
    secondary.before_bulk = hold
    link = rig.link()
    for sequence in range(1, 15):
        bulk.send(pages(sequence), bytes(MIB), timeout_s=LIMIT_S)
    link.hello(HELLO)
    eventually(lambda: len(secondary.bulk) == 15, "all frames")
    assert "control" in secondary.order
    assert secondary.order.index("control") <= _BULK_TURN
