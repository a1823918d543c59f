"""A second engine for a guest: whose pages the secondary has already, or which has rebooted."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from pair import LIMIT, MS, pair_in

from checkpointd import native, node
from checkpointd.errors import NoSuchDomainError
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.port import EndReason
from checkpointd.primary import service
from checkpointd.primary.epoch import EpochTaker
from checkpointd.primary.watchdog import Watchdog
from checkpointd.wire import messages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointd.native import Outcome
    from checkpointd.wire.frames import Header, Octets

ARENA_PAGES = 512  # the whole guest


def test_an_idle_guest_is_protected_again_without_sending_a_page(tmp_path: Path) -> None:
    """Every page is known, so no live part comes to be: its dirty bits must not stay in the arena."""
    with pair_in(tmp_path) as pair:
        guest = pair.guest()
        standby = pair.standby(silence=int(LIMIT) * 1000 * MS)  # no time without an engine is long
        first = pair.engine(guest, standby)
        first.wait("protected")
        first.committed()
        first.service._events.put(RuntimeError("the engine dies"))
        first.thread.join()
        assert first.service.status()["role"] == "primary"  # the HTTP thread asks, and ends later
        first.stop()
        second = pair.engine(guest, standby)
        second.wait("protected")
        second.committed()
        assert standby.replica(guest).equal
        guest.client("after").set("k", "v")
        second.committed()
        assert standby.replica(guest).equal


def test_a_pause_voids_what_is_known(tmp_path: Path) -> None:
    """Else a page that changes, is staged by the pause, and changes back would be left out of a later round, while the
    secondary has the version in between.
    """
    with pair_in(tmp_path) as pair:
        guest = pair.guest()
        hypervisor = EmbeddedHypervisor("primary", tmp_path / "run")
        with closing(hypervisor.attach(guest.info.domid)) as domain:
            nr_pfns = domain.info.nr_pfns
            taker = EpochTaker(
                domain.table,
                nr_pfns,
                native.DigestKey(bytes(32)),
                arenas=1,
                arena_pages=ARENA_PAGES,
                mapping_budget=64 << 20,
                audit_pages=0,
                suspend_timeout_ns=int(LIMIT * 1e9),
                detect_zero=True,
            )
            with closing(taker):
                domain.enable_log()
                taker.dirty.begin_anew()
                taker.known = bytearray(nr_pfns * native.DIGEST_SIZE)
                assert taker.take(0, close_output=False).status == 0
                assert taker.known is None


def test_a_reboot_is_followed_to_the_new_domain(tmp_path: Path) -> None:
    """Which is not there yet when the old one ends."""
    with pair_in(tmp_path) as pair:
        guest = pair.guest()
        standby = pair.standby(silence=int(LIMIT) * 1000 * MS)
        engine = pair.engine(guest, standby)
        engine.wait("protected")
        guest.transport().send(b"c 1 reboot")
        engine.thread.join()
        assert engine.thread.ending is not None
        assert engine.thread.ending.guest is EndReason.REBOOT
        engine.stop()
        found = node._after_reboot(EmbeddedHypervisor("primary", tmp_path / "run"), guest.info)
        assert (found.uuid, found.domid) == (guest.info.uuid, guest.info.domid + 1)


def test_a_reboot_that_comes_to_nothing_is_said(tmp_path: Path) -> None:
    with pair_in(tmp_path) as pair:
        guest = pair.guest()  # it has not rebooted
        with pytest.raises(NoSuchDomainError, match="said that it reboots"):
            node._after_reboot(EmbeddedHypervisor("primary", tmp_path / "run"), guest.info, 0.1)


def test_words_of_a_session_that_was_given_up_are_not_about_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They wait in the loop's queue while it is busy: one failed audit, said twice, must not end two sessions, and a
    welcome of the old session must not begin the copy in the new one.
    """
    with pair_in(tmp_path) as pair:
        guest = pair.guest()
        standby = pair.standby()
        engine = pair.engine(guest, standby)
        engine.wait("protected")
        service = engine.service
        busy, go = threading.Event(), threading.Event()
        take = service._taker.take

        def held(index: int, *, close_output: bool, stay: bool = False) -> Outcome:
            busy.set()
            assert go.wait(LIMIT)
            return take(index, close_output=close_output, stay=stay)

        service._taker.take = held  # type: ignore[method-assign]  # keeps the loop busy
        assert busy.wait(LIMIT)
        me = standby.service._around.identity
        welcome = messages.Welcome(service._session.number, 1, 1, 1, False, 1 << 30, me)
        for word in (messages.FullCopyWanted("audit"), welcome, messages.FullCopyWanted("audit")):
            service._deliver(word)
        go.set()
        engine.wait("connecting", "syncing")
        engine.wait("protected")
        engine.committed()
        assert sum("retired its replica" in record.message for record in caplog.records) == 1
        assert standby.replica(guest).equal


def test_an_arena_that_just_does_not_fit_the_secondary_is_refused_at_once(tmp_path: Path) -> None:
    """With what goes with its pages a part of it is larger than all that the secondary takes, each time it is sent."""
    with pair_in(tmp_path) as pair:
        guest = pair.guest(memory=8 << 20)
        standby = pair.standby(epoch_memory=4 << 20)
        engine = pair.engine(guest, standby, arena=4 << 20, zero_pages=False)
        engine.thread.join()
        assert engine.thread.ending is not None
        assert "--epoch-memory" in engine.thread.ending.text


def test_what_ends_the_shipper_is_what_the_engine_ends_with(tmp_path: Path) -> None:
    """Its traceback holds frames, so their arena cannot be freed yet: that must not be said instead."""
    with pair_in(tmp_path) as pair:
        guest = pair.guest()
        standby = pair.standby(silence=int(LIMIT) * 1000 * MS)
        engine = pair.engine(guest, standby)
        engine.wait("protected")

        def broken(header: Header, payload: Octets = b"", *, timeout_s: float) -> None:
            raise ValueError("broken")

        engine.gate.send = broken  # type: ignore[method-assign]  # as no link should be
        guest.transport().send(b"one 1 set k v")
        engine.thread.join()
        assert isinstance(engine.thread.error, ValueError)
        engine.thread.error = None


def test_the_watchdog_waits_longer_than_an_idle_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which turns once a heartbeat: with a rare one and a short --give-up-after each idle engine was killed."""
    limits: list[float] = []

    class Watched(Watchdog):
        def __init__(self, limit: float, progress: Callable[[], int]) -> None:
            limits.append(limit)
            super().__init__(limit, progress)

    monkeypatch.setattr(service, "Watchdog", Watched)
    second = 1000 * MS
    with pair_in(tmp_path) as pair:
        standby = pair.standby()
        engine = pair.engine(
            pair.guest(), standby, heartbeat=3 * second, standby_timeout=9 * second,
            give_up_after=second, suspend_timeout=second,
        )  # fmt: skip
        engine.wait("protected")
    assert limits[0] > 3
