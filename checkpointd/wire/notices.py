"""A control connection of one who is no engine: the watcher of a primary's machine (docs/wire-protocol.md, 4.8)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import zmq

from checkpointd.wire.frames import Channel, FrameError, Kind, split
from checkpointd.wire.messages import decode_payload, encode
from checkpointd.wire.sockets import control_dealer

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.keys import KeyPair
    from checkpointd.wire.messages import FromPrimary, Message
    from checkpointd.wire.sockets import Context, Endpoint, Socket

# s. What is said is answered at once, or its connection is dead, or it was denied, which libzmq takes for good: dial
# anew. Longer than connecting and a handshake may take.
REDIAL: Final = 3.0


class Notices:
    """Says what it is told to, of one session, and gives what is answered. Belongs to the calling thread.

    It connects at once, and stays connected while there is nothing to say, so that a word once needed waits for
    nothing.
    """

    def __init__(
        self,
        context: Context,
        endpoint: Endpoint,
        keys: KeyPair,
        *,
        session: int,
        term: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._keys = keys
        self._mark = (session, term)
        self._clock = clock
        self._socket = self._dial()
        self._unanswered: float | None = None  # since when

    def _dial(self) -> Socket:
        return control_dealer(self._context, self._endpoint, self._keys)

    def say(self, message: FromPrimary) -> bool:
        """False: there is no connection, and nothing was queued for one."""
        now = self._clock()
        if self._unanswered is None:
            self._unanswered = now
        elif now - self._unanswered >= REDIAL:
            self._socket.close()
            self._socket = self._dial()
            self._unanswered = now
        session, term = self._mark
        try:
            self._socket.send_multipart(encode(message, session=session, term=term), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def heard(self) -> list[Message]:
        """What has come since, of this session; without waiting. Anything malformed is dropped."""
        found: list[Message] = []
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return found
            self._unanswered = None
            session, term = self._mark
            try:
                header, payload = split(parts, Channel.CONTROL_TO_PRIMARY)
                ours = header.session == session and (
                    header.term == term or header.kind is Kind.REFUSED
                )
                if ours:
                    found.append(decode_payload(header, payload))
            except FrameError:
                continue  # whoever holds the pinned key sends garbage: there is nothing to learn from it

    def fileno(self) -> int:
        """For a poll by zmq only: its readiness is zmq's own (ZMQ_FD)."""
        return int(self._socket.fileno())

    def close(self) -> None:
        self._socket.close()
