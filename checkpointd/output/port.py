"""The port of an output buffer: what the engine needs to hold a guest's output until it may leave.

The buffer lives with the guest's host, not with the engine, so that an engine's death opens nothing. Epochs are
closed inside the pause, by `output_close` of the native table (csrc/hypervisor.h); all else is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class OutputStats:
    held_packets: int
    held_bytes: int
    limit_bytes: int
    dropped_packets: int  # over the limit: dropped, never released early (total since the guest began)
    released_packets: int  # total
    shut: bool  # True: packets are held until released; False: they leave at once


class OutputBuffer(Protocol):
    """Invariant 1, the guest's half: once shut, a packet leaves only by release() of its epoch or by open().

    Numbers are given by output_close, grow by one, and go on across engines: releasing n releases everything
    up to and including n.
    """

    @property
    def depth(self) -> int:
        """How many closed epochs it can tell apart (embedded: many; sch_plug: one)."""
        ...

    def release(self, closed: int) -> None:
        """Let out every packet of the epochs up to `closed`. Only for an acknowledged epoch."""
        ...

    def open(self) -> None:
        """Let everything out, now and from now on. Only after the secondary has retired its replica or was
        fenced, or for a guest that was never protected.
        """
        ...

    def stats(self) -> OutputStats: ...
