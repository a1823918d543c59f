"""The xl restorer on a fake host: the whole way, domains that are in the way, and an xl that dies, hangs or fails."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest
from xl_guest import HASTY, INFO, PATIENCE, STATIC, UUID, Clock, Guest, runs, same_memory, until

from checkpointd.authority.processes import identify
from checkpointd.errors import HypervisorError, StateError
from checkpointd.secondary.restorers.xl import RESTART
from checkpointd.stream.records import RecordType
from checkpointd.stream.writer import record

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from fake_xl import FakeDomains

    from checkpointd.secondary.restorers.xl import XlRestorer


# ---------------------------------------------------------------- the whole way


def test_warm_activation_is_the_last_committed_epoch(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    for live in (0, 30, 0, 50, 0, 0, 20):
        epoch = guest.run(live=live)
        restorer.committed(guest.replica)
        if epoch % 2:
            until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not applied")
    assert not runs(xen)
    started = restorer.start(INFO, guest.replica, paused=False)
    domain = xen.get(UUID)
    assert domain is not None
    assert (started.domid, domain["name"], domain["pauses"]) == (domain["domid"], "guest", 0)
    same_memory(xen, guest.memory)
    assert not list((xen.folder / "notes").iterdir())


def test_without_a_warm_domain_one_is_built_from_the_image(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    guest.run(300)
    guest.run(live=20)
    make().start(INFO, guest.replica, paused=False)
    assert runs(xen)
    same_memory(xen, guest.memory)


def test_activated_paused_it_stays_paused(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    guest.run()
    make().start(INFO, guest.replica, paused=True)
    domain = xen.get(UUID)
    assert domain is not None
    assert (domain["name"], domain["pauses"]) == ("guest", 1)


def test_a_replica_that_is_not_whole_is_not_started(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    with pytest.raises(StateError, match="copying, not one whole epoch"):
        make().start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is None


def test_discard_leaves_no_domain(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: xen.get(UUID), "no domain")
    restorer.discard()
    assert xen.get(UUID) is None
    assert guest.replica.changed is None
    assert not list((xen.folder / "notes").iterdir())


def test_another_description_begins_anew(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not applied")
    restorer.begin(INFO, STATIC)
    assert xen.get(UUID) is not None, "the same description keeps it"
    restorer.begin(INFO, STATIC + record(RecordType.STATIC_DATA_END))
    assert xen.get(UUID) is None


# ---------------------------------------------------------------- a domain that is here already


def test_a_domain_of_the_same_uuid_is_neither_doubled_nor_destroyed(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    xen.put(UUID, domid=3, name="guest", pauses=1)
    guest.run()
    with pytest.raises(HypervisorError, match=r"domain 3 .* lives here.*xl destroy 3"):
        make().start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is not None


def test_one_that_runs_is_not_destroyed_though_a_note_is_there(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    guest.run()
    restorer._notes.write(UUID)
    xen.put(UUID, domid=3, name="guest", pauses=0)
    with pytest.raises(HypervisorError, match="lives here"):
        restorer.start(INFO, guest.replica, paused=False)
    assert runs(xen)


def test_one_that_a_living_process_takes_in_is_not_destroyed(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    xen.put(UUID, domid=3, name="guest--incoming", pauses=2)
    guest.run()
    (xen.folder / "notes").mkdir()
    note = xen.folder / "notes" / f"incoming-{UUID}.json"
    note.write_text(
        json.dumps({"uuid": UUID, "by": asdict(identify(os.getppid())), "builder": None})
    )
    with pytest.raises(HypervisorError, match="lives here"):
        make().start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is not None


def test_an_xl_that_an_earlier_life_started_is_killed_before_another_is(
    xen: FakeDomains,
    guest: Guest,
    make: Callable[..., XlRestorer],
    old_xl: subprocess.Popen[bytes],
) -> None:
    """It may be making its domain only now, and that one would be taken for the new one's, and held in its place."""
    gone = replace(identify(), start_time=1)
    (xen.folder / "notes").mkdir()
    note = xen.folder / "notes" / f"incoming-{UUID}.json"
    note.write_text(
        json.dumps({"uuid": UUID, "by": asdict(gone), "builder": asdict(identify(old_xl.pid))})
    )
    guest.run()
    make().start(INFO, guest.replica, paused=False)
    assert old_xl.wait(PATIENCE) == -signal.SIGKILL
    assert runs(xen)


def test_a_stranger_that_has_the_pid_of_a_dead_xl_is_let_be(
    guest: Guest, make: Callable[..., XlRestorer], old_xl: subprocess.Popen[bytes]
) -> None:
    was = replace(identify(old_xl.pid), start_time=1)
    guest.run()
    restorer = make()
    restorer._notes.write(UUID, was)
    restorer.start(INFO, guest.replica, paused=False)
    assert old_xl.poll() is None


def test_the_xl_that_finishes_a_guest_which_runs_is_let_be(
    xen: FakeDomains,
    guest: Guest,
    make: Callable[..., XlRestorer],
    old_xl: subprocess.Popen[bytes],
) -> None:
    """Somebody has unpaused it meanwhile: it is refused, and nothing is done to it."""
    guest.run()
    restorer = make()
    restorer._notes.write(UUID, identify(old_xl.pid))
    xen.put(UUID, domid=3, name="guest", pauses=0)
    with pytest.raises(HypervisorError, match="lives here"):
        restorer.start(INFO, guest.replica, paused=False)
    assert old_xl.poll() is None
    assert restorer._notes.builder(UUID) == identify(old_xl.pid)


def test_the_xl_of_a_feed_is_noted_before_it_can_make_a_domain(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not warm")
    assert restorer._feed is not None
    assert restorer._notes.builder(UUID) == restorer._feed.receive.identity is not None


# ---------------------------------------------------------------- xl dies, hangs, fails


def test_death_of_xl_is_an_alarm_and_a_new_one_comes_later(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    clock = Clock()
    restorer = make(clock=clock)
    xen.order("die-at-epoch", "1")
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer._feed and not restorer._feed.alive, "the feed goes on without xl")
    guest.run()
    restorer.committed(guest.replica)
    assert "killed by signal 9" in restorer.alarm
    assert "something broke" in restorer.alarm, "what xl said belongs to it"
    assert xen.get(UUID) is None
    (xen.folder / "orders" / "die-at-epoch").unlink()
    clock.now += RESTART - 1
    guest.run()
    restorer.committed(guest.replica)
    assert xen.get(UUID) is None
    clock.now += 2
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not warm again")
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


@pytest.mark.parametrize("order", ["die-at-epoch", "stop-at-epoch"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_activation_that_meets_a_lost_xl_builds_anew(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer], order: str, epoch: int
) -> None:
    restorer = make(HASTY)
    xen.order(order, str(epoch))
    guest.run()
    restorer.committed(guest.replica)
    feed = restorer._feed
    assert feed is not None

    def met(count: int) -> bool:
        """An xl that has died takes its domain along, so that its count may never be seen."""
        return (xen.get(UUID) or {}).get("epochs") == count or not feed.alive

    until(lambda: met(1), "not applied")
    guest.run()
    if epoch == 2:
        restorer.committed(guest.replica)
        until(lambda: met(2), "not applied")
    first = (xen.get(UUID) or {}).get("xl")
    (xen.folder / "orders" / order).unlink()
    restorer.start(INFO, guest.replica, paused=False)
    domain = xen.get(UUID)
    assert domain is not None
    assert domain["xl"] != first
    assert runs(xen)
    same_memory(xen, guest.memory)


def test_an_xl_that_does_not_finish_is_replaced(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make(HASTY)
    xen.order("no-finish")
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not applied")
    with pytest.raises(HypervisorError, match=r"did not finish the domain within 0\.5 s"):
        restorer.start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is None
    (xen.folder / "orders" / "no-finish").unlink()
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


@pytest.mark.parametrize(
    ("order", "text", "says"),
    [
        ("fail", "failed to free memory for the domain", "ended .*failed to free memory"),
        ("mute", "", "did not say that it is ready within"),
        ("no-domain", "", "made no domain within"),
    ],
)
def test_what_keeps_xl_from_beginning_is_said(
    xen: FakeDomains,
    guest: Guest,
    make: Callable[..., XlRestorer],
    order: str,
    text: str,
    says: str,
) -> None:
    xen.order(order, text)
    guest.run()
    with pytest.raises(HypervisorError, match=says):
        make(HASTY).start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is None


def test_without_xl_it_says_what_to_install(
    guest: Guest, make: Callable[..., XlRestorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    guest.run()
    with pytest.raises(HypervisorError, match="install xen-utils"):
        make().start(INFO, guest.replica, paused=False)
