"""The primary's side: the control link with its thread and heartbeats. (BulkLink is in bulk.py.)"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from checkpointd.errors import WireError
from checkpointd.wire.bulk import BulkLink, LinkTimeoutError
from checkpointd.wire.frames import FrameError
from checkpointd.wire.messages import Hello, encode
from checkpointd.wire.session import ControlSession, Progress
from checkpointd.wire.sockets import CONTROL_WAITING, control_dealer
from checkpointd.wire.wake import Wake

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.keys import KeyPair
    from checkpointd.wire.messages import FromPrimary, Message
    from checkpointd.wire.sockets import Context, Endpoint, Socket

__all__ = ["BulkLink", "ControlLink", "LinkTimeoutError"]

log = logging.getLogger(__name__)

_TURN_MAX: Final = 64  # messages received before it is time to look at the heartbeat again

_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
)


# libzmq dials again by itself after a lost connection, but gives up for good when it is denied or
# meets octets that are no ZMTP. An operator may allow our key any moment, so begin anew, slowly;
# and as a last resort whenever nothing has come of connecting for longer than one attempt may take
# (CONNECT_MS + HANDSHAKE_MS). ms.
_FINAL_EVENTS: Final = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
DENIED_REDIAL_MS: Final = 1000
REDIAL_MS: Final = 5000

# What each of these events means to a person; {} is the endpoint.
TROUBLE: Final[dict[int, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "{} denies this side's key: allow it there, with"
    " `checkpointd keys trust` and the key that `checkpointd keys show` prints here",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "{} does not complete the handshake: is it checkpointd's"
    " port, and is the key that is trusted for it its own?",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "{} does not finish the handshake: either it is stuck, or"
    " the key that is trusted for it is not its own (`checkpointd keys show` there)",
    zmq.EVENT_CONNECT_RETRIED: "no connection to {}: is `checkpointd secondary` running there?",
    zmq.EVENT_DISCONNECTED: "lost the connection to {}",
}


_monitors: Final = itertools.count()  # each needs an address of its own in its context


_SILENT: Final = "{} answers nothing any more: connecting anew"


class ControlLink:
    """Heartbeats out, acks in, on a thread of its own, which does nothing that can wait (invariant
    9).

    `deliver` gets each message of this session on that thread; it must hand it on and return.
    `on_error` gets the first malformed message of each connection; the message is dropped and the
    link goes on. `on_fatal` gets whatever else goes wrong, once: the thread has then ended, and so
    must the daemon.
    """

    def __init__(
        self,
        context: Context,
        endpoint: Endpoint,
        keys: KeyPair,
        *,
        heartbeat_s: float,
        deliver: Callable[[Message], None],
        on_error: Callable[[FrameError], None],
        on_fatal: Callable[[BaseException], None],
        on_rtt: Callable[[int], None] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._keys = keys
        self._deliver = deliver
        self._on_error = on_error
        self._on_fatal = on_fatal
        self._on_rtt = on_rtt
        self._clock = clock
        self._session = ControlSession(int(heartbeat_s * 1e9))
        self._progress = Progress()
        self._queue: deque[Hello | list[bytes]] = deque()
        self._hello: Hello | None = None  # as told; the session follows when its turn comes
        self._wake = Wake()
        self._closing = False
        self._blamed = False  # on_error was called for this connection
        self._handshake_failed = False  # that is why there is no connection
        self._last_heard_ns: int | None = None
        self._trouble = f"connecting to {endpoint}"
        self._redial_at: int | None = None
        self.bad_frames = 0
        self._thread = threading.Thread(target=self._run, name="control-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hello(self, hello: Hello) -> None:
        """Begin this session: HELLO now and after each reconnect until it is answered. From any
        thread.

        Raises FrameError if a field is out of its bounds.
        """
        encode(hello, session=hello.session, term=hello.term)
        self._hello = hello
        self._queue.append(hello)
        self._wake.set()

    def send(self, message: FromPrimary) -> bool:
        """Send once, when there is a connection; from any thread.

        What is lost with a connection is not repeated: whoever needs an answer asks again. False:
        too many messages wait already, and this one was dropped. Raises FrameError if a field is
        out of its bounds.
        """
        if self._hello is None:
            raise WireError(f"{type(message).__name__} before any session: call hello() first")
        parts = encode(message, session=self._hello.session, term=self._hello.term)
        if len(self._queue) >= CONTROL_WAITING:
            return False
        self._queue.append(parts)
        self._wake.set()
        return True

    def progress(self, epoch: int, phase: int, count: int) -> None:
        """What the next heartbeats say of the epoch loop; from any thread, costs one assignment."""
        self._progress = Progress(epoch, phase, count)

    @property
    def last_heard_ns(self) -> int | None:
        """When the last message of this session came, by the link's clock; None: none yet."""
        return self._last_heard_ns

    @property
    def connected(self) -> bool:
        return self._session.connected

    @property
    def session(self) -> int:
        """The session that frames are taken of. It follows hello() on the link's thread: ask there."""
        return self._session.mark[0]

    @property
    def trouble(self) -> str:
        """Why there is no connection, for a person; empty while there is one."""
        return self._trouble

    @property
    def dropped(self) -> int:
        """Messages of another session or term, dropped unread."""
        return self._session.dropped

    def close(self) -> None:
        """End the thread and the connection. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._wake.close()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: handed on, never lost
            self._on_fatal(error)

    def _serve(self) -> None:
        while not self._closing:
            socket = control_dealer(self._context, self._endpoint, self._keys)
            monitor = socket.get_monitor_socket(_EVENTS, f"inproc://monitor-{next(_monitors)}")
            try:
                self._serve_socket(socket, monitor)
            finally:
                socket.disable_monitor()
                monitor.close()
                socket.close()

    def _serve_socket(self, socket: Socket, monitor: Socket) -> None:
        """Until this link is closed, or the socket has not come to anything."""
        self._redial_in(REDIAL_MS)
        poller = zmq.Poller()
        for source in (socket, monitor, self._wake.fd):
            poller.register(source, zmq.POLLIN)
        while not self._closing and not self._redial_due():
            poller.poll(self._wait_ms())
            self._wake.clear()
            self._watch(monitor)
            self._receive(socket)
            self._send_due(socket)
            self._send_queue(socket)
            if self._session.silent(self._clock()):
                self._set_trouble(_SILENT)
                self._session.disconnect()
                return

    def _redial_in(self, milliseconds: int) -> None:
        self._redial_at = self._clock() + milliseconds * 1_000_000

    def _redial_due(self) -> bool:
        return self._redial_at is not None and self._clock() >= self._redial_at

    def _wait_ms(self) -> int | None:
        now = self._clock()
        waits = [self._session.wait_ns(now)]
        if self._redial_at is not None:
            waits.append(max(0, self._redial_at - now))
        left = [wait for wait in waits if wait is not None]
        return math.ceil(min(left) / 1e6) if left else None  # rounded down it would spin

    def _watch(self, monitor: Socket) -> None:
        """Follow the connection; every change of its state is logged once."""
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                log.info("connected to %s", self._endpoint)
                self._trouble, self._blamed, self._redial_at = "", False, None
                self._session.connect(self._clock())
            elif event == zmq.EVENT_CONNECT_RETRIED:
                # It says the least, and must not hide why the last handshake failed.
                if not self._handshake_failed:
                    self._set_trouble(TROUBLE[event])
            elif self._session.connected or event != zmq.EVENT_DISCONNECTED:
                self._handshake_failed = event != zmq.EVENT_DISCONNECTED
                self._set_trouble(TROUBLE[event])
                self._session.disconnect()
                if event in _FINAL_EVENTS:
                    self._redial_in(DENIED_REDIAL_MS)
                elif self._redial_at is None:
                    self._redial_in(REDIAL_MS)

    def _set_trouble(self, text: str) -> None:
        trouble = text.format(self._endpoint)
        if trouble != self._trouble:
            log.warning("%s", trouble)
        self._trouble = trouble

    def _receive(self, socket: Socket) -> None:
        for _ in range(_TURN_MAX):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            now = self._clock()
            try:
                message = self._session.received(parts, now)
            except FrameError as error:
                self.bad_frames += 1
                if not self._blamed:
                    self._blamed = True
                    log.warning("from %s: %s", self._endpoint, error)
                    self._on_error(error)
                continue
            if message is None:
                continue
            self._last_heard_ns = now
            if self._session.rtt_ns is not None and self._on_rtt is not None:
                self._on_rtt(self._session.rtt_ns)
                self._session.rtt_ns = None
            self._deliver(message)

    def _send_due(self, socket: Socket) -> None:
        while (message := self._session.due(now := self._clock(), self._progress)) is not None:
            session, term = self._session.mark
            if _sent(socket, encode(message, session=session, term=term)):
                self._session.sent(message, now)
            else:
                self._session.blocked(message, now)

    def _send_queue(self, socket: Socket) -> None:
        while self._queue:
            item = self._queue[0]
            if isinstance(item, Hello):
                self._session.open(item, self._clock())
                self._send_due(socket)
            elif not self._session.connected or not _sent(socket, item):
                return
            self._queue.popleft()


def _sent(socket: Socket, parts: list[bytes]) -> bool:
    """Whether the socket took the message; else there is no connection, or its queue is full."""
    try:
        socket.send_multipart(parts, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
