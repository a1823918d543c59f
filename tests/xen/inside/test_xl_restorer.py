"""The xl restorer with the real xl, on epochs of a real guest: what the unit test tries on a fake one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.guests import Guest, ticks

from checkpointd.authority.processes import boot_id
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.hypervisor.xen.incoming import Domains
from checkpointd.hypervisor.xen.lib import open_libs
from checkpointd.native import DigestKey
from checkpointd.secondary.activations import Activation, Activations, Phase
from checkpointd.secondary.epochs import Budget, Load
from checkpointd.secondary.replica import Replica
from checkpointd.secondary.restorers.xl import XlRestorer
from checkpointd.secondary.restorers.xl_process import Limits
from checkpointd.stream.files import read_chunks
from checkpointd.stream.libxl import XlHeader
from checkpointd.stream.reader import Reader, Record
from checkpointd.stream.records import DomainHeader, ImageHeader, Layer, RecordType
from checkpointd.stream.scan import whole_epochs
from checkpointd.stream.writer import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME = "xl-restorer"
EPOCHS = 4
LIMIT = 240.0  # s, for what takes one or two where nobody else needs the processors
LOOK = 0.2  # s between two looks at what nothing announces
CONSOLE = Path(f"/var/log/xen/console/guest-{NAME}.log")
NR_PFNS = 1 << 20  # 4 GiB of pfn space: a small PVH guest has its last pages right below it
EPOCH_MEMORY = 1 << 28


def xl(*words: str) -> str:
    done = subprocess.run(["xl", *words], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"xl {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def until(true: Callable[[], object], what: str) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < LIMIT, what
        time.sleep(LOOK)
    return time.monotonic() - began


def said() -> int:
    """Ticks of the guest's console so far; none of them found its memory damaged."""
    found = ticks(CONSOLE.read_text(errors="replace")) if CONSOLE.exists() else []
    assert all(tick.ok for tick in found), "the guest's memory is damaged"
    return len(found)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The first epochs of a guest that checks its own memory; the guest is gone."""
    folder = tmp_path_factory.mktemp("recording")
    config, file = folder / "guest.cfg", folder / "recording.xl"
    config.write_text(Guest(NAME, memory=96, pages=256, rate=200).config())
    CONSOLE.unlink(missing_ok=True)
    xl("create", "-q", str(config))
    try:
        until(lambda: said() >= 2, "the guest does not come up")
        words = ["primary", "--domid", xl("domid", NAME), "--to", str(file), "--interval", "500ms"]
        words += [
            "--hypervisor",
            "xen",
            "--run-dir",
            str(folder),
            "--state-dir",
            str(folder),
            "--no-metrics",
        ]
        with subprocess.Popen([sys.executable, "-m", "checkpointd.cli.main", *words]) as primary:
            try:
                until(
                    lambda: (
                        (file.exists() and epochs_in(file) >= EPOCHS) or primary.poll() is not None
                    ),
                    "it records no epochs",
                )
            finally:
                primary.terminate()
            assert primary.wait(LIMIT) in (0, 1), "recording failed"
    finally:
        subprocess.run(["xl", "destroy", NAME], timeout=LIMIT, check=False)
    yield file
    file.unlink()


def epochs_in(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(1 for _ in whole_epochs(stream))


class Recorded:
    """A standby's replica that takes in one recorded epoch after the other."""

    def __init__(self, file: Path, notes: Path, limits: Limits | None = None) -> None:
        self._loads = self._read(file)
        self.config = ""
        self.static = b""
        first = next(self._loads)
        uuid = json.loads(self.config)["c_info"]["uuid"]
        host = HostIdentity("lab", 0, 0)
        self.info = DomainInfo(uuid, 1, NAME, NR_PFNS, 24576, "xen", host, {"xl": self.config})
        self.domains = Domains(open_libs())
        self.replica = Replica(uuid, NR_PFNS, Budget(EPOCH_MEMORY))
        self.activations = Activations(notes.parent / "activations")
        self.restorer = XlRestorer(self.domains, notes, self.activations, limits=limits)
        self.restorer.begin(self.info, self.static)
        self._commit(first)

    def _read(self, file: Path) -> Iterator[Load]:
        reader, load = Reader(), Load(1, 0, True, 0)
        for chunk in read_chunks(str(file)):
            for event in reader.feed(chunk):
                content = event.content
                if isinstance(content, XlHeader):
                    self.config = content.optional_data[4:-1].decode()
                elif isinstance(content, ImageHeader | DomainHeader):
                    self.static += content.pack()
                elif isinstance(content, Record) and content.layer is Layer.LIBXC:
                    octets = b"".join(encode(content))
                    if content.type == RecordType.PAGE_DATA:
                        load.pages.append(octets)
                    elif content.type == RecordType.CHECKPOINT:
                        yield load
                        load = Load(load.epoch + 1, 0, True, 0)
                    elif load.epoch == 1 and not load.pages:
                        self.static += octets
                    else:
                        load.context += octets

    def _commit(self, load: Load) -> None:
        self.replica.admit(load)
        self.replica.commit(load, DigestKey(bytes(32)))
        self.restorer.committed(self.replica)

    def next(self) -> None:
        """The next epoch is committed, and xl has applied it."""
        self._commit(next(self._loads))
        self.applied()

    def applied(self) -> None:
        def so() -> bool:
            assert not self.restorer.alarm, self.restorer.alarm
            return self.restorer.status()["applied_epoch"] == self.replica.epoch

        until(so, "not applied")

    @property
    def xl(self) -> int:
        feed = self.restorer._feed
        assert feed is not None
        assert feed.receive._process is not None
        return feed.receive._process.pid

    def start(self) -> float:
        """Seconds from the order to the release of the guest, which then runs on and finds its memory right."""
        before = said()
        began = time.monotonic()
        self.restorer.start(self.info, self.replica, paused=False)
        took = time.monotonic() - began
        found = self.domains.find(self.info.uuid)
        assert found is not None
        assert (found.name, found.paused) == (NAME, False)
        until(lambda: said() >= before + 2, "it does not run")
        return took

    def close(self) -> None:
        self.restorer.discard()
        if found := self.domains.find(self.info.uuid):
            self.domains.destroy(found.domid, LIMIT)
        self.replica.close()
        self.domains.close()


@pytest.fixture
def make(recording: Path, tmp_path: Path) -> Iterator[Callable[..., Recorded]]:
    made: list[Recorded] = []

    def make(limits: Limits | None = None) -> Recorded:
        made.append(Recorded(recording, tmp_path / "notes", limits))
        return made[-1]

    yield make
    for recorded in made:
        recorded.close()


def test_a_warm_activation_runs_the_guest(
    make: Callable[..., Recorded], record_property: Callable[[str, object], None]
) -> None:
    recorded = make()
    recorded.applied()
    for _ in range(EPOCHS - 1):
        recorded.next()
    held = recorded.domains.find(recorded.info.uuid)
    assert held is not None
    assert (held.name, held.paused) == (f"{NAME}--incoming", True)
    record_property("seconds of a warm activation, in software emulation", recorded.start())


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_an_xl_that_is_lost_is_replaced_at_the_activation(
    make: Callable[..., Recorded],
    record_property: Callable[[str, object], None],
    blow: signal.Signals,
) -> None:
    recorded = make(Limits(exit=10.0))
    recorded.applied()
    os.kill(recorded.xl, blow)
    record_property("seconds of an activation from the image, in emulation", recorded.start())


@pytest.mark.parametrize(
    "point", ["xl.pages@9", "xl.after-seal", "xl.before-seal@2", "xl.before-release"]
)
def test_our_death_leaves_the_guest_paused_and_the_next_life_goes_on(
    recording: Path, make: Callable[..., Recorded], tmp_path: Path, point: str
) -> None:
    die(recording, tmp_path, point)
    before = said()
    domains = Domains(open_libs())
    uuid = _uuid(recording)
    if point == "xl.pages@9":
        until(lambda: domains.find(uuid) is None, "xl has not given up")
    else:
        until(
            lambda: (found := domains.find(uuid)) and found.name == NAME, "xl has not finished it"
        )
        time.sleep(2)  # two of its ticks, if it ran
        found = domains.find(uuid)
        assert found is not None
        assert found.paused
    assert said() == before
    domains.close()
    recorded = make()
    recorded.applied()
    recorded.start()


@pytest.mark.parametrize("point", ["xl.sealed", "xl.finished", "xl.before-release", "xl.unnoted"])
def test_an_activation_that_we_die_in_is_finished_by_the_next_life(
    recording: Path, tmp_path: Path, point: str
) -> None:
    die(recording, tmp_path, point)
    before = said()
    domains, activations = Domains(open_libs()), Activations(tmp_path / "activations")
    uuid = _uuid(recording)
    try:
        left = activations.load(uuid)
        assert left is not None
        domid = XlRestorer(domains, tmp_path / "notes", activations).resume(left)
        until(lambda: said() >= before + 2, "it does not run")
        found = domains.find(uuid)
        assert found is not None
        assert (found.domid, found.name, found.paused) == (domid, NAME, False)
    finally:
        if found := domains.find(uuid):
            domains.destroy(found.domid, LIMIT)
        domains.close()


def die(recording: Path, folder: Path, point: str) -> None:
    """A process like ours is killed at this point."""
    done = subprocess.run(
        (sys.executable, __file__, str(recording), str(folder / "notes")),
        env={
            **os.environ,
            "CHECKPOINTD_FAULTS": f"{point}=kill",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def _uuid(recording: Path) -> str:
    for event in Reader().feed(recording.read_bytes()[: 1 << 16]):
        assert isinstance(event.content, XlHeader)
        config = event.content.config()
        assert isinstance(config, dict)
        return str(config["c_info"]["uuid"])
    raise AssertionError("no header")


if __name__ == "__main__":
    life = Recorded(Path(sys.argv[1]), Path(sys.argv[2]))
    life.applied()
    life.next()
    life.activations.begin(
        Activation(life.info.uuid, NAME, "", 2, life.replica.epoch or 0, Phase.FEEDING, boot_id())
    )
    life.restorer.start(life.info, life.replica, paused=False)
