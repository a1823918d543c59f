"""When the next epoch starts. (Pure.) The interval is the time between two starts: fixed, or chosen (auto).

All times are nanoseconds of the driver's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# What --interval auto keeps within: as --interval itself may be.
SHORTEST_NS = 5_000_000
LONGEST_NS = 10_000_000_000
BEGIN_NS = 100_000_000  # until the first epochs have told what they take
# Aimed at is so much of the target: what an epoch takes spreads about its mean, and the target is what is not to be
# passed.
AIM = 0.9
# Weight of the newest epoch in what the next ones are expected to take: ten of them make up nine tenths of it.
NEWEST = 0.2
# An arena is to be filled by no more than this: what does not fit is copied in rounds, its output held meanwhile. Pages
# grow by less than the interval does, for some are written again; bursts may double them.
FULL = 0.6
NEAR = 0.05  # share of the interval by which it need not be moved: else it would follow every epoch's chance


class Interval(Protocol):
    """How long the interval is now; told what each epoch took."""

    @property
    def ns(self) -> int: ...

    def paused(self, pause_ns: int, fill: float) -> None:
        """An epoch was taken, or was to be: the guest stood still for so long, and the arena is filled so far (1: it
        is full; 0: nothing is known of that).
        """
        ...

    def overflowed(self, fill: float) -> None:
        """It did not fit: so many arenas would have been needed."""
        ...

    def acked(self, ack_ns: int) -> None:
        """An epoch was acked, so long after it was taken."""
        ...


class Pace(Protocol):
    """What the user has decided about the interval."""

    def begin(self) -> Interval: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """--interval TIME."""

    ns: int

    def begin(self) -> Interval:
        return self

    def paused(self, pause_ns: int, fill: float) -> None:
        pass

    def overflowed(self, fill: float) -> None:
        pass

    def acked(self, ack_ns: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class PauseShare:
    """--interval auto --pause-share: the guest stands still for at most this share of the time.

    It grows faster than it shrinks: one that is too short takes from the guest what it cannot get back.
    """

    share: float
    longest_ns: int = LONGEST_NS

    def begin(self) -> Interval:
        return Chosen(
            lambda pause, ack: pause / (AIM * self.share), (1 / 1.1, 1.25), self.longest_ns
        )


@dataclass(frozen=True, slots=True)
class AddedLatency:
    """--interval auto --added-latency: what the guest sends waits for at most so long, on average.

    That is half an interval until its epoch is taken, and then pause and ack. Where these alone are too long, the
    interval is as short as epochs can be acked one after the other: a shorter one would only make them wait for each
    other. It shrinks faster than it grows: while it is too long, answers wait.
    """

    latency_ns: int
    longest_ns: int = LONGEST_NS

    def begin(self) -> Interval:
        return Chosen(
            lambda pause, ack: max(2 * (AIM * self.latency_ns - pause - ack), pause + ack),
            (1 / 1.5, 1.1),
            self.longest_ns,
        )


class Chosen:
    """An interval that follows what the last epochs took: by small steps, and not at all for little."""

    def __init__(self, wanted: Wanted, steps: tuple[float, float], longest_ns: int) -> None:
        """`steps`: times the interval that one epoch makes of it, at least and at most."""
        self._wanted = wanted
        self._shrink, self._grow = steps
        self._longest = longest_ns
        self._ns = float(min(BEGIN_NS, longest_ns))
        self._pause: float | None = None  # expected
        self._ack = 0.0  # the same; none was acked yet

    @property
    def ns(self) -> int:
        return round(self._ns)

    def paused(self, pause_ns: int, fill: float) -> None:
        self._pause = _follow(self._pause, pause_ns)
        wanted = self._wanted(self._pause, self._ack)
        if fill:
            wanted = min(wanted, self._ns * FULL / fill)
        if abs(wanted - self._ns) > NEAR * self._ns:
            self._move(min(max(wanted, self._ns * self._shrink), self._ns * self._grow))

    def overflowed(self, fill: float) -> None:
        self._move(self._ns * FULL / max(fill, 1.0))

    def acked(self, ack_ns: int) -> None:
        self._ack = _follow(self._ack or None, ack_ns)

    def _move(self, ns: float) -> None:
        self._ns = min(max(ns, SHORTEST_NS), self._longest)


class Wanted(Protocol):
    """The interval (ns) that suits an epoch which is expected to take so long."""

    def __call__(self, pause: float, ack: float) -> float: ...


def _follow(expected: float | None, seen: int) -> float:
    return seen if expected is None else expected + NEWEST * (seen - expected)


class Pacer:
    """An epoch that starts late moves the next one, so lateness is never made up in a burst."""

    def __init__(self, pace: Pace, now: int) -> None:
        self.interval = pace.begin()
        self.next_start = now
        self.late_ns = 0  # how much later than wanted the last epoch started (no arena was free)

    def due(self, now: int) -> None:
        """An epoch starts now."""
        self.late_ns = max(0, now - self.next_start)
        self.next_start = now + self.interval.ns

    def started(self, now: int) -> None:
        """An epoch was taken; a pause longer than the interval leaves the guest one interval to run all the same."""
        if now >= self.next_start:
            self.next_start = now + self.interval.ns

    def failed(self, now: int) -> None:
        """Nothing was taken: try again after one interval."""
        self.next_start = now + self.interval.ns

    def again(self, now: int) -> None:
        """It did not fit: once live rounds have copied most of it, the rest is taken at once, before it grows anew."""
        self.next_start = now
