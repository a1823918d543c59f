"""Frames on their way to the replica's thread before their part is whole: one at a time, none that was thrown away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from checkpointd.secondary.foresight import Foresight

if TYPE_CHECKING:
    from collections.abc import Callable


class Jobs:
    """Those that wait for the thread, done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []

    def do(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self.waiting.append((work, then))

    def one(self) -> None:
        work, then = self.waiting.pop(0)
        then(work())


class Bench:
    def __init__(self) -> None:
        self.jobs = Jobs()
        self.worked: list[tuple[int, Any]] = []
        self.done: list[Any] = []
        self.foresight = Foresight(
            self.jobs,  # type: ignore[arg-type]  # a fake
            lambda epoch, content: self.worked.append((epoch, content)),
            self.done.append,
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_one_frame_at_a_time_in_order(bench: Bench) -> None:
    for number in range(3):
        bench.foresight.frame(7, bytes([number]))
        assert len(bench.jobs.waiting) == 1
    for _ in range(3):
        bench.jobs.one()
    assert bench.worked == [(7, b"\0"), (7, b"\1"), (7, b"\2")]
    assert bench.done == [b"\0", b"\1", b"\2"]
    assert bench.jobs.waiting == []


def test_what_was_thrown_away_is_not_worked_on(bench: Bench) -> None:
    """However long the thread is busy with something else, one frame of it is all that is still held."""
    for epoch in range(100):
        bench.foresight.frame(epoch, bytes(1))
        bench.foresight.over()
    assert len(bench.jobs.waiting) == 1
    bench.foresight.frame(100, b"new")
    bench.jobs.one()
    bench.jobs.one()
    assert bench.worked == [(0, bytes(1)), (100, b"new")]
    assert bench.jobs.waiting == []
