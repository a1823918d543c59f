"""The mapping cache: a page is read through a mapping that shows that page (invariant 8)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from fake_hypervisor import EXTENT, KEY, NR_PFNS, PAGE, SECOND, XTAB, staged, text, words_of

from checkpointd import native
from checkpointd.errors import HostLostError, HypervisorError
from checkpointd.native import Bitmap, Mappings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_hypervisor import Guest


def ballooned(guest: Guest) -> None:
    """Page 20 is read through the cache, then gets another frame with other contents."""
    guest.write(20, text(20, 1))
    assert guest.pause().status == 0
    assert staged(guest.arena) == {20: text(20, 1)}
    guest.carried.clear()
    guest.lib.fake_swap(guest.handle, 20)
    guest.write(20, text(20, 2))


def test_a_page_with_another_frame_is_read_from_that_frame(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    ballooned(guest)
    assert guest.pause().status == 0
    assert staged(guest.arena) == {20: text(20, 2)}
    assert guest.mappings.stats().invalidated == 1
    guest.carried.clear()
    guest.lib.fake_swap(guest.handle, 700)
    assert guest.pause().dirty == 1, "news is told once"


def test_a_hole_is_told_only_where_the_replica_may_have_a_page(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    digests = bytearray(16 * NR_PFNS)
    digests[16 * 8] = 1
    guest.mappings.replica_has(digests)
    guest.write(10, text(10))
    for pfn in (7, 8):
        guest.lib.fake_hole(guest.handle, pfn)
    outcome = guest.pause()
    assert (outcome.pages, outcome.gone) == (1, 1)
    assert words_of(guest.arena.gone_pfns) == [XTAB << 60 | 8]
    guest.carried.clear()
    guest.lib.fake_hole(guest.handle, 10)
    guest.fail("context")
    assert guest.pause().status < 0, "what it told is not known to have arrived"
    guest.heal()
    guest.lib.fake_hole(guest.handle, 10)
    assert guest.pause().gone == 1
    guest.carried.clear()
    guest.mappings.replica_has(None)
    guest.lib.fake_hole(guest.handle, 10)
    assert guest.pause().gone == 0
    with pytest.raises(ValueError, match="16 octets of digests"):
        guest.mappings.replica_has(bytes(16))


def test_planted_a_cache_without_invalidation_reads_the_old_frame(
    make_guest: Callable[..., Guest],
) -> None:
    """The test above can fail: without the news of the change, the old contents are what one gets."""
    guest = make_guest()
    ballooned(guest)
    thief = Mappings(guest.table, NR_PFNS, EXTENT * PAGE)  # another cache takes the news away
    assert thief.refresh() == 1
    thief.close()
    assert guest.pause().status == 0
    assert staged(guest.arena) == {20: text(20, 1)}


def test_refresh_gives_frames_back_at_once_and_dirties_at_the_next_pause(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    guest.write(20, text(20))
    guest.pause()
    guest.carried.clear()
    guest.lib.fake_hole(guest.handle, 20)
    assert guest.mappings.refresh() == 1
    assert guest.lib.fake_mapped(guest.handle) == 0
    assert guest.mappings.stats().mapped_bytes == 0
    assert guest.mappings.refresh() == 0
    assert guest.pause().gone == 1
    assert words_of(guest.arena.gone_pfns) == [XTAB << 60 | 20]


def test_extents_are_mapped_once_and_kept(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    for epoch in range(5):
        for pfn in (3, 600, NR_PFNS - 1):
            guest.write(pfn, text(pfn, epoch))
        assert guest.pause().status == 0
        assert staged(guest.arena) == {p: text(p, epoch) for p in (3, 600, NR_PFNS - 1)}
        guest.carried.clear()
    stats = guest.mappings.stats()
    assert (stats.misses, stats.evicted, stats.invalidated) == (3, 0, 0)
    assert stats.hits >= 12
    assert stats.mapped_extents == 3
    assert stats.mapped_bytes == (2 * EXTENT + 100) * PAGE
    guest.mappings.invalidate_all()
    assert guest.mappings.stats().mapped_extents == 0


@pytest.mark.parametrize("limit", ["budget", "adapter"])
def test_the_least_recently_used_extent_is_evicted(
    make_guest: Callable[..., Guest], limit: str
) -> None:
    guest = make_guest(budget=2 if limit == "budget" else 64, audit_pages=0)
    if limit == "adapter":
        guest.lib.fake_map_limit(guest.handle, 2)  # map() says -ENOSPC beyond, also in the pause
    misses = []
    for extent in (0, 1, 0, 2, 0, 1):
        guest.write(extent * EXTENT, text(extent))
        assert guest.pause().status == 0
        assert staged(guest.arena) == {extent * EXTENT: text(extent)}
        guest.carried.clear()
        misses.append(guest.mappings.stats().misses)
        assert guest.lib.fake_mapped(guest.handle) <= 2
    assert misses == [1, 2, 2, 3, 3, 4]
    assert guest.mappings.stats().evicted == 2


def test_one_extent_is_enough_for_any_pause(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(budget=1, capacity=NR_PFNS)
    for pfn in range(0, NR_PFNS, 3):
        guest.write(pfn, text(pfn))
    assert guest.pause().status == 0
    assert staged(guest.arena) == {pfn: text(pfn) for pfn in range(0, NR_PFNS, 3)}
    assert guest.lib.fake_mapped(guest.handle) == 1


def test_no_room_for_even_one_extent_is_a_failure(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.lib.fake_map_limit(guest.handle, 0)
    guest.write(1, text(1))
    outcome = guest.pause()
    assert (outcome.status, outcome.step) == (-errno.ENOSPC, "map")
    assert set(guest.pending) == {1}


def test_a_stale_extent_that_cannot_be_unmapped_is_never_read(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    ballooned(guest)
    guest.fail("unmap", times=3)
    assert guest.pause().step == "p2m"  # the news came, the unmapping failed
    assert guest.pause().step == "map"  # and fails again, before the page is read
    with pytest.raises(HypervisorError, match="Input/output error"):
        guest.mappings.invalidate_all()
    assert guest.pause().status == 0
    assert staged(guest.arena) == {20: text(20, 2)}


def test_refresh_raises_what_went_wrong(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.fail("p2m")
    with pytest.raises(HypervisorError, match="Input/output error"):
        guest.mappings.refresh()
    guest.fail("p2m", error=errno.EHOSTDOWN)
    with pytest.raises(HostLostError):
        guest.mappings.refresh()
    assert guest.live_round().dirty == NR_PFNS  # nothing is known about what changed


def test_a_table_of_another_version_is_refused(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.lib.fake_abi(guest.handle, 1)
    with pytest.raises(HypervisorError, match="rebuild"):
        Mappings(guest.table, NR_PFNS, EXTENT * PAGE)


def test_closed_and_foreign_things_are_refused(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    with pytest.raises(ValueError, match="budget"):
        Mappings(guest.table, NR_PFNS, EXTENT * PAGE - 1)
    with pytest.raises(ValueError, match="one domain"):
        native.pause(
            guest.table + 8,
            guest.mappings,
            guest.pending,
            guest.carried,
            guest.arena,
            key=KEY,
            suspend_timeout_ns=SECOND,
        )
    own, guest.pending = guest.pending, Bitmap(NR_PFNS - 1)
    with pytest.raises(ValueError, match=f"one of {NR_PFNS} is needed"):
        guest.pause()
    guest.pending = own
    with pytest.raises(ValueError, match=f"one of {NR_PFNS} is needed"):
        guest.pause(audit=Bitmap(64))
    guest.mappings.close()
    guest.mappings.close()
    for use in (guest.pause, guest.mappings.refresh, guest.mappings.stats):
        with pytest.raises(ValueError, match="closed"):
            use()
