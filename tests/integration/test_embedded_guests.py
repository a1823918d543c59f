"""Embedded guests as processes: replay, activation elsewhere, reboot, fencing, faults, the command."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from checkpointd import faults
from checkpointd.cli.main import main
from checkpointd.errors import HypervisorError, StateError, UsageError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.fence import EmbeddedFence
from checkpointd.hypervisor.embedded.fresh import FreshGuest
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.kv import KvClient, Load, UdpTransport
from checkpointd.hypervisor.embedded.lib import ffi
from checkpointd.hypervisor.embedded.replay import replay
from checkpointd.hypervisor.port import PAGE_SIZE, EndReason
from checkpointd.stream.writer import write_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.hypervisor.port import Domain, DomainInfo

PATIENCE = 20.0  # s; generous, and only ever waited out by a failing test
SECOND = 1_000_000_000  # ns


@dataclass
class Image:
    """A guest's whole state, read through the port while it stood still."""

    memory: bytes
    populated: bytes
    context: bytes
    static: bytes

    @property
    def step(self) -> int:
        return int.from_bytes(self.memory[8:16], "little")

    def memfd(self) -> int:
        fd = os.memfd_create("test-replica", os.MFD_CLOEXEC)
        with open(fd, "wb", closefd=False) as file:
            file.write(self.memory)
        return fd


def capture(domain: Domain, *, resume: bool = True) -> Image:
    table = ffi.cast("struct ck_hypervisor *", domain.table)
    nr = domain.info.nr_pfns
    assert table.suspend(table.domain, 10 * SECOND) == 0
    memory, populated = bytearray(nr * PAGE_SIZE), bytearray((nr + 63) // 64 * 8)
    base = ffi.new("void **")
    for first in range(0, nr, 512):
        count = min(512, nr - first)
        words = ffi.new("uint64_t[]", list(range(first, first + count)))
        assert table.types(table.domain, words, count) == 0
        assert table.map(table.domain, first, count, base) == 0
        for index, word in enumerate(words):
            if word >> 60 == 0:
                pfn = first + index
                address = ffi.cast("uint8_t *", base[0]) + index * PAGE_SIZE
                memory[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE] = ffi.buffer(address, PAGE_SIZE)
                populated[pfn // 8] |= 1 << pfn % 8
        assert table.unmap(table.domain, base[0], count) == 0
    buffer = ffi.new("uint8_t[]", 4096)
    size = table.context(table.domain, buffer, 4096)
    assert size > 0
    if resume:
        assert table.resume(table.domain) == 0
    return Image(
        bytes(memory), bytes(populated), bytes(ffi.buffer(buffer, size)), domain.static_records()
    )


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        return int(udp.getsockname()[1])


class Side:
    """A namespace with guests in it, all gone when it is closed."""

    def __init__(self, run_dir: Path, namespace: str) -> None:
        self.hypervisor = EmbeddedHypervisor(namespace, run_dir)
        self.processes: list[subprocess.Popen[str]] = []

    def guest(self, program: str = "kv", pages: int = 1024, **options: Any) -> DomainInfo:
        options = {"address": f"127.0.0.1:{free_port()}", **options}
        guest = FreshGuest(str(self.hypervisor.namespace), program, pages * PAGE_SIZE, **options)
        process, info = toolstack.create(guest)
        self.processes.append(process)
        return info

    def log(self, info: DomainInfo) -> Path:
        return self.hypervisor.namespace / str(info.domid) / "input.log"

    def close(self) -> None:
        for info in self.hypervisor.domains():
            wait_exit(info.host.pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate(timeout=PATIENCE)


def wait_exit(pid: int, kill: int | None = None) -> None:
    """Until the process `pid` has exited, reaped or not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if kill is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, kill)
        assert select.select([pidfd], [], [], PATIENCE)[0]
    finally:
        os.close(pidfd)


def stop_host(info: DomainInfo) -> None:
    """SIGSTOP, and wait until every thread has stopped."""
    os.kill(info.host.pid, signal.SIGSTOP)
    tasks = list(Path(f"/proc/{info.host.pid}/task").iterdir())
    while not all(") T" in (task / "stat").read_text() for task in tasks):
        os.sched_yield()


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    before = len(os.listdir("/proc/self/fd"))
    primary, secondary = Side(tmp_path, "primary"), Side(tmp_path, "secondary")
    try:
        yield primary, secondary
    finally:
        primary.close()
        secondary.close()
        faults.arm("")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def primary(sides: tuple[Side, Side]) -> Side:
    return sides[0]


@pytest.fixture
def secondary(sides: tuple[Side, Side]) -> Side:
    return sides[1]


@pytest.fixture
def transports() -> Iterator[list[UdpTransport]]:
    opened: list[UdpTransport] = []
    yield opened
    for transport in opened:
        transport.close()


def client_of(info: DomainInfo, transports: list[UdpTransport], name: str = "c") -> KvClient:
    transports.append(UdpTransport(str(info.config["address"])))
    return KvClient(transports[-1], name, patience=PATIENCE)


def wait_step(info: DomainInfo, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while toolstack.look(info).step < step:
        assert time.monotonic() < deadline, f"the guest does not come to step {step}"


# ---- the oracle ----


def test_replay_computes_a_kv_guests_memory(primary: Side, transports: list[UdpTransport]) -> None:
    info = primary.guest(pages=2048)
    client = client_of(info, transports)
    rng = random.Random(11)
    for turn in range(150):
        verb = rng.choice(["set", "incr", "get", "ping", "nonsense"])
        key = f"{'n' if verb == 'incr' else 's'}{rng.randrange(40)}"
        client.request(verb, key, *([f"value {turn}"] if verb == "set" else []))
    transports[0].send(b"\0\xff garbage")
    out = rng.sample(range(2048), 300)
    moved = toolstack.balloon_out(info, out)
    assert 0 < moved < 300  # it keeps what its store lives in
    assert toolstack.balloon_in(info, out[:100]) > 0
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        image = capture(domain)
    client.set("after", "the image")
    with replay([primary.log(info)], image.step) as memory:
        assert memory.context == image.context
        assert not memory.diff(image.memory, image.populated)
        damaged = bytearray(image.memory)
        damaged[0] ^= 1
        assert memory.diff(damaged, image.populated).changed == [0]
        fewer = bytes([image.populated[0] & ~2]) + image.populated[1:]
        assert memory.diff(image.memory, fewer).missing == [1]
    with replay([primary.log(info)]) as memory:
        assert memory.step == image.step + 1
        assert memory.diff(image.memory, image.populated).changed  # one step on is another memory
    with pytest.raises(StateError, match=f"no input for step {image.step + 2}"):
        replay([primary.log(info)], image.step + 2)


def test_replay_computes_a_dirty_guests_memory(primary: Side) -> None:
    info = primary.guest("dirty:500@100")
    wait_step(info, 1000)
    pfns = random.Random(3).sample(range(1, 1024), 400)
    assert toolstack.balloon_out(info, pfns) == 400
    wait_step(info, toolstack.look(info).step + 500)
    assert toolstack.balloon_in(info, pfns[:200]) == 200
    wait_step(info, toolstack.look(info).step + 500)
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        image = capture(domain)
        later = capture(domain)
    for state in (image, later):
        with replay([primary.log(info)], state.step) as memory:
            assert memory.context == state.context
            assert not memory.diff(state.memory, state.populated)


# ---- activation ----


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
    from dataclasses import asdict

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


# ---- ends ----


def test_a_reboot_is_a_new_domain_in_the_same_process(
    primary: Side, transports: list[UdpTransport]
) -> None:
    info = primary.guest(domid=4, name="web")
    other = primary.guest(domid=5)
    client = client_of(info, transports)
    client.incr("n")
    domain = primary.hypervisor.attach(4)
    with closing(domain):
        transports[0].send(b"c 2 reboot")
        assert select.select([domain], [], [], PATIENCE)[0]
        assert domain.ended() is EndReason.REBOOT
    answer = client_of(info, transports, "d").incr("n")  # retried until it is up again
    assert (answer.step, answer.value) == (1, "1")  # fresh RAM
    found = primary.hypervisor.find(uuid=info.uuid)
    assert (found.domid, found.name, found.config) == (6, "web", info.config)  # 5 is taken
    assert (found.host.pid, found.host.start_time) == (info.host.pid, info.host.start_time)
    assert primary.hypervisor.domains() == [other, found]
    with closing(EmbeddedFence(info.host)) as fence:  # made for the domain before the reboot
        assert fence.fence(PATIENCE).fenced
    assert primary.hypervisor.domains() == [other]


def test_many_guests_at_once(primary: Side, transports: list[UdpTransport]) -> None:
    guests = [primary.guest(pages=64) for _ in range(6)]
    assert [info.domid for info in primary.hypervisor.domains()] == [1, 2, 3, 4, 5, 6]
    for turn in range(1, 4):
        for index, info in enumerate(guests):
            assert client_of(info, transports, f"c{turn}").incr(f"k{index}").value == str(turn)


def test_the_load_sees_no_violation_and_loses_nothing(
    primary: Side, transports: list[UdpTransport]
) -> None:
    info = primary.guest()
    transports += [UdpTransport(str(info.config["address"])) for _ in range(3)]
    loads = [Load(transport, seed=seed) for seed, transport in enumerate(transports)]
    for load in loads:
        load.start()
    wait_step(info, 500)
    for load in loads:
        report = load.stop()
        assert report.violations == ()
        assert report.silent == 0
        assert report.answered > 50


# ---- the fence ----


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


# ---- faults ----


def test_faults_of_the_table(primary: Side) -> None:
    info = primary.guest()
    faults.arm("hv.harvest@2=fail,hv.suspend@2=fail+again,hv.map@3=kill-host")
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        domain.enable_log()
        table = ffi.cast("struct ck_hypervisor *", domain.table)
        bitmap = ffi.new("uint64_t[16]")
        results = [table.harvest(table.domain, bitmap, 1024, 1) for _ in range(3)]
        assert results == [0, -errno.EIO, 0]
        suspends = [table.suspend(table.domain, 10 * SECOND) for _ in range(3)]
        assert suspends == [0, -errno.EIO, -errno.EIO]
        base = ffi.new("void **")
        for _ in range(2):
            assert table.map(table.domain, 0, 1, base) == 0
        assert table.map(table.domain, 0, 1, base) == -errno.EHOSTDOWN
        assert domain.ended() is EndReason.HOST_LOST


def test_an_unknown_fault_point_is_refused(primary: Side) -> None:
    info = primary.guest()
    for spec in ("hv.harwest=fail", "hv.map=kill-nobody"):
        faults.arm(spec)
        with pytest.raises(UsageError):
            primary.hypervisor.attach(info.domid)
    assert not toolstack.look(info).engine


def test_input_is_in_the_log_before_the_guest_sees_it(
    primary: Side, transports: list[UdpTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.ENVIRONMENT, "host.input-logged@3=kill")
    info = primary.guest()
    monkeypatch.delenv(faults.ENVIRONMENT)
    client = client_of(info, transports)
    for _ in range(2):
        client.incr("n")
    transports[0].send(b"c 3 incr n")
    wait_exit(info.host.pid)
    path = primary.log(info)
    with replay([path]) as memory:
        assert memory.step == 3
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # as if it had died while writing
    with replay([path]) as memory:
        assert memory.step == 2
    path.write_bytes(whole[:-80] + b"?" + whole[-79:])
    with pytest.raises(StateError, match="damaged"):
        replay([path])


# ---- the command ----


def test_a_domid_is_one_hosts_and_a_dead_hosts_is_free(
    primary: Side, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = primary.guest(domid=9)
    assert main(["guest", "--domid", "9", "--run-dir", str(tmp_path)]) == 5
    assert "domain 9 is running already" in capsys.readouterr().err
    wait_exit(info.host.pid, signal.SIGKILL)
    first = primary.log(info).read_bytes()
    again = primary.guest(domid=9)
    assert again.uuid != info.uuid
    assert primary.log(info).with_name("input.log.old").read_bytes() == first


def test_all_bad_arguments_are_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "guest",
        "--program",
        "vk",
        "--memory",
        "5kB",
        "--domid",
        "0",
        "--run-dir",
        str(tmp_path),
    ]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "--program 'vk'" in said
    assert "--memory" in said
    assert "--domid" in said
    assert main(["guest", "--until", "3"]) == 2


def test_the_command_runs_a_guest_until_sigterm(
    primary: Side,
    tmp_path: Path,
    transports: list[UdpTransport],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [
        sys.executable,
        "-m",
        "checkpointd.cli.main",
        "guest",
        "--domid",
        "3",
        "--memory",
        "1MiB",
    ]
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [*command, "--listen", address, "--run-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "domid 3" in process.stdout.readline()
        info = primary.hypervisor.find(domid=3)
        client_of(info, transports).set("k", "v")
        domain = primary.hypervisor.attach(3)
        with closing(domain):
            image = capture(domain)
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=PATIENCE)[0] == "guest ended: destroyed\n"
            assert domain.ended() is EndReason.DESTROYED
    assert process.returncode == 0
    assert primary.hypervisor.domains() == []

    raw, stream, log = tmp_path / "raw", tmp_path / "stream", str(primary.log(info))
    raw.write_bytes(image.memory)
    words = list(range(256))
    with stream.open("wb") as file:
        write_image(file, image.static, [(words, image.memory)], image.context)
    for path in (raw, stream):
        assert main(["guest", "--replay", log, "--until", "1", "--compare", str(path)]) == 0
        assert "equal" in capsys.readouterr().out
        assert main(["guest", "--replay", log, "--until", "0", "--compare", str(path)]) == 1
        assert "different" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["guest", "--replay", log, "--out", str(out)]) == 0
    assert out.read_bytes() == image.memory
