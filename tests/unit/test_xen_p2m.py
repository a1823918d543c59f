"""The Xen adapter's p2m and invalidations (csrc/p2m.c, csrc/invalidation.c) on fake libraries: no page is ever taken
from a frame that the guest has given back (invariant 8), and no vcpu is left waiting.
"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING, Any

import pytest
from cffi import FFI
from fake_hypervisor import XTAB
from fake_library import TABLE
from fake_p2m import IN, LEAVE, OUT, OUT_IN, XenGuest, compile_fake_p2m
from fake_xen import MAP, TYPES

from checkpointd.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def fake_p2m(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_fake_p2m(tmp_path_factory.mktemp("fake-p2m"))


@pytest.fixture
def make(fake_p2m: Any) -> Iterator[Callable[..., XenGuest]]:
    """Makes guests on fake Xen, and checks in the end what they left."""
    guests: list[XenGuest] = []

    def new(**options: Any) -> XenGuest:
        guests.append(XenGuest(fake_p2m, **options))
        return guests[-1]

    yield new
    for guest in guests:
        guest.close()


@pytest.mark.parametrize("marks", [False, True], ids=["4.17", "4.20.3"])
def test_out_and_in_within_one_epoch_is_taken_from_the_new_frame(
    make: Callable[..., XenGuest], *, marks: bool
) -> None:
    guest = make(marks=marks)
    guest.epoch()
    assert not guest.wrong()
    guest.out(5)
    assert guest.put(5, 77)
    guest.epoch()
    assert not guest.wrong()
    assert guest.replica[5] == 77


@pytest.mark.parametrize("marks", [False, True], ids=["4.17", "4.20.3"])
def test_switched_off_the_old_contents_are_taken(
    make: Callable[..., XenGuest], *, marks: bool
) -> None:
    guest = make(marks=marks, deaf=True)
    guest.epoch()
    guest.out(5)
    assert guest.put(5, 77)
    guest.epoch()
    assert guest.wrong() == {5: (77, 5)}


ADD_TO_PHYSMAP, DECREASE = 7, 1  # XENMEM_*
SHARED_INFO, GRANTS, MOVE = 0, 1, 2  # XENMAPSPACE_*
HOLE, STACK = 900, 3  # pfns


def put_grant(
    guest: XenGuest, pfn: int = HOLE, command: int = ADD_TO_PHYSMAP, space: int = GRANTS, *, long: bool = True
) -> bool:  # fmt: skip
    return bool(guest.lib.fake_put_grant(pfn, STACK, command, space, long))


def test_a_resume_that_puts_the_grant_table_where_it_was_changes_nothing(
    make: Callable[..., XenGuest],
) -> None:
    """Every epoch ends with one: it must not make the next a full copy."""
    guest = make()
    guest.epoch()
    guest.epoch()
    mapped = guest.facts.mapped
    assert mapped > 0
    assert put_grant(guest), "it is answered"
    assert guest.mappings.refresh() == 0
    assert guest.facts.mapped == mapped
    assert guest.lib.fake_requests() == 0
    guest.out(5)
    assert put_grant(guest), "beside a change it hides nothing"
    assert guest.mappings.refresh() > 0


@pytest.mark.parametrize(
    "other",
    [{"pfn": 7}, {"command": DECREASE}, {"space": MOVE}, {"space": SHARED_INFO}, {"long": False}],
    ids=["over a page", "gives pages back", "moves a page", "shared info", "32 bits"],
)
def test_any_other_request_counts_as_a_change(
    make: Callable[..., XenGuest], other: dict[str, Any]
) -> None:
    guest = make()
    guest.epoch()
    guest.epoch()
    assert put_grant(guest, **other)
    assert guest.mappings.refresh() > 0


def test_a_pfn_of_which_nothing_is_known_may_have_had_a_page(make: Callable[..., XenGuest]) -> None:
    guest = make()
    assert put_grant(guest)
    assert guest.lib.fake_requests() == 1


def test_a_page_that_comes_in_is_found_though_no_log_has_it(make: Callable[..., XenGuest]) -> None:
    guest = make()
    guest.epoch()
    assert guest.put(900, 78)  # nothing was there, nothing left: no request, no dirty bit
    guest.epoch()
    assert guest.replica[900] == 78
    assert guest.lib.fake_requests() == 0


def test_one_page_out_and_another_in_at_a_constant_number_of_frames(
    make: Callable[..., XenGuest],
) -> None:
    guest = make()
    guest.epoch()
    guest.mappings.invalidate_all()  # what is not mapped leaves the number at once
    tot = guest.facts.tot_pages
    guest.out(5)
    assert guest.put(900, 79)
    assert guest.facts.tot_pages == tot
    guest.epoch()
    assert not guest.wrong()


def test_frames_are_given_back_by_the_next_look_and_the_guest_may_grow_again(
    make: Callable[..., XenGuest],
) -> None:
    guest = make(nr_frames=800)  # 400 in use, the rest is for growing
    guest.epoch()
    before = guest.facts.tot_pages
    for pfn in range(100):
        guest.out(pfn)
    assert guest.facts.tot_pages == before, "still mapped, still charged"
    assert guest.mappings.refresh() > 0
    assert guest.facts.tot_pages == before - 100
    for pfn in range(100):
        assert guest.put(pfn, 1000 + pfn)
    guest.epoch()
    assert not guest.wrong()


def test_nothing_is_told_when_nothing_happened(make: Callable[..., XenGuest]) -> None:
    guest = make()
    guest.epoch()
    for _ in range(5):
        guest.write(3, 4)
        assert guest.mappings.refresh() == 0
        assert guest.pause().pages == 1
    guest.out(9)
    assert guest.mappings.refresh() > 0
    assert guest.mappings.refresh() > 0, "frames were mapped until then: what came in meanwhile?"
    assert guest.mappings.refresh() == 0


def test_what_was_learnt_before_the_watch_began_is_not_trusted(
    make: Callable[..., XenGuest],
) -> None:
    guest = make()
    words = guest.ffi.new("uint64_t[]", [900])
    assert _function(guest, "types")(words, 1) == 0
    assert words[0] >> 60 == XTAB
    assert guest.put(900, 5)
    guest.epoch()
    assert guest.replica[900] == 5


def test_a_hole_is_asked_for_once(make: Callable[..., XenGuest]) -> None:
    guest = make()
    guest.epoch()
    assert guest.facts.pfns_asked <= 2 * guest.nr_pfns, "the first listing, and audits"
    guest.pending.fill()
    asked = guest.facts.pfns_asked
    guest.epoch()
    present = len(guest.memory())
    assert guest.facts.pfns_asked - asked <= present + 20  # audits: 4 pages an epoch
    calls = guest.facts.calls[TYPES]
    assert guest.pause().dirty == 0
    assert guest.facts.calls[TYPES] - calls == 1  # of the audit


def test_types_of_holes_and_pages_in_any_order(make: Callable[..., XenGuest]) -> None:
    guest = make(nr_frames=200)
    words = guest.ffi.new("uint64_t[]", [150, 3, 151, 3, 150, 99, 100])
    types = _function(guest, "types")
    for _ in range(2):  # once asked, once known
        words[0:7] = [150, 3, 151, 3, 150, 99, 100]
        assert types(words, 7) == 0
        hole = XTAB << 60
        assert list(words) == [hole | 150, 3, hole | 151, 3, hole | 150, 99, hole | 100]
    assert types(words, 1025) == -errno.E2BIG
    words[0] = guest.nr_pfns
    assert types(words, 1) == -errno.EINVAL


def _function(guest: XenGuest, name: str) -> Callable[..., int]:
    """A function of the adapter's table."""
    ffi = FFI()
    ffi.cdef(TABLE)
    table: Any = ffi.cast("struct ck_hypervisor *", guest.table)

    def call(*arguments: Any) -> int:
        return int(
            getattr(table, name)(
                table.domain,
                *(
                    ffi.cast("void *", int(guest.ffi.cast("uintptr_t", a)))
                    if isinstance(a, guest.ffi.CData)
                    else a
                    for a in arguments
                ),
            )
        )

    return call


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EPERM])
def test_a_host_without_room_for_mappings(make: Callable[..., XenGuest], error: int) -> None:
    guest = make()
    base = guest.ffi.new("void **")
    guest.facts.fail_map = error
    expected = -errno.ENOSPC if error == errno.ENOMEM else -error
    assert _function(guest, "map")(0, 512, base) == expected


def test_a_page_that_is_not_there_in_the_pause_though_nobody_took_it_is_an_error(
    make: Callable[..., XenGuest],
) -> None:
    guest = make(deaf=True)
    guest.epoch()
    guest.out(3)  # unheard
    guest.mappings.invalidate_all()
    guest.pending.add(4)  # of the same extent; of page 3 it is remembered that it has memory
    outcome = guest.pause()
    assert (outcome.status, outcome.step) == (-errno.EIO, "map")


def test_a_page_that_leaves_while_its_extent_is_mapped_is_not_touched(
    make: Callable[..., XenGuest],
) -> None:
    guest = make()
    guest.epoch()
    guest.mappings.invalidate_all()
    guest.write(3, 33)
    guest.write(4, 44)
    # It has left, and neither the number of frames nor a request tells of it yet: touching it would be a SIGSEGV.
    guest.lib.fake_hook(TYPES, 1, LEAVE, 3)
    guest.live_round()
    assert guest.value(3) == -1
    assert guest.lib.fake_left()
    assert guest.put(3, 333)
    guest.epoch()
    assert not guest.wrong()


def test_a_guest_that_grows_beyond_its_p2m_is_refused(make: Callable[..., XenGuest]) -> None:
    guest = make()
    guest.epoch()
    guest.facts.nr_pfns += 1
    assert guest.put(900, 1)
    with pytest.raises(HypervisorError, match="out of range"):
        guest.mappings.refresh()


def test_a_domain_that_is_gone(make: Callable[..., XenGuest]) -> None:
    guest = make()
    guest.epoch()
    guest.facts.gone = True
    guest.gone = True
    with pytest.raises(HypervisorError, match="shutdown"):
        guest.mappings.refresh()
    assert guest.lib.fake_ioreq_destroy(guest.server) == -errno.ENOENT
    guest.mappings.close()
    assert guest.lib.fake_end() == 0, "what is gone needs no undoing"


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_guest_does_and_when_the_replica_is_exact(
    make: Callable[..., XenGuest], seed: int
) -> None:
    """Against a model: the guest's own memory. Pages leave, come, change places and are written to, also between any
    two calls of a live round.
    """
    rng = random.Random(seed)
    guest = make(marks=bool(seed % 2), budget=rng.choice([1, 2, 64]))
    values = iter(range(10_000, 1 << 40))

    def act() -> None:
        pfn = rng.randrange(guest.nr_pfns)
        match rng.randrange(6):
            case 0:
                guest.out(pfn)
            case 1:
                guest.put(pfn, next(values))
            case 2:
                guest.out(pfn)
                guest.put(pfn, next(values))
                guest.write(pfn, next(values))
            case 3:
                guest.mappings.refresh()
            case _:
                for _ in range(rng.randrange(40)):
                    guest.write(rng.randrange(guest.nr_pfns), next(values))

    for _ in range(25):
        for _ in range(rng.randrange(4)):
            act()
        for _ in range(rng.randrange(4)):
            guest.lib.fake_hook(
                rng.choice([TYPES, MAP]), rng.randrange(1, 6), rng.choice([OUT, IN, OUT_IN]),
                rng.randrange(guest.nr_pfns),
            )  # fmt: skip
        if rng.randrange(3) == 0:
            guest.live_round()
        guest.epoch()
        assert not guest.wrong()


# ------------------------------------------------------------ the ioreq server


def test_a_vcpu_is_answered_though_nobody_looks(make: Callable[..., XenGuest]) -> None:
    guest = make()
    for pfn in range(50):
        guest.out(pfn)  # each waits for the answer, on both vcpus
    assert guest.lib.fake_requests() == 50


def test_the_vcpus_of_a_dead_holder_are_woken_and_its_server_goes(
    make: Callable[..., XenGuest],
) -> None:
    guest = make()
    lib, facts = guest.lib, guest.facts
    facts.mute = True
    lib.fake_ask(1)
    assert lib.fake_waits(1), "nobody answers"
    assert lib.fake_ioreq_destroy(guest.server) == -errno.EBUSY, "its ports are bound"
    assert facts.server
    assert lib.fake_waits(1)

    lib.fake_unbind()
    facts.mute = False
    assert lib.fake_ioreq_destroy(guest.server) == 0
    assert not lib.fake_waits(1)
    assert not facts.server
    assert lib.fake_ioreq_destroy(guest.server) == -errno.ENOENT, "a second time"


def test_closing_answers_who_still_waits(make: Callable[..., XenGuest]) -> None:
    guest = make()
    lib, facts = guest.lib, guest.facts
    facts.mute = True  # the event is lost
    lib.fake_ask(0)
    facts.mute = False
    guest.mappings.close()
    assert lib.fake_end() == 0
    assert not lib.fake_waits(0)
    assert not facts.server


@pytest.fixture
def fresh(fake_p2m: Any) -> Iterator[tuple[Any, Any, int]]:
    """A guest whose ioreq server is not enabled yet; both its vcpus ask as soon as it is."""
    _, lib = fake_p2m
    assert lib.fake_new(1000, 800, False)
    server = lib.fake_begin(False)
    assert server >= 0
    lib.guest.ask_at_enable = True
    yield lib, lib.guest, server
    lib.fake_end()


def test_a_server_that_cannot_be_enabled_leaves_nobody_waiting(
    fresh: tuple[Any, Any, int],
) -> None:
    """Dom0 has one event channel left: the second vcpu asks, and no port of it can be bound."""
    lib, facts, _ = fresh
    facts.free_ports = 1
    assert lib.fake_watch() == -errno.ENOSPC
    assert lib.fake_waits(1)
    assert lib.fake_end() == 0
    assert not lib.fake_waits(0)
    assert not lib.fake_waits(1)
    assert not facts.server


def test_a_server_somebody_waits_for_is_left_to_the_watcher(fresh: tuple[Any, Any, int]) -> None:
    """Destroyed, it would take with it all that could still let them go on."""
    lib, facts, server = fresh
    facts.free_ports = 0
    assert lib.fake_watch() == -errno.ENOSPC
    assert lib.fake_end() == -errno.ENOSPC
    assert facts.server
    facts.free_ports = 1
    assert lib.fake_ioreq_destroy(server) == 0
    assert not lib.fake_waits(0)
    assert not lib.fake_waits(1)
    assert not facts.server
