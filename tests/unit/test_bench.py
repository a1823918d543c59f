"""The bench: turns and ratios, its rival's stream, and that each scenario runs. Never how long anything takes."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import pytest

from checkpointd.bench import plots, report
from checkpointd.bench.lib import ffi
from checkpointd.bench.machine import this_machine
from checkpointd.bench.scenarios import NAMES
from checkpointd.bench.standin import BenchError, Copies, Standin, scattered
from checkpointd.bench.turns import Figure, Goal, Spread, compare, in_turns
from checkpointd.cli.main import main
from checkpointd.errors import UsageError
from checkpointd.stream.records import RecordType

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


def test_a_spread_is_of_the_whole_series() -> None:
    spread = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert spread == Spread(median=3.0, low=2.0, high=4.0, least=1.0, most=5.0, n=5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0, 1)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_ways_take_turns_and_each_is_first_as_often_as_the_others() -> None:
    said: list[str] = []

    def way(name: str) -> float:
        said.append(name)
        return len(said)

    ways = {name: partial(way, name) for name in "abc"}
    found = in_turns(ways, 3, between=lambda: said.append("-"))
    assert "".join(said) == "-a-b-c-b-c-a-c-a-b"
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_ratio_is_taken_turn_by_turn() -> None:
    """A machine that is twice as slow in one turn changes no ratio."""
    figure = compare("x", "ms", [1e6, 2e6, 1e6], "y", [2e6, 4e6, 2e6], Goal(0.5), scale=1e-6)
    assert figure.ratio is not None
    assert (figure.ratio.least, figure.ratio.most) == (0.5, 0.5)
    assert figure.ours.most == 2.0
    assert figure.met is True


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [(Goal(1.0), 1.0, True), (Goal(1.0), 1.01, False), (Goal(1.0, least=True), 0.99, False)],
)
def test_a_goal_is_met_or_missed(goal: Goal, value: float, met: bool) -> None:
    figure = Figure("x", "ms", Spread.of([value]), goal=goal)
    assert figure.met is met
    assert figure.as_dict()["goal"] == str(goal)
    assert ("MISSED" in report.line(figure)) is not met


def test_scattered_pages_are_ascending_and_within_the_guest() -> None:
    for count in (1, 7, 100):
        pfns = scattered(random.Random(3), 100, count)
        assert pfns == sorted(set(pfns))
        assert len(pfns) == count
        assert pfns[-1] < 100


def test_a_guest_that_does_not_fit_this_machine_is_told() -> None:
    with pytest.raises(BenchError, match="MiB are free"):
        Standin(1 << 30)


def pages_of(stream: bytes) -> dict[int, bytes]:
    """What its PAGE_DATA records carry, as far as there are any."""
    found, at = {}, 0
    while stream[at : at + 4] == int(RecordType.PAGE_DATA).to_bytes(4, "little"):
        length, count = (int.from_bytes(stream[at + i : at + i + 4], "little") for i in (4, 8))
        data = at + 16 + 8 * count
        for i in range(count):
            word = int.from_bytes(stream[at + 16 + 8 * i : at + 24 + 8 * i], "little")
            found[word] = stream[data + i * PAGE : data + (i + 1) * PAGE]
        at += 8 + length
    return found


def test_the_rival_sends_the_pages_that_ours_stages() -> None:
    pfns = [*range(3, 2300, 2), 3000, 3001, 4095]  # two batches; neighbours, too
    with Standin(1 << 12) as domain:
        domain.map_all()
        domain.dirty(pfns)
        domain.pause()
        ours = pages_of(b"".join(domain.arena.records))
        domain.dirty(pfns)
        near, far = socket.socketpair()
        with far, ThreadPoolExecutor() as pool:
            reading = pool.submit(_read_all, far)
            with near:
                domain.libxc_epoch(near.fileno())
            theirs = pages_of(reading.result())
    assert list(ours) == list(theirs) == pfns
    assert theirs == ours


def _read_all(far: socket.socket) -> bytes:
    received = bytearray()
    while piece := far.recv(1 << 20):
        received += piece
    return bytes(received)


def test_copies_are_of_the_pages_asked_for() -> None:
    with Standin(1 << 10) as domain, closing(Copies(domain, 4)) as copies:

        def guest(pfn: int) -> bytes:
            return bytes(ffi.buffer(domain.memory + pfn * PAGE, PAGE))

        before = {pfn: guest(pfn) for pfn in (1, 5, 7, 8, 9, 10, 11, 40)}
        assert copies.scattered([1, 5, 9, 11]) > 0
        assert copies.content() == b"".join(before[pfn] for pfn in (1, 5, 9, 11))
        assert copies.one(7, 4) > 0
        assert copies.content() == b"".join(before[pfn] for pfn in (7, 8, 9, 10))
        assert copies.back([40, 1]) > 0
        assert (guest(40), guest(1), guest(5)) == (before[7], before[8], before[5])


@pytest.mark.parametrize("name", NAMES)
def test_each_scenario_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--smallest", "--json", name]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == report.SCHEMA
    assert document["machine"]["last_level_cache"] > 0
    figures = document["scenarios"][name]
    assert figures
    for figure in figures:
        assert figure["ours"]["n"] > 0
        if figure["ratio"]:
            assert figure["ratio"]["median"] > 0


def test_a_scenario_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pause", "speed"]) == 2
    assert "no scenario speed; there are pause" in capsys.readouterr().err


def test_a_report_has_a_row_for_each_figure() -> None:
    figures = [
        compare("two", "ms", [1.0], "other", [2.0], Goal(0.1)),
        Figure("one", "ms", Spread.of([1.0])),
    ]
    text = report.as_markdown(figures, this_machine())
    assert (
        "| two | 1 (1 to 1) ms | other | 2 (2 to 2) ms | 0.5 (0.5 to 0.5) | <= 0.1 | **missed** |"
        in text
    )
    assert "| one | 1 (1 to 1) ms |  |  |  |  |  |" in text


def test_a_report_goes_into_its_place(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text("a\n<!-- pause: begin -->\nold\n<!-- pause: end -->\nb\n", encoding="utf-8")
    for _ in range(2):
        report.put_section(path, "pause", "new\n")
        assert path.read_text(encoding="utf-8") == (
            "a\n<!-- pause: begin -->\nnew\n<!-- pause: end -->\nb\n"
        )
    with pytest.raises(UsageError, match="has no lines `<!-- fixed: begin -->`"):
        report.put_section(path, "fixed", "new\n")


def test_plots_are_of_what_has_a_size(tmp_path: Path) -> None:
    figures = [
        compare("x", "us/page", [1.0, 2.0], "memcpy", [2.0, 2.0], pages=pages, kind="scattered")
        for pages in (2_000, 200)
    ]
    other = [Figure("y", "ms", Spread.of([1.0]))]
    (made,) = plots.draw(tmp_path / "plots", {"pause": figures, "latency": other})
    assert made == tmp_path / "plots" / "pause.png"
    assert made.read_bytes().startswith(b"\x89PNG")
    assert plots._lines(figures, "pages") == {
        "checkpointd scattered": [(200, figures[1].ours), (2_000, figures[0].ours)],
        "memcpy": [(200, figures[1].other), (2_000, figures[0].other)],
    }
