"""One host of the lab: a QEMU process that runs Xen. Killing it is a power failure."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from lab import fence, image, needs
from lab.image import run
from lab.places import HOSTS, LINK_NET, LabError
from lab.plug import PATIENCE, Process, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lab.places import Place, Suite

BOOT_LIMIT = 900.0  # s from power on to a working `xl`; 40 s alone on an idle machine, 100 s for two on two cores
OFF_LIMIT = 300.0  # s from `poweroff` to its end, with guests to shut down
COMMAND_LIMIT = 600.0  # s; commands in software emulation are slow, but not that slow
MONITOR_LIMIT = 30.0  # s for an answer of QEMU's monitor
KEEP_LIMIT = 300.0  # s to write a host's memory to its disk, some hundred MiB
KEPT = "ready"  # QEMU's name for that state
# Processors of a host, unless told otherwise. Two hosts of two on a machine of two wait for each other's locks most of
# the time: they boot in half the time with one each.
CPUS = 1
TRANSLATED = 256  # MiB for translated code; QEMU would take 1 GiB, and is no faster with it

XEN_LINE = "dom0_mem=1024M,max:1024M console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all"
KERNEL_LINE = "root=/dev/sda rw console=hvc0 mitigations=off quiet"


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Machine:
    place: Place
    name: str

    def __post_init__(self) -> None:
        if self.name not in HOSTS:
            raise LabError(f"no host {self.name!r}: there are {' and '.join(HOSTS)}")

    @property
    def address(self) -> str:
        """On the replication link."""
        return f"{LINK_NET}.{HOSTS[self.name]}"

    @property
    def record(self) -> Record | None:
        return Record.read(self.place.run, self.name)

    @property
    def serial(self) -> Path:
        """What Xen and dom0's kernel said."""
        return self._file("serial")

    def _file(self, suffix: str) -> Path:
        return self.place.run / f"{self.name}.{suffix}"

    # -- power -------------------------------------------------------------------------------------------------------

    def power_on(
        self, suite: Suite, made: Path, *, cpus: int = CPUS, kept: bool = False
    ) -> None:
        """Returns as soon as QEMU runs; `made`: the suite's image directory. A host whose power was cut finds its disk
        as it was, see forget_disk(); with `kept`, both disk and memory are as they were at keep().
        """
        if self.record:
            raise LabError(f"host {self.name} is on already")
        last = Record.last(self.place.run, self.name)
        if last and last.facts["image"] != str(made):
            self.forget_disk()  # it lies over an image that is no more
            last = None
        kept = kept and last is not None and last.facts["cpus"] == cpus
        fence_port = fence.ensure(self.place)
        disk = self._file("qcow2")
        if not disk.exists():
            run(
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                made / "dom0.img",
                disk,
            )
        for suffix in ("serial", "monitor", "pid"):
            self._file(suffix).unlink(missing_ok=True)
        run(*self._qemu(suite, made, disk, fence_port, cpus), *(["-loadvm", KEPT] if kept else []))
        process = Process.of(int(self._file("pid").read_text()))
        facts = {
            "suite": suite.name,
            "image": str(made),
            "ssh_port": self._forwarded_port(),
            "cpus": cpus,
            "kept": kept,
        }
        Record(self.name, process, facts).write(self.place.run)

    def _qemu(
        self, suite: Suite, made: Path, disk: Path, fence_port: int, cpus: int
    ) -> list[str]:
        number = HOSTS[self.name]
        (peer,) = (name for name in HOSTS if name != self.name)
        line = (
            f"{KERNEL_LINE} lab_name={self.name} lab_address={self.address} lab_fence={fence_port}"
        )
        # A wire of datagrams: either end may vanish and come back. Nothing is lost on it while both are there.
        ends = (
            f"local.path={self._file('link')},remote.path={Machine(self.place, peer)._file('link')}"
        )
        return [
            "qemu-system-x86_64", "-daemonize", "-pidfile", str(self._file("pid")),
            # TCG: alike on every machine. The CPU has what Xen needs for PVH guests; `max` crashes dom0's kernel.
            "-accel", f"tcg,thread=multi,tb-size={TRANSLATED}", "-cpu", "qemu64,+svm,+npt",
            "-smp", str(cpus), "-m", str(suite.memory),
            "-display", "none", "-no-reboot",
            "-kernel", str(made / "xen.elf"), "-append", XEN_LINE,
            "-initrd", f"{made / 'vmlinuz'} {line},{made / 'initrd.img'}",
            # AHCI and e1000: virtio does not work under a PV dom0. writeback: what dom0 synced survives a power cut.
            "-drive", f"file={disk},format=qcow2,if=none,id=disk,cache=writeback",
            "-device", "ahci,id=ahci", "-device", "ide-hd,drive=disk,bus=ahci.0",
            "-netdev", "user,id=user,hostfwd=tcp:127.0.0.1:0-:22",
            "-device", f"e1000,netdev=user,mac=52:54:00:00:00:{number:02x}",
            "-netdev", f"dgram,id=link,local.type=unix,remote.type=unix,{ends}",
            "-device", f"e1000,netdev=link,mac=52:54:00:00:01:{number:02x}",
            "-monitor", f"unix:{self._file('monitor')},server=on,wait=off",
            "-serial", f"file:{self.serial}",
        ]  # fmt: skip

    def _forwarded_port(self) -> int:
        """That of ssh, which QEMU chose among those that are free."""
        found = re.search(
            r"HOST_FORWARD\]\s+\S+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+22\b",
            self.monitor("info usernet"),
        )
        if not found:
            raise LabError(f"host {self.name}: QEMU forwards no port to ssh")
        return int(found[1])

    def monitor(self, command: str, limit: float = MONITOR_LIMIT) -> str:
        """Ask QEMU's monitor; what it says, without the echo of the command."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(limit)
            connection.connect(str(self._file("monitor")))
            _until_prompt(connection)
            connection.sendall(f"{command}\n".encode())
            _echo, *lines, _prompt = _until_prompt(connection).replace("\r", "").split("\n")
            return "\n".join(lines)

    def wait_up(self, limit: float = BOOT_LIMIT) -> None:
        """Until ssh answers and the toolstack works."""
        deadline = time.monotonic() + limit
        said = "nothing"
        while time.monotonic() < deadline:
            self._must_be_on()
            with suppress(subprocess.TimeoutExpired):
                result = self.ssh(
                    "xl list >/dev/null && systemctl is-active xen", timeout=30, check=False
                )
                if result.code == 0:
                    self._share()
                    if self._must_be_on().facts.get("kept"):  # then its clock stood still since
                        self.ssh(f"date -s @{time.time():.0f}")
                    return
                said = (result.err or result.out).strip()
            time.sleep(1)
        raise LabError(
            f"host {self.name} is not up after {limit:.0f} s ({said}); its console: {self.serial}"
        )

    def power_off(self, limit: float = OFF_LIMIT) -> None:
        """In order, as its administrator would."""
        if record := self.record:
            self.ssh("systemctl poweroff", check=False)
            self._leave()
            record.process.wait(limit)

    def pull_plug(self) -> None:
        """A power failure: returns when the host is gone."""
        if record := self.record:
            record.process.kill()
        self._leave()

    def forget_disk(self) -> None:
        """The next power_on() is of a new machine."""
        if self.record:
            raise LabError(f"host {self.name} is on: its disk is in use")
        for suffix in ("qcow2", "json", "serial", "monitor", "pid", "link", "kept"):
            self._file(suffix).unlink(missing_ok=True)

    # -- a state to begin with ---------------------------------------------------------------------------------------

    @property
    def kept(self) -> bool:
        """Is there what keep() wrote?"""
        return self._file("kept").exists()

    def keep(self) -> None:
        """Write down what runs now, disk and memory, so that power_on() can begin with it: a boot takes minutes."""
        if self.kept:
            return
        self._leave()  # the state has no connection of ours
        if said := self.monitor(f"savevm {KEPT}", KEEP_LIMIT):
            raise LabError(f"host {self.name}: savevm: {said}")
        self._file("kept").touch()
        self._share()

    def keep_no_more(self) -> None:
        """What was kept is out of date."""
        self._file("kept").unlink(missing_ok=True)

    # -- ssh ---------------------------------------------------------------------------------------------------------

    def ssh_command(self, *options: str) -> list[str]:
        """All sessions share the connection of wait_up(): a handshake takes seconds in software emulation."""
        record = self._must_be_on()
        return [
            "ssh", "-q", "-i", str(self.place.identity), "-p", str(record.facts["ssh_port"]),
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes",
            "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8",
            "-o", f"ControlPath={self._file('ssh')}",
            *options, "root@127.0.0.1",
        ]  # fmt: skip

    def ssh(
        self,
        command: str,
        *,
        timeout: float = COMMAND_LIMIT,
        check: bool = True,
        stdin: IO[bytes] | None = None,
    ) -> Result:
        """Run `command` in dom0's shell; LabError if it fails, unless not `check`."""
        done = subprocess.run(
            [*self.ssh_command(), command],
            stdin=stdin or subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        result = Result(
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
        if check and result.code:
            raise LabError(
                f"host {self.name}: {command}: exit code {result.code}\n{result.out}{result.err}"
            )
        return result

    def put(self, into: str, *paths: Path) -> None:
        """Copy files and directories into a directory of dom0."""
        arguments = [word for path in paths for word in ("-C", str(path.parent), path.name)]
        with subprocess.Popen(
            ["tar", "c", "--exclude=__pycache__", "--owner=0", "--group=0", *arguments],
            stdout=subprocess.PIPE,
        ) as tar:
            assert tar.stdout is not None
            self.ssh(
                f"mkdir -p {shlex.quote(into)} && tar x -C {shlex.quote(into)}", stdin=tar.stdout
            )
        if tar.returncode:
            raise LabError(f"tar of {paths} failed")

    def _share(self) -> None:
        """Open the connection that later sessions share; its process ends with the host."""
        if not self._file("ssh").exists():
            self._quietly(*self.ssh_command("-o", "ControlMaster=yes", "-N", "-f"))

    def _leave(self) -> None:
        """Close the shared connection, which hangs once the host is gone."""
        self._quietly(
            "ssh", "-q", "-o", f"ControlPath={self._file('ssh')}", "-O", "exit", "root@127.0.0.1"
        )
        self._file("ssh").unlink(missing_ok=True)

    @staticmethod
    def _quietly(*command: str) -> None:
        null = subprocess.DEVNULL
        subprocess.run(command, stdin=null, stdout=null, stderr=null, timeout=PATIENCE, check=False)

    def _must_be_on(self) -> Record:
        if not (record := self.record):
            tail = self.serial.read_text(errors="replace")[-2000:] if self.serial.exists() else ""
            raise LabError(f"host {self.name} is off; the end of its console:\n{tail}")
        return record


def _until_prompt(connection: socket.socket) -> str:
    said = b""
    while not said.endswith(b"(qemu) "):
        if not (more := connection.recv(65536)):
            raise LabError("QEMU's monitor closed its socket")
        said += more
    return said.decode(errors="replace")


def boot(
    place: Place,
    suites: Mapping[str, Suite],
    say: Callable[[str], None],
    limit: float = BOOT_LIMIT,
    *,
    cpus: int | None = None,
    kept: bool = False,
) -> list[Machine]:
    """Those of the hosts that are off are switched on, all at once; returns when all work. What a host that is on was
    made of stays, also if a newer image could be built. `cpus`: of each host; None: as many as it has, or CPUS. `kept`:
    see power_on(), of those that have been kept.
    """
    needs.install()
    machines = [Machine(place, name) for name in suites]
    for machine in machines:
        suite = suites[machine.name]
        if not (record := machine.record):
            path = image.ensure(place, suite, say)
            say(f"host {machine.name}: {suite.name}, Xen {suite.xen}")
            machine.power_on(suite, path, cpus=cpus or CPUS, kept=kept and machine.kept)
        elif record.facts["suite"] != suite.name:
            raise LabError(f"host {machine.name} runs {record.facts['suite']}: switch it off first")
        elif cpus not in (None, record.facts["cpus"]):
            raise LabError(f"host {machine.name} has not {cpus} processors: switch it off first")
    deadline = time.monotonic() + limit
    for machine in machines:
        machine.wait_up(deadline - time.monotonic())
    return machines


def suite_of(machine: Machine) -> str:
    """What it is of, while it is on or was last."""
    record = Record.last(machine.place.run, machine.name)
    assert record, machine.name
    return str(record.facts["suite"])


def down(place: Place) -> None:
    """All hosts and the fence, at once and without a trace but the images."""
    for name in HOSTS:
        machine = Machine(place, name)
        machine.pull_plug()
        machine.forget_disk()
    if record := Record.read(place.run, fence.NAME):
        record.process.kill()
    for path in place.run.iterdir():
        with suppress(OSError):
            os.unlink(path)
