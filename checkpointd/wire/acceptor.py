"""The secondary's side: one thread that serves both routers, control before bulk."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

import zmq

from checkpointd.errors import WireError
from checkpointd.wire.frames import Channel, FrameError, pack, split
from checkpointd.wire.messages import decode_payload, encode
from checkpointd.wire.sockets import bound_port, bulk_router, control_router
from checkpointd.wire.wake import Wake
from checkpointd.wire.zap import Authenticator

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.frames import Header, Octets
    from checkpointd.wire.keys import KeyStore
    from checkpointd.wire.messages import FromSecondary, Message
    from checkpointd.wire.sockets import Contexts, Socket

log = logging.getLogger(__name__)

# Messages a turn. Control: enough for every waiting heartbeat of many guests, and still an end.
# Bulk: 4 MiB are some milliseconds of work, so a heartbeat that comes meanwhile waits no longer
# than that.
_CONTROL_TURN: Final = 256
_BULK_TURN: Final = 4


class Sent(Enum):
    """What became of a message given to send() or send_bulk()."""

    YES = "queued for the peer's connection"
    FULL = "the peer does not read: try again on a later tick"
    GONE = "the connection is no more: the peer will say HELLO on another"


@dataclass(frozen=True, slots=True)
class Peer:
    """One connection of an allowed peer; it has another route on each connection."""

    key: bytes  # the public key that the handshake proved, 40 octets of Z85
    route: bytes  # of this connection, given by the router
    address: str = ""  # the other machine's IP address, as TCP has it

    def __str__(self) -> str:
        return f"peer {self.key.decode('ascii')} ({self.route.hex()})"


class Acceptor:
    """Serves all peers on one thread: run() on the caller's, or start() on its own.

    All callbacks come on that thread, and only there may send() and send_bulk() be called. Each
    turn drains control before it takes a few bulk frames, so heartbeats never queue behind pages. A
    malformed message is dropped, counted (`bad_frames`), logged once for a connection, and told to
    `on_error`, which ends the peer's session. An exception out of a callback ends run(), or goes to
    `on_fatal` after start(): it is never lost.

    The authenticator runs, and both ports are bound, once the constructor returns; WireError if
    they cannot be.
    """

    def __init__(
        self,
        contexts: Contexts,
        address: str,
        control_port: int,
        bulk_port: int,
        keys: KeyStore,
        *,
        on_control: Callable[[Peer, Header, Message], None],
        on_bulk: Callable[[Peer, Header, zmq.Frame | bytes], None],
        on_error: Callable[[Peer, FrameError], None],
        on_tick: Callable[[], None],
        tick_s: float,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._on_control = on_control
        self._on_bulk = on_bulk
        self._on_error = on_error
        self._on_tick = on_tick
        self._on_fatal = on_fatal
        self._tick_s = tick_s
        self._posted: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._failure: BaseException | None = None  # of the authenticator's thread
        self._thread: threading.Thread | None = None
        self._blamed: dict[bytes, bytes] = {}  # key: the route last logged; as many as trusted keys
        self.bad_frames: Counter[bytes] = Counter()  # by the peer's key
        pair = keys.own()
        self._wake = Wake()
        self.authenticator = Authenticator(
            (contexts.control, contexts.bulk), keys, on_fatal=self._authenticator_failed
        )
        # The sockets are made here, so that an address in use is told at once, and handed over
        # whole to the thread that run() is called on: from then on they are its own.
        sockets: list[Socket] = []
        try:
            sockets.append(control_router(contexts.control, address, control_port, pair))
            sockets.append(bulk_router(contexts.bulk, address, bulk_port, pair))
        except WireError:
            for socket in sockets:
                socket.close()
            self.authenticator.close()
            self._wake.close()
            raise
        self._control, self._bulk = sockets
        self.control_port = bound_port(self._control)
        self.bulk_port = bound_port(self._bulk)

    def start(self) -> None:
        """run() on a thread of its own."""
        self._thread = threading.Thread(target=self._run_guarded, name="acceptor", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Serve until stop(). Raises what a callback raised; the sockets are closed then."""
        try:
            self._serve()
        finally:
            self._release()

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run on the acceptor's thread soon; from any thread."""
        self._posted.append(call)
        self._wake.set()

    def stop(self) -> None:
        """End run() after the current turn; from any thread."""
        self._stopping = True
        self._wake.set()

    def close(self) -> None:
        """stop(), wait for start()'s thread, and free everything. Idempotent."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self._release()

    def send(self, peer: Peer, message: FromSecondary, *, session: int, term: int) -> Sent:
        """Send a control message to a peer of on_control. Raises FrameError if a field is out of
        bounds.
        """
        return _send(self._control, [peer.route, *encode(message, session=session, term=term)])

    def send_bulk(self, peer: Peer, header: Header, payload: Octets = b"") -> Sent:
        """Send a bulk frame, copied, to a peer of on_bulk. Raises FrameError if the header is
        wrong.
        """
        parts = [peer.route, pack(header), payload]
        return _send(self._bulk, parts if header.length else parts[:2])

    def _run_guarded(self) -> None:
        try:
            self.run()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: handed on, never lost
            self._on_fatal(error)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._control, self._bulk, self._wake.fd):
            poller.register(source, zmq.POLLIN)
        tick_at = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if now >= tick_at:
                self._on_tick()
                tick_at = now + self._tick_s
            ready = dict(poller.poll(math.ceil(max(0.0, tick_at - now) * 1000)))
            if self._wake.fd in ready:
                self._wake.clear()
                self._run_posted()
            if self._control in ready:
                self._receive(self._control, self._take_control, _CONTROL_TURN)
            if self._bulk in ready:
                self._receive(self._bulk, self._take_bulk, _BULK_TURN)

    def _run_posted(self) -> None:
        if self._failure is not None:
            raise self._failure
        for _ in range(len(self._posted)):  # not those that these post
            self._posted.popleft()()

    def _receive(
        self, socket: Socket, take: Callable[[Peer, list[zmq.Frame]], None], limit: int
    ) -> None:
        for _ in range(limit):
            try:
                route, *parts = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = _peer(route, parts)
            try:
                take(peer, parts)
            except FrameError as error:
                self._blame(peer, error)

    def _take_control(self, peer: Peer, parts: list[zmq.Frame]) -> None:
        header, payload = split([part.buffer for part in parts], Channel.CONTROL_TO_SECONDARY)
        self._on_control(peer, header, decode_payload(header, payload))

    def _take_bulk(self, peer: Peer, parts: list[zmq.Frame]) -> None:
        header, _ = split([part.buffer for part in parts], Channel.BULK_TO_SECONDARY)
        # The Frame, not its octets: they stay where libzmq received them until the commit.
        self._on_bulk(peer, header, parts[1] if header.length else b"")

    def _blame(self, peer: Peer, error: FrameError) -> None:
        self.bad_frames[peer.key] += 1
        if self._blamed.get(peer.key) != peer.route:
            self._blamed[peer.key] = peer.route
            log.warning("%s: %s; its session ends", peer, error)
        self._on_error(peer, error)

    def _authenticator_failed(self, error: BaseException) -> None:
        self._failure = error
        self._wake.set()

    def _release(self) -> None:
        self._control.close()
        self._bulk.close()
        self.authenticator.close()
        self._wake.close()


def _peer(route: zmq.Frame, parts: list[zmq.Frame]) -> Peer:
    """Who sent this. Every message of a router has User-Id: the authenticator gave it, or there was
    no handshake.
    """
    user, address = parts[0].get("User-Id"), parts[0].get("Peer-Address")
    return Peer(str(user).encode("ascii"), route.bytes, str(address))


def _send(socket: Socket, parts: list[Octets]) -> Sent:
    try:
        socket.send_multipart(parts, zmq.NOBLOCK)
    except zmq.Again:
        return Sent.FULL
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            return Sent.GONE
        raise
    return Sent.YES
