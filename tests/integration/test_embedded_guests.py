"""Embedded guests as processes: reboot, load, faults, the command."""

from __future__ import annotations

import errno
import select
import signal
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from embedded_sides import capture, client_of
from hosts import PATIENCE, SECOND, free_port, wait_exit, wait_step
from plain_bitmap import PlainBitmap

from checkpointd import faults
from checkpointd.cli.main import main
from checkpointd.errors import UsageError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.fence import EmbeddedFence
from checkpointd.hypervisor.embedded.kv import Load, UdpTransport
from checkpointd.hypervisor.embedded.lib import ffi
from checkpointd.hypervisor.port import EndReason
from checkpointd.stream.writer import write_image

if TYPE_CHECKING:
    from pathlib import Path

    from embedded_sides import Side


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


def test_faults_of_the_table(primary: Side) -> None:
    info = primary.guest()
    faults.arm("hv.harvest@2=fail,hv.suspend@2=fail+again,hv.map@3=kill-host")
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        domain.enable_log()
        table = ffi.cast("struct ck_hypervisor *", domain.table)
        bitmap = PlainBitmap(ffi, 1024)
        results = [table.harvest(table.domain, bitmap.pointer, 1) for _ in range(3)]
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
