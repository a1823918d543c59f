"""Every kill of the matrix, and kills at random moments; the report goes into docs/campaigns.md.

CHECKPOINTD_CAMPAIGN_SEED   where all chance begins (default 2014)
CHECKPOINTD_CAMPAIGN_EACH   least number of kills at each named point (default 10)
CHECKPOINTD_CAMPAIGN_COUNT  kills at random moments (default 200)
CHECKPOINTD_CAMPAIGN_WORKERS  installations at once (default: one for each processor)
"""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest
from kill_plans import Phase, Plan, matrix, moments
from kills import Report, play
from report import commit, machine, write_section

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

pytestmark = pytest.mark.campaign


def _option(name: str, default: int) -> int:
    return int(os.environ.get(f"CHECKPOINTD_CAMPAIGN_{name}", default))


def _play(base: Path, numbered: tuple[int, Plan]) -> Report:
    number, plan = numbered
    directory = base / str(number)
    directory.mkdir()
    report = play(plan, directory)
    if not report.wrong:
        shutil.rmtree(directory)
    return report


def _table(reports: Iterable[Report]) -> str:
    """Point by what was killed: runs/activations/failures."""
    cells: dict[tuple[str, str], Counter[str]] = {}
    for report in reports:
        plan = report.plan
        cell = cells.setdefault((plan.point or "(random)", plan.victims_named), Counter())
        cell.update(runs=1, activated=int(report.activated), failed=int(bool(report.wrong)))
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells}, key=lambda text: (text.count("+"), text))
    lines = [
        f"| point | {' | '.join(columns)} | all |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    for row in rows:
        counts = [cells.get((row, column), Counter()) for column in columns]
        counts.append(sum(counts, Counter()))
        texts = [f"{c['runs']}/{c['activated']}/{c['failed']}" if c else "" for c in counts]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _text(reports: list[Report], seed: int, took: float) -> str:
    failed = sum(bool(report.wrong) for report in reports)
    date = dt.datetime.now(dt.UTC).date()
    text = (
        f"Commit {commit()}, {date}, seed {seed}: **{len(reports)} runs, {failed} failed**, in {took / 60:.0f} min; "
        f"{sum(bool(report.plan.victims) for report in reports)} with kills at the point or moment, "
        f"{sum(report.activated for report in reports)} activations, "
        f"{sum(report.answers for report in reports)} answers seen by clients.\n"
        f"Machine: {machine()}.\n\nEach cell: runs/activations/failures.\n"
    )
    for phase in Phase:
        of_phase = [report for report in reports if report.plan.phase is phase]
        text += f"\n### During {phase}\n{_table(of_phase)}" if of_phase else ""
    return text


def _progress(report: Report) -> Report:
    sys.stdout.write(f"{'FAILED' if report.wrong else 'ok'}: {report.plan}\n")
    sys.stdout.flush()
    return report


def test_kills(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = _option("SEED", 2014)
    plans = [*matrix(seed, _option("EACH", 10)), *moments(seed, _option("COUNT", 200))]
    base = tmp_path_factory.mktemp("k")
    began = time.monotonic()
    # Processes, not threads: each has the clients and oracles of one installation.
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(_option("WORKERS", os.cpu_count() or 1), spawn) as pool,
        capsys.disabled(),
    ):
        reports = [_progress(report) for report in pool.map(partial(_play, base), enumerate(plans))]
        text = _text(reports, seed, time.monotonic() - began)
        sys.stdout.write(text)
    write_section("kills", text)
    assert [(str(report.plan), report.wrong) for report in reports if report.wrong] == []
