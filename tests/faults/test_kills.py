"""Some kills of each kind: one for each phase of an epoch and each set; the campaign has them all."""

from __future__ import annotations

import pytest
from kill_plans import (
    BOTH_COPIES,
    DAEMONS,
    ENGINE,
    GUEST,
    MACHINE,
    NEW_HOST,
    STALL,
    STANDBY,
    Phase,
    Plan,
    activation,
    steady,
)
from kills import play
from witnesses import Seen, surviving, unexplained

SEED = 41


PLANS = [
    # the pause
    steady("hv.suspend", MACHINE, SEED),
    steady("hv.harvest", ENGINE, SEED, returns=False),
    steady("hv.context", GUEST, SEED),
    steady("hv.output_close", ENGINE, SEED),
    # on the way, and the output
    steady("primary.after-pause", MACHINE, SEED),
    steady("ship.frame", MACHINE, SEED),
    steady("primary.before-release", DAEMONS, SEED),
    # at the standby
    steady("secondary.before-ack", GUEST, SEED),
    steady("secondary.mid-commit", MACHINE, SEED),
    steady("secondary.after-commit", STANDBY, SEED),
    # in the guest's host
    steady("host.input-logged", MACHINE, SEED),
    steady("host.suspended", BOTH_COPIES, SEED),
    # nobody dies, but one stands still for longer than anybody waits
    steady("hv.resume", STALL, SEED),
    steady("secondary.before-commit", STALL, SEED),
    # copies
    Plan(SEED, Phase.FIRST_COPY, MACHINE, "ship.end"),
    Plan(SEED, Phase.SECOND_COPY, MACHINE, "ship.frame"),
    # the activation itself
    activation("secondary.before-fence", ENGINE, STANDBY, SEED),
    activation("secondary.before-fence", ENGINE, STALL, SEED, returns=True),
    activation("secondary.after-term", MACHINE, STANDBY, SEED),
    activation("secondary.before-start", MACHINE, frozenset({NEW_HOST}), SEED),
    activation("host.before-bind", GUEST, STANDBY, SEED),
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
