"""One module for each scenario: TEXT says what it measures, run() does, each figure as soon as it is there."""

from __future__ import annotations

from enum import Enum, auto
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure

# In the order in which they are run and reported.
NAMES = (
    "pause",
    "fixed",
    "libxc",
    "whole",
    "copy",
    "shipping",
    "wire",
    "commit",
    "latency",
    "loss",
    "guests",
    "failover",
)


class Size(Enum):
    SMALL = auto()  # seconds: that it runs; its figures mean little
    FULL = auto()


def scenario(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def run(name: str, size: Size, machine: Machine) -> Iterator[Figure]:
    """Raises BenchError if the machine cannot do it."""
    figures: Iterator[Figure] = scenario(name).run(size, machine)
    return figures
