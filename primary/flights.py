"""Parts that are staged and not yet acked, each in its arena: what has become of each on its way. (Pure.)"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .events import AskMissing, Ship


@dataclass(slots=True)
class Flight:
    """One part, from staged to acked and let go."""

    arena: int
    epoch: int
    part: int
    final: bool
    closed: int | None  # the output epoch that it closed
    staged_ns: int
    sent: bool = False  # handed to the shipper
    shipped: bool = False  # ZeroMQ has let go of the arena
    acked: bool = False
    asked_ns: int = 0  # when it was last sent or asked for
    first_sent_ns: int = 0


class Flights:
    """In the order in which they were staged; the head is the one on the wire. An arena is free or has one flight."""

    def __init__(self, arenas: int) -> None:
        self._arenas = arenas
        self._queue: deque[Flight] = deque()
        self._free = list(range(arenas))

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def head(self) -> Flight | None:
        return self._queue[0] if self._queue else None

    @property
    def free_arena(self) -> int | None:
        return self._free[0] if self._free else None

    @property
    def unreleased(self) -> int:
        """Closed output epochs that are not released."""
        return sum(1 for flight in self._queue if flight.closed is not None)

    def take_off(self, flight: Flight) -> None:
        self._free.remove(flight.arena)
        self._queue.append(flight)

    def ship(self, now: int) -> Ship | None:
        """The head goes out, unless it is out already."""
        head = self.head
        if head is None or head.sent:
            return None
        head.sent = True
        head.asked_ns = head.first_sent_ns = now
        return Ship(head.arena, head.epoch, head.part, head.final)

    def shipped(self, epoch: int, part: int, now: int) -> bool:
        """ZeroMQ has let go of that part, with all of it sent or not; False: an echo of the past."""
        head = self._on_wire(epoch, part)
        if head is None:
            return False
        head.shipped = True
        head.asked_ns = now
        return True

    def acked(self, epoch: int, part: int) -> bool:
        """The standby has all of that part; False: an echo of the past, or of an attempt that was abandoned."""
        head = self._on_wire(epoch, part)
        if head is None or not head.sent:
            return False
        head.acked = True
        return True

    @property
    def may_land(self) -> bool:
        return self.head is not None and self.head.acked and self.head.shipped

    def ask(self, now: int) -> AskMissing | None:
        """The question what the standby lacks of the head."""
        head = self.head
        if head is None:
            return None
        head.asked_ns = now
        return AskMissing(head.epoch, head.part)

    def ship_again(
        self, epoch: int, part: int, ranges: tuple[tuple[int, int], ...] | None, now: int
    ) -> Ship | None:
        """What the standby lacks of that part. None: an echo of the past; or it is on its way; or it has it all."""
        head = self._on_wire(epoch, part)
        if head is None or not head.shipped or head.acked:
            return None
        head.shipped = False
        head.asked_ns = now
        return Ship(head.arena, head.epoch, head.part, head.final, ranges)

    def land(self) -> Flight:
        """The head is acked and let go: its arena is free."""
        head = self._queue.popleft()
        self._free.append(head.arena)
        return head

    def outlived(self, now: int) -> None:
        """A time without a standby, which counts for none of them."""
        for flight in self._queue:
            flight.staged_ns = now
            if flight.sent:
                flight.first_sent_ns = now

    def clear(self) -> None:
        """Everything was abandoned."""
        self._queue.clear()
        self._free = list(range(self._arenas))

    def _on_wire(self, epoch: int, part: int) -> Flight | None:
        """The head, if it is that part."""
        head = self.head
        return head if head and (head.epoch, head.part) == (epoch, part) else None
