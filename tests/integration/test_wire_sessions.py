"""A session over both links: its beginning, heartbeats, cuts, silence, and what ends it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from wire_rig import (
    HELLO,
    INFO,
    LIMIT_S,
    MIB,
    SESSION,
    TERM,
    Rig,
    Secondary,
    descriptors,
    eventually,
    pages,
    wire_rig,
)

from checkpointd.errors import WireError
from checkpointd.wire.acceptor import Acceptor, Sent
from checkpointd.wire.frames import FrameError
from checkpointd.wire.keys import loopback_pair
from checkpointd.wire.messages import Ack, Hello, Query, Welcome, encode
from checkpointd.wire.sockets import Contexts, Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with wire_rig(tmp_path) as rig:
        yield rig


def test_a_session_begins_and_its_heartbeats_come_back(rig: Rig) -> None:
    link = rig.link()
    link.hello(HELLO)
    link.progress(epoch=5, phase=2, count=99)
    eventually(lambda: len(rig.secondary.beats()) >= 5 and len(rig.rtts) >= 3, "heartbeats")
    assert rig.secondary.hellos() == [HELLO]
    counts = [beat.count for beat in rig.secondary.beats()]
    assert counts == list(range(1, len(counts) + 1))
    last = rig.secondary.beats()[-1]
    assert (last.epoch, last.phase, last.progress) == (5, 2, 99)
    assert isinstance(rig.delivered[0], Welcome)
    assert (link.connected, link.trouble) == (True, "")
    assert link.last_heard_ns is not None
    assert all(0 <= rtt < LIMIT_S * 1e9 for rtt in rig.rtts)
    peer = rig.secondary.control[0][0]
    assert peer.key == rig.primary_keys.own().public
    assert link.send(Query(3, 1))
    eventually(
        lambda: any(message == Query(3, 1) for _, _, message in list(rig.secondary.control)),
        "query",
    )
    assert rig.secondary.ticks > 0
    assert not rig.fatal


def test_nothing_can_be_sent_before_a_session_and_the_queue_is_bounded(rig: Rig) -> None:
    nowhere = Endpoint("127.0.0.1", rig.endpoint.key, 1, 2)
    link = rig.link(nowhere)
    with pytest.raises(WireError, match="hello"):
        link.send(Query(1, 0))
    with pytest.raises(FrameError):
        link.hello(Hello(SESSION, TERM, INFO, 0, bytes(32), b"", 1, resume=False))
    link.hello(HELLO)
    sent = [link.send(Query(1, 0)) for _ in range(200)]
    assert sent.index(False) in (63, 64)  # with or without HELLO among them
    assert not any(sent[64:])
    eventually(lambda: "secondary` running" in link.trouble, "a word of what is wrong")


def test_after_a_cut_both_links_resume(rig: Rig) -> None:
    endpoint, control, bulk_proxy = rig.proxied()
    link = rig.link(endpoint)
    bulk = rig.bulk(endpoint)
    link.hello(HELLO)
    eventually(rig.secondary.beats, "heartbeats")
    bulk.send(pages(0), bytes(MIB), timeout_s=LIMIT_S)
    eventually(lambda: rig.delivered and rig.secondary.bulk, "a frame")

    control.cut()
    bulk_proxy.cut()
    eventually(lambda: not link.connected, "the cut to be noticed")
    assert link.trouble
    seen = len(rig.secondary.beats())
    control.heal()
    bulk_proxy.heal()

    eventually(lambda: len(rig.secondary.beats()) >= seen + 3, "heartbeats after the cut")
    assert [hello.resume for hello in rig.secondary.hellos()] == [False, True]
    counts = [beat.count for beat in rig.secondary.beats()]
    assert counts == sorted(set(counts))
    routes = {peer.route for peer, _, _ in rig.secondary.control}
    assert len(routes) == 2
    # The old connection's route is gone, and the acceptor says so instead of pretending.
    old = rig.secondary.control[0][0]
    result = rig.secondary.on_its_thread(
        lambda: rig.secondary.acceptor.send(old, Ack(1, 0, True), session=SESSION, term=TERM)
    )
    assert result is Sent.GONE
    bulk.send(pages(1), bytes(MIB), timeout_s=LIMIT_S)
    eventually(lambda: rig.secondary.bulk[-1][1].sequence == 1, "a frame after the cut")
    assert bulk.wait_released(LIMIT_S)


@pytest.mark.slow
def test_a_silent_network_is_noticed_and_replaced(rig: Rig) -> None:
    """No connection breaks; nothing comes through any more: after 3 s without an echo."""
    endpoint, control, _ = rig.proxied()
    link = rig.link(endpoint)
    link.hello(HELLO)
    eventually(rig.secondary.beats, "heartbeats")
    control.freeze()
    eventually(lambda: not link.connected, "the silence to be noticed")
    control.heal()
    eventually(lambda: len(rig.secondary.hellos()) == 2, "HELLO on a new connection")


def test_what_is_of_another_session_is_dropped_unread_and_what_is_malformed_is_told_once(
    rig: Rig,
) -> None:
    link = rig.link()
    link.hello(HELLO)
    eventually(lambda: rig.delivered, "welcome")
    peer = rig.secondary.control[0][0]
    router = rig.secondary.acceptor._control
    other = encode(Ack(9, 0, True), session=SESSION + 1, term=TERM)
    good = encode(Ack(1, 0, True), session=SESSION, term=TERM)

    def speak() -> None:
        for parts in (other, [b"junk"], [b"more junk"], [], good):
            router.send_multipart([peer.route, *parts] if parts else [peer.route, b""])

    rig.secondary.on_its_thread(speak)
    eventually(lambda: Ack(1, 0, True) in rig.delivered, "the good one")
    assert Ack(9, 0, True) not in rig.delivered
    assert (link.dropped, link.bad_frames) == (1, 3)
    assert [error.field for error in rig.errors] == ["header"]
    before = len(rig.secondary.beats())
    eventually(lambda: len(rig.secondary.beats()) > before, "heartbeats all the same")


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_a_callback_that_fails_ends_its_thread_and_is_told(rig: Rig, side: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError(side)

    if side == "primary":
        rig.link(deliver=fail).hello(HELLO)
        told = rig.fatal
    else:
        rig.secondary.acceptor.post(fail)
        told = rig.secondary.fatal
    eventually(lambda: told, "on_fatal")
    assert [str(error) for error in told] == [side]


def test_run_raises_what_a_callback_raised_and_frees_its_ports(tmp_path: Path) -> None:
    files = descriptors()
    keys = loopback_pair(tmp_path)[1]
    contexts = Contexts.make()
    first = Secondary(contexts, keys)
    acceptor = first.acceptor

    def fail() -> None:
        raise ZeroDivisionError

    acceptor.post(fail)
    with pytest.raises(ZeroDivisionError):
        acceptor.run()
    acceptor.close()
    contexts.close()
    eventually(lambda: descriptors() <= files, "all descriptors closed")


def test_a_port_in_use_is_told_and_leaves_nothing_behind(rig: Rig) -> None:
    files, threads = descriptors(), threading.active_count()
    used = rig.endpoint.bulk_port
    contexts = Contexts.make()
    with pytest.raises(WireError, match=f"127.0.0.1:{used}"):
        Acceptor(
            contexts, "127.0.0.1", 0, used, rig.secondary_keys,
            on_control=print, on_bulk=print, on_error=print, on_tick=print, tick_s=1,
            on_fatal=print,
        )  # fmt: skip
    contexts.close()
    eventually(lambda: descriptors() <= files, "all descriptors closed")
    assert threading.active_count() == threads
