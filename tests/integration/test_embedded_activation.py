"""Embedded guests that go on elsewhere, and the fence that makes sure of their old hosts."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest
from embedded_sides import capture, client_of
from hosts import PATIENCE, stop_host, wait_exit, wait_step

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.fence import EmbeddedFence
from checkpointd.hypervisor.embedded.replay import replay
from checkpointd.hypervisor.port import PAGE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from embedded_sides import Side

    from checkpointd.hypervisor.embedded.kv import UdpTransport


def test_an_activated_guest_goes_on_where_its_replica_stood(
    primary: Side, secondary: Side, transports: list[UdpTransport], tmp_path: Path
) -> None:
    info = primary.guest(domid=4)
    client = client_of(info, transports)
    for _ in range(10):
        client.incr("n")
    toolstack.balloon_out(info, list(range(900, 950)))
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        image = capture(domain)
        lost = client.incr("n")  # beyond the replica: void, and executed anew
    fd = image.memfd()
    incoming = secondary.hypervisor.prepare(info, fd)
    assert secondary.hypervisor.domains() == []
    os.kill(info.host.pid, signal.SIGKILL)
    started = incoming.start(image.context, image.populated)
    incoming.discard()  # no longer ours to discard
    assert secondary.hypervisor.domains() == [started]
    assert (started.uuid, started.domid, started.ram_pages) == (info.uuid, 4, 1024 - 50)
    assert started.host.pid != info.host.pid
    again = client.incr("n")
    assert (lost.value, again.value) == ("11", "11")  # as if the lost one had never been
    assert toolstack.balloon_in(started, list(range(900, 950))) == 50
    domain = secondary.hypervisor.attach(4)
    with closing(domain):
        after = capture(domain)
    logs = [primary.log(info), secondary.log(started)]
    with replay(logs, after.step) as memory:
        assert memory.context == after.context
        assert not memory.diff(after.memory, after.populated)
        memory.write(tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == after.memory
    with replay(logs, image.step) as memory:
        assert not memory.diff(image.memory, image.populated)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as shared:
        assert (
            shared[: 512 * PAGE_SIZE] != image.memory[: 512 * PAGE_SIZE]
        )  # the image is its RAM now
    os.close(fd)


def test_a_torn_replica_is_not_run(
    primary: Side, secondary: Side, transports: list[UdpTransport]
) -> None:
    info = primary.guest()
    client_of(info, transports).incr("n")
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        image = capture(domain)
        client_of(info, transports, "d").incr("n")
        later = capture(domain)
    fd = image.memfd()
    try:
        for context, populated in ((later.context, image.populated), (image.context, bytes(128))):
            with pytest.raises(HypervisorError):
                secondary.hypervisor.prepare(info, fd).start(context, populated)
        with pytest.raises(HypervisorError, match="another guest"):
            secondary.hypervisor.prepare(replace(info, uuid=info.uuid[::-1]), fd).start(
                image.context, image.populated
            )
        with pytest.raises(HypervisorError, match="bitmap"):
            secondary.hypervisor.prepare(info, fd).start(image.context, image.populated[:-8])
    finally:
        os.close(fd)
    assert secondary.hypervisor.domains() == []


CREATOR = """
import json, os, sys
from pathlib import Path
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.place import parse_info
fd = os.memfd_create("image")
info = parse_info(json.loads(sys.argv[2]))
os.truncate(fd, info.nr_pfns * 4096)
incoming = EmbeddedHypervisor("secondary", Path(sys.argv[1])).prepare(info, fd)
print(incoming._process.pid, flush=True)
sys.stdin.read()
"""


def test_what_is_prepared_goes_with_its_creator(
    primary: Side, secondary: Side, tmp_path: Path
) -> None:
    info = primary.guest()
    with subprocess.Popen(
        [sys.executable, "-c", CREATOR, str(tmp_path), json.dumps(asdict(info))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as creator:
        assert creator.stdout is not None
        pid = int(creator.stdout.readline())
        os.kill(pid, 0)  # it is there
        creator.kill()
    wait_exit(pid)
    assert secondary.hypervisor.domains() == []


def test_an_activated_guest_may_begin_paused(primary: Side, secondary: Side) -> None:
    info = primary.guest("dirty:10@100")
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        image = capture(domain)
    toolstack.destroy(info)
    wait_exit(info.host.pid)
    fd = image.memfd()
    started = secondary.hypervisor.prepare(info, fd).start(
        image.context, image.populated, paused=True
    )
    os.close(fd)
    view = toolstack.look(started)
    assert (view.paused, view.step) == (True, image.step)
    toolstack.unpause(started)
    wait_step(started, image.step + 1)


def test_fencing_a_live_host(primary: Side) -> None:
    info = primary.guest()
    with closing(EmbeddedFence(info.host)) as fence:
        view = fence.probe(PATIENCE)
        assert (view.alive, view.engine_attached) == (True, False)
        with closing(primary.hypervisor.attach(info.domid)):
            assert fence.probe(PATIENCE).engine_attached
            result = fence.fence(PATIENCE)
        assert result.fenced
        assert "at our order" in result.detail
        assert fence.probe(PATIENCE).alive is False
        assert fence.fence(PATIENCE).fenced  # it stays so
    assert primary.hypervisor.domains() == []


def test_fencing_a_stopped_host(primary: Side) -> None:
    info = primary.guest()
    stop_host(info)
    with closing(EmbeddedFence(info.host)) as fence:
        view = fence.probe(0.05)
        assert (view.alive, view.engine_attached) == (True, None)
        result = fence.fence(1.0)
    assert result.fenced
    assert "killed" in result.detail
    assert primary.hypervisor.domains() == []


def test_fencing_a_host_that_is_gone(primary: Side) -> None:
    info = primary.guest()
    with closing(EmbeddedFence(info.host)) as before:
        wait_exit(info.host.pid, signal.SIGKILL)
        with closing(EmbeddedFence(info.host)) as after:
            for fence in (before, after):
                assert fence.probe(PATIENCE).alive is False
                assert fence.fence(PATIENCE).fenced


def test_a_reused_pid_is_not_fenced(primary: Side) -> None:
    info = primary.guest()
    impostor = replace(info.host, start_time=info.host.start_time - 1)
    with closing(EmbeddedFence(impostor)) as fence:
        assert fence.fence(PATIENCE).fenced  # the host it was made for is gone
    assert toolstack.look(info).step == 0  # and who has its number now is left alone


def test_a_host_of_another_boot_is_not_fenced(primary: Side) -> None:
    info = primary.guest()
    with closing(EmbeddedFence(replace(info.host, boot_id="another"))) as fence:
        assert fence.probe(PATIENCE).alive is None
        result = fence.fence(PATIENCE)
    assert not result.fenced
    assert "another machine" in result.detail
    toolstack.look(info)
