"""Some kills of each kind: one for each phase of an epoch and each set; the campaign has them all."""

from __future__ import annotations

import pytest
from kills import (
    HOST,
    NEW_HOST,
    PRIMARY,
    SECONDARY,
    Phase,
    Plan,
    activation,
    play,
    steady,
)
from witnesses import Seen, surviving, unexplained

SEED = 41


def victims(*names: str) -> frozenset[str]:
    return frozenset(names)


PLANS = [
    # the pause
    steady("hv.suspend", victims(PRIMARY, HOST), SEED),
    steady("hv.harvest", victims(PRIMARY), SEED, returns=False),
    steady("hv.context", victims(HOST), SEED),
    steady("hv.output_close", victims(PRIMARY), SEED),
    # on the way, and the output
    steady("ship.frame", victims(PRIMARY, SECONDARY), SEED),
    steady("primary.before-release", victims(PRIMARY, HOST), SEED),
    # at the standby
    steady("secondary.before-ack", victims(HOST), SEED),
    steady("secondary.mid-commit", victims(PRIMARY, HOST), SEED),
    steady("secondary.after-commit", victims(SECONDARY), SEED),
    # in the guest's host
    steady("host.input-logged", victims(PRIMARY, HOST), SEED),
    steady("host.suspended", victims(HOST, SECONDARY), SEED),
    # copies
    Plan(SEED, Phase.FIRST_COPY, victims(PRIMARY, HOST), "ship.end"),
    Plan(SEED, Phase.SECOND_COPY, victims(PRIMARY, HOST), "ship.frame"),
    # the activation itself
    activation("secondary.before-fence", victims(PRIMARY), victims(SECONDARY), SEED),
    activation("secondary.after-term", victims(PRIMARY, HOST), victims(SECONDARY), SEED),
    activation("secondary.before-start", victims(PRIMARY, HOST), victims(NEW_HOST), SEED),
    activation("host.before-bind", victims(HOST), victims(SECONDARY), SEED),
    activation("secondary.after-start", victims(PRIMARY), victims(), SEED),
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_kill(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    report = play(plan, tmp_path_factory.mktemp("k"))
    assert not report.wrong, "\n".join(report.wrong)
    assert report.answers > 0


def test_answers_that_history_does_not_contain_are_found() -> None:
    """The judge himself: an answer of an epoch that was lost with its host, and one that nobody gave."""
    first = (0, {1: b"a 1 set k v", 2: b"b 1 set k w", 3: b"a 2 get k"})
    second = (2, {3: b"b 2 get k"})
    history = surviving([first, second])
    assert unexplained([Seen(b"a 1", 1), Seen(b"b 1", 2), Seen(b"b 2", 3)], history) == []
    assert len(unexplained([Seen(b"a 2", 3)], history)) == 1
    assert len(unexplained([Seen(b"b 2", 4)], history)) == 1
    assert unexplained([Seen(b"a 2", 3)], surviving([first])) == []
