"""Live rounds: stages while the guest runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_hypervisor import KEY, NR_PFNS, XTAB, ZERO, staged, text, words_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_hypervisor import Guest


def test_rounds_go_on_from_the_cursor_until_nothing_is_left(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest(capacity=300)
    guest.pending.fill()
    for pfn in range(NR_PFNS):
        guest.write(pfn, text(pfn) if pfn % 10 else ZERO)
    replica: dict[int, bytes] = {}
    cursor, rounds, left = 1000, 0, NR_PFNS
    while left:
        outcome = guest.live_round(cursor)
        assert outcome.status == 0
        assert outcome.closed_output == outcome.pause_ns == 0
        assert outcome.dirty == left
        left = outcome.remaining
        assert set(guest.carried).isdisjoint(guest.pending)
        assert len(guest.owned()) == outcome.dirty
        replica |= staged(guest.arena)
        replica |= dict.fromkeys(words_of(guest.arena.zero_pfns), ZERO)
        guest.carried.clear()
        cursor, rounds = outcome.cursor, rounds + 1
    assert replica == {pfn: guest.read(pfn) for pfn in range(NR_PFNS)}
    assert rounds == -(-NR_PFNS * 9 // 10 // 300)
    assert "S" not in guest.journal()


def test_a_round_begins_at_its_cursor_and_goes_round(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(capacity=3)
    for pfn in (1, 2, 700, 701):
        guest.write(pfn, text(pfn))
    outcome = guest.live_round(700)
    assert list(staged(guest.arena)) == [700, 701, 1]
    assert (outcome.cursor, outcome.remaining) == (2, 1)
    guest.carried.clear()
    assert guest.live_round(outcome.cursor).pages == 1
    assert list(staged(guest.arena)) == [2]


def test_a_round_of_gone_pages_stops_when_their_list_is_full(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest(capacity=3)
    for pfn in range(100, 108):
        guest.lib.fake_hole(guest.handle, pfn)
    gone: list[int] = []
    for left in (5, 2, 0):
        assert guest.live_round().remaining == left
        gone += words_of(guest.arena.gone_pfns)
        guest.carried.clear()
    assert gone == [XTAB << 60 | pfn for pfn in range(100, 108)]


def test_pages_that_the_other_side_has_are_left_out(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    for pfn in (10, 11, 12):
        guest.write(pfn, text(pfn))
    known = bytearray(16 * NR_PFNS)
    known[160:176] = KEY.digest(text(10))
    known[176:192] = KEY.digest(text(11, 1))  # it has another version of this one
    outcome = guest.live_round(key=KEY, known=known)
    assert (outcome.known, outcome.pages, outcome.remaining) == (1, 2, 0)
    assert staged(guest.arena) == {11: text(11), 12: text(12)}
    guest.carried.clear()
    guest.write(10, text(10, 2))  # the log is on: a later change shows
    guest.pause()
    assert staged(guest.arena) == {10: text(10, 2)}
    with pytest.raises((TypeError, BufferError)):
        guest.live_round(key=KEY, known=bytes(known))  # read-only: it could not be forgotten
    with pytest.raises(ValueError, match="octets of digests"):
        guest.live_round(key=KEY, known=known[:-1])
    with pytest.raises(ValueError, match="key"):
        guest.live_round(known=known)


@pytest.mark.parametrize("between", ["data", "zero", "gone"])
def test_a_known_page_that_changes_there_and_back_is_sent_both_times(
    make_guest: Callable[..., Guest], between: str
) -> None:
    guest = make_guest()
    known = bytearray(16 * NR_PFNS)
    known[160:176] = KEY.digest(text(10))
    if between == "gone":
        guest.lib.fake_hole(guest.handle, 10)
    else:
        guest.write(10, text(10, 1) if between == "data" else ZERO)
    assert guest.live_round(key=KEY, known=known).known == 0
    guest.carried.clear()
    guest.lib.fake_swap(guest.handle, 10)
    guest.write(10, text(10))
    assert guest.live_round(key=KEY, known=known).known == 0
    assert staged(guest.arena) == {10: text(10)}


@pytest.mark.parametrize("change", ["swap", "hole"])
def test_a_frame_that_changes_under_a_round_waits_for_the_next(
    make_guest: Callable[..., Guest], change: str
) -> None:
    """The guest balloons between types() and the copy: a hole would be a fault, an old frame a lie."""
    guest = make_guest()
    for pfn in (5, 6, 700):
        guest.write(pfn, text(pfn))
    guest.lib.fake_after_types(
        guest.handle, 6 if change == "swap" else -1, 6 if change == "hole" else -1
    )
    outcome = guest.live_round()
    assert outcome.status == 0
    assert staged(guest.arena) == {700: text(700)}  # its whole extent waits
    assert (set(guest.pending), set(guest.carried)) == ({5, 6}, {700})
    guest.carried.clear()
    if change == "swap":
        guest.write(6, text(6, 1))
    assert guest.live_round().status == 0
    assert staged(guest.arena) == {5: text(5)} | ({6: text(6, 1)} if change == "swap" else {})
    assert outcome.remaining == 2


@pytest.mark.parametrize("change", ["swap", "hole"])
def test_a_frame_that_changes_before_its_extent_is_reached_waits_too(
    make_guest: Callable[..., Guest], change: str
) -> None:
    """One call of types() is about several extents. The change is told when the first of them is looked at, so the
    second, mapped after it, has the hole and no news of it.
    """
    guest = make_guest()
    for pfn in (5, 700, 701):
        guest.write(pfn, text(pfn))
    guest.lib.fake_after_types(
        guest.handle, 701 if change == "swap" else -1, 701 if change == "hole" else -1
    )
    assert guest.live_round().status == 0
    assert staged(guest.arena) == {5: text(5)}
    assert (set(guest.pending), set(guest.carried)) == ({700, 701}, {5})
