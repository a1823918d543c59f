"""Both links over real sockets on loopback: sessions, reconnects, memory, strangers, and broken
peers.

Waiting is always for a condition, with a limit that only a failure reaches.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from checkpointd.errors import WireError
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.wire.acceptor import _BULK_TURN, Acceptor, Peer, Sent
from checkpointd.wire.bulk import BulkLink, LinkTimeoutError
from checkpointd.wire.frames import (
    CONTROL_PAYLOAD_MAX,
    FrameError,
    Header,
    Kind,
    pack,
)
from checkpointd.wire.initiator import ControlLink
from checkpointd.wire.keys import KeyPair, KeyStore, loopback_pair
from checkpointd.wire.messages import (
    Ack,
    Echo,
    Heartbeat,
    Hello,
    Message,
    Query,
    Welcome,
    encode,
)
from checkpointd.wire.sockets import (
    Contexts,
    Endpoint,
    bulk_dealer,
    control_dealer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT_S = 20.0  # for any wait; none comes near it
BEAT_S = 0.02
SESSION, TERM = 7, 1
HOST = HostIdentity("boot", 1, 1)
INFO = DomainInfo("12345678-1234-4234-8234-123456789abc", 4, "g", 100, 100, "embedded", HOST)
HELLO = Hello(SESSION, TERM, INFO, 10**8, bytes(32), b"static", 1, resume=False)
MIB = 1 << 20


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.002)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Secondary:
    """An acceptor that answers HELLO and heartbeats, and remembers what came."""

    def __init__(self, contexts: Contexts, keys: KeyStore) -> None:
        self.control: list[tuple[Peer, Header, Message]] = []
        self.bulk: list[tuple[Peer, Header, bytes]] = []
        self.errors: list[tuple[Peer, FrameError]] = []
        self.fatal: list[BaseException] = []
        self.before_bulk: Callable[[], None] = lambda: None
        self.order: list[str] = []
        self.ticks = 0
        self.acceptor = Acceptor(
            contexts, "127.0.0.1", 0, 0, keys,
            on_control=self.on_control, on_bulk=self.on_bulk,
            on_error=lambda peer, error: self.errors.append((peer, error)),
            on_tick=self.on_tick, tick_s=0.02, on_fatal=self.fatal.append,
        )  # fmt: skip

    def on_tick(self) -> None:
        self.ticks += 1

    def on_control(self, peer: Peer, header: Header, message: Message) -> None:
        self.control.append((peer, header, message))
        self.order.append("control")
        mark = {"session": header.session, "term": header.term}
        if isinstance(message, Hello):
            welcome = Welcome(header.session, header.term, 0, None, False, 1 << 30, HOST)
            self.acceptor.send(peer, welcome, **mark)
        elif isinstance(message, Heartbeat):
            self.acceptor.send(peer, Echo(message.count, message.sent_ns, None), **mark)

    def on_bulk(self, peer: Peer, header: Header, payload: zmq.Frame | bytes) -> None:
        self.before_bulk()
        self.order.append("bulk")
        octets = payload if isinstance(payload, bytes) else payload.bytes
        self.bulk.append((peer, header, octets))

    def beats(self, session: int = SESSION) -> list[Heartbeat]:
        return [
            m for _, h, m in list(self.control) if isinstance(m, Heartbeat) and h.session == session
        ]

    def hellos(self) -> list[Hello]:
        return [m for _, _, m in list(self.control) if isinstance(m, Hello)]

    def on_its_thread(self, call: Callable[[], Any]) -> Any:
        """The result of `call` on the acceptor's thread, where sockets may be used."""
        done = threading.Event()
        result: list[Any] = []

        def run() -> None:
            result.append(call())
            done.set()

        self.acceptor.post(run)
        assert done.wait(LIMIT_S)
        return result[0]


class Proxy:
    """A network that can be cut (connections break, new ones are refused) and frozen (silence)."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._whole = threading.Event()
        self._flowing = threading.Event()
        self._whole.set()
        self._flowing.set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._whole.is_set():
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        with self._lock:
            self._whole.clear()
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        self._flowing.clear()

    def heal(self) -> None:
        self._whole.set()
        self._flowing.set()

    def close(self) -> None:
        self.heal()
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(LIMIT_S)
        for end in self._open:
            end.close()


class Rig:
    """One secondary, and primaries and strangers as a test needs them. It ends them all."""

    def __init__(self, directory: Path) -> None:
        self.stack = ExitStack()
        self.primary_keys, self.secondary_keys = loopback_pair(directory)
        self.contexts = Contexts.make()
        self.peers = Contexts.make()
        self.stack.callback(self.contexts.close)
        self.stack.callback(self.peers.close)
        self.secondary = Secondary(self.contexts, self.secondary_keys)
        self.stack.callback(self.secondary.acceptor.close)
        self.endpoint = Endpoint(
            "127.0.0.1",
            self.secondary_keys.own().public,
            self.secondary.acceptor.control_port,
            self.secondary.acceptor.bulk_port,
        )
        self.delivered: list[Message] = []
        self.errors: list[FrameError] = []
        self.fatal: list[BaseException] = []
        self.rtts: list[int] = []

    def link(self, endpoint: Endpoint | None = None, **other: Any) -> ControlLink:
        link = ControlLink(
            self.peers.control,
            endpoint or self.endpoint,
            other.pop("keys", self.primary_keys.own()),
            heartbeat_s=BEAT_S,
            deliver=other.pop("deliver", self.delivered.append),
            on_error=self.errors.append,
            on_fatal=self.fatal.append,
            on_rtt=self.rtts.append,
        )
        self.stack.callback(link.close)
        link.start()
        return link

    def bulk(self, endpoint: Endpoint | None = None, **other: Any) -> BulkLink:
        link = BulkLink(
            self.peers.bulk, endpoint or self.endpoint, self.primary_keys.own(), **other
        )
        self.stack.callback(link.close)
        return link

    def proxied(self) -> tuple[Endpoint, Proxy, Proxy]:
        control, bulk = Proxy(self.endpoint.control_port), Proxy(self.endpoint.bulk_port)
        self.stack.callback(control.close)
        self.stack.callback(bulk.close)
        return (
            Endpoint("127.0.0.1", self.endpoint.key, control.port, bulk.port),
            control,
            bulk,
        )

    def raw(self, make: Callable[..., Any], context: Any, keys: KeyPair | None = None) -> Any:
        """A bare socket of ours, to say what our links never would."""
        bare = make(context, self.endpoint, keys or self.primary_keys.own())
        self.stack.callback(bare.close)
        return bare

    def monitor(self, bare: Any, events: int) -> Any:
        """What becomes of a bare socket's connection; wait for it by poll()."""
        monitor = bare.get_monitor_socket(events)
        self.stack.callback(monitor.close)
        self.stack.callback(bare.disable_monitor)
        return monitor


@pytest.fixture(scope="module", autouse=True)
def _garbage_thread() -> None:
    """pyzmq starts a thread of its own at the first send in place, and keeps it: not a leak of a
    test's.
    """
    with zmq.Context() as context, context.socket(zmq.PAIR) as a, context.socket(zmq.PAIR) as b:
        a.bind("inproc://first")
        b.connect("inproc://first")
        tracker = a.send(bytearray(MIB), copy=False, track=True)
        b.recv()
        assert tracker is not None
        tracker.wait(LIMIT_S)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    threads, files = set(threading.enumerate()), descriptors()
    with ExitStack() as stack:
        made = Rig(tmp_path)
        stack.enter_context(made.stack)
        made.secondary.acceptor.start()
        yield made
    assert set(threading.enumerate()) == threads
    eventually(lambda: descriptors() <= files, "all descriptors closed")


def pages(sequence: int, epoch: int = 1, length: int = MIB) -> Header:
    return Header(Kind.PAGES, SESSION, TERM, epoch, 0, sequence, length=length)


# --- a session ------------------------------------------------------------------------------


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


# --- bulk -----------------------------------------------------------------------------------


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


# --- strangers and broken peers -------------------------------------------------------------


class Watch:
    """A good session whose heartbeats must go on while something happens."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.link = rig.link()
        self.link.hello(HELLO)
        eventually(rig.secondary.beats, "the good session")
        self.allowed = {rig.primary_keys.own().public}

    def goes_on(self) -> None:
        before = len(self.rig.secondary.beats())
        eventually(lambda: len(self.rig.secondary.beats()) >= before + 3, "its heartbeats")
        assert self.link.connected
        assert len(self.rig.secondary.hellos()) == 1  # the connection never broke
        assert {peer.key for peer, _, _ in self.rig.secondary.control} == self.allowed
        assert not self.rig.fatal
        assert not self.rig.secondary.fatal


def test_strangers_get_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(rig)
    ports = (rig.endpoint.control_port, rig.endpoint.bulk_port)
    authenticator = rig.secondary.acceptor.authenticator
    accepted = authenticator.accepted

    with caplog.at_level(logging.WARNING):
        # One who knows the secondary's public key, but is not on the list.
        wrong = rig.link(keys=KeyPair(*zmq.curve_keypair()))
        wrong.hello(HELLO)
        eventually(lambda: authenticator.denied >= 1, "the denial")
        eventually(lambda: "keys trust" in wrong.trouble, "a word of what to do")
    assert sum("denied a connection" in record.getMessage() for record in caplog.records) == 1

    # One who has an allowed key, but takes another for the secondary's.
    elsewhere = Endpoint("127.0.0.1", zmq.curve_keypair()[0], *ports)
    fooled = rig.link(elsewhere)
    fooled.hello(HELLO)
    eventually(lambda: "handshake" in fooled.trouble, "a word of what is wrong")

    # No CURVE at all, and one who says ZMTP and then junk, and one who says junk at once.
    for port in ports:
        plain = rig.peers.control.socket(zmq.DEALER)
        rig.stack.callback(plain.close, linger=0)
        monitor = rig.monitor(
            plain,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_DISCONNECTED,
        )
        plain.connect(f"tcp://127.0.0.1:{port}")
        plain.send_multipart(encode(HELLO, session=SESSION, term=TERM))
        assert monitor.poll(int(LIMIT_S * 1000))
        for junk in (
            b"GET / HTTP/1.1\r\n\r\n" * 100,
            b"\xff" + bytes(8) + b"\x7f" + b"\xee" * 9000,
        ):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.settimeout(LIMIT_S)
                connection.sendall(junk)
                got = 0
                with suppress(ConnectionResetError):
                    while data := connection.recv(4096):
                        got += len(data)
                assert got <= 64  # the greeting at most
    watch.goes_on()
    assert rig.secondary.errors == []
    assert not rig.secondary.bulk
    assert authenticator.accepted == accepted


@pytest.mark.slow
def test_a_flood_of_half_open_connections_costs_descriptors_for_two_seconds(rig: Rig) -> None:
    watch = Watch(rig)
    files, memory = descriptors(), resident_bytes()
    opened: list[socket.socket] = []
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15 + 32)
    # A frame that a stranger announces: below the limit (never completed) and above it.
    below = b"\x06" + (CONTROL_PAYLOAD_MAX - 100).to_bytes(8, "big")
    above = b"\x06" + (1 << 40).to_bytes(8, "big")
    try:
        for number in range(300):
            for port in (rig.endpoint.control_port, rig.endpoint.bulk_port):
                end = socket.create_connection(("127.0.0.1", port))
                opened.append(end)
                end.sendall((b"", greeting, greeting + below, greeting + above)[number % 4])
        watch.goes_on()
        assert resident_bytes() - memory < 64 * MIB
        # The secondary closes its ends after HANDSHAKE_MS; ours are left.
        eventually(lambda: descriptors() <= files + len(opened), "the strangers' end")
        watch.goes_on()
        assert rig.secondary.errors == []
        assert rig.secondary.acceptor.authenticator.denied == 0
    finally:
        for end in opened:
            end.close()
    assert resident_bytes() - memory < 64 * MIB


def test_without_an_authenticator_nobody_is_let_in(rig: Rig) -> None:
    rig.secondary.acceptor.authenticator.close()
    link = rig.link()
    link.hello(HELLO)
    eventually(lambda: "handshake" in link.trouble or "denies" in link.trouble, "the refusal")
    assert not rig.secondary.control


def test_a_broken_list_lets_nobody_in_and_says_so(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    trusted = rig.secondary_keys.directory / "trusted"
    (trusted / "bad.key").write_text("nonsense")
    with caplog.at_level(logging.ERROR):
        link = rig.link()
        link.hello(HELLO)
        eventually(lambda: "denies" in link.trouble, "the refusal")
    assert "bad.key" in caplog.text
    (trusted / "bad.key").unlink()
    eventually(rig.secondary.beats, "heartbeats once the list is whole")


def test_a_peer_is_let_in_as_soon_as_it_is_trusted(rig: Rig, tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "new").own()
    link = rig.link(keys=keys)
    link.hello(HELLO)
    eventually(lambda: "denies" in link.trouble, "the denial")
    rig.secondary_keys.trust("new", keys.public)
    eventually(rig.secondary.beats, "heartbeats")
    assert link.trouble == ""


HEAD = pack(Header(Kind.QUERY, SESSION, TERM, epoch=1))
BROKEN = {
    "nothing": [b""],
    "short header": [HEAD[:63]],
    "long header": [HEAD + b"x"],
    "three parts": [HEAD, b"x", b"y"],
    "thousand parts": [HEAD] * 1000,
    "magic": [b"XXXX" + HEAD[4:]],
    "version": [HEAD[:4] + b"\x02\x00" + HEAD[6:]],
    "kind": [HEAD[:6] + b"\x3f\x00" + HEAD[8:]],
    "other side's kind": [pack(Header(Kind.ACK, SESSION, TERM))],
    "other socket's kind": [pack(Header(Kind.DIGESTS_WANTED, SESSION, TERM))],
    "session 0": [HEAD[:16] + bytes(8) + HEAD[24:]],
    "length": [HEAD, b"unannounced"],
    "deep JSON": [pack(Header(Kind.RETIRE, SESSION, TERM, length=200_000)), b"[" * 200_000],
    "no JSON": [pack(Header(Kind.HELLO, SESSION, TERM, length=4)), b"\xff\xfe\xfd\xfc"],
    "huge number": [
        pack(Header(Kind.END, SESSION, TERM, length=100_011)),
        b'{"reason":' + b"9" * 100_000 + b"}",
    ],
}


def test_a_broken_peer_ends_nobody_elses_session(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(rig)
    keys = KeyStore(tmp_path / "broken").own()
    rig.secondary_keys.trust("broken", keys.public)
    bare = rig.raw(control_dealer, rig.peers.control, keys)
    bare.setsockopt(zmq.SNDTIMEO, int(LIMIT_S * 1000))
    with caplog.at_level(logging.WARNING):
        for parts in BROKEN.values():
            bare.send_multipart(parts)
        eventually(lambda: len(rig.secondary.errors) == len(BROKEN), "all faults")
    assert [
        record.getMessage() for record in caplog.records if "malformed" in record.getMessage()
    ] == [
        f"{rig.secondary.errors[0][0]}: malformed message: header has 0 octets, not 64; its session ends"
    ]
    assert {peer.key for peer, _ in rig.secondary.errors} == {keys.public}
    assert rig.secondary.acceptor.bad_frames[keys.public] == len(BROKEN)
    assert bare.poll(0) == 0  # nothing was answered
    watch.goes_on()

    # The same peer may begin anew on the same connection.
    bare.send_multipart(encode(HELLO, session=SESSION, term=TERM))
    assert bare.poll(int(LIMIT_S * 1000))


@pytest.mark.parametrize("which", ["control", "bulk"])
def test_an_oversized_message_ends_its_connection_only(
    rig: Rig, tmp_path: Path, which: str
) -> None:
    watch = Watch(rig)
    keys = KeyStore(tmp_path / "big").own()
    rig.secondary_keys.trust("big", keys.public)
    if which == "control":
        bare, size = rig.raw(control_dealer, rig.peers.control, keys), CONTROL_PAYLOAD_MAX + MIB
    else:
        bare, size = rig.raw(bulk_dealer, rig.peers.bulk, keys), 8 * MIB
    bare.setsockopt(zmq.SNDTIMEO, int(LIMIT_S * 1000))
    monitor = rig.monitor(bare, zmq.EVENT_DISCONNECTED)
    bare.send(bytes(size))
    assert monitor.poll(int(LIMIT_S * 1000))
    watch.goes_on()
    assert rig.secondary.errors == []
    assert not rig.secondary.bulk
