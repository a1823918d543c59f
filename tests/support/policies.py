"""A policy for tests of the protection machine: a guest of six pages, arenas of three."""

from __future__ import annotations

from checkpointd.primary.pacing import Fixed
from checkpointd.primary.policy import Policy

MS = 1_000_000
PAGES = 6
ARENA_PAGES = 3


BASE = Policy(
    pace=Fixed(100 * MS),
    arenas=2,
    arena_pages=ARENA_PAGES,
    ram_pages=PAGES,
    output_depth=8,
    run_without_standby=False,
    standby_timeout_ns=1000 * MS,
    ack_timeout_ns=5000 * MS,
    give_up_after_ns=60_000 * MS,
    max_live_rounds=30,
)
