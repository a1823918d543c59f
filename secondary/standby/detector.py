"""When is a primary silent? Pure: times come in, in nanoseconds of one monotonic clock.

Only words on the control connection count: pages may lie queued long after their sender has died.
Liveness and progress are told apart (invariant 9): a primary that is heard and does nothing is an
alarm, never ground for activation.
"""

from __future__ import annotations


class Detector:
    """Invariant: time in which we ourselves did not listen is never held against the peer.

    Kept so: tick() is expected every `tick_ns`, by the thread that listens, after it has taken in
    what was queued. A tick that comes late by more than `slack_ns` tells that the thread was
    stalled (a stopped process, a starved machine): the stall is added to the peer's credit, and no
    verdict is given before the next tick that is on time, by when the queue has been drained.
    """

    def __init__(self, limit_ns: int, stuck_ns: int, tick_ns: int, now_ns: int) -> None:
        """`limit_ns`: silence beyond it is silence. `stuck_ns`: likewise without progress."""
        self._limit_ns = limit_ns
        self._stuck_ns = stuck_ns
        self._tick_ns = tick_ns
        # Ticks are late by some milliseconds on a busy machine; one tick more is no stall.
        self._slack_ns = tick_ns
        self._last_tick_ns = now_ns
        self._heard_ns = now_ns
        self._progress: tuple[int, int] | None = None
        self._progress_ns = now_ns
        self._stuck_told = False
        self.stalls = 0  # of our own, in all

    def heard(self, now_ns: int) -> None:
        self._heard_ns = max(self._heard_ns, now_ns)

    def progressed(self, progress: int, phase: int, now_ns: int) -> None:
        """What a heartbeat says of the peer's epoch loop."""
        if (progress, phase) != self._progress:
            self._progress = (progress, phase)
            self._progress_ns = now_ns
            self._stuck_told = False

    def silent_for(self, now_ns: int) -> int:
        """How long nothing was heard, less our own stalls."""
        return max(0, now_ns - self._heard_ns)

    def tick(self, now_ns: int) -> int:
        """How long the peer has been silent if that is beyond the limit, else 0."""
        late_ns = now_ns - self._last_tick_ns - self._tick_ns
        self._last_tick_ns = now_ns
        if late_ns > self._slack_ns:
            self.stalls += 1
            self._heard_ns = min(now_ns, self._heard_ns + late_ns)
            self._progress_ns = min(now_ns, self._progress_ns + late_ns)
            return 0
        silent_ns = self.silent_for(now_ns)
        return silent_ns if silent_ns > self._limit_ns else 0

    def stuck_for(self, now_ns: int) -> int:
        """How long a peer that is heard has made no progress; told once each time, else 0."""
        stuck_ns = now_ns - self._progress_ns
        heard = self.silent_for(now_ns) <= self._limit_ns
        if self._progress is None or self._stuck_told or not heard or stuck_ns <= self._stuck_ns:
            return 0
        self._stuck_told = True
        return stuck_ns
