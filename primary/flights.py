"""Parts that are staged and not yet acked, each in its arena."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class Flight:
    """One part, from staged to acked and let go."""

    arena: int
    epoch: int
    part: int
    final: bool
    closed: int | None  # the output epoch that it closed
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

    def on_wire(self, epoch: int, part: int) -> Flight | None:
        """The head, if it is that part; anything else is an echo of the past."""
        head = self.head
        return head if head and (head.epoch, head.part) == (epoch, part) else None

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

    def land(self) -> Flight:
        """The head is acked and let go: its arena is free."""
        head = self._queue.popleft()
        self._free.append(head.arena)
        return head

    def clear(self) -> None:
        """Everything was abandoned."""
        self._queue.clear()
        self._free = list(range(self._arenas))
