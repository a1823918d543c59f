"""SIGKILL of either daemon: the guest runs on on host a, and host b does not start it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lab.guests import Guest

if TYPE_CHECKING:
    from xen_rig import Rig

KEPT = Guest("kept", pages=512, rate=100)
# Steps of an epoch on either side (checkpointd/faults.py, docs/architecture.md).
PRIMARY_STEPS = [
    "primary.before-pause", "primary.after-pause", "primary.before-release", "ship.frame", "ship.shipped",
]  # fmt: skip
SECONDARY_STEPS = [
    "secondary.frame", "secondary.part-whole", "secondary.before-ack", "secondary.after-ack",
    "secondary.before-commit", "secondary.mid-commit", "secondary.after-commit",
]  # fmt: skip
SHORT = {"secondary.before-commit"}  # the others are for a campaign
DEAD = 900  # s from the start of both daemons to the death of one; a minute on two idle cores
PASSAGE = 6  # of the point: the first copy is over by then


def steps(names: list[str]) -> list[object]:
    marks = {True: pytest.mark.short, False: pytest.mark.campaign}
    return [pytest.param(name, marks=marks[name in SHORT]) for name in names]


@pytest.mark.parametrize("step", steps(SECONDARY_STEPS))
def test_secondary_dies(rig: Rig, step: str) -> None:
    """kill -9 of the secondary at a step of an epoch: the guest stays paused on host b and runs on host a, and its
    engine says that the secondary is lost.
    """
    living = rig.create(KEPT)
    secondary = rig.secondary(environment={"CHECKPOINTD_FAULTS": f"{step}@{PASSAGE}=kill"})
    primary = rig.primary(living)
    assert secondary.wait(DEAD) == 137, "killed"
    rig.not_started_on_b(living)
    rig.runs_on_a(living)
    assert primary.alive(), primary.said()
    assert rig.domain(rig.a, "primary")["state"] == "holding"


@pytest.mark.parametrize("step", steps(PRIMARY_STEPS))
def test_primary_dies(rig: Rig, step: str) -> None:
    """kill -9 of the primary at a step of an epoch: the guest goes on running on host a, and host b, which is told that
    its host lives, waits for a new engine and does not start it. (That a guest which is suspended at the death runs
    again within a second: inside/test_never_stranded.py.)
    """
    living = rig.create(KEPT)
    secondary = rig.secondary("--engine-restart", "10m")
    primary = rig.primary(living, environment={"CHECKPOINTD_FAULTS": f"{step}@{PASSAGE}=kill"})
    assert primary.wait(DEAD) == 137, "killed"
    rig.runs_on_a(living)
    rig.not_started_on_b(living)
    assert secondary.alive()
    assert rig.domain(rig.b, "secondary")["state"] == "engine-lost"
    again = rig.primary(living, name="again")
    rig.protected(living, again)
