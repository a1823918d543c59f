"""Measuring in turns, and ratios: what a figure is, and whether it meets its goal, whatever is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, quartiles and extremes of a series."""

    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        low, median, high = (percentile(ordered, share) for share in (25, 50, 75))
        return cls(median, low, high, ordered[0], ordered[-1], len(ordered))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of an ascending series, what `share` per cent are not above; between two values their mean by weight."""
    at = (len(ordered) - 1) * share / 100
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


@dataclass(frozen=True, slots=True)
class Goal:
    """Of a ratio's or a figure's median."""

    bound: float
    least: bool = False  # it is to be at least so much; else at most

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.least else '<='} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: what ours takes, what the other takes, and the ratio of the two, turn by turn."""

    what: str
    unit: str  # of ours and the other
    ours: Spread
    against: str = ""  # what the other is; "": none, and the goal is of ours
    other: Spread | None = None
    ratio: Spread | None = None  # of ours to the other
    goal: Goal | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)  # what else was seen; as JSON allows

    @property
    def judged(self) -> float:
        """What the goal is of."""
        return (self.ratio or self.ours).median

    @property
    def met(self) -> bool | None:
        """None: it has no goal."""
        return self.goal.met(self.judged) if self.goal else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "goal": str(self.goal) if self.goal else None, "met": self.met}


def in_turns(
    ways: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    between: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Each way `rounds` times, one after the other, after `between` each time: whatever else this machine does
    meanwhile meets all of them alike. Which is first changes from round to round.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(rounds):
        for name in order:
            between()
            found[name].append(ways[name]())
        order = [*order[1:], order[0]]
    return found


def compare(
    what: str, unit: str, ours: Sequence[float], against: str, other: Sequence[float], goal: Goal | None = None,
    *, scale: float = 1.0, **notes: Any,
) -> Figure:  # fmt: skip
    """`scale` turns what was measured into `unit`."""
    return Figure(
        what, unit, Spread.of([one * scale for one in ours]), against, Spread.of([one * scale for one in other]),
        Spread.of([one / two for one, two in zip(ours, other, strict=True)]), goal, notes,
    )  # fmt: skip
