"""After an activation, terms hold: whoever comes back with an old one is sent away, and its guest stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from installation import ACTING, SILENCE, Installation, outcome, said, wait_ended
from kills import stale_engine_refused
from processes import PATIENCE, until

from checkpointd.errors import RefusedError
from checkpointd.hypervisor.embedded import toolstack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

SEED = 7


@pytest.fixture
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A protected guest with clients; secondary and primary run."""
    on = Installation(tmp_path_factory.mktemp("t"), seed=SEED)
    try:
        on.start_guest()
        on.clients.start()
        yield on
    finally:
        assert on.close() == [], "processes were left behind"


def all_proved(on: Installation) -> list[str]:
    """The activated guest answers, has kept its word, and is what its inputs make it."""
    wrong = [] if on.clients.all_answered(PATIENCE) else ["not every client is answered"]
    places = [place for place, _ in on.hosts()]
    wrong += [] if places == ["secondary"] else [f"guests live at {places}"]
    return wrong + on.clients.finish() + on.prove_guest("secondary") + on.prove_answers()


def test_both_daemons_restarted_after_an_activation(installation: Installation) -> None:
    """The guest lives on through the restart of the secondary that started it; the old term is over for good."""
    on = installation
    on.start_secondary()
    on.start_primary().state("protected")
    assert on.guest is not None
    on.named("primary").kill()
    on.guest.kill()
    assert outcome(on) is not None
    assert on.clients.all_answered(PATIENCE)
    assert on.named("secondary").stop() == 0
    assert on.clients.all_answered(PATIENCE), "the guest does not need the secondary"
    on.start_secondary()
    assert on.standby()["state"] == "active"
    assert on.standby()["term"] == 2
    assert stale_engine_refused(on) == []
    assert stale_engine_refused(on) == [], "asking twice makes no difference"
    on.named("secondary").kill()
    on.start_secondary()
    assert stale_engine_refused(on) == []
    assert all_proved(on) == []


def test_an_old_guest_that_still_lives_is_stopped_by_its_engine(installation: Installation) -> None:
    """--unsafe-no-fencing: the old guest was not stopped. It holds its address, so nothing starts beside it; its output
    is shut; and the engine that comes back for it stops it. When its host is taken away, the other side goes on.
    """
    on = installation
    secondary = on.start_secondary("--unsafe-no-fencing")
    on.start_primary().state("protected")
    on.named("primary").kill()
    secondary.state("activating")
    assert on.look().shut, "nothing may leave the old guest"
    assert on.clients.silent(0.3)
    secondary.state("failed")  # the address is the old guest's: two of them never answer
    assert [place for place, _ in on.hosts()] == ["primary"]

    assert wait_ended(on.start_primary(), RefusedError.exit_code) == []
    view = on.look()
    assert view.paused, "the returning engine stops its guest"
    assert view.shut
    assert on.clients.silent(0.3)

    toolstack.destroy(view.info)
    until(lambda: on.standby()["state"] == "active", "the activation, once the address is free")
    assert all_proved(on) == []


def test_unsafe_stays_visible(installation: Installation) -> None:
    installation.start_secondary("--unsafe-no-fencing")
    assert any("no-fencing" in text for text in installation.rig.status("secondary")["unsafe"])


def test_a_secondary_without_a_session_never_acts(installation: Installation) -> None:
    """Primary, host and secondary die; a new secondary knows of no session and so does nothing."""
    on = installation
    on.start_secondary()
    on.start_primary().state("protected")
    assert on.guest is not None
    for daemon in (on.named("secondary"), on.named("primary"), on.guest):
        daemon.kill()
    secondary = on.start_secondary()
    assert on.clients.silent(2 * SILENCE)
    assert not said(secondary, *ACTING)
    assert on.hosts() == []
    assert on.clients.give_up() == []
    assert on.prove_answers() == []
