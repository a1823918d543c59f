"""What status and the metrics say of an engine's work: the epoch loop keeps it, any thread may read it."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpointd.daemon.metrics import PrimaryMetrics
    from checkpointd.native import MappingStats, Outcome
    from checkpointd.output.port import OutputStats

log = logging.getLogger(__name__)

# Pauses kept for the quantiles in status: at 100 ms a minute and a half, at 25 ms a quarter of one.
PAUSES_KEPT = 1000


class Pauses:
    """How long the guest stood still for each of the last epochs."""

    def __init__(self) -> None:
        self._kept: deque[int] = deque(maxlen=PAUSES_KEPT)

    def add(self, pause_ns: int) -> None:
        self._kept.append(pause_ns)

    def status(self) -> dict[str, int | None]:
        pauses = sorted(self._kept)
        return {
            "pause_p50_ns": pauses[len(pauses) // 2] if pauses else None,
            "pause_p99_ns": pauses[len(pauses) * 99 // 100] if pauses else None,
        }


class Figures:
    """Of one engine. Nothing here looks into memory that the end of its loop frees."""

    def __init__(self, metrics: PrimaryMetrics, ram_pages: int) -> None:
        self._metrics = metrics
        self._ram_pages = ram_pages
        self._pauses = Pauses()
        self.copied = 0  # pages of the first copy dealt with
        self.committed: int | None = None  # the last epoch that is the replica
        self._staged_at: dict[int, int] = {}  # ns, by epoch, until its ack
        self._dirty = 0  # pages, of the last epoch
        self._mapped_bytes = 0
        self._dropped = 0  # packets, ever
        self._dropping = False  # at the last look

    def status(self) -> dict[str, Any]:
        return {
            "committed_epoch": self.committed,
            **self._pauses.status(),
            "dirty_pages": self._dirty,
            "copied_pages": self.copied,
            "ram_pages": self._ram_pages,
            "output_dropped": self._dropped,
            "mapped_bytes": self._mapped_bytes,
        }

    # ------------------------------------------------------------ the way of an epoch

    def paused(self, outcome: Outcome) -> None:
        """A pause is over, well or not."""
        self._metrics.paused(outcome)
        self._dirty = outcome.dirty
        if outcome.pause_ns:
            self._pauses.add(outcome.pause_ns)

    def staged(self, epoch: int) -> None:
        self._staged_at[epoch] = time.monotonic_ns()

    def live_round(self, outcome: Outcome) -> None:
        self._metrics.live_round(outcome)
        done = outcome.pages + outcome.zeros + outcome.known
        self.copied = min(self.copied + done, self._ram_pages)

    def acked(self, epoch: int) -> None:
        now = time.monotonic_ns()
        self._metrics.acked(epoch, now - self._staged_at.pop(epoch, now))

    def abandoned(self) -> None:
        """Every epoch that is staged and not acked."""
        for _ in self._staged_at:
            self._metrics.abandoned()
        self._staged_at.clear()

    def has_committed(self, epoch: int, commit_ns: int) -> None:
        """So the secondary says."""
        self.committed = epoch
        self._metrics.committed(epoch, commit_ns)

    # ------------------------------------------------------------ what is looked at now and then

    def lag(self, epoch: int, acked_epoch: int | None) -> None:
        """`epoch` is the one in the making."""
        if acked_epoch is not None:
            self._metrics.lag(epoch - 1 - (self.committed or acked_epoch))

    def mappings(self, stats: MappingStats) -> None:
        self._mapped_bytes = stats.mapped_bytes
        self._metrics.mappings(stats)

    def output(self, stats: OutputStats) -> None:
        """Packets that the buffer had to drop are an alarm, one for each burst."""
        self._metrics.output(stats)
        dropped = stats.dropped_packets - self._dropped
        self._dropped = stats.dropped_packets
        if dropped > 0 and not self._dropping:
            self._metrics.alarm()
            log.error(
                "the output buffer is full and has dropped %d packets: %d octets are held until their epoch is acked; "
                "shorten --interval, or give the guest a larger buffer",
                dropped,
                stats.held_bytes,
            )
        self._dropping = dropped > 0
