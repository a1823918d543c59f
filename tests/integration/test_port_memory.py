"""What every adapter of the hypervisor port must do: the dirty log, mappings and the p2m."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from hosts import free_port, stop_host, wait_step
from port_adapters import CLEAN, FINAL, NOTAB, PEEK, XTAB, page, talk

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.lib import ffi, lib
from checkpointd.hypervisor.port import EXTENT_PAGES, PAGE_SIZE

if TYPE_CHECKING:
    import socket

    from port_adapters import Adapter


@pytest.mark.embedded_only(
    "the embedded guest's pages are counted one by one; test_what_a_harvest_refuses is for all"
)
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
    bitmap.add(1023)
    assert table.harvest(CLEAN, bitmap) == dirty | {1023}  # ORed into what is there
    assert table.harvest(PEEK) == set()
    assert table.harvest_status(FINAL) == -errno.EINVAL  # the guest runs
    assert table.harvest_status(CLEAN, 1000) == -errno.EINVAL  # not its size
    send("a 2 get k")
    client.recv(2048)
    assert table.suspend() == 0
    assert table.harvest(FINAL) == set(sorted(dirty)[:2])  # the header and the client
    assert table.harvest(FINAL) == set()


def test_what_a_harvest_refuses(adapter: Adapter) -> None:
    domain, table = adapter.attach(adapter.guest("dirty:100@100"))
    assert table.harvest_status(CLEAN) == -errno.EINVAL  # the log is off
    domain.enable_log()
    with pytest.raises(HypervisorError):
        domain.enable_log()
    assert table.harvest_status(FINAL) == -errno.EINVAL  # the guest runs
    assert table.harvest_status(CLEAN, 1000) == -errno.EINVAL  # not its size
    while not table.harvest(CLEAN):
        pass
    assert table.suspend() == 0
    dirty = table.harvest(PEEK)
    assert table.harvest(PEEK) == dirty  # it stands still, and its log is kept
    assert table.harvest(FINAL) >= dirty
    assert (
        len(table.harvest(FINAL)) <= 1
    )  # the adapter may have marked one itself, to see that the log is whole
    assert table.resume() == 0


@pytest.mark.embedded_only("tests/xen compares whole guests after a failover")
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


@pytest.mark.embedded_only("the lock is the embedded host's own")
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


@pytest.mark.embedded_only("tests/xen/inside/test_invalidation.py is the same for Xen")
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


@pytest.mark.embedded_only("the toolstack of Xen cannot name the page that a guest gives back")
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


@pytest.mark.embedded_only("the toolstack of Xen cannot name the pages that a guest gives back")
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
    info = adapter.guest()
    _, table = adapter.attach(info)
    base = ffi.new("void **")
    domain = table.table.domain
    end = info.nr_pfns
    for first, count in ((0, 0), (0, 513), (end, 1), (end - 24, 25), ((1 << 64) - 1, 2)):
        assert table.table.map(domain, first, count, base) == -errno.EINVAL
    assert table.table.types(domain, ffi.new("uint64_t[]", 1025), 1025) == -errno.E2BIG


@pytest.mark.embedded_only("on Xen a mapping is the kernel's, and to end none is no error there")
def test_a_mapping_ends_once(adapter: Adapter) -> None:
    _, table = adapter.attach(adapter.guest())
    good = table.map(0, 16)
    assert table.unmap(good, 16) == 0
    assert table.unmap(good, 16) == -errno.EINVAL


@pytest.mark.embedded_only("dom0 has no limit that a test could reach")
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


@pytest.mark.embedded_only("Xen is the host")
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
