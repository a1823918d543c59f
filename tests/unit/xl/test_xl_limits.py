"""How long an activation through xl may take, and a warm domain that does not come about, are bounded and told."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xl_guest import HASTY, INFO, PATIENT, UUID, Clock, Guest, runs, same_memory, until

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.xen import incoming
from checkpointd.secondary.restorers.xl import (
    AFTER_DESTROY,
    RESTART,
    longest_feed,
    longest_start,
)
from checkpointd.secondary.restorers.xl_process import Limits, XlReceive

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_xl import FakeDomains

    from checkpointd.secondary.restorers.xl import XlRestorer

GIB = 1 << 30
DOCUMENT = Path(__file__).parents[3] / "docs" / "xen.md"


def test_the_documented_limit_of_an_activation_is_the_computed_one() -> None:
    found = re.search(
        r"\*\*(\d+) s and (\d+) s for each GiB\s+of the guest's memory\*\*",
        DOCUMENT.read_text(encoding="utf-8"),
    )
    assert found
    limits = Limits()
    fixed, each = longest_start(limits, 0), longest_start(limits, GIB) - longest_start(limits, 0)
    assert (int(found[1]), int(found[2])) == (-int(-fixed // 1), -int(-each // 1))
    assert AFTER_DESTROY == incoming.KILL


def test_whatever_xl_and_the_toolstack_do_an_error_is_said_within_the_limit(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make(HASTY)
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not warm")
    xen.order("no-finish")
    xen.order("no-destroy")
    began = time.monotonic()
    with pytest.raises(HypervisorError):
        restorer.start(INFO, guest.replica, paused=False)
    assert time.monotonic() - began < longest_start(HASTY, INFO.ram_pages * 4096)
    assert not runs(xen)
    for name in ("no-finish", "no-destroy"):
        (xen.folder / "orders" / name).unlink()
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


def test_an_xl_that_is_never_still_and_never_done_is_given_up(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    """Each octet comes within the limit for one, so that one alone would bound nothing."""
    restorer = make(HASTY)
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not warm")
    xen.order("drip")
    guest.run(300)
    restorer.committed(guest.replica)
    feed = restorer._feed
    assert feed is not None
    until(lambda: feed.sent > 40 * 4096 and feed.receive.unread > 1 << 19, "not on its way")
    with pytest.raises(HypervisorError, match=r"xl has not taken in epoch 2 within \d"):
        feed.catch_up(longest_feed(HASTY, 0, 0))
    (xen.folder / "orders" / "drip").unlink()
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


def test_an_xl_that_hangs_in_the_kernel_is_told_and_its_domain_destroyed_all_the_same(
    xen: FakeDomains,
) -> None:
    xen.put(UUID, domid=3, name="guest--incoming", pauses=2)
    receive = XlReceive(xen, UUID, limits=HASTY)

    class Undead:
        """A process that SIGKILL does not end."""

        pid = 1 << 30  # nobody has it
        stdin = stdout = stderr = None

        def poll(self) -> None:
            return None

        def wait(self, timeout: float) -> int:
            raise subprocess.TimeoutExpired("xl", timeout)

    receive._process = Undead()  # type: ignore[assignment]
    with pytest.raises(HypervisorError, match="hangs in the kernel, and this host may have to be"):
        receive.abort()
    assert xen.get(UUID) is None
    receive.abort()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 0", ""),
        ("echo no such domain >&2; exit 3", "`xl destroy 7` failed: no such domain"),
        ("sleep 600", r"has not ended within 0\.3 s: killed"),
        ("sleep 600 & exec sleep 600", r"has not ended within 0\.3 s: killed"),
    ],
)
def test_a_destruction_has_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    program = tmp_path / "xl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    domains = incoming.Domains.__new__(incoming.Domains)  # of the toolstack's half only
    limit = 0.3 if "600" in script else 20.0
    if not says:
        domains.destroy(7, limit)
        return
    with pytest.raises(HypervisorError, match=says):
        domains.destroy(7, limit)


# ---------------------------------------------------------------- a warm domain that does not come about


def fails(xen: FakeDomains, guest: Guest, restorer: XlRestorer, clock: Clock) -> None:
    """One feed that ends, the time after it, and the commit that begins the next."""
    clock.now += RESTART
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer._feed is not None and not restorer._feed.alive, "the feed goes on")


def test_a_feed_that_fails_again_and_again_is_a_trouble_until_one_works(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    clock = Clock()
    restorer = make(PATIENT, clock)
    xen.order("fail", "Xen refuses the CPU policy")
    fails(xen, guest, restorer, clock)
    assert restorer.trouble() == "", "once may be a passing want"
    guest.run()
    restorer.committed(guest.replica)
    assert restorer.trouble() == ""
    fails(xen, guest, restorer, clock)
    for _ in range(2):  # also once its end was taken note of
        assert "no epoch in 2 tries" in restorer.trouble()
        assert "Xen refuses the CPU policy" in restorer.trouble()
        assert restorer.status()["trouble"] == restorer.trouble()
        guest.run()
        restorer.committed(guest.replica)
    (xen.folder / "orders" / "fail").unlink()
    clock.now += RESTART
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not warm")
    assert restorer.trouble() == ""
    assert restorer.status()["trouble"] is None


def test_feeds_that_die_later_are_no_trouble(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    """Each was warm for a while: an activation at any such moment would have been quick."""
    clock = Clock()
    restorer = make(PATIENT, clock)
    for _ in range(3):
        clock.now += RESTART
        guest.run()
        restorer.committed(guest.replica)
        until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not warm")
        xen.order("die-at-epoch", "2")
        guest.run()
        restorer.committed(guest.replica)
        until(lambda: restorer._feed is not None and not restorer._feed.alive, "it lives")
        (xen.folder / "orders" / "die-at-epoch").unlink()
        guest.run()
        restorer.committed(guest.replica)
        assert restorer.trouble() == ""


def test_another_description_is_another_matter(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    clock = Clock()
    restorer = make(PATIENT, clock)
    xen.order("fail", "Xen refuses the CPU policy")
    for _ in range(2):
        fails(xen, guest, restorer, clock)
        restorer.committed(guest.replica)  # its end is taken note of
    assert restorer.trouble()
    restorer.begin(INFO, b"another")
    assert restorer.trouble() == ""
