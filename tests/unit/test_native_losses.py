"""No bit is ever lost (invariant 3), and no guest left suspended (invariant 5), whichever call fails."""

from __future__ import annotations

import errno
import mmap
import random
from typing import TYPE_CHECKING

import pytest
from fake_hypervisor import BLOCKS, CALLS, EXTENT, NR_PFNS, PAGE, ZERO, is_empty, staged, text

from checkpointd import native
from checkpointd.native import Arena, Bitmap

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_hypervisor import Guest

    from checkpointd.native import Outcome


def scenario(make_guest: Callable[..., Guest]) -> tuple[Guest, set[int]]:
    """A guest with a warm cache under pressure, changed frames, and dirt of every kind."""
    guest = make_guest(budget=2, audit_pages=3)
    for pfn in range(0, NR_PFNS, 150):
        guest.write(pfn, text(pfn))
    assert guest.pause().status == 0
    guest.carried.clear()
    dirty = {1, 2, 300, 511, 512, 1030, 1535, NR_PFNS - 1}
    for pfn in dirty:
        guest.write(pfn, ZERO if pfn == 300 else text(pfn, 1))
    guest.lib.fake_swap(guest.handle, 150)
    guest.write(150, text(150, 2))
    guest.lib.fake_hole(guest.handle, 450)
    guest.pending.add(77)  # of an epoch that failed before
    guest.write(77, text(77))
    guest.journal()
    return guest, dirty | {150, 450, 77}


def points(make_guest: Callable[..., Guest], how: str) -> list[tuple[str, int]]:
    """Every passage of every function in the scenario."""
    guest, _ = scenario(make_guest)
    before = guest.passages()
    assert getattr(guest, how)().status == 0
    return [
        (call, at + 1) for call, n in guest.passages().items() for at in range(n - before[call])
    ]


@pytest.mark.parametrize("how", ["pause", "live_round"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_failure_of_any_call_keeps_every_dirty_bit(
    make_guest: Callable[..., Guest], how: str, late: bool
) -> None:
    where = points(make_guest, how)
    expected = {"pause": set(CALLS), "live_round": {"harvest", "p2m", "types", "map", "unmap"}}
    assert {call for call, _ in where} == expected[how]
    for call, at in where:
        if call == "unmap" and late:
            continue  # what has been unmapped cannot fail to be
        guest, dirty = scenario(make_guest)
        guest.fail(call, at, late=late)
        outcome = getattr(guest, how)()
        journal = guest.journal()
        place = f"{call} number {at}"
        if how == "pause":
            assert journal.count("R") == 1, place
            assert journal.endswith("R"), place
        if call == "resume":
            assert (outcome.status, outcome.resume_status) == (0, -errno.EIO), place
            assert outcome.step == "resume"
            assert set(guest.carried) == dirty, "the epoch is whole all the same"
            guest.pending.update(guest.carried)
            guest.carried.clear()
        else:
            assert outcome.status == -errno.EIO, place
            assert outcome.fault, place
            assert is_empty(guest.arena), place
            assert not guest.carried, place
            in_log = {p for p in range(NR_PFNS) if guest.lib.fake_is_dirty(guest.handle, p)}
            if call in ("harvest", "p2m"):  # the log is lost, so every page must count as dirty
                assert guest.pending.count() == NR_PFNS, place
            elif call == "suspend":  # nothing was asked: the log has it all still
                assert set(guest.pending) == {77}
                assert in_log | {77, 450} == dirty
            else:
                assert set(guest.pending) == dirty, place
        guest.heal()
        guest.arena.close()
        guest.arena = Arena(NR_PFNS, NR_PFNS, 4096, 3)
        assert guest.pause().status == 0, place
        assert dirty <= set(guest.carried), place
        for pfn in dirty - {450, 300}:
            assert staged(guest.arena)[pfn] == guest.read(pfn), place


@pytest.mark.parametrize("call", ["harvest", "p2m"])
def test_again_means_that_nothing_was_lost(make_guest: Callable[..., Guest], call: str) -> None:
    guest, dirty = scenario(make_guest)
    guest.fail(call, error=errno.EAGAIN)
    assert guest.pause().status == -errno.EAGAIN
    assert guest.owned() < dirty
    assert guest.pause().status == 0
    assert set(guest.carried) == dirty


def test_a_failed_suspend_that_stopped_the_guest_is_undone(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    guest.fail("suspend", late=True)
    assert guest.pause().step == "suspend"
    assert not guest.lib.fake_suspended(guest.handle)


# All of it together: whatever happens, in the end the replica is the guest.


@pytest.mark.parametrize("seed", range(12))
def test_a_replica_follows_its_guest_through_any_misfortune(
    make_guest: Callable[..., Guest], seed: int
) -> None:
    dice = random.Random(seed)
    nr_pfns = BLOCKS if seed % 4 == 0 else 2 * EXTENT + 40
    guest = make_guest(nr_pfns=nr_pfns, budget=dice.choice([1, 2, 9]), capacity=nr_pfns // 6)
    image, populated = mmap.mmap(-1, nr_pfns * PAGE), Bitmap(nr_pfns)
    address = native.address_of(image)
    cursor = 0
    guest.pending.fill()  # a new engine trusts no log

    def apply() -> None:
        for record in guest.arena.records:
            native.scatter(address, nr_pfns, populated, record)
        native.zero_pages(address, nr_pfns, populated, guest.arena.zero_pfns)
        native.drop_pages(address, nr_pfns, populated, guest.arena.gone_pfns)
        guest.carried.clear()

    def step(*, calm: bool) -> Outcome:
        nonlocal cursor
        if not calm and dice.random() < 0.4:
            call = dice.choice([c for c in CALLS if c != "resume"])
            late = dice.random() < 0.5 and call != "unmap"
            guest.fail(call, dice.randrange(1, 4), late=late, error=dice.choice([5, errno.EAGAIN]))
            if call in ("harvest", "p2m") and late:
                guest.fail(
                    call, 1, late=True
                )  # not -EAGAIN, which would promise that nothing changed
        outcome = guest.pause() if calm or dice.random() < 0.6 else guest.live_round(cursor)
        guest.heal()
        if outcome.status == native.TOO_MANY:
            outcome = guest.live_round(cursor)
        if outcome.status != 0:
            assert is_empty(guest.arena)
            return outcome
        cursor = outcome.cursor
        if not calm and dice.random() < 0.3:  # the epoch is lost on its way
            guest.pending.update(guest.carried)
            guest.carried.clear()
        else:
            apply()
        return outcome

    for epoch in range(40):
        for _ in range(dice.randrange(60)):
            pfn = dice.randrange(nr_pfns)
            if dice.random() < 0.05:
                guest.lib.fake_hole(guest.handle, pfn)
            elif dice.random() < 0.1 or guest.read(pfn) is None:
                guest.lib.fake_swap(guest.handle, pfn)
            else:
                guest.write(pfn, dice.choice([ZERO, text(pfn, epoch)]))
        step(calm=False)
    while (outcome := step(calm=True)).closed_output == 0:  # until a pause takes all that is left
        assert outcome.status == 0
    for pfn in range(nr_pfns):
        page = guest.read(pfn)
        assert (pfn in populated) == (page is not None)
        assert image[pfn * PAGE : (pfn + 1) * PAGE] == (page or ZERO)
