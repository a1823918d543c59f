"""A pause that copies beforehand: what the guest writes meanwhile is copied again, and what comes last counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_hypervisor import KEY, NR_PFNS, PAGE, SECOND, XTAB, ZERO, staged, text, words_of

from checkpointd import native
from checkpointd.native import TOO_MANY, Bitmap
from checkpointd.primary.epoch import PRECOPY_LEAST, EpochTaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fake_hypervisor import Guest


def replica(guest: Guest) -> dict[int, bytes]:
    """What the secondary makes of the arena: pages, zeros, gone, in this order."""
    image, populated = bytearray(NR_PFNS * PAGE), Bitmap(NR_PFNS)
    address = native.address_of(image)
    for record in guest.arena.records:
        native.scatter(address, NR_PFNS, populated, record)
    native.zero_pages(address, NR_PFNS, populated, guest.arena.zero_pfns)
    native.drop_pages(address, NR_PFNS, populated, guest.arena.gone_pfns)
    return {pfn: bytes(image[pfn * PAGE : (pfn + 1) * PAGE]) for pfn in populated}


def filled(value: int) -> bytes:
    return value.to_bytes(8, "little") * (PAGE // 8)


def test_only_what_was_written_since_is_copied_in_the_pause(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    for pfn in (1, 2, 3, 700):
        guest.write(pfn, text(pfn))
    guest.at_suspend("w", 2, 7)
    guest.at_suspend("w", 900, 8)
    outcome = guest.precopied_pause()
    assert (outcome.status, outcome.precopied, outcome.twice, outcome.pages) == (0, 4, 1, 6)
    assert outcome.dirty == 5
    assert set(guest.carried) == {1, 2, 3, 700, 900}
    assert not guest.pending
    words = [word for record in guest.arena.records for word in record_words(record)]
    assert words == [1, 2, 3, 700, 2, 900]
    assert replica(guest) == {pfn: guest.read(pfn) for pfn in (1, 2, 3, 700, 900)}
    journal = guest.journal()
    assert journal.index("C") < journal.index("m") < journal.index("S") < journal.index("F")


def record_words(record: memoryview) -> list[int]:
    octets = record.cast("B")
    count = int.from_bytes(octets[8:12], "little")
    return words_of(octets[16 : 16 + 8 * count])


@pytest.mark.parametrize(("what", "value"), [("w", 5), ("w", 0), ("h", 0), ("s", 0)])
def test_a_page_that_changes_its_kind_is_what_it_was_last(
    make_guest: Callable[..., Guest], what: str, value: int
) -> None:
    """From data, zero or nothing before the pause to data, zero, nothing or another frame in it."""
    guest = make_guest()
    for pfn in (10, 11, 12):
        guest.write(pfn, text(pfn))
    assert guest.pause().status == 0
    guest.carried.clear()
    guest.write(10, text(10, 1))
    guest.write(11, ZERO)
    guest.lib.fake_hole(guest.handle, 12)
    for pfn in (10, 11, 12):
        guest.at_suspend(what, pfn, value)
    outcome = guest.precopied_pause()
    assert outcome.status == 0
    found = replica(guest)
    assert {pfn: found.get(pfn) for pfn in (10, 11, 12)} == {
        pfn: guest.read(pfn) for pfn in (10, 11, 12)
    }


def test_holes_and_zeros_wait_for_the_pause(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    for pfn in (10, 11):
        guest.write(pfn, text(pfn))
    assert guest.pause().status == 0
    guest.carried.clear()
    guest.write(10, ZERO)
    guest.lib.fake_hole(guest.handle, 11)
    guest.write(12, text(12))
    guest.at_suspend("w", 10, 3)
    outcome = guest.precopied_pause()
    assert (outcome.precopied, outcome.pages, outcome.zeros, outcome.gone) == (1, 2, 0, 1)
    assert staged(guest.arena) == {10: filled(3), 12: text(12)}
    assert words_of(guest.arena.gone_pfns) == [XTAB << 60 | 11]


def test_more_than_half_an_arena_is_not_copied_beforehand(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest(capacity=10)
    for pfn in range(6):
        guest.write(pfn, text(pfn))
    outcome = guest.precopied_pause()
    assert (outcome.status, outcome.precopied, outcome.pages) == (0, 0, 6)


def test_copies_give_way_to_what_the_pause_must_stage(make_guest: Callable[..., Guest]) -> None:
    """Five before, eight in the pause: thirteen entries, yet eight pages, for which the arena has room."""
    guest = make_guest(capacity=10)
    for pfn in range(5):
        guest.write(pfn, text(pfn))
    for pfn in range(8):
        guest.at_suspend("w", pfn, 1 + pfn)
    outcome = guest.precopied_pause()
    assert (outcome.status, outcome.precopied, outcome.pages, outcome.dirty) == (0, 0, 8, 8)
    assert replica(guest) == {pfn: filled(1 + pfn) for pfn in range(8)}


def test_what_does_not_fit_leaves_nothing_behind(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(capacity=10)
    for pfn in range(5):
        guest.write(pfn, text(pfn))
    for pfn in range(20, 26):
        guest.at_suspend("w", pfn, 1)
    outcome = guest.precopied_pause()
    assert (outcome.status, outcome.dirty, outcome.pages, outcome.precopied) == (TOO_MANY, 11, 0, 0)
    assert set(guest.pending) == {*range(5), *range(20, 26)}
    assert not guest.carried
    assert not guest.lib.fake_suspended(guest.handle)


def test_precopied_pages_are_not_audited(make_guest: Callable[..., Guest]) -> None:
    """They are dirty, so that the other side cannot have them yet."""
    guest = make_guest(audit_pages=8)
    for pfn in (1, 2):
        guest.write(pfn, text(pfn))
    assert guest.pause().status == 0
    guest.carried.clear()
    guest.write(1, text(1, 1))
    assert guest.precopied_pause().audited == 1


@pytest.mark.parametrize("change", ["swap", "hole"])
@pytest.mark.parametrize("changed", [6, 701], ids=["first extent", "later extent"])
def test_a_frame_that_changes_under_it_waits_for_the_pause(
    make_guest: Callable[..., Guest], change: str, changed: int
) -> None:
    """The guest balloons between types() and the copy: a hole would be a fault, an old frame a lie."""
    guest = make_guest()
    for pfn in (5, 6, 700, 701):
        guest.write(pfn, text(pfn))
    where = [changed if change == how else -1 for how in ("swap", "hole")]
    guest.lib.fake_after_types(guest.handle, *where)
    outcome = guest.precopied_pause()
    assert outcome.status == 0
    assert outcome.precopied == 2  # its whole extent waits, the other does not
    assert replica(guest) == {
        pfn: page for pfn in (5, 6, 700, 701) if (page := guest.read(pfn)) is not None
    }


def test_a_failed_one_lets_the_guest_run(make_guest: Callable[..., Guest]) -> None:
    """It may have stopped late, for a request that was given up: resume() is what looks after that."""
    guest = make_guest()
    guest.write(5, text(5))
    guest.fail("types")
    assert guest.precopied_pause().status < 0
    journal = guest.journal()
    assert "S" not in journal
    assert journal.endswith("R")


def test_what_changed_meanwhile_is_pending_after_a_failure(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    for pfn in (5, 700):
        guest.write(pfn, text(pfn))
    guest.lib.fake_after_types(guest.handle, 900, -1)
    guest.fail("suspend")
    assert guest.precopied_pause().status < 0
    assert set(guest.pending) == {5, 700, 900}


# When it is made.


class Taker:
    """An EpochTaker of one arena, and the guest's pages to be written."""

    def __init__(self, guest: Guest, *, arena_pages: int, precopy: bool = True) -> None:
        self.guest = guest
        self.taker = EpochTaker(
            guest.table, guest.nr_pfns, KEY, arenas=1, arena_pages=arena_pages, mapping_budget=64 * 512 * PAGE,
            audit_pages=0, suspend_timeout_ns=SECOND, detect_zero=True, precopy=precopy,
        )  # fmt: skip

    def epoch(self, pages: int) -> bool:
        """An epoch of so many pages: was there a pre-copy?"""
        for pfn in range(pages):
            self.guest.write(pfn, text(pfn))
        outcome = self.taker.take(0, close_output=False)
        assert outcome.status == 0
        self.taker.dirty.settle(0)
        return outcome.precopy_ns > 0

    def live_round(self) -> None:
        assert self.taker.live_round(0).status == 0
        self.taker.dirty.keep(0)


@pytest.fixture
def taker(make_guest: Callable[..., Guest]) -> Iterator[Callable[..., Taker]]:
    made: list[Taker] = []

    def make(arena_pages: int, *, precopy: bool = True) -> Taker:
        made.append(Taker(make_guest(), arena_pages=arena_pages, precopy=precopy))
        return made[-1]

    yield make
    for each in made:
        each.taker.close()


def test_it_is_made_where_it_pays(taker: Callable[..., Taker]) -> None:
    """By what the last two epochs had: one short epoch says little of the next one."""
    it = taker(1024)
    large, small = PRECOPY_LEAST, PRECOPY_LEAST - 1
    assert [it.epoch(n) for n in (large, large, small, small, small)] == [
        False, True, True, True, False,
    ]  # fmt: skip


def test_it_is_made_before_the_first_pause_of_a_copy(taker: Callable[..., Taker]) -> None:
    it = taker(NR_PFNS - PRECOPY_LEAST)
    it.taker.dirty.begin_anew()
    it.live_round()
    assert it.epoch(10), "what the arena did not take is left"


def test_it_is_not_made_where_it_would_copy_nothing(taker: Callable[..., Taker]) -> None:
    it = taker(1000)
    assert [it.epoch(501), it.epoch(501)] == [False, False]


def test_it_is_not_made_where_nobody_wants_it(taker: Callable[..., Taker]) -> None:
    it = taker(1024, precopy=False)
    assert [it.epoch(400), it.epoch(400)] == [False, False]
