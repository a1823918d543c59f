"""The primary's half of a control session: what to send when, and what to make of what comes
(section 4).

Pure: no socket and no clock; the link's thread (initiator.py) drives it and tests replay it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from checkpointd.wire.frames import Channel, Kind, split
from checkpointd.wire.messages import (
    Echo,
    Heartbeat,
    Hello,
    Message,
    Refused,
    Welcome,
    decode_payload,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checkpointd.wire.frames import Octets

# ns. A secondary answers at once; a second is long enough not to flood one that is busy with a
# commit.
HELLO_AGAIN_NS: Final = 1_000_000_000
# ns. A connection on which nothing was echoed for so long is dead, whatever TCP says of it; a new
# one is tried. This is no verdict on the secondary, and 3 s outlast any pause of a live one. At
# least three heartbeats long.
SILENCE_NS: Final = 3_000_000_000
# ns. libzmq has said that the connection is there, so its queue has room in a moment.
BLOCKED_AGAIN_NS: Final = 20_000_000


@dataclass(frozen=True, slots=True)
class Progress:
    """What the epoch loop is at, for the heartbeat."""

    epoch: int = 0
    phase: int = 0
    count: int = 0  # grows whenever it does something


class ControlSession:
    """HELLO until it is answered, heartbeats all the while, and only frames of this session and
    term let in.

    Times are ns of any one monotonic clock.
    """

    def __init__(self, heartbeat_ns: int) -> None:
        self._heartbeat_ns = heartbeat_ns
        self._hello: Hello | None = None
        self._hello_at: int | None = None  # when HELLO is due; None: it is answered
        self._beat_at = 0
        self._silence_ns = max(SILENCE_NS, 3 * heartbeat_ns)
        self._heard_at = 0  # or connected, or opened
        self._count = 0
        self._connected = False
        self._welcomed = False
        self._refused = False
        self.dropped = 0  # frames of another session or term
        self.rtt_ns: int | None = None  # of the last heartbeat that came back

    @property
    def mark(self) -> tuple[int, int]:
        """Session and term, which every frame bears."""
        if self._hello is None:
            raise RuntimeError("no session is open")
        return self._hello.session, self._hello.term

    @property
    def connected(self) -> bool:
        return self._connected

    def open(self, hello: Hello, now: int) -> None:
        """Begin this session, in place of any other."""
        self._hello = hello
        self._hello_at = self._beat_at = self._heard_at = now
        self._count = 0
        self._welcomed = hello.resume
        self._refused = False

    def connect(self, now: int) -> None:
        """A connection is there: whatever was said on an earlier one may be lost, so say HELLO
        again.
        """
        self._connected = True
        self._heard_at = now
        if self._hello is not None and not self._refused:
            self._hello_at = self._beat_at = now

    def disconnect(self) -> None:
        self._connected = False

    def silent(self, now: int) -> bool:
        """Whether this connection must be given up: heartbeats went out and nothing came back."""
        if not self._connected or self._hello is None or self._refused:
            return False
        return now - self._heard_at >= self._silence_ns

    def due(self, now: int, progress: Progress) -> Hello | Heartbeat | None:
        """What must be sent now; tell sent() or blocked() what became of it, and ask again."""
        if not self._connected or self._hello is None or self._refused:
            return None
        if self._hello_at is not None and now >= self._hello_at:
            return replace(self._hello, resume=self._welcomed)
        if now >= self._beat_at:
            return Heartbeat(self._count + 1, now, progress.epoch, progress.count, progress.phase)
        return None

    def sent(self, message: Hello | Heartbeat, now: int) -> None:
        if isinstance(message, Hello):
            self._hello_at = now + HELLO_AGAIN_NS
        else:
            self._count = message.count
            self._beat_at += self._heartbeat_ns
            if self._beat_at <= now:  # late: do not send a burst to make up for it
                self._beat_at = now + self._heartbeat_ns

    def blocked(self, message: Hello | Heartbeat, now: int) -> None:
        """The socket took nothing."""
        again = now + min(BLOCKED_AGAIN_NS, self._heartbeat_ns)
        if isinstance(message, Hello):
            self._hello_at = again
        else:
            self._beat_at = again

    def wait_ns(self, now: int) -> int | None:
        """How long nothing will be due; None: until something else happens."""
        if not self._connected or self._hello is None or self._refused:
            return None
        due = self._beat_at if self._hello_at is None else min(self._beat_at, self._hello_at)
        return max(0, due - now)

    def received(self, parts: Sequence[Octets], now: int) -> Message | None:
        """The message, or None if it is not of this session; raises FrameError."""
        self._heard_at = now
        header, payload = split(parts, Channel.CONTROL_TO_PRIMARY)
        hello = self._hello
        if (
            hello is None
            or header.session != hello.session
            or (header.term != hello.term and header.kind is not Kind.REFUSED)
        ):
            self.dropped += 1
            return None
        message = decode_payload(header, payload)
        match message:
            case Welcome():
                self._welcomed, self._hello_at = True, None
            case Refused():
                self._refused, self._hello_at = True, None
            case Echo():
                self.rtt_ns = max(0, now - message.sent_ns)
        return message
