"""The primary's bulk link: frames out without copying, for the shipping thread."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import zmq

from checkpointd.errors import WireError
from checkpointd.wire.frames import BULK_PAYLOAD_MAX, Channel, FrameError, pack, split
from checkpointd.wire.sockets import bulk_dealer

if TYPE_CHECKING:
    from checkpointd.wire.frames import Header, Octets
    from checkpointd.wire.keys import KeyPair
    from checkpointd.wire.sockets import Context, Endpoint, Socket

# Octets. Below this, copying costs less than the tracker of a message that is sent in place. What is copied counts as
# sent while it may still wait, BULK_WAITING of them at most: 128 KiB are not on their way for long.
ZERO_COPY_MIN: Final = 8 << 10
# Octets handed to libzmq and not yet encrypted: enough to keep its thread busy, small beside an
# arena.
IN_FLIGHT_MAX: Final = 16 << 20
# s. Closing with linger 0 frees memory as soon as the I/O thread comes to it: milliseconds. A
# machine that needs longer is in trouble that waiting does not mend.
ABANDON_S: Final = 10.0


class LinkTimeoutError(WireError):
    """The peer did not take or release what was sent within the time allowed."""


class BulkLink:
    """Frames out without copying, bounded in octets; for one thread, the shipper's.

    It connects at its first use. After a LinkTimeoutError the connection may be beyond repair:
    abandon() it.

    A payload given to send() must not be written until wait_released() or abandon() says that
    libzmq is done with it (and, for the protocol, not until its part is acknowledged): what changes
    before is sent changed.
    """

    def __init__(
        self,
        context: Context,
        endpoint: Endpoint,
        keys: KeyPair,
        *,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._keys = keys
        self._in_flight_max = max(in_flight_max, BULK_PAYLOAD_MAX)
        self._in_flight: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._in_flight_bytes = 0
        self._mark: tuple[int, int] | None = None  # session and term of what was sent last
        self.dropped = 0  # frames received of another session or term
        self._socket: Socket | None = None

    @property
    def in_flight_bytes(self) -> int:
        """Octets of payload that libzmq may still read in place."""
        self._reap()
        return self._in_flight_bytes

    def send(
        self, header: Header, payload: Octets = b"", *, timeout_s: float
    ) -> zmq.MessageTracker | None:
        """Hand one frame to libzmq; its tracker if it is sent in place, None if it was copied.

        Raises LinkTimeoutError if there is no connection or no room for so long, FrameError if
        header and payload are no frame. A frame is handed over whole or not at all.
        """
        deadline = time.monotonic() + timeout_s
        head = pack(header)
        size = memoryview(payload).nbytes
        if size != header.length:
            raise FrameError("length", f"is {header.length}, but the payload has {size} octets")
        in_place = size >= ZERO_COPY_MIN
        if in_place and not self._wait_in_flight(self._in_flight_max - size, deadline):
            raise LinkTimeoutError(
                f"{self._endpoint} took nothing for {timeout_s:g} s;"
                f" {self._in_flight_bytes} octets wait"
            )
        while True:
            try:
                tracker = self._send_parts(head, payload, size, in_place=in_place)
                break
            except zmq.Again:  # no connection, no room, or it ended between the two parts
                if not self._poll(zmq.POLLOUT, deadline):
                    raise LinkTimeoutError(
                        f"no connection to {self._endpoint} for {timeout_s:g} s, or it is stuck"
                    ) from None
        self._mark = (header.session, header.term)
        if tracker is not None:
            self._in_flight.append((tracker, size))
            self._in_flight_bytes += size
        return tracker

    def _send_parts(
        self, head: bytes, payload: Octets, size: int, *, in_place: bool
    ) -> zmq.MessageTracker | None:
        socket = self._dialled()
        if not size:
            socket.send(head, zmq.NOBLOCK)
            return None
        socket.send(head, zmq.NOBLOCK | zmq.SNDMORE)
        if not in_place:
            socket.send(payload, zmq.NOBLOCK)
            return None
        return socket.send(payload, zmq.NOBLOCK, copy=False, track=True)

    def wait_released(self, timeout_s: float) -> bool:
        """Whether libzmq is done with every payload sent so far, after waiting for it so long."""
        return self._wait_in_flight(0, time.monotonic() + timeout_s)

    def receive(self, timeout_s: float) -> tuple[Header, memoryview] | None:
        """The next frame of the session and term that were sent last; None: none came. Raises
        FrameError.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                parts = self._dialled().recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                if not self._poll(zmq.POLLIN, deadline):
                    return None
                continue
            header, payload = split(parts, Channel.BULK_TO_PRIMARY)
            if (header.session, header.term) == self._mark:
                return header, payload
            self.dropped += 1

    def abandon(self, timeout_s: float = ABANDON_S) -> None:
        """Give up all that is on its way: afterwards every payload may be written again.

        The next use connects anew. Raises LinkTimeoutError if libzmq does not let go: the memory
        must then not be touched any more.
        """
        self.close()
        if not self.wait_released(timeout_s):
            raise LinkTimeoutError(
                f"libzmq holds {self._in_flight_bytes} octets {timeout_s:g} s after its socket was"
                " closed: restart this daemon"
            )

    def close(self) -> None:
        """End the connection; what was on its way is lost. Memory is free when wait_released() says
        so.
        """
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def _dialled(self) -> Socket:
        """The socket, which connects at its first use: by then the control link was welcome, and so
        will it be.
        """
        if self._socket is None:
            self._socket = bulk_dealer(self._context, self._endpoint, self._keys)
        return self._socket

    def _poll(self, events: int, deadline: float) -> bool:
        left = deadline - time.monotonic()
        return left > 0 and bool(self._dialled().poll(math.ceil(left * 1000), events))

    def _reap(self) -> None:
        while self._in_flight and self._in_flight[0][0].done:
            self._in_flight_bytes -= self._in_flight.popleft()[1]

    def _wait_in_flight(self, limit: int, deadline: float) -> bool:
        """Wait until at most `limit` octets are in flight."""
        self._reap()
        while self._in_flight_bytes > limit:
            try:
                self._in_flight[0][0].wait(max(0.0, deadline - time.monotonic()))
            except zmq.NotDone:
                return False
            self._reap()
        return True
