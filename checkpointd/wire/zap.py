"""The authenticator: who may finish a handshake (ZeroMQ RFC 27, ZAP)."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

from checkpointd.errors import KeyFileError
from checkpointd.wire.sockets import ZAP_DOMAIN
from checkpointd.wire.wake import Wake

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from checkpointd.wire.keys import KeyStore
    from checkpointd.wire.sockets import Context, Socket

log = logging.getLogger(__name__)

_ADDRESS: Final = "inproc://zeromq.zap.01"  # fixed by RFC 27
_VERSION: Final = b"1.0"
_NAMED_MAX: Final = 64  # denied keys that are logged; a flood of made-up keys then only counts


class Authenticator:
    """Answers libzmq's question for each handshake on `contexts`: is this key in the list?
    (invariant 7)

    Fails closed: a fault in the list denies everybody; with no authenticator running libzmq denies
    by itself (ZAP_ENFORCE_DOMAIN). The list is read again when it has changed, so `checkpointd
    keys` needs no restart. Its thread does nothing else, so strangers who knock delay no message.
    Start it before the routers bind.
    """

    def __init__(
        self,
        contexts: Sequence[Context],
        keys: KeyStore,
        *,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._keys = keys
        self._on_fatal = on_fatal
        self._stamp: object = None  # of the list as it was read; None: not read yet
        self._trusted: dict[bytes, str] = {}
        self._named: set[bytes] = set()
        self.accepted = 0  # handshakes since the start
        self.denied = 0
        self._stopping = False
        self._wake = Wake()
        self._sockets = [_reply_socket(context) for context in contexts]
        self._thread = threading.Thread(target=self._run, name="authenticator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; from here on libzmq denies everybody."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._wake.close()

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._wake.fd, zmq.POLLIN)
            for socket in self._sockets:
                poller.register(socket, zmq.POLLIN)
            while not self._stopping:
                ready = dict(poller.poll())
                for socket in self._sockets:
                    if socket in ready:
                        self._answer(socket)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: handed on, never lost
            self._on_fatal(error)
        finally:
            for socket in self._sockets:
                socket.close()

    def _answer(self, socket: Socket) -> None:
        request = socket.recv_multipart()
        code, text, user = self._judge(request[2:])
        socket.send_multipart([_VERSION, request[1], code, text, user, b""])

    def _judge(self, request: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
        """Status code, text and User-Id; `request` from the domain on: domain, address, identity,
        mechanism, key.
        """
        if len(request) != 5 or request[0] != ZAP_DOMAIN or request[3] != b"CURVE":
            self.denied += 1
            return b"400", b"denied", b""
        key = z85.encode(request[4])
        try:
            self._refresh()
        except KeyFileError as error:
            log.error("nobody can connect: %s", error)
            self._trusted, self._stamp = {}, None
        if key in self._trusted:
            self.accepted += 1
            return b"200", b"welcome", key  # the router finds the sender's key as User-Id
        self.denied += 1
        if key not in self._named and len(self._named) < _NAMED_MAX:
            self._named.add(key)
            log.warning(
                "denied a connection from %s with the key %s; if it is yours, allow it with"
                " `checkpointd keys trust`",
                request[1].decode("ascii", "replace"),
                key.decode("ascii"),
            )
        return b"400", b"denied", b""

    def _refresh(self) -> None:
        stamp = self._keys.stamp()
        if stamp != self._stamp:
            self._trusted = {key: name for name, key in self._keys.trusted().items()}
            self._stamp = stamp


def _reply_socket(context: Context) -> Socket:
    socket = context.socket(zmq.REP)
    socket.setsockopt(zmq.LINGER, 0)
    # No limit here, since open connections are one: each has at most one question waiting (some 300
    # octets), and strangers who know our public key must not crowd out an honest peer.
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(_ADDRESS)
    return socket
