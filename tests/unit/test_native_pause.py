"""The pause, the live round and the mapping cache, on a hypervisor made for it (test_native_fake.c)."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import sysconfig
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cffi import FFI

from checkpointd import native
from checkpointd.errors import HostLostError, HypervisorError, NativeError
from checkpointd.native import Arena, Bitmap, DigestKey, Mappings, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
EXTENT = 512  # pages
SECOND = 1_000_000_000  # ns
ZERO = bytes(PAGE)
XTAB, BROKEN = 0xF, 0xD
CALLS = ("suspend", "resume", "harvest", "p2m", "types", "map", "unmap", "context", "output")
KEY = DigestKey(bytes(range(32)))
NR_PFNS = 3 * EXTENT + 100  # whole extents and a partial one; not a multiple of 64


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The fake hypervisor, compiled: (ffi, lib)."""
    here = Path(__file__)
    library = tmp_path_factory.mktemp("fake") / "fake.so"
    compiler = sysconfig.get_config_var("CC").split()[0]
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{here.parents[2] / 'checkpointd' / 'csrc'}",
            "-o",
            library,
            here.with_name("test_native_fake.c"),
        ],
        check=True,
    )
    ffi = FFI()
    ffi.cdef(
        """
        void *fake_new(uint64_t nr_pfns);
        void fake_free(void *f);
        void *fake_table(void *f);
        void fake_swap(void *f, uint64_t pfn);
        void fake_hole(void *f, uint64_t pfn);
        void fake_fail(void *f, int call, uint64_t at, int error, int late, uint64_t passages);
        void fake_heal(void *f);
        uint64_t fake_passages(void *f, int call);
        uint8_t *fake_page(void *f, uint64_t pfn);
        void fake_dirty(void *f, uint64_t pfn);
        int fake_is_dirty(void *f, uint64_t pfn);
        void fake_hold(void *f, uint64_t pfn);
        void fake_set_type(void *f, uint64_t pfn, uint8_t type);
        void fake_meet(void *f, int tell, int wait);
        void fake_lie(void *f);
        void fake_context_length(void *f, uint64_t length);
        void fake_map_limit(void *f, uint64_t extents);
        void fake_after_types(void *f, int64_t swap, int64_t hole);
        int fake_suspended(void *f);
        uint64_t fake_mapped(void *f);
        uint64_t fake_closed(void *f);
        void fake_abi(void *f, uint32_t abi);
        const char *fake_journal(void *f);
        """
    )
    return ffi, ffi.dlopen(str(library))


@dataclass
class Guest:
    """A guest of the fake hypervisor, with what an engine needs to protect it."""

    fake: Any
    nr_pfns: int = NR_PFNS
    budget: int = 64  # extents
    capacity: int = 600  # pages
    audit_pages: int = 4
    handle: Any = None
    mappings: Mappings = field(init=False)
    pending: Bitmap = field(init=False)
    carried: Bitmap = field(init=False)
    arena: Arena = field(init=False)

    def __post_init__(self) -> None:
        self.ffi, self.lib = self.fake
        self.handle = self.lib.fake_new(self.nr_pfns)
        assert self.handle
        self.table = int(self.ffi.cast("uintptr_t", self.lib.fake_table(self.handle)))
        self.mappings = Mappings(self.table, self.nr_pfns, self.budget * EXTENT * PAGE)
        self.pending, self.carried = Bitmap(self.nr_pfns), Bitmap(self.nr_pfns)
        self.arena = Arena(self.capacity, self.nr_pfns, 4096, self.audit_pages)

    def write(self, pfn: int, data: bytes) -> None:
        """The guest stores `data` at the start of a page, then the hypervisor notes it."""
        self.ffi.memmove(self.lib.fake_page(self.handle, pfn), data, len(data))
        self.lib.fake_dirty(self.handle, pfn)

    def read(self, pfn: int) -> bytes | None:
        page = self.lib.fake_page(self.handle, pfn)
        return bytes(self.ffi.buffer(page, PAGE)) if page else None

    def fail(
        self, call: str, at: int = 1, error: int = errno.EIO, *, late: bool = False, times: int = 1
    ) -> None:
        self.lib.fake_fail(self.handle, CALLS.index(call), at, -error, late, times)

    def heal(self) -> None:
        self.lib.fake_heal(self.handle)

    def journal(self) -> str:
        """Letters of the calls since the last journal()."""
        return bytes(self.ffi.string(self.lib.fake_journal(self.handle))).decode()

    def passages(self) -> dict[str, int]:
        return {name: self.lib.fake_passages(self.handle, i) for i, name in enumerate(CALLS)}

    def pause(self, **options: Any) -> Outcome:
        options = {"key": KEY, "suspend_timeout_ns": SECOND, **options}
        return native.pause(
            self.table, self.mappings, self.pending, self.carried, self.arena, **options
        )

    def live_round(self, cursor: int = 0, **options: Any) -> Outcome:
        return native.live_round(
            self.table,
            self.mappings,
            self.pending,
            self.carried,
            self.arena,
            cursor=cursor,
            **options,
        )

    def owned(self) -> set[int]:
        return set(self.pending) | set(self.carried)

    def close(self) -> None:
        self.heal()
        self.mappings.close()
        self.arena.close()
        leaked, suspended = self.lib.fake_mapped(self.handle), self.lib.fake_suspended(self.handle)
        self.lib.fake_free(self.handle)
        assert not leaked, "extents are still mapped"
        assert not suspended, "the guest was left suspended"


@pytest.fixture
def make_guest(fake: Any) -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def make(**options: int) -> Guest:
        guests.append(Guest(fake, **options))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


def text(pfn: int, version: int = 0) -> bytes:
    """Contents of a page that names it; never all zero."""
    return struct.pack("<QQ", pfn + 1, version) * (PAGE // 16)


def page_data(pages: dict[int, bytes], types: dict[int, int] | None = None) -> bytes:
    """A PAGE_DATA record, written the plain way: the oracle of the staged one."""
    types = types or {}
    words = [types.get(pfn, 0) << 60 | pfn for pfn in pages]
    body = struct.pack(f"<II{len(words)}Q", len(words), 0, *words) + b"".join(pages.values())
    return struct.pack("<II", 1, len(body)) + body


def words_of(view: memoryview) -> list[int]:
    return list(struct.unpack(f"<{len(view) // 8}Q", view))


def staged(arena: Arena) -> dict[int, bytes]:
    """Pages with data in the records, all of which must be well-formed."""
    pages = {}
    for record in arena.records:
        assert native.check_record(record, arena.nr_pfns) is None
        kind, _, count, _ = struct.unpack_from("<IIII", record)
        assert kind == 1
        for i, word in enumerate(words_of(record[16 : 16 + 8 * count])):
            start = 16 + 8 * count + i * PAGE
            pages[word & (1 << 52) - 1] = bytes(record[start : start + PAGE])
    return pages


def is_empty(arena: Arena) -> bool:
    return not (arena.records or arena.zero_pfns or arena.gone_pfns or arena.context or arena.audit)


# The pause.


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


# No bit is ever lost (invariant 3), and no guest left suspended (invariant 5).


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


# The mapping cache (invariant 8).


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
    guest.lib.fake_abi(guest.handle, 2)
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


# The audit (invariant 10).


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


# Live rounds.


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


# All of it together: whatever happens, in the end the replica is the guest.


@pytest.mark.parametrize("seed", range(12))
def test_a_replica_follows_its_guest_through_any_misfortune(
    make_guest: Callable[..., Guest], seed: int
) -> None:
    dice = random.Random(seed)
    nr_pfns = 2 * EXTENT + 40
    guest = make_guest(nr_pfns=nr_pfns, budget=dice.choice([1, 2, 9]), capacity=200)
    image, populated = bytearray(nr_pfns * PAGE), Bitmap(nr_pfns)
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
