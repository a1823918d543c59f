"""The pause: what it calls, what it stages, what it says."""

from __future__ import annotations

import errno
import os
import random
import threading
from typing import TYPE_CHECKING

import pytest
from fake_hypervisor import (
    BROKEN,
    NR_PFNS,
    PAGE,
    SECOND,
    XTAB,
    ZERO,
    is_empty,
    page_data,
    staged,
    text,
    words_of,
)

from checkpointd import native
from checkpointd.errors import NativeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_hypervisor import Guest


def test_a_pause_calls_in_the_order_that_keeps_the_promises(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    guest.write(5, text(5))
    assert guest.pause().status == 0
    # suspend, p2m_changes, harvest FINAL, types, map, context, (nothing clean to audit), close, resume
    assert guest.journal() == "SpFtmxoR"
    guest.carried.clear()
    guest.write(6, text(6))
    assert guest.pause().status == 0
    assert guest.journal() == "SpFtxtoR"  # page 5 is audited now, and nothing is mapped again


@pytest.mark.parametrize("count", [1, 255, 256, 257, 512, 600])
def test_records_are_what_a_plain_writer_makes(
    make_guest: Callable[..., Guest], count: int
) -> None:
    guest = make_guest()
    pfns = sorted(random.Random(count).sample(range(NR_PFNS), count))
    for pfn in pfns:
        guest.write(pfn, text(pfn))
    outcome = guest.pause()
    assert (outcome.status, outcome.pages, outcome.dirty) == (0, count, count)
    expected = [
        page_data({pfn: text(pfn) for pfn in pfns[i : i + 256]}) for i in range(0, count, 256)
    ]
    assert [bytes(record) for record in guest.arena.records] == expected
    for record in guest.arena.records:
        data = native.address_of(record) + 16 + 8 * ((len(record) - 16) // (PAGE + 8))
        assert data % PAGE == 0, "page data must be aligned"
        assert len(record) % 8 == 0
        assert record.readonly
    assert set(guest.carried) == set(pfns)
    assert not guest.pending


def test_more_than_a_batch_of_types_in_one_pause(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(capacity=NR_PFNS)
    for pfn in range(NR_PFNS):
        guest.write(pfn, text(pfn))
    assert guest.pause().pages == NR_PFNS
    assert guest.journal().count("t") == 2  # 1024 and the rest
    assert staged(guest.arena) == {pfn: text(pfn) for pfn in range(NR_PFNS)}


def test_zero_pages_are_listed_and_not_copied(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.write(7, ZERO)
    guest.write(8, ZERO[:-1] + b"\1")
    outcome = guest.pause()
    assert (outcome.zeros, outcome.pages) == (1, 1)
    assert words_of(guest.arena.zero_pfns) == [7]
    assert staged(guest.arena) == {8: ZERO[:-1] + b"\1"}
    guest.carried.clear()
    guest.write(7, ZERO)
    assert guest.pause(detect_zero=False).pages == 1
    assert staged(guest.arena) == {7: ZERO}


def test_gone_pages_are_listed_and_never_touched(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.lib.fake_hole(guest.handle, 9)  # touching it would be a fault
    guest.lib.fake_set_type(guest.handle, 10, BROKEN)
    guest.lib.fake_dirty(guest.handle, 10)
    guest.write(11, text(11))
    outcome = guest.pause()
    assert (outcome.gone, outcome.pages, outcome.dirty) == (2, 1, 3)
    assert words_of(guest.arena.gone_pfns) == [XTAB << 60 | 9, BROKEN << 60 | 10]
    assert staged(guest.arena) == {11: text(11)}


def test_an_extent_of_gone_pages_is_not_mapped(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.lib.fake_hole(guest.handle, 600)
    assert guest.pause().gone == 1
    assert "m" not in guest.journal()


def test_page_tables_of_a_pv_guest_keep_their_types(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    types = {1: 0x1, 2: 0x4, 3: 0x9, 4: 0xC}
    for pfn, kind in types.items():
        guest.lib.fake_set_type(guest.handle, pfn, kind)
        guest.write(pfn, text(pfn))
    guest.pause()
    assert bytes(guest.arena.records[0]) == page_data({p: text(p) for p in types}, types)


@pytest.mark.parametrize("kind", [5, 8, 0xE])
def test_a_type_that_no_record_may_hold_fails_the_epoch(
    make_guest: Callable[..., Guest], kind: int
) -> None:
    guest = make_guest()
    guest.write(3, text(3))
    guest.lib.fake_set_type(guest.handle, 3, kind)
    outcome = guest.pause()
    assert (outcome.status, outcome.step) == (-errno.EPROTO, "stage")
    assert set(guest.pending) == {3}


def test_an_answer_about_other_pages_fails_the_epoch(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.write(3, text(3))
    guest.lib.fake_lie(guest.handle)
    outcome = guest.pause()
    assert (outcome.status, outcome.step) == (-errno.EPROTO, "stage")
    assert set(guest.pending) == {3}


def test_bits_beyond_the_guest_are_not_pages(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.lib.fake_swap(guest.handle, NR_PFNS - 1)
    guest.lib.fake_dirty(guest.handle, NR_PFNS)  # a log is in whole words, and may say anything
    outcome = guest.pause()
    assert (outcome.dirty, list(guest.carried)) == (1, [NR_PFNS - 1])


def test_final_harvest_brings_what_the_hypervisor_holds_writable(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    guest.lib.fake_hold(guest.handle, 12)
    assert guest.live_round().dirty == 0  # CLEAN must not be FINAL
    assert guest.pause().dirty == 1


def test_too_many_stages_nothing_and_closes_nothing(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(capacity=10)
    for pfn in range(11):
        guest.write(pfn, text(pfn))
    outcome = guest.pause()
    assert outcome.status == native.TOO_MANY
    assert "11" in outcome.fault
    assert set(guest.pending) == set(range(11))
    assert not guest.carried
    assert is_empty(guest.arena)
    assert guest.journal() == "SpFR"


def test_the_outcome_says_how_long_each_step_took(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.write(1, text(1))
    outcome = guest.pause()
    stopped = (
        outcome.harvest_ns,
        outcome.stage_ns,
        outcome.context_ns,
        outcome.audit_ns,
        outcome.output_ns,
        outcome.resume_ns,
    )
    assert min(outcome.suspend_ns, *stopped) >= 0
    assert outcome.stage_ns > 0
    assert sum(stopped) <= outcome.pause_ns
    assert outcome.closed_output == 1
    assert (outcome.fault, outcome.step) == ("", "")


def test_other_threads_run_python_during_a_pause(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    entered, tell = os.pipe()
    wait, answer = os.pipe()
    guest.lib.fake_meet(guest.handle, tell, wait)
    thread = threading.Thread(target=lambda: os.write(answer, os.read(entered, 1)))
    thread.start()
    outcome = guest.pause(suspend_timeout_ns=20 * SECOND)  # in vain, if the GIL were held
    if outcome.status:
        os.write(tell, b"S")
    thread.join()
    for fd in (entered, tell, wait, answer):
        os.close(fd)
    assert outcome.status == 0


def test_output_stays_open_when_told(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    assert guest.pause(close_output=False).status == 0
    assert guest.journal() == "SpFxR"


def test_context_is_what_the_hypervisor_wrote(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    assert guest.pause().status == 0
    assert bytes(guest.arena.context) == b"\xc7" * 48
    guest.lib.fake_context_length(guest.handle, 5000)  # the arena has 4096
    guest.write(1, text(1))
    outcome = guest.pause()
    assert (outcome.status, outcome.step) == (-errno.ENOSPC, "context")
    assert set(guest.pending) == {1}


def test_a_guest_that_does_not_stop_is_resumed_all_the_same(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    guest.write(1, text(1))
    outcome = guest.pause(suspend_timeout_ns=0)
    assert (outcome.status, outcome.step) == (-errno.ETIMEDOUT, "suspend")
    assert "suspend: " in outcome.fault
    assert guest.journal() == "SR"
    assert guest.lib.fake_is_dirty(guest.handle, 1), "the log must not have been harvested"


def test_a_carried_epoch_is_never_staged_over(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.write(1, text(1))
    guest.pause()
    guest.write(2, text(2))
    guest.journal()
    for stage in (guest.pause, guest.live_round):
        with pytest.raises(NativeError, match="acknowledged"):
            stage()
    assert guest.journal() == ""
    assert staged(guest.arena) == {1: text(1)}


def test_a_guest_that_is_to_stay_is_left_suspended(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.write(5, text(5))
    assert guest.pause(stay=True).status == 0
    assert guest.lib.fake_suspended(guest.handle)
    assert guest.journal() == "SpFtmxo"
    guest.carried.clear()
    assert guest.pause().status == 0
    assert not guest.lib.fake_suspended(guest.handle)


def test_a_guest_that_was_to_stay_is_resumed_if_its_pause_fails(
    make_guest: Callable[..., Guest],
) -> None:
    guest = make_guest()
    guest.write(5, text(5))
    guest.fail("context")
    assert guest.pause(stay=True).status == -errno.EIO
    assert not guest.lib.fake_suspended(guest.handle)
    assert set(guest.pending) == {5}
