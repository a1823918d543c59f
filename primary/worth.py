"""Whether making frames smaller pays: what is spent on it must be less than what the wire saves. (Pure.)

Times are nanoseconds, costs nanoseconds for an octet that goes in. The wire's cost is learnt from parts that went out
as they are; the cost and the gain of a stage from itself, or from a sample of it while it is off.

    changes  a page that the standby holds travels as its changes
    codec    what is left is compressed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

NEWEST = 0.25  # weight of the newest part: five of them make up three quarters of what is expected of the next
# Of what is spent here on a stage, so much again is spent by the standby before it acks: it reads as many pages and
# writes as many, and Zstandard takes a third as long to undo its level 1.
UNDOING_CHANGES = 1.0
UNDOING_CODEC = 0.4
SURE = 0.8  # a stage that is off goes on once what it takes is within this share of what it saves: it should not flap
SAMPLE = 16  # of changes, while they do not pay: one page in so many is still looked at
TRY_EVERY = 16  # parts; of the codec, while it does not pay: one frame in so many parts is still compressed
WARM = 8  # parts for which changes stay on before they are judged: a page has to be sent once before it can gain
LEARN_EVERY = 256  # parts; once in so many all goes as it is: by then the wire may have become another
AGREED = 0.25  # share by which what was learnt may be beside what was expected; else it is learnt again soon
LEAST_LEARNT = 1 << 20  # octets; of less, the time is that of threads waking up
LEAST_SEEN = 64 << 10  # octets of pages; likewise, of looking at them
LATE = 2.0  # times what is expected; no part counts as slower: a link that stood still once has not become slow
PAUSE, LONGEST_PAUSE = 16, 1024  # parts that go as they are after one was refused; twice as many each time, up to


class Plan(Protocol):
    """What is to be done with the part under way."""

    every: int  # one page in so many is looked at for changes; 1: all of them
    compress: bool
    as_it_is: bool  # look at everything, and send it as it is
    skip: bool  # look at nothing, and send it as it is

    def begin(self, *, final: bool) -> None:
        """A part begins; `final`: it ends an epoch, so that most of its pages have come before."""
        ...

    def changed(self, octets: int, left: int, ns: int) -> None:
        """A frame's pages that were looked at took `octets`, and take `left`."""
        ...

    def compressed(self, octets: int, left: int, ns: int) -> None: ...

    def sent(self, staged: int, octets: int, ns: int) -> None:
        """The part is out: `octets` for the `staged` ones, `ns` after its first frame, but for what changed() and
        compressed() took.
        """
        ...

    def refused(self) -> None:
        """A whole part was asked for again: it may be that its reader lacks the memory to undo what came reduced."""
        ...


class _Refusals:
    """How long nothing is reduced after a part was refused."""

    def __init__(self) -> None:
        self._pause = PAUSE
        self._left = 0

    def begin(self) -> bool:
        """A part begins: is it to go as it is?"""
        self._left = max(0, self._left - 1)
        return self._left > 0

    def refused(self) -> None:
        self._left = self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


class Always:
    """--reduce always: whatever it takes."""

    every = 1
    compress = True
    as_it_is = False

    def __init__(self) -> None:
        self.skip = False
        self._refusals = _Refusals()

    def begin(self, *, final: bool) -> None:
        self.skip = self._refusals.begin()

    def changed(self, octets: int, left: int, ns: int) -> None:
        pass

    def compressed(self, octets: int, left: int, ns: int) -> None:
        pass

    def sent(self, staged: int, octets: int, ns: int) -> None:
        pass

    def refused(self) -> None:
        self._refusals.refused()


@dataclass(slots=True)
class _Mean:
    """Of a ratio, the newest part weighted most; None: of nothing yet."""

    value: float | None = None

    def add(self, new: float) -> None:
        self.value = new if self.value is None else self.value + NEWEST * (new - self.value)


class _Stage:
    def __init__(self, undoing: float) -> None:
        self._undoing = undoing
        self._cost = _Mean()
        self._left = _Mean()
        self.begin()

    def begin(self) -> None:
        """A part begins; what was seen of one that was cut short counts for nothing."""
        self._seen = self._out = self._ns = 0

    def add(self, octets: int, left: int, ns: int) -> None:
        self._seen += octets
        self._out += left
        self._ns += ns

    def enough(self, every: int = 1) -> bool:
        """Is there enough of the part to learn from?"""
        return self._seen * every >= LEAST_SEEN

    def end(self, every: int = 1) -> bool:
        """The part is over; did it teach anything?"""
        if not self.enough(every):
            return False
        if every == 1:  # a sample is dearer, for each page of it, than all of them are
            self._cost.add(self._ns / self._seen)
        self._left.add(self._out / self._seen)
        return True

    def pays(self, wire: float | None, *, on: bool) -> bool:
        if self._cost.value is None or self._left.value is None or wire is None:
            return on
        spent = self._cost.value * (1 + self._undoing)
        return spent < (1 - self._left.value) * wire * (1 if on else SURE)


class Worth:
    """--reduce auto."""

    def __init__(self) -> None:
        self.every = 1
        self.compress = False
        self.as_it_is = False
        self.skip = False
        self._refusals = _Refusals()
        self._trying = False  # the codec, on the first frame of this part
        self._on = False  # the codec
        self._final = False
        self._changes = _Stage(UNDOING_CHANGES)
        self._codec = _Stage(UNDOING_CODEC)
        self._wire = _Mean()
        self._parts = 0
        self._warm = WARM  # finals until changes are judged
        self._learn_at = LEARN_EVERY  # the part from which on the wire is to be learnt again

    def begin(self, *, final: bool) -> None:
        self._final = final
        self._changes.begin()
        self._codec.begin()
        self.skip = self._refusals.begin()
        self.as_it_is = self._parts >= self._learn_at
        self._trying = not self._on and not self.as_it_is and self._parts % TRY_EVERY == 0
        self.compress = (self._on or self._trying) and not self.as_it_is

    def changed(self, octets: int, left: int, ns: int) -> None:
        self._changes.add(octets, left, ns)

    def compressed(self, octets: int, left: int, ns: int) -> None:
        self._codec.add(octets, left, ns)
        if self._trying:
            self.compress = False  # one frame says enough

    def sent(self, staged: int, octets: int, ns: int) -> None:
        if octets >= LEAST_LEARNT and octets >= staged * 15 // 16 and self._parts:  # the first one connects, too
            self._learn(ns / octets)
        elif self.as_it_is:
            self._learn_at = self._parts + LEARN_EVERY  # too small, and the next one will be, too
        self._parts += 1
        if self._codec.end():
            self._on = self._codec.pays(self._wire.value, on=self._on)
        # Pages of a live round are sent for the first time, most of them: they say nothing about changes.
        if self._final:
            self._judge_changes()

    def refused(self) -> None:
        self._refusals.refused()

    def _learn(self, new: float) -> None:
        before = self._wire.value
        if before is not None:
            new = min(new, LATE * before)
        self._wire.add(new)
        agreed = before is not None and abs(new - before) <= AGREED * before
        self._learn_at = self._parts + (LEARN_EVERY if agreed else TRY_EVERY)

    def _judge_changes(self) -> None:
        on = self.every == 1
        if self._warm:
            # Most of what is sent now has not been sent before, since changes are on.
            if self._changes.enough(self.every):
                self._warm -= 1
            return
        if not self._changes.end(self.every) or self._changes.pays(self._wire.value, on=on) == on:
            return
        self.every = SAMPLE if on else 1
        self._warm = 0 if on else WARM
