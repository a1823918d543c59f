"""`checkpointd save`: a guest's image, as `xl save` makes it, at the cost of one pause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .capture import Capture

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.hypervisor.port import Domain
    from checkpointd.stream.records import Octets

    from .capture import Limits


@dataclass(frozen=True, slots=True)
class Saved:
    octets: int
    pause_ns: int  # that the guest stood still for; with `stay` it does yet


def save(
    domain: Domain,
    write: Callable[[Octets], object],
    limits: Limits,
    *,
    stay: bool,
    progress: Callable[[int, int], None],
) -> Saved:
    """Write a plain stream of an attached domain: live rounds until little is dirty, then one pause. With `stay` the
    guest is left suspended as it is in the image, until the domain is closed. Raises as Capture.begin() does; the
    guest runs on then, at the latest once the domain is closed.
    """
    octets = 0

    def count(part: Octets) -> None:
        nonlocal octets
        write(part)
        octets += memoryview(part).nbytes

    capture = Capture(domain, count, limits, progress=progress)
    try:
        capture.begin()
        outcome = capture.take(stay=stay)
        capture.end()
    finally:
        capture.close()
    return Saved(octets, outcome.pause_ns)
