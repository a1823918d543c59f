"""The audit: clean pages in turn, with their digests (invariant 10)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from fake_hypervisor import BLOCK, BLOCKS, EXTENT, KEY, NR_PFNS, PAGE, staged, text

from checkpointd.native import Bitmap, Mappings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_hypervisor import Guest

    from checkpointd.native import Arena


def audited(arena: Arena) -> dict[int, bytes]:
    return dict(struct.iter_unpack("<Q16s", arena.audit))


def test_the_audit_takes_clean_pages_in_turn(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(audit_pages=4)
    pages = [0, 63, 64, 200, 600, 601, 1200, NR_PFNS - 1]
    for pfn in pages:
        guest.write(pfn, text(pfn))
    guest.lib.fake_hole(guest.handle, 300)
    first = guest.pause()
    assert (first.audited, first.cursor) == (0, 0)  # nothing is clean
    cursor = 0
    seen: list[int] = []
    for _ in range(4):
        guest.carried.clear()
        guest.write(64, text(64, 1))
        outcome = guest.pause(audit_cursor=cursor)
        cursor = outcome.cursor
        found = audited(guest.arena)
        assert len(found) == outcome.audited == 4
        assert all(digest == KEY.digest(text(pfn)) for pfn, digest in found.items())
        seen += found
    clean = [pfn for pfn in pages if pfn != 64]  # the gone page is not audited, nor the dirty one
    assert seen == (clean * 3)[:16]


@pytest.mark.parametrize("first", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 7, BLOCKS - 1])
def test_the_audit_passes_over_blocks_of_holes_and_over_nothing_else(
    make_guest: Callable[..., Guest], first: int
) -> None:
    """Wherever it begins: clean pages at both ends of blocks, and a block and more without any."""
    guest = make_guest(nr_pfns=BLOCKS, audit_pages=3)
    pages = [0, 63, BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 64, 3 * BLOCK - 1, 3 * BLOCK, BLOCKS - 1]
    for pfn in pages:
        guest.write(pfn, text(pfn))
    guest.pause()
    cursor = first
    seen: list[int] = []
    for _ in range(4):
        guest.carried.clear()
        cursor = guest.pause(audit_cursor=cursor).cursor
        seen += audited(guest.arena)
    turn = [pfn for pfn in pages if pfn >= first] + [pfn for pfn in pages if pfn < first]
    assert seen == (turn * 2)[:12]


def test_dirt_of_every_block_is_harvested(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(nr_pfns=BLOCKS)
    pages = [5, BLOCK, 3 * BLOCK - 1, BLOCKS - 1]
    guest.pause()
    guest.carried.clear()
    for pfn in pages:
        guest.write(pfn, text(pfn))
    assert guest.pause().dirty == len(pages)
    assert list(guest.carried) == pages
    guest.carried.clear()
    guest.lib.fake_swap(guest.handle, 2 * BLOCK)
    guest.lib.fake_swap(guest.handle, BLOCKS - 1)
    guest.pause()
    assert set(guest.carried) == {2 * BLOCK, BLOCKS - 1}


def test_the_audit_may_be_restricted(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    for pfn in range(10):
        guest.write(pfn, text(pfn))
    guest.pause()
    guest.carried.clear()
    some = Bitmap(NR_PFNS)
    some.add(3)
    some.add(8)
    some.add(700)  # never staged: not audited
    assert guest.pause(audit=some, audit_cursor=4).audited == 2
    assert list(audited(guest.arena)) == [8, 3]


def test_the_audit_spends_nothing_on_pages_that_have_gone(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest(audit_pages=1)
    guest.write(5, text(5))
    guest.write(6, text(6))
    guest.pause()
    guest.lib.fake_hole(guest.handle, 5)
    for _ in range(2):
        guest.carried.clear()
        guest.pause()
    assert list(audited(guest.arena)) == [6]


def test_the_audit_touches_nothing_that_went_unreported(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.write(5, text(5))
    guest.pause()
    guest.carried.clear()
    guest.lib.fake_hole(guest.handle, 5)
    thief = Mappings(guest.table, NR_PFNS, EXTENT * PAGE)
    assert thief.refresh() == 1
    thief.close()
    guest.mappings.invalidate_all()  # mapped again it would be a hole
    outcome = guest.pause()
    assert (outcome.status, outcome.audited) == (0, 0)


def test_the_audit_finds_dirt_that_nobody_reported(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.write(5, text(5))
    guest.pause()
    replica = staged(guest.arena)
    guest.carried.clear()
    guest.ffi.memmove(guest.lib.fake_page(guest.handle, 5), b"unseen", 6)
    assert guest.pause().pages == 0
    assert audited(guest.arena)[5] != KEY.digest(replica[5])
