"""Fencing: making sure that the other side does not run the guest, before this side does (invariant 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class HostView:
    """What can be seen of the other side's host, without touching it."""

    alive: bool | None  # None: it cannot be seen from here
    engine_attached: bool | None  # None: the host did not say
    detail: str


@dataclass(frozen=True, slots=True)
class FenceResult:
    fenced: bool  # True only with proof that the old guest runs no more and cannot send
    detail: str  # how it was proved, or why it failed and what to do


class Fence(Protocol):
    """Stops one guest on the other side. Made when a session begins, while the other side is known to live."""

    def probe(self, timeout: float) -> HostView:
        """Look at the host; `timeout` in seconds."""
        ...

    def fence(self, timeout: float) -> FenceResult:
        """Destroy the old guest or prove it gone; never raises; `timeout` in seconds."""
        ...

    def close(self) -> None: ...


class NoFence:
    """--unsafe-no-fencing: nothing is stopped, and the caller goes on as if it were. Split brain is possible."""

    def probe(self, timeout: float) -> HostView:
        return HostView(None, None, "not looked at: --unsafe-no-fencing")

    def fence(self, timeout: float) -> FenceResult:
        return FenceResult(True, "NOT FENCED: --unsafe-no-fencing; the old guest may still run")

    def close(self) -> None:
        pass
