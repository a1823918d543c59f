"""Frames made smaller on their way out, after the guest runs on (docs/wire-protocol.md, section 6).

Used by the shipper's thread alone, frame by frame, so that ZeroMQ encrypts the one before meanwhile. The history is
what the standby holds once it has all that was shipped: that is so because a part is on the wire only when the one
before it was acked; whatever else happens to a part (asked for again, abandoned) ends in distrust(), after which
nothing is known. Should the history be wrong all the same, the digest of what was staged, which goes along, shows it to
the standby, and it asks for the part again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from checkpointd.native import History, body_size
from checkpointd.wire.frames import BULK_PAYLOAD_MAX, Kind
from checkpointd.wire.reduced import CHANGES, ZSTD, Codec, Reduced

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.frames import Octets

    from .epoch import Frame
    from .worth import Plan

PAGE = 4096  # octets
LEAST_CODED = 512  # octets; a frame of a few pages' changes is a packet either way
GAIN = 16  # what gains less than one part in so many is not worth the standby's work


class Reducer:
    """`history` octets of pages as the standby holds them, taken as they are used."""

    def __init__(
        self, plan: Plan, history: int, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """Raises OSError (no memory)."""
        self.plan = plan
        self._history = History(history)
        self._out = bytearray(body_size(BULK_PAYLOAD_MAX))
        self._codec = Codec()
        self._clock = clock
        self._spent = self._staged = self._left = 0  # ns, octets and octets of the part under way

    def begin(self, *, final: bool) -> None:
        """The frames of a part follow, all of them."""
        self.plan.begin(final=final)
        self._spent = self._staged = self._left = 0

    def reduce(self, frame: Frame) -> bytes | None:
        """The payload of a REDUCED frame that stands for this one, or None: it goes as it is."""
        self._staged += frame.payload.nbytes
        reduced, started = None, self._clock()
        if self.plan.skip:
            pass  # the history is empty: distrust() came before, and nothing has been looked at since
        elif frame.kind is Kind.PAGES:
            reduced = self._pages(frame)
        elif frame.kind in (Kind.ZERO, Kind.GONE):
            self._history.forget(frame.payload)
        self._spent += self._clock() - started
        self._left += frame.payload.nbytes if reduced is None else len(reduced)
        return reduced

    def sent(self, ns: int) -> None:
        """ZeroMQ has let go of the part, `ns` after begin()."""
        self.plan.sent(self._staged, self._left, ns - self._spent)

    def distrust(self) -> None:
        """Nothing is known any more of what the standby holds."""
        self._history.clear()

    def refused(self) -> None:
        """A whole part is to be sent once more, as it is."""
        self.distrust()
        self.plan.refused()

    def close(self) -> None:
        self._history.close()

    def _pages(self, frame: Frame) -> bytes | None:
        plan, length = self.plan, frame.payload.nbytes
        flags, body = self._changes(frame.payload)
        content = body
        if plan.compress and len(body) >= LEAST_CODED:
            content = self._compress(body)
            flags |= ZSTD if content is not body else 0
        if not flags or plan.as_it_is or len(content) > length - length // GAIN:
            return None
        return Reduced(frame.digest, length, len(body), flags, content).pack()

    def _changes(self, record: memoryview) -> tuple[int, Octets]:
        every, started = self.plan.every, self._clock()
        result = self._history.reduce(record, self._out if every == 1 else None, every=every)
        self.plan.changed(result.seen * PAGE, result.octets, self._clock() - started)
        if not result.changes or not result.body:
            return 0, record
        return CHANGES, memoryview(self._out)[: result.body]

    def _compress(self, body: Octets) -> Octets:
        started = self._clock()
        packed = self._codec.compress(body)
        shorter = len(packed) < len(body)
        self.plan.compressed(len(body), min(len(packed), len(body)), self._clock() - started)
        return packed if shorter else body
