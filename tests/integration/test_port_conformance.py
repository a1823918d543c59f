"""What every adapter of the hypervisor port must do. Each test runs on every adapter (one so far)."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from checkpointd.errors import DomainBusyError, HypervisorError, NoSuchDomainError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.fresh import FreshGuest
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.lib import ffi, lib
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.port import EXTENT_PAGES, PAGE_SIZE, EndReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointd.hypervisor.port import Domain, DomainInfo

SECOND = 1_000_000_000  # ns
PATIENCE = 20.0  # s; generous, and only ever waited out by a failing test
PEEK, CLEAN, FINAL = lib.CK_HARVEST_PEEK, lib.CK_HARVEST_CLEAN, lib.CK_HARVEST_FINAL
NOTAB, XTAB = 0x0, 0xF


class Table:
    """Calls the native table as the pause does."""

    def __init__(self, domain: Domain) -> None:
        self.table = ffi.cast("struct ck_hypervisor *", domain.table)
        self.nr_pfns = domain.info.nr_pfns

    def suspend(self, timeout_ns: int = 10 * SECOND) -> int:
        return int(self.table.suspend(self.table.domain, timeout_ns))

    def resume(self) -> int:
        return int(self.table.resume(self.table.domain))

    def harvest(self, mode: int, into: Any = None) -> set[int]:
        bitmap = self.bitmap() if into is None else into
        assert self.table.harvest(self.table.domain, bitmap, self.nr_pfns, mode) == 0
        return self.bits(bitmap)

    def harvest_status(self, mode: int, nr_pfns: int | None = None) -> int:
        nr = self.nr_pfns if nr_pfns is None else nr_pfns
        return int(self.table.harvest(self.table.domain, self.bitmap(), nr, mode))

    def p2m_changes(self) -> set[int]:
        bitmap = self.bitmap()
        count = self.table.p2m_changes(self.table.domain, bitmap, self.nr_pfns)
        assert count == len(self.bits(bitmap))
        return self.bits(bitmap)

    def types(self, *pfns: int) -> list[int]:
        words = ffi.new("uint64_t[]", list(pfns))
        assert self.table.types(self.table.domain, words, len(pfns)) == 0
        assert [word & ((1 << 52) - 1) for word in words] == list(pfns)
        return [word >> 60 for word in words]

    def map(self, first: int, count: int) -> Any:
        base = ffi.new("void **")
        status = self.table.map(self.table.domain, first, count, base)
        assert status == 0, os.strerror(-status)
        return base[0]

    def unmap(self, base: Any, count: int) -> int:
        return int(self.table.unmap(self.table.domain, base, count))

    def context(self) -> bytes:
        buffer = ffi.new("uint8_t[]", 4096)
        size = self.table.context(self.table.domain, buffer, 4096)
        assert size > 0
        return bytes(ffi.buffer(buffer, size))

    def close_output(self) -> int:
        closed = ffi.new("uint64_t *")
        assert self.table.output_close(self.table.domain, closed) == 0
        return int(closed[0])

    def epoch(self) -> int:
        assert self.suspend() == 0
        closed = self.close_output()
        assert self.resume() == 0
        return closed

    def bitmap(self) -> Any:
        return ffi.new("uint64_t[]", (self.nr_pfns + 63) // 64)

    @staticmethod
    def bits(bitmap: Any) -> set[int]:
        return {
            64 * at + bit
            for at, word in enumerate(bitmap)
            if word
            for bit in range(64)
            if word >> bit & 1
        }


def page(base: Any, index: int) -> bytes:
    return bytes(ffi.buffer(ffi.cast("uint8_t *", base) + index * PAGE_SIZE, PAGE_SIZE))


class Adapter:
    """The embedded hypervisor with the toolstack that the tests need."""

    def __init__(self, run_dir: Path) -> None:
        self.hypervisor = EmbeddedHypervisor("primary", run_dir)
        self.processes: list[subprocess.Popen[str]] = []
        self.domains: list[Domain] = []

    def guest(self, program: str = "kv", pages: int = 1024, **options: Any) -> DomainInfo:
        guest = FreshGuest(
            str(self.hypervisor.namespace), program, pages * PAGE_SIZE,
            **{"address": "127.0.0.1:0", **options},
        )  # fmt: skip
        process, info = toolstack.create(guest)
        self.processes.append(process)
        return info

    def attach(self, info: DomainInfo) -> tuple[Domain, Table]:
        domain = self.hypervisor.attach(info.domid)
        self.domains.append(domain)
        return domain, Table(domain)

    def close(self) -> None:
        for domain in self.domains:
            domain.close()
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
            process.communicate(timeout=PATIENCE)
        assert self.hypervisor.domains() == []


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=[Adapter], ids=["embedded"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Adapter]:
    before = open_fds()
    adapter = request.param(tmp_path)
    try:
        yield adapter
    finally:
        adapter.close()
    assert open_fds() == before


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        return int(udp.getsockname()[1])


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(PATIENCE)
        yield udp


def talk(client: socket.socket, port: int) -> Callable[[str], None]:
    return lambda text: (client.sendto(text.encode(), ("127.0.0.1", port)), None)[1]


def wait_step(info: DomainInfo, step: int) -> None:
    """Until the guest has come so far; each look is a round trip to its host."""
    deadline = time.monotonic() + PATIENCE
    while toolstack.look(info).step < step:
        assert time.monotonic() < deadline, f"the guest does not come to step {step}"


def wait_held(domain: Domain, packets: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while domain.output.stats().held_packets < packets:
        assert time.monotonic() < deadline, f"{packets} packets are not held"
        os.sched_yield()


def stop_host(info: DomainInfo) -> None:
    """SIGSTOP, and wait until every thread has stopped."""
    os.kill(info.host.pid, signal.SIGSTOP)
    tasks = list(Path(f"/proc/{info.host.pid}/task").iterdir())
    while not all(") T" in (task / "stat").read_text() for task in tasks):
        os.sched_yield()


def silent(client: socket.socket) -> bool:
    return not select.select([client], [], [], 0)[0]


# ---- finding and attaching ----


def test_a_guest_is_found_by_domid_and_by_uuid(adapter: Adapter) -> None:
    info = adapter.guest(domid=7, name="web")
    hypervisor = adapter.hypervisor
    assert hypervisor.domains() == [info]
    assert hypervisor.find(domid=7) == hypervisor.find(uuid=info.uuid) == info
    assert (info.name, info.nr_pfns, info.ram_pages, info.hypervisor) == (
        "web",
        1024,
        1024,
        hypervisor.name,
    )
    with pytest.raises(NoSuchDomainError, match=r"7 \(web"):
        hypervisor.find(domid=8)


def test_one_engine_at_a_time(adapter: Adapter) -> None:
    info = adapter.guest()
    domain, _ = adapter.attach(info)
    with pytest.raises(DomainBusyError):
        adapter.hypervisor.attach(info.domid)
    domain.close()
    domain.close()  # idempotent
    adapter.attach(info)  # close() has detached when it returns


# ---- the dirty log ----


def test_harvest_modes(adapter: Adapter, client: socket.socket) -> None:
    port = free_port()
    send = talk(client, port)
    domain, table = adapter.attach(adapter.guest(address=f"127.0.0.1:{port}"))
    assert table.harvest_status(CLEAN) == -errno.EINVAL  # the log is off
    domain.enable_log()
    with pytest.raises(HypervisorError):
        domain.enable_log()
    assert table.harvest(CLEAN) == set()
    send("a 1 set k v")
    client.recv(2048)
    dirty = table.harvest(PEEK)
    assert 0 in dirty
    assert len(dirty) == 3  # the header, the client, the value
    assert table.harvest(PEEK) == dirty
    bitmap = table.bitmap()
    bitmap[15] = 1 << 63
    assert table.harvest(CLEAN, bitmap) == dirty | {1023}  # ORed into what is there
    assert table.harvest(PEEK) == set()
    assert table.harvest_status(FINAL) == -errno.EINVAL  # the guest runs
    assert table.harvest_status(CLEAN, 1000) == -errno.EINVAL  # not its size
    send("a 2 get k")
    client.recv(2048)
    assert table.suspend() == 0
    assert table.harvest(FINAL) == set(sorted(dirty)[:2])  # the header and the client
    assert table.harvest(FINAL) == set()


def test_no_write_is_lost_between_clean_and_store(adapter: Adapter) -> None:
    """A copy kept up to date by the log alone, while the guest writes, ends up equal to its memory."""
    domain, table = adapter.attach(adapter.guest("dirty:300@100"))
    domain.enable_log()
    bases = [table.map(first, EXTENT_PAGES) for first in range(0, 1024, EXTENT_PAGES)]
    view = [ffi.buffer(base, EXTENT_PAGES * PAGE_SIZE) for base in bases]
    copy = [bytearray(part) for part in view]

    def fetch(pfns: set[int]) -> None:
        for pfn in pfns:
            extent, at = divmod(pfn, EXTENT_PAGES)
            copy[extent][at * PAGE_SIZE : (at + 1) * PAGE_SIZE] = page(bases[extent], at)

    dirt = 0
    while dirt < 2000:
        pfns = table.harvest(CLEAN)
        dirt += len(pfns)
        fetch(pfns)
    assert table.suspend() == 0
    last = table.harvest(FINAL)
    fetch(last)
    assert [bytes(part) for part in view] == [bytes(part) for part in copy]
    assert table.harvest(PEEK) == set()


def test_no_step_stores_while_a_harvest_is_under_way(adapter: Adapter) -> None:
    """The lock that CLEAN takes is the one that a step stores and marks under."""
    info = adapter.guest("dirty:100@200")
    domain, table = adapter.attach(info)
    domain.enable_log()
    header = table.map(0, 1)
    control = lib.client_control(domain._client)  # type: ignore[attr-defined]  # embedded's own
    harvested = threading.Thread(target=table.harvest, args=(CLEAN,))
    lib.log_lock(control)
    try:
        before = page(header, 0)
        harvested.start()
        for _ in range(100):  # round trips to the host: some ten milliseconds, hundreds of steps
            toolstack.look(info)
        assert page(header, 0) == before
        assert harvested.is_alive()
    finally:
        lib.log_unlock(control)
        harvested.join()
    wait_step(info, toolstack.look(info).step + 100)


# ---- mappings and the p2m ----


def test_a_stale_mapping_shows_the_old_frame_and_is_paid_for(adapter: Adapter) -> None:
    info = adapter.guest("dirty:1023@5")
    domain, table = adapter.attach(info)
    domain.enable_log()
    wait_step(info, 1023)  # every one of its pages has been written
    base = table.map(512, 512)
    out = list(range(600, 700))
    assert toolstack.balloon_out(info, out) == len(out)
    before = [page(base, pfn - 512) for pfn in out]
    assert all(any(content) for content in before)  # the frames are still there
    wait_step(info, toolstack.look(info).step + 1000)
    assert [page(base, pfn - 512) for pfn in out] == before  # and nobody else's
    assert table.p2m_changes() == set(out)
    assert table.p2m_changes() == set()
    assert table.types(599, 600, 699, 700, 5000) == [NOTAB, XTAB, XTAB, NOTAB, XTAB]
    assert toolstack.balloon_in(info, out) == 0  # and still charged to the guest
    assert table.unmap(base, 512) == 0
    table.harvest(CLEAN)
    assert toolstack.balloon_in(info, [out[0]]) == 1
    assert table.p2m_changes() == {out[0]}
    assert out[0] in table.harvest(PEEK)  # adding marks dirty
    new = table.map(512, 512)
    assert table.suspend() == 0
    assert (
        page(new, out[0] - 512) != before[0]
    )  # another frame: zeros, and at most a line written since
    assert page(new, out[0] - 512).count(0) >= PAGE_SIZE - 64 * 64
    assert table.resume() == 0


def test_removal_marks_clean(adapter: Adapter) -> None:
    info = adapter.guest()
    domain, table = adapter.attach(info)
    domain.enable_log()
    assert toolstack.balloon_out(info, [1000]) == 1
    assert toolstack.balloon_in(info, [1000]) == 1
    assert 1000 in table.harvest(PEEK)
    assert toolstack.balloon_out(info, [1000]) == 1
    assert 1000 not in table.harvest(PEEK)
    assert toolstack.look(info).info.ram_pages == 1023


def test_mappings_of_scattered_frames_show_each_its_page(adapter: Adapter) -> None:
    """After ballooning the p2m is no straight line; what pfn p shows is pfn p all the same."""
    info = adapter.guest("dirty:1000@5")
    domain, table = adapter.attach(info)
    pfns = random.Random(5).sample(range(1, 1024), 500)
    assert toolstack.balloon_out(info, pfns) == 500
    assert toolstack.balloon_in(info, sorted(pfns)) == 500
    wait_step(info, toolstack.look(info).step + 1000)
    domain.enable_log()
    whole = [table.map(first, EXTENT_PAGES) for first in (0, EXTENT_PAGES)]
    assert table.suspend() == 0
    for first in range(0, 1024, 8):  # the same pages through other mappings
        base = table.map(first, 8)
        for pfn in range(first, first + 8):
            shown = page(whole[pfn // EXTENT_PAGES], pfn % EXTENT_PAGES)
            assert shown == page(base, pfn - first)
        assert table.unmap(base, 8) == 0
    contents = {page(whole[pfn // EXTENT_PAGES], pfn % EXTENT_PAGES) for pfn in range(1024)}
    assert len(contents) > 900  # and they differ from one another


def test_bad_mapping_requests_are_refused(adapter: Adapter) -> None:
    _, table = adapter.attach(adapter.guest())
    base = ffi.new("void **")
    domain = table.table.domain
    for first, count in ((0, 0), (0, 513), (1024, 1), (1000, 25), (1 << 63, 1)):
        assert table.table.map(domain, first, count, base) == -errno.EINVAL
    good = table.map(0, 16)
    assert table.unmap(good, 16) == 0
    assert table.unmap(good, 16) == -errno.EINVAL
    assert table.table.types(domain, ffi.new("uint64_t[]", 1025), 1025) == -errno.E2BIG


def test_mappings_are_limited_and_come_free_again(adapter: Adapter) -> None:
    domain, table = adapter.attach(adapter.guest())
    bases = []
    base = ffi.new("void **")
    while (status := table.table.map(table.table.domain, 0, 8, base)) == 0:
        bases.append(base[0])
    assert status == -errno.ENOSPC
    assert (
        len(set(bases)) == len(bases) > 2 * (1024 // EXTENT_PAGES)
    )  # an old and a new one of each
    assert table.unmap(bases[1], 8) == 0
    assert page(table.map(8, 8), 0) == bytes(PAGE_SIZE)
    domain.close()
    assert domain.ended() is None
    with pytest.raises(HypervisorError, match="closed"):
        assert domain.table


@pytest.mark.slow  # waits for the adapter's own limit of a second, twice
def test_a_stopped_host_hangs_no_mapping(adapter: Adapter) -> None:
    info = adapter.guest("dirty:1023@5")
    _, table = adapter.attach(info)
    wait_step(info, 1023)
    kept = table.map(512, 8)
    stop_host(info)
    base = ffi.new("void **")
    assert table.table.map(table.table.domain, 0, 8, base) == -errno.ETIMEDOUT
    assert table.unmap(kept, 8) == 0
    os.kill(info.host.pid, signal.SIGCONT)
    for first in (8, 512, 16):  # no late answer is taken for one of these
        mapped = table.map(first, 8)
        other = table.map(first, 4)
        assert table.suspend() == 0
        assert page(mapped, 1) == page(other, 1) != bytes(PAGE_SIZE)
        assert table.resume() == 0
        assert table.unmap(mapped, 8) == table.unmap(other, 4) == 0
    assert (
        toolstack.balloon_out(info, range(512, 520))
        == toolstack.balloon_in(info, range(512, 520))
        == 8
    )


# ---- suspend ----


def test_a_suspended_guest_stands_still_and_goes_on(adapter: Adapter) -> None:
    info = adapter.guest("dirty:100@100")
    _, table = adapter.attach(info)
    base = table.map(0, 1)
    for _ in range(20):
        assert table.suspend() == 0
        header = page(base, 0)
        context = Context.parse(table.context())
        assert context.step == int.from_bytes(header[8:16], "little")
        assert (context.uuid, context.nr_pfns, context.program) == (
            info.uuid,
            1024,
            "dirty:100@100",
        )
        assert toolstack.look(info).step == context.step
        assert page(base, 0) == header
        assert table.resume() == 0
        assert table.resume() == 0  # idempotent
        wait_step(info, context.step + 1)


def test_only_a_suspended_guest_has_a_context_and_closes_output(adapter: Adapter) -> None:
    _, table = adapter.attach(adapter.guest())
    buffer = ffi.new("uint8_t[]", 4096)
    closed = ffi.new("uint64_t *")
    assert table.table.context(table.table.domain, buffer, 4096) == -errno.EINVAL
    assert table.table.output_close(table.table.domain, closed) == -errno.EINVAL
    assert table.suspend() == 0
    assert table.table.context(table.table.domain, buffer, 10) == -errno.ENOSPC


def test_a_suspend_that_times_out_is_withdrawn(adapter: Adapter) -> None:
    info = adapter.guest("dirty:100@100")
    _, table = adapter.attach(info)
    stop_host(info)
    assert table.suspend(SECOND // 20) == -errno.ETIMEDOUT
    os.kill(info.host.pid, signal.SIGCONT)
    wait_step(info, toolstack.look(info).step + 100)  # it runs
    assert table.suspend() == 0


def test_the_operators_pause_outlasts_engines(adapter: Adapter) -> None:
    info = adapter.guest("dirty:100@100")
    domain, table = adapter.attach(info)
    domain.pause()
    assert table.suspend() == 0  # it stands already
    assert table.resume() == 0
    domain.close()
    view = toolstack.look(info)
    assert view.paused
    _, table = adapter.attach(info)
    assert table.suspend() == 0
    assert Context.parse(table.context()).step == view.step
    assert table.resume() == 0
    toolstack.unpause(info)
    wait_step(info, view.step + 1)


# ---- ends ----


@pytest.mark.parametrize("verb", ["poweroff", "crash"])
def test_an_end_is_told_from_a_loss(adapter: Adapter, client: socket.socket, verb: str) -> None:
    port = free_port()
    domain, table = adapter.attach(adapter.guest(address=f"127.0.0.1:{port}"))
    assert domain.ended() is None
    talk(client, port)(f"a 1 {verb}")
    assert select.select([domain], [], [], PATIENCE)[0]
    assert domain.ended() is EndReason(verb)
    assert table.suspend() == -errno.ESHUTDOWN


def test_destroyed(adapter: Adapter) -> None:
    info = adapter.guest()
    domain, table = adapter.attach(info)
    toolstack.destroy(info)
    assert select.select([domain], [], [], PATIENCE)[0]
    assert domain.ended() is EndReason.DESTROYED
    assert table.suspend() == -errno.ESHUTDOWN
    assert adapter.processes[0].wait(PATIENCE) == 0


@pytest.mark.parametrize("suspended", [False, True])
def test_a_lost_host_hangs_nobody(adapter: Adapter, suspended: bool) -> None:
    info = adapter.guest()
    domain, table = adapter.attach(info)
    domain.enable_log()
    base = table.map(0, 16)
    if suspended:
        assert table.suspend() == 0
    header = page(base, 0)
    os.kill(info.host.pid, signal.SIGKILL)
    assert select.select([domain], [], [], PATIENCE)[0]
    assert domain.ended() is EndReason.HOST_LOST
    assert table.resume() == -errno.EHOSTDOWN
    assert table.suspend() == -errno.EHOSTDOWN
    assert table.table.map(table.table.domain, 0, 1, ffi.new("void **")) == -errno.EHOSTDOWN
    assert page(base, 0) == header  # what is mapped can still be read
    assert table.unmap(base, 16) == 0
    with pytest.raises(HypervisorError):
        domain.pause()


# ---- detaching ----

ENGINE = """
import sys
from pathlib import Path
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.lib import ffi
domain = EmbeddedHypervisor("primary", Path(sys.argv[1])).attach(int(sys.argv[2]))
domain.enable_log()
table = ffi.cast("struct ck_hypervisor *", domain.table)
assert table.map(table.domain, 512, 512, ffi.new("void **")) == 0
assert table.suspend(table.domain, 10**10) == 0
assert table.output_close(table.domain, ffi.new("uint64_t *")) == 0
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_death_of_an_engine_leaves_the_guest_running_and_its_output_shut(
    adapter: Adapter, tmp_path: Path, client: socket.socket
) -> None:
    port = free_port()
    info = adapter.guest(address=f"127.0.0.1:{port}")
    with subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(tmp_path), str(info.domid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "ready\n"
        talk(client, port)("a 1 ping")  # the guest is suspended: not yet
        assert toolstack.look(info).step == 0
        engine.kill()
    wait_step(info, 1)  # resumed without the engine
    view = toolstack.look(info)
    assert (view.engine, view.shut, view.held) == (False, True, 1)
    assert silent(client)
    assert toolstack.balloon_out(info, [900]) == 1
    assert toolstack.balloon_in(info, [900]) == 1  # its mapping holds nothing back any more
    domain, table = adapter.attach(info)
    domain.enable_log()  # the dead engine's log is over
    assert table.harvest(PEEK) == set()
    assert domain.output.stats().held_packets == 1
    second = table.epoch()
    assert second == 2  # numbers go on
    domain.output.release(second)
    assert client.recv(2048) == b"a 1 1 ok"


LOCKER = """
import sys
from pathlib import Path
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.lib import lib
domain = EmbeddedHypervisor("primary", Path(sys.argv[1])).attach(int(sys.argv[2]))
lib.log_lock(lib.client_control(domain._client))
print("ready", flush=True)
sys.stdin.read()
"""


def test_an_engine_that_dies_in_a_harvest_does_not_stop_the_guest(
    adapter: Adapter, tmp_path: Path
) -> None:
    info = adapter.guest("dirty:100@100")
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(tmp_path), str(info.domid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "ready\n"
        engine.kill()
    wait_step(info, toolstack.look(info).step + 100)
    domain, table = adapter.attach(info)
    domain.enable_log()
    while not table.harvest(CLEAN):
        pass


# ---- output ----


def test_output_leaves_by_release_in_epoch_order(adapter: Adapter, client: socket.socket) -> None:
    port = free_port()
    send = talk(client, port)
    domain, table = adapter.attach(adapter.guest(address=f"127.0.0.1:{port}"))
    output = domain.output
    assert output.depth > 1
    assert not output.stats().shut
    send("a 1 ping")
    assert client.recv(2048) == b"a 1 1 ok"  # never shut yet
    assert table.epoch() == 1
    assert output.stats().shut
    for seq in (2, 3):
        send(f"a {seq} ping")
        wait_held(domain, seq - 1)
        assert table.epoch() == seq
    send("a 4 ping")
    wait_held(domain, 3)
    assert silent(client)
    output.release(1)
    assert output.stats().held_packets == 3  # epoch 1 had none
    output.release(2)
    assert client.recv(2048) == b"a 2 2 ok"
    output.release(99)  # nothing beyond what is closed
    assert client.recv(2048) == b"a 3 3 ok"
    assert output.stats().held_packets == 1
    assert table.epoch() == 4
    output.release(4)
    assert client.recv(2048) == b"a 4 4 ok"
    assert output.stats().released_packets == 4


def test_open_lets_all_out_and_stays_open_until_the_next_epoch(
    adapter: Adapter, client: socket.socket
) -> None:
    port = free_port()
    send = talk(client, port)
    domain, table = adapter.attach(adapter.guest(address=f"127.0.0.1:{port}"))
    table.epoch()
    send("a 1 ping")
    wait_held(domain, 1)
    domain.output.open()
    assert client.recv(2048) == b"a 1 1 ok"
    assert not domain.output.stats().shut
    send("a 2 ping")
    assert client.recv(2048) == b"a 2 2 ok"
    table.epoch()
    send("a 3 ping")
    wait_held(domain, 1)
    assert domain.output.stats().shut


def test_output_beyond_the_limit_is_dropped_and_counted_never_sent(
    adapter: Adapter, client: socket.socket
) -> None:
    port = free_port()
    info = adapter.guest(address=f"127.0.0.1:{port}", output_limit=1000)
    domain, table = adapter.attach(info)
    table.epoch()
    for seq in range(1, 11):
        talk(client, port)(f"a {seq} ping")
        wait_step(info, seq)
    stats = domain.output.stats()
    assert stats.held_bytes <= stats.limit_bytes == 1000
    assert stats.held_packets + stats.dropped_packets == 10
    assert stats.dropped_packets > 0
    domain.output.release(table.epoch())
    received = [client.recv(2048) for _ in range(stats.held_packets)]
    assert received == [f"a {seq} {seq} ok".encode() for seq in range(1, stats.held_packets + 1)]
    assert domain.output.stats().dropped_packets == stats.dropped_packets
