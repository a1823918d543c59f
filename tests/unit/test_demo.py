"""What the demo says of its outcome: every reason of a failure, and what it takes to play it again."""

from __future__ import annotations

from typing import Any

import pytest

from checkpointd.demo import show
from checkpointd.demo.proof import Verdict
from checkpointd.hypervisor.embedded.kv import LoadReport

LAST = {"acked_epoch": 77, "pause_p50_ns": 60_000, "pause_p99_ns": 90_000, "sent_bytes": 7_000_000}
REPORT = LoadReport(100, 0, 0, 1.2, ())


def judged(**changes: Any) -> tuple[show.Figures, str]:
    said: list[str] = []
    facts: dict[str, Any] = {
        "last": LAST,
        "standby": {"committed_epoch": 78},
        "reports": [REPORT],
        "verdict": Verdict(5000, 16384, ""),
        "seed": 4711,
        "interval": 100_000_000,
        "ram_pages": 16384,
        "failover": 1.0,
        **changes,
    }
    return show._judge(said.append, **facts), "\n".join(said)


def test_nothing_was_lost() -> None:
    figures, said = judged()
    assert figures.ok
    assert said.endswith("Nothing was lost.")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"verdict": Verdict(5000, 16384, "page 7 differs")}, "page 7 differs"),
        ({"reports": [LoadReport(9, 0, 0, 1.0, ("a write vanished",))]}, "a write vanished"),
        ({"standby": {"committed_epoch": 76}}, "epoch 77 was acknowledged, and the guest runs from epoch 76"),
        ({"reports": [LoadReport(0, 12, 0, 0.0, ())]}, "no client got an answer"),
    ],
)  # fmt: skip
def test_each_reason_of_a_failure_is_told_and_the_seed(changes: dict[str, Any], told: str) -> None:
    figures, said = judged(**changes)
    assert not figures.ok
    assert told in said
    assert "FAILED" in said
    assert "--seed 4711" in said
