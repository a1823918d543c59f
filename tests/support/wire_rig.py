"""Both links over real sockets on loopback: a secondary that remembers what came, a network that can
be cut or frozen, and primaries and strangers as a test needs them.

Waiting is always for a condition, with a limit that only a failure reaches.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from leaks import nothing_leaks

from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.wire.acceptor import Acceptor, Peer
from checkpointd.wire.bulk import BulkLink
from checkpointd.wire.frames import FrameError, Header, Kind
from checkpointd.wire.initiator import ControlLink
from checkpointd.wire.keys import KeyPair, KeyStore, loopback_pair
from checkpointd.wire.messages import Echo, Heartbeat, Hello, Message, Welcome
from checkpointd.wire.sockets import Contexts, Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import zmq

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


@contextmanager
def wire_rig(directory: Path) -> Iterator[Rig]:
    """A rig whose secondary runs; fails with the names of what is left of it."""
    with nothing_leaks():
        threads = set(threading.enumerate())
        with ExitStack() as stack:
            made = Rig(directory)
            stack.enter_context(made.stack)
            made.secondary.acceptor.start()
            yield made
        assert set(threading.enumerate()) == threads  # at once: close() waits for its thread


def pages(sequence: int, epoch: int = 1, length: int = MIB) -> Header:
    return Header(Kind.PAGES, SESSION, TERM, epoch, 0, sequence, length=length)
