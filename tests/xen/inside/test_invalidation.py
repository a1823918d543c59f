"""Run in dom0: a guest gives memory back and takes it again while an engine keeps it mapped (csrc/p2m.c and
csrc/invalidation.c).

What is true is read past the adapter: types and mappings made afresh, straight through Xen's libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import pytest
from lab.guests import TSC

from checkpointd import native
from checkpointd.hypervisor.xen import versions
from checkpointd.hypervisor.xen.lib import check, ffi, lib, open_libs
from checkpointd.native import TOO_MANY, Arena, Bitmap, DigestKey, Mappings, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
MIB = 1 << 20
MEMORY, LESS = 160, 120  # MiB; Debian's kernel lives in the latter, with room for the load
NAME = "invalidation-test"
SLACK = 256  # pages that Xen counts beside the guest's memory, and more
LIMIT = 300.0  # s for whatever the guest does; an emulated host may stand still for seconds
GIVEN_BACK: Final = 1.0  # s from the last frame given back to all of them uncharged
MAP_NORESERVE = 0x4000  # asm-generic/mman.h; Python names it from 3.12 on
TURN = 0.05  # s between two looks of an engine, as the epoch loop takes them
STILL = 200  # looks without a request, after which a guest has given back all that it was to
FEW = 8  # pages: what Xen itself writes into those that it shares with a guest
HELD = 10.0  # s; a guest that nothing stops gives all of it back in less

CONFIG = f"""
name="{NAME}"
type="pvh"
kernel="/root/vmlinuz"
ramdisk="/root/initrd.gz"
memory={MEMORY}
vcpus=2
{TSC}
extra="console=hvc0 quiet rdinit=/init pages=256 rate=50 pressure=16"
"""


def xl(*words: str) -> str:
    return subprocess.run(
        ["xl", *words], check=True, capture_output=True, text=True, timeout=LIMIT
    ).stdout


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"not within {LIMIT} s: {what}"
        time.sleep(TURN)


def tot_pages(domid: int) -> int:
    info = ffi.new("struct xen_dominfo *")
    check(lib.xen_domain_state(open_libs(), domid, info), "no such domain")
    return int(info.tot_pages)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Its domid. It is up: its balloon follows."""
    config = tmp_path_factory.mktemp("guest") / "guest.cfg"
    config.write_text(CONFIG)
    xl("create", "-q", str(config))
    try:
        domid = int(xl("domid", NAME))
        # The balloon driver of a kernel that boots takes orders only late.
        give_and_take(domid, MEMORY - 4)
        yield domid
    finally:
        xl("destroy", NAME)


def give_and_take(domid: int, target: int) -> None:
    xl("mem-set", NAME, str(target))
    goal = target * MIB // PAGE
    end = time.monotonic() + LIMIT
    while abs((now := tot_pages(domid)) - goal) > SLACK:
        assert time.monotonic() < end, f"not within {LIMIT} s: the guest has {now} pages, not {goal}"
        time.sleep(TURN)


@pytest.fixture
def domid(guest: int) -> int:
    """The guest, with all its memory."""
    xl("mem-max", NAME, str(MEMORY + 1))
    give_and_take(guest, MEMORY)
    return guest


class Engine:
    """The native half of one, and an image."""

    def __init__(self, domid: int, *, deaf: bool = False) -> None:
        self.domid = domid
        out, server = ffi.new("struct xen_domain **"), ffi.new("uint16_t *")
        check(lib.xen_domain_new(open_libs(), domid, out), "attach")
        self.domain = out[0]
        self.memory: mmap.mmap | None = None
        try:
            check(lib.xen_p2m_begin(self.domain, deaf, server), "ioreq server")
            self.server = int(server[0])
            check(lib.xen_p2m_watch(self.domain), "enable")
            check(lib.xen_log_begin(self.domain), "log-dirty")
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        nr_pfns = ffi.new("uint64_t *")
        check(lib.xen_nr_pfns(open_libs(), self.domid, nr_pfns), "nr_pfns")
        self.nr_pfns = int(nr_pfns[0])
        self.table = int(ffi.cast("uintptr_t", lib.xen_domain_table(self.domain)))
        self.mappings = Mappings(self.table, self.nr_pfns, 1 << 30)
        self.pending, self.carried = Bitmap(self.nr_pfns), Bitmap(self.nr_pfns)
        self.populated = Bitmap(self.nr_pfns)
        self.arena = Arena(8192, self.nr_pfns, 1 << 18, 16)
        # Sparse: only pages that the guest has take memory.
        self.memory = mmap.mmap(-1, self.nr_pfns * PAGE, mmap.MAP_PRIVATE | MAP_NORESERVE)
        self.image = int(ffi.cast("uintptr_t", ffi.from_buffer(self.memory)))
        self.key = DigestKey(bytes(32))
        self.cursor = 0
        self.pending.fill()

    def live_round(self) -> Outcome:
        outcome = native.live_round(
            self.table, self.mappings, self.pending, self.carried, self.arena, cursor=self.cursor
        )
        self.cursor = outcome.cursor
        assert outcome.status in (0, -errno.EAGAIN), outcome
        return self._apply(outcome)

    def pause(self, *, stay: bool = False) -> Outcome:
        outcome = native.pause(
            self.table, self.mappings, self.pending, self.carried, self.arena, key=self.key,
            suspend_timeout_ns=int(LIMIT * 1e9), stay=stay,
        )  # fmt: skip
        assert outcome.status in (0, TOO_MANY), outcome
        return self._apply(outcome)

    def epoch(self, *, stay: bool = False) -> None:
        """Live rounds until what is left fits, and the pause. With `stay` the guest is left suspended."""
        while self.pause(stay=stay).status == TOO_MANY:
            while self.live_round().remaining > self.arena.capacity // 2:
                pass

    def _apply(self, outcome: Outcome) -> Outcome:
        if outcome.status == 0:
            for record in self.arena.records:
                native.scatter(self.image, self.nr_pfns, self.populated, record)
            native.zero_pages(self.image, self.nr_pfns, self.populated, self.arena.zero_pfns)
            native.drop_pages(self.image, self.nr_pfns, self.populated, self.arena.gone_pfns)
        self.carried.clear()
        return outcome

    def close(self) -> None:
        if self.memory is not None:
            self.mappings.close()
            self.arena.close()
        lib.xen_resume_ours(self.domain)
        ended = lib.xen_p2m_end(self.domain)
        lib.xen_log_off(open_libs(), self.domid)
        lib.xen_domain_free(self.domain)
        assert ended == 0


@pytest.fixture
def attach(domid: int) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def new(**options: bool) -> Engine:
        engines.append(Engine(domid, **options))
        return engines[-1]

    yield new
    for engine in engines:
        engine.close()


class Truth:
    """The guest's memory as Xen shows it now, by libraries of this class's own."""

    def __init__(self, domid: int) -> None:
        self._ctrl = ctypes.CDLL(f"libxenctrl.so.{versions.running()}", use_errno=True)
        self._memory = ctypes.CDLL("libxenforeignmemory.so.1", use_errno=True)
        self._ctrl.xc_interface_open.restype = ctypes.c_void_p
        self._memory.xenforeignmemory_open.restype = ctypes.c_void_p
        self._memory.xenforeignmemory_map.restype = ctypes.c_void_p
        self._xch = ctypes.c_void_p(self._ctrl.xc_interface_open(None, None, 0))
        self._handle = ctypes.c_void_p(self._memory.xenforeignmemory_open(None, 0))
        self._domid = domid

    def present(self, nr_pfns: int) -> list[int]:
        found = []
        for first in range(0, nr_pfns, 1024):
            count = min(1024, nr_pfns - first)
            pfns = (ctypes.c_ulong * count)(*range(first, first + count))
            assert self._ctrl.xc_get_pfn_type_batch(self._xch, self._domid, count, pfns) == 0
            found += [first + i for i, word in enumerate(pfns) if word >> 28 != 0xF]
        return found

    def wrong(self, engine: Engine) -> list[int]:
        """pfns whose memory is not what the image has."""
        present = self.present(engine.nr_pfns)
        assert engine.memory is not None
        wrong = [pfn for pfn in present if pfn not in engine.populated]
        for i in range(0, len(present), 512):
            part = present[i : i + 512]
            pfns, errors = (ctypes.c_ulong * len(part))(*part), (ctypes.c_int * len(part))()
            base = self._memory.xenforeignmemory_map(
                self._handle, self._domid, mmap.PROT_READ, ctypes.c_size_t(len(part)), pfns, errors
            )
            assert base, os.strerror(ctypes.get_errno())
            assert not any(errors)
            for k, pfn in enumerate(part):
                theirs = (ctypes.c_char * PAGE).from_address(base + k * PAGE)
                ours = engine.memory[pfn * PAGE : (pfn + 1) * PAGE]
                if theirs.raw != ours:
                    wrong.append(pfn)
            self._memory.xenforeignmemory_unmap(
                self._handle, ctypes.c_void_p(base), ctypes.c_size_t(len(part))
            )
        return wrong

    def close(self) -> None:
        self._memory.xenforeignmemory_close(self._handle)
        self._ctrl.xc_interface_close(self._xch)


@pytest.fixture
def truth(domid: int) -> Iterator[Truth]:
    with contextlib.closing(Truth(domid)) as truth:
        yield truth


def resize(engine: Engine, target: int) -> None:
    """`xl mem-set`, with epochs meanwhile, until the guest has followed and its frames are counted so."""
    xl("mem-set", NAME, str(target))
    goal = target * MIB // PAGE
    end = time.monotonic() + LIMIT
    while abs(tot_pages(engine.domid) - goal) > SLACK:
        assert time.monotonic() < end, f"the guest has {tot_pages(engine.domid)} pages, not {goal}"
        engine.epoch()


def test_memory_taken_and_given_back_leaves_an_exact_replica(
    attach: Callable[..., Engine], truth: Truth
) -> None:
    engine = attach()
    engine.epoch()
    for _ in range(2):
        resize(engine, LESS)
        resize(engine, MEMORY)
    engine.epoch(stay=True)
    assert lib.xen_p2m_requests(engine.domain) > 0
    assert truth.wrong(engine) == []


def out_and_in(engine: Engine, *, deaf: bool) -> None:
    """Within one epoch the guest gives frames back, and takes others for the same pfns. Nothing is harvested meanwhile;
    the engine only looks after its mappings, as the epoch loop does between two epochs.
    """
    xl("mem-set", NAME, str(LESS))
    requests: list[int] = []

    def given() -> bool:
        engine.mappings.refresh()
        if not deaf:
            return tot_pages(engine.domid) <= LESS * MIB // PAGE + SLACK
        # What it gives back stays charged: nothing but the end of its requests tells.
        requests.append(lib.xen_p2m_requests(engine.domain))
        return len(requests) > STILL and requests[-1] == requests[-STILL] > 0

    until(given, "the guest gives memory back")
    xl("mem-set", NAME, str(MEMORY))
    # What is still mapped stays charged: unless it may have more than it had, the guest gets none back. After mem-set,
    # which sets the most that it may have, too; the guest's balloon asks again by itself.
    xl("mem-max", NAME, str(MEMORY + (MEMORY - LESS) + 8))
    goal = (MEMORY + 16 if deaf else MEMORY - 1) * MIB // PAGE

    def back() -> bool:
        engine.mappings.refresh()
        return tot_pages(engine.domid) > goal

    until(back, "the guest takes memory again")


@pytest.mark.parametrize("deaf", [False, True], ids=["told", "deaf"])
def test_frames_that_change_within_an_epoch(
    attach: Callable[..., Engine], truth: Truth, deaf: bool
) -> None:
    """An engine that is told has no old contents; a deaf one has, or this would prove nothing."""
    engine = attach(deaf=deaf)
    engine.epoch()
    out_and_in(engine, deaf=deaf)
    engine.epoch()
    engine.epoch(stay=True)
    assert bool(truth.wrong(engine)) == deaf


def test_frames_given_back_are_uncharged_within_a_second(attach: Callable[..., Engine]) -> None:
    engine = attach()
    engine.epoch()
    assert engine.mappings.stats().mapped_bytes > LESS * MIB, (
        "nothing is mapped: nothing is kept charged"
    )
    xl("mem-set", NAME, str(LESS))
    goal, end = LESS * MIB // PAGE + SLACK, time.monotonic() + LIMIT
    last, requests = time.monotonic(), -1
    while tot_pages(engine.domid) > goal:
        engine.mappings.refresh()
        now, answered = time.monotonic(), lib.xen_p2m_requests(engine.domain)
        if answered != requests:
            last, requests = now, answered
        assert now < end, f"{tot_pages(engine.domid)} pages, not {goal}"
        time.sleep(TURN)
    assert time.monotonic() - last < GIVEN_BACK


def test_holes_cost_one_listing(
    attach: Callable[..., Engine], record_property: Callable[[str, object], None]
) -> None:
    """Absolute times mean little in emulation; their ratio does."""
    engine = attach()
    xl("pause", NAME)  # a paused guest dirties nothing
    try:
        begin = time.monotonic()
        while engine.live_round().remaining:
            pass
        first = time.monotonic() - begin
        engine.pending.fill()
        begin = time.monotonic()
        while engine.live_round().remaining:
            pass
        second = time.monotonic() - begin
        begin = time.monotonic()
        for _ in range(10):
            assert engine.live_round().pages <= FEW
        idle = (time.monotonic() - begin) / 10
    finally:
        xl("unpause", NAME)
    record_property("first_listing_s", first)
    record_property("second_listing_s", second)
    record_property("idle_round_s", idle)
    assert idle < first / 10


HOLDER = """
import sys, time
from checkpointd.hypervisor.xen.lib import check, ffi, lib, open_libs
out, server = ffi.new("struct xen_domain **"), ffi.new("uint16_t *")
check(lib.xen_domain_new(open_libs(), int(sys.argv[1]), out), "attach")
check(lib.xen_p2m_begin(out[0], False, server), "ioreq server")
check(lib.xen_p2m_watch(out[0]), "enable")
print(server[0], flush=True)
time.sleep(3600)
"""


def test_a_holder_that_dies_stops_the_guest_and_destroying_its_server_frees_it(domid: int) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(domid)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder.stdout:
        server = int(holder.stdout.readline())
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    before = tot_pages(domid)
    xl("mem-set", NAME, str(LESS))
    goal = LESS * MIB // PAGE + SLACK
    until(lambda: tot_pages(domid) < before, "the guest begins to give memory back")
    end = time.monotonic() + HELD
    while time.monotonic() < end:
        assert tot_pages(domid) > goal, "the guest was not stopped: nothing to free"
        time.sleep(TURN)
    libs = open_libs()
    assert lib.xen_ioreq_destroy(libs, domid, server) == 0
    until(lambda: tot_pages(domid) <= goal, "the guest goes on giving memory back")
    assert lib.xen_ioreq_destroy(libs, domid, server) == -errno.ENOENT
