"""When the next epoch starts. The interval is the time between the starts of two epochs."""

from __future__ import annotations


class Pacer:
    """A fixed interval; an epoch that starts late moves the next one, so lateness is never made up in a burst.

    All times are nanoseconds of the driver's clock.
    """

    def __init__(self, interval_ns: int, now: int) -> None:
        self.interval_ns = interval_ns
        self.next_start = now
        self.late_ns = 0  # how much later than wanted the last epoch started (no arena was free)

    def due(self, now: int) -> None:
        """An epoch starts now."""
        self.late_ns = max(0, now - self.next_start)
        self.next_start = now + self.interval_ns

    def started(self, now: int) -> None:
        """An epoch was taken; a pause longer than the interval leaves the guest one interval to run all the same."""
        if now >= self.next_start:
            self.next_start = now + self.interval_ns

    def failed(self, now: int) -> None:
        """Nothing was taken: try again after one interval."""
        self.next_start = now + self.interval_ns
