"""What every adapter of the hypervisor port must do: attaching, suspending, ends, detaching."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hosts import PATIENCE, SECOND, free_port, wait_step
from port_adapters import CLEAN, CONTEXT_ROOM, PEEK, page, silent, talk

from checkpointd.errors import DomainBusyError, HypervisorError, NoSuchDomainError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.lib import ffi
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.port import EndReason

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from port_adapters import Adapter


def test_a_guest_is_found_by_domid_and_by_uuid(adapter: Adapter) -> None:
    info = adapter.guest(name="web")
    hypervisor = adapter.hypervisor
    assert [found.domid for found in hypervisor.domains() if found.uuid == info.uuid] == [
        info.domid
    ]
    found = hypervisor.find(domid=info.domid)
    assert found == hypervisor.find(uuid=info.uuid)
    assert (found.uuid, found.name, found.nr_pfns) == (info.uuid, "web", info.nr_pfns)
    assert found.hypervisor == hypervisor.name
    assert 0 < found.ram_pages <= found.nr_pfns
    with pytest.raises(NoSuchDomainError, match=rf"{info.domid} \(web"):
        hypervisor.find(domid=0x7FEE)


def test_one_engine_at_a_time(adapter: Adapter) -> None:
    info = adapter.guest()
    domain, _ = adapter.attach(info)
    with pytest.raises(DomainBusyError):
        adapter.hypervisor.attach(info.domid)
    domain.close()
    domain.close()  # idempotent
    adapter.attach(info)  # close() has detached when it returns


@pytest.mark.embedded_only("reads the embedded guest's own step counter")
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
    info = adapter.guest("dirty:100@100")
    _, table = adapter.attach(info)
    buffer = ffi.new("uint8_t[]", CONTEXT_ROOM)
    closed = ffi.new("uint64_t *")
    assert table.table.context(table.table.domain, buffer, CONTEXT_ROOM) == -errno.EINVAL
    assert table.table.output_close(table.table.domain, closed) == -errno.EINVAL
    assert table.suspend() == 0
    assert table.table.context(table.table.domain, buffer, 10) == -errno.ENOSPC
    assert table.context() == table.context()
    first = table.close_output()
    assert table.close_output() == first + 1
    assert table.resume() == 0
    adapter.wait_running(info)


def test_a_suspend_that_times_out_is_withdrawn(adapter: Adapter) -> None:
    info = adapter.guest("dirty:100@100")
    _, table = adapter.attach(info)
    adapter.stop(info)
    assert table.suspend(SECOND // 20) == -errno.ETIMEDOUT
    assert table.resume() == 0
    adapter.go_on(info)
    adapter.wait_running(info)
    assert table.suspend() == 0
    assert table.resume() == 0


@pytest.mark.embedded_only(
    "a paused Xen guest cannot bring its drivers to rest: it cannot be suspended"
)
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


@pytest.mark.embedded_only("the embedded guest is told by a datagram")
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
    adapter.destroy(info)
    assert select.select([domain], [], [], PATIENCE)[0]
    assert domain.ended() is EndReason.DESTROYED
    assert table.suspend() == -errno.ESHUTDOWN


@pytest.mark.embedded_only("Xen is the host: we are gone with it")
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


@pytest.mark.embedded_only("tests/xen has the same with the watcher")
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


@pytest.mark.embedded_only("Xen takes no lock that a process could die with")
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
