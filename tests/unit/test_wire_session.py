"""The primary's half of a control session, with a clock made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.wire.frames import FrameError
from checkpointd.wire.messages import (
    Ack,
    Echo,
    Heartbeat,
    Hello,
    Message,
    Refused,
    Welcome,
    encode,
)
from checkpointd.wire.session import HELLO_AGAIN_NS, SILENCE_NS, ControlSession, Progress

BEAT = 100_000_000
HOST = HostIdentity("boot", 1, 1)
INFO = DomainInfo("12345678-1234-4234-8234-123456789abc", 4, "g", 10, 10, "embedded", HOST)
HELLO = Hello(7, 2, INFO, 1, bytes(32), b"", 1, resume=False)
WELCOME = Welcome(7, 2, 0, None, False, 1, HOST)
IDLE = Progress()


def opened() -> ControlSession:
    session = ControlSession(BEAT)
    session.open(HELLO, 0)
    session.connect(0)
    return session


def send_all(session: ControlSession, now: int) -> list[Message]:
    out: list[Message] = []
    while (message := session.due(now, IDLE)) is not None:
        session.sent(message, now)
        out.append(message)
        assert len(out) < 10
    return out


def hear(
    session: ControlSession, message: Message, now: int = 0, *, mark: tuple[int, int] = (7, 2)
) -> Message | None:
    return session.received(encode(message, session=mark[0], term=mark[1]), now)


def kinds(messages: list[Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


def test_nothing_is_said_before_there_is_a_session_and_a_connection() -> None:
    session = ControlSession(BEAT)
    session.connect(0)
    assert session.due(0, IDLE) is None
    assert session.wait_ns(0) is None
    session.disconnect()
    session.open(HELLO, 0)
    assert session.due(0, IDLE) is None
    with pytest.raises(RuntimeError):
        _ = ControlSession(BEAT).mark


def test_hello_comes_first_and_again_until_it_is_answered() -> None:
    session = opened()
    assert kinds(send_all(session, 0)) == ["Hello", "Heartbeat"]
    assert kinds(send_all(session, BEAT)) == ["Heartbeat"]
    assert kinds(send_all(session, HELLO_AGAIN_NS)) == ["Hello", "Heartbeat"]
    assert hear(session, WELCOME) == WELCOME
    assert kinds(send_all(session, 3 * HELLO_AGAIN_NS)) == ["Heartbeat"]


def test_after_a_reconnect_hello_says_whether_it_was_welcomed() -> None:
    session = opened()
    send_all(session, 0)
    session.disconnect()
    assert session.wait_ns(1) is None
    session.connect(1)
    assert session.due(1, IDLE) == HELLO
    hear(session, WELCOME)
    session.disconnect()
    session.connect(2)
    assert session.due(2, IDLE) == replace(HELLO, resume=True)
    session.open(replace(HELLO, session=8), 3)
    assert session.due(3, IDLE) == replace(HELLO, session=8)


def test_heartbeats_keep_their_time_and_do_not_burst() -> None:
    session = opened()
    send_all(session, 0)
    hear(session, WELCOME)
    assert session.wait_ns(30_000_000) == 70_000_000
    # A little late: the next one is on time all the same.
    assert kinds(send_all(session, BEAT + 10_000_000)) == ["Heartbeat"]
    assert session.wait_ns(BEAT + 10_000_000) == 90_000_000
    # Very late: one, not ten.
    assert kinds(send_all(session, 12 * BEAT)) == ["Heartbeat"]
    assert session.wait_ns(12 * BEAT) == BEAT


def test_heartbeats_carry_progress_and_count() -> None:
    session = opened()
    send_all(session, 0)
    assert session.due(BEAT, Progress(epoch=5, phase=3, count=99)) == Heartbeat(2, BEAT, 5, 99, 3)


def test_a_blocked_message_is_tried_again_soon_and_not_counted() -> None:
    session = opened()
    message = session.due(0, IDLE)
    assert isinstance(message, Hello)
    session.blocked(message, 0)
    beat = session.due(0, IDLE)
    assert beat == Heartbeat(1, 0, 0, 0, 0)
    assert isinstance(beat, Heartbeat)
    session.blocked(beat, 0)
    wait = session.wait_ns(0)
    assert wait is not None
    assert 0 < wait < BEAT
    assert send_all(session, wait) == [HELLO, Heartbeat(1, wait, 0, 0, 0)]


def test_frames_of_another_session_or_term_are_dropped_unread() -> None:
    session = opened()
    assert hear(session, Ack(1, 0, True), mark=(8, 2)) is None
    assert hear(session, Ack(1, 0, True), mark=(7, 1)) is None
    bad = encode(WELCOME, session=7, term=2)
    bad[1] = b"[" * len(bad[1])
    assert (
        session.received([bad[0].replace(b"\x07" + bytes(7), b"\x08" + bytes(7)), bad[1]], 0)
        is None
    )
    assert session.dropped == 3
    with pytest.raises(FrameError):
        session.received(bad, 0)
    assert hear(session, Ack(1, 0, True)) == Ack(1, 0, True)
    assert ControlSession(BEAT).received(encode(Ack(1, 0, True), session=7, term=2), 0) is None


def test_after_a_refusal_it_is_silent_until_another_session() -> None:
    session = opened()
    send_all(session, 0)
    refused = Refused(7, 9, "term", "a newer term runs this guest")
    assert hear(session, refused, mark=(7, 9)) == refused
    assert session.due(10 * BEAT, IDLE) is None
    assert session.wait_ns(0) is None
    session.disconnect()
    session.connect(1)
    assert session.due(10 * BEAT, IDLE) is None
    session.open(replace(HELLO, session=8), 1)
    assert kinds(send_all(session, 1)) == ["Hello", "Heartbeat"]


def test_a_connection_without_an_echo_is_given_up() -> None:
    session = opened()
    assert not session.silent(SILENCE_NS - 1)
    assert session.silent(SILENCE_NS)
    hear(session, Echo(1, 0, None), now=SILENCE_NS)
    assert not session.silent(2 * SILENCE_NS - 1)
    assert session.silent(2 * SILENCE_NS)
    session.disconnect()
    assert not session.silent(9 * SILENCE_NS)
    session.connect(9 * SILENCE_NS)
    assert not session.silent(9 * SILENCE_NS + 1)
    hear(session, Refused(7, 2, "busy", "no"), now=9 * SILENCE_NS)
    assert not session.silent(99 * SILENCE_NS)
    slow = ControlSession(2 * SILENCE_NS)
    slow.open(HELLO, 0)
    slow.connect(0)
    assert not slow.silent(6 * SILENCE_NS - 1)


def test_an_echo_gives_the_round_trip() -> None:
    session = opened()
    hear(session, Echo(1, sent_ns=1000, committed_epoch=None), now=5000)
    assert session.rtt_ns == 4000
