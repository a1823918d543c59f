"""What the user decided about one domain's protection, and what its parts can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .pacing import LONGEST_NS, AddedLatency, Fixed, PauseShare

if TYPE_CHECKING:
    from checkpointd.daemon.config import PrimaryOptions

    from .pacing import Pace


@dataclass(frozen=True, slots=True)
class Policy:
    """Times in nanoseconds."""

    pace: Pace
    arenas: int
    arena_pages: int
    ram_pages: int
    output_depth: int
    run_without_standby: bool  # --standby-loss run
    standby_timeout_ns: int
    ack_timeout_ns: int
    give_up_after_ns: int
    max_live_rounds: int  # passes over the whole memory, in pages staged
    # How long a standby may take to retire its replica before we leave with the output shut. It has to
    # wait for its commit worker at most, which holds one epoch.
    retire_timeout_ns: int = 5_000_000_000
    # How often a question that got no answer is asked again: what waited in a connection that ended is lost.
    ask_every_ns: int = 500_000_000
    # How often it is looked whether a silent standby is gone by now; a look may hold the loop for a second.
    look_every_ns: int = 5_000_000_000


def pace_of(options: PrimaryOptions) -> Pace:
    """The interval that the user has chosen, or how it is to be chosen."""
    if options.interval is not None:
        return Fixed(options.interval)
    # An epoch is progress, and its ack is waited for: both limits are longer than an interval ever gets.
    longest = min(LONGEST_NS, options.ack_timeout, options.give_up_after // 2)
    if options.pause_share is not None:
        return PauseShare(options.pause_share, longest)
    assert options.added_latency is not None, "one of them goes with auto"
    return AddedLatency(options.added_latency, longest)
