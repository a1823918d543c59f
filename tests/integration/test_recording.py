"""`primary --to FILE`: every epoch against the replay oracle, and what is left of a recording that was cut."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import signal
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hosts import wait_exit, wait_step

from checkpointd import native
from checkpointd.archive.restore import Restore, run_restore
from checkpointd.daemon.config import PrimaryOptions
from checkpointd.daemon.metrics import PrimaryMetrics
from checkpointd.daemon.settings import Endpoint as Address
from checkpointd.demo.proof import Snapshot
from checkpointd.demo.rig import Rig
from checkpointd.errors import ProtectionLostError, StateError, StreamError, UsageError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.port import EndReason
from checkpointd.primary.recording import Recording, RecordingFile, State
from checkpointd.stream.reader import Reader
from checkpointd.stream.rebuild import rebuild
from checkpointd.stream.remus import SEAL
from checkpointd.stream.scan import survey, whole_epochs
from checkpointd.stream.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedded_sides import Side

    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.primary.service import Ending
    from checkpointd.stream.records import Octets

MS = 1_000_000  # ns
EPOCHS = 5


class Recorder:
    """A recording in the test's own thread, stopped after some epochs."""

    def __init__(self, side: Side, info: DomainInfo, path: Path, **options: Any) -> None:
        chosen = {"interval": 10 * MS, "arena": 1 << 20, "mapping_budget": 64 << 20, **options}
        self.options = PrimaryOptions(domid=info.domid, to=path, **chosen)
        self.domain = side.hypervisor.attach(info.domid)
        self.file = RecordingFile(path)
        self.metrics = PrimaryMetrics(info.name, list(State))
        self.recording = Recording(self.options, self.domain, self.file, self.metrics)
        self.epochs = 0

    def run(self, epochs: int = EPOCHS) -> Ending:
        keep = self.file.keep

        def count() -> None:
            keep()
            self.epochs += 1
            if self.epochs == epochs:
                self.recording.stop()

        self.file.keep = count  # type: ignore[method-assign]  # the moment at which an epoch is safe
        try:
            return self.recording.run()
        finally:
            self.close()

    def close(self) -> None:
        self.file.close()
        self.domain.close()


def image(data: bytes, info: DomainInfo) -> tuple[Snapshot, int]:
    """What a receiver makes of a stream that ends with a whole epoch; the caller closes it."""
    snapshot = Snapshot(info.nr_pfns)
    built = rebuild([data], native.address_of(snapshot.image), info.nr_pfns)
    snapshot.populated = native.Bitmap.from_bytes(info.nr_pfns, built.populated)
    return snapshot, Context.parse(built.context).step


def digest(snapshot: Snapshot) -> str:
    return hashlib.sha256(snapshot.bitmap() + bytes(snapshot.image)).hexdigest()


@pytest.fixture
def info(primary: Side) -> DomainInfo:
    return primary.guest("dirty:300@50", pages=1024)


def test_every_epoch_is_the_guest_at_its_step(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    path = tmp_path / "rec"
    ending = Recorder(primary, info, path).run()
    assert (ending.exit_code, ending.guest) == (0, None)
    assert f"{EPOCHS} whole epochs" in ending.text
    data = path.read_bytes()
    ends = list(whole_epochs(io.BytesIO(data)))
    assert len(ends) == EPOCHS
    assert ends[-1] == len(data)
    report = verify([data])
    assert report.ok, report.findings
    assert report.notes == 0
    steps = []
    for end in ends:
        snapshot, step = image(data[:end], info)
        verdict = snapshot.against([primary.log(info)], step)
        snapshot.close()
        assert verdict.equal, verdict.difference
        steps.append(step)
    assert steps == sorted(set(steps)), "the guest went on between the epochs"
    wait_step(info, steps[-1] + 2)


def test_what_is_left_of_a_cut_recording_is_its_last_whole_epoch(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    """Cut at every record boundary, at each octet of a seal, and at ten random places."""
    path = tmp_path / "rec"
    Recorder(primary, info, path).run(4)
    data = path.read_bytes()
    ends = list(whole_epochs(io.BytesIO(data)))
    digests = {}
    for end in ends:
        snapshot, step = image(data[:end], info)
        assert snapshot.against([primary.log(info)], step).equal
        digests[end] = digest(snapshot)
        snapshot.close()
    assert len(set(digests.values())) == len(ends), "each epoch is another image"

    cuts = {event.position.offset for event in Reader().feed(data)}
    cuts |= {ends[1] - behind for behind in range(1, len(SEAL) + 1)}
    cuts |= set(random.Random(3).sample(range(len(data)), 10))
    for cut in sorted(cuts):
        with path.open("r+b") as file:
            file.write(data)
            file.truncate(cut)
            found = survey(file)
        assert found.end == max((end for end in ends if end <= cut), default=0)
        assert found.epochs == sum(end <= cut for end in ends)
        if found.end:
            snapshot, _ = image(path.read_bytes()[: found.end], info)
            assert digest(snapshot) == digests[found.end]
            snapshot.close()


def test_a_cut_recording_starts_from_its_last_whole_epoch(
    primary: Side, secondary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    path = tmp_path / "rec"
    Recorder(primary, info, path).run(3)
    wait_exit(info.host.pid, signal.SIGKILL)
    data = path.read_bytes()
    ends = list(whole_epochs(io.BytesIO(data)))
    for cut, epochs in ((ends[1] + 100, 2), (ends[2] - 1, 2), (ends[0], 1)):
        path.write_bytes(data[:cut])
        restored = run_restore(
            Restore(source=path, paused=True, namespace="secondary", run_dir=tmp_path),
            lambda done, total: None,
        )
        assert (restored.epochs, restored.left_over) == (epochs, cut - ends[epochs - 1])
        there = secondary.hypervisor.find(domid=restored.domid)
        snapshot, step = image(data[: ends[epochs - 1]], info)
        snapshot.close()
        view = toolstack.look(there)
        assert (view.info.uuid, view.step, view.paused) == (info.uuid, step, True)
        toolstack.unpause(there)
        wait_step(there, step + 1)
        toolstack.destroy(there)
        wait_exit(there.host.pid)
    assert path.read_bytes() == data[: ends[0]], "restoring changes nothing"


def test_without_a_whole_epoch_nothing_is_started(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    path = tmp_path / "rec"
    Recorder(primary, info, path).run(1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(StreamError, match="no whole epoch"):
        run_restore(Restore(source=path, run_dir=tmp_path), lambda done, total: None)


def test_a_damaged_recording_is_refused_before_anything_is_started(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    path = tmp_path / "rec"
    Recorder(primary, info, path).run(1)
    wait_exit(info.host.pid, signal.SIGKILL)
    data = bytearray(path.read_bytes())
    record = next(
        event.position.offset
        for event in Reader().feed(bytes(data))
        if event.position.name == "PAGE_DATA"
    )
    data[record + 8 : record + 12] = (1 << 20).to_bytes(4, "little")  # its count
    path.write_bytes(data)
    with pytest.raises(StreamError, match="announces 1048576 entries"):
        run_restore(Restore(source=path, run_dir=tmp_path), lambda done, total: None)
    assert primary.hypervisor.domains() == []


# -- the file -------------------------------------------------------------------------------------


def test_an_epoch_is_sealed_only_once_its_pages_are_safe(
    primary: Side, info: DomainInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure any part of what was not synced may be missing: never all but the seal."""
    done: list[str] = []
    recorder = Recorder(primary, info, tmp_path / "rec")
    write, sync = recorder.file.write, recorder.file.sync

    def writing(octets: Octets) -> None:
        done.append("seal" if SEAL in bytes(memoryview(octets)[-16:]) else "part")
        write(octets)

    def syncing() -> None:
        done.append("sync")
        sync()

    monkeypatch.setattr(recorder.file, "write", writing)
    monkeypatch.setattr(recorder.file, "sync", syncing)
    recorder.run(3)
    assert done.count("seal") == 3
    for at, word in enumerate(done):
        if word == "seal":
            assert (done[at - 1], done[at + 1]) == ("sync", "sync")


def test_a_recording_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "rec"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        RecordingFile(path)
    assert path.read_bytes() == b"precious"


def test_what_is_no_whole_epoch_is_cut_off(tmp_path: Path) -> None:
    file = RecordingFile(tmp_path / "rec")
    assert (tmp_path / "rec").stat().st_mode & 0o777 == 0o600
    file.write(b"whole")
    file.keep()
    file.write(b"half")
    file.close()
    assert (tmp_path / "rec").read_bytes() == b"whole"
    empty = RecordingFile(tmp_path / "empty")
    empty.write(b"half")
    empty.close()
    assert not (tmp_path / "empty").exists()


@pytest.fixture
def file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_limit")
def test_a_full_disk_ends_it_with_the_epochs_there_are(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    path = tmp_path / "rec"
    # The guest's memory and then some: a few epochs of 300 pages fit.
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, most))
    with pytest.raises(StateError, match=r"File too large.* the guest runs on"):
        Recorder(primary, info, path).run(1000)
    found = survey(io.BytesIO(path.read_bytes()))
    assert found.epochs > 0
    assert found.end == found.octets
    wait_step(info, toolstack.look(info).step + 2)


# -- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "code"), [(EndReason.DESTROYED, 0), (EndReason.HOST_LOST, 6)], ids=str
)
def test_it_ends_with_the_guest(
    primary: Side, info: DomainInfo, tmp_path: Path, reason: EndReason, code: int
) -> None:
    recorder = Recorder(primary, info, tmp_path / "rec")

    def strike(state: str) -> None:
        if state != State.RECORDING:
            return
        if reason is EndReason.DESTROYED:
            toolstack.destroy(info)
        wait_exit(info.host.pid, None if reason is EndReason.DESTROYED else signal.SIGKILL)

    recorder.recording.on_state = strike
    ending = recorder.run()
    assert (ending.exit_code, ending.guest) == (code, reason)
    assert not (tmp_path / "rec").exists(), "it held no whole epoch"


def test_a_stop_in_the_first_copy_leaves_no_file(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    recorder = Recorder(primary, info, tmp_path / "rec")
    recorder.recording.stop()
    assert recorder.run().exit_code == 0
    assert not (tmp_path / "rec").exists()


def test_a_guest_that_outruns_it_is_told(primary: Side, tmp_path: Path) -> None:
    info = primary.guest("dirty:900@1000", pages=1024)
    recorder = Recorder(primary, info, tmp_path / "rec", max_live_rounds=1)

    def outrun(done: int, total: int) -> None:
        if done < total:
            wait_step(info, toolstack.look(info).step + 900)  # a step is a page

    recorder.recording.on_progress = outrun
    with pytest.raises(ProtectionLostError, match="larger --arena"):
        recorder.run()


def test_it_says_that_it_is_no_protection(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    recorder = Recorder(primary, info, tmp_path / "rec")
    seen = []
    recorder.recording.on_state = lambda state: seen.append(recorder.recording.status())
    recorder.run(2)
    assert seen[0]["state"] == "recording"
    assert "not protected" in seen[0]["reason"]
    status = recorder.recording.status()
    assert (status["recorded_epochs"], status["recorded_bytes"]) == (2, recorder.file.octets)
    assert recorder.recording.not_ready() == ["recording, not protected"]


def test_what_was_allowed_in_spite_of_its_danger_shows_in_status(
    primary: Side, info: DomainInfo, tmp_path: Path
) -> None:
    recorder = Recorder(primary, info, tmp_path / "rec", unsafe_untested_xen=True)
    assert recorder.recording.status()["unsafe"] == ["--unsafe-untested-xen"]
    recorder.run(1)


# -- the daemon -----------------------------------------------------------------------------------


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as rig:
        yield rig


def record(rig: Rig, path: Path, faults: str = "") -> Any:
    return rig.start(
        *("recorder", "primary", "--domid", "4", "--to", str(path), "--interval", "20ms"),
        *("--metrics", "127.0.0.1:0"),
        faults=faults,
    )


def test_a_daemon_that_is_killed_leaves_whole_epochs_and_a_running_guest(
    rig: Rig, tmp_path: Path
) -> None:
    guest = rig.guest(4, "--memory", "4MiB", "--program", "dirty:50@50")
    rig.guest_is_up(guest)
    path = tmp_path / "rec"
    recorder = record(rig, path, "record.before-seal@4=kill")
    assert recorder.wait() == -signal.SIGKILL
    with path.open("rb") as file:
        found = survey(file)
    assert found.epochs == 3
    assert found.end < found.octets, "pages of the fourth are there"
    goes_on(rig)


def goes_on(rig: Rig) -> None:
    """The guest runs, and its output was never shut."""
    info = EmbeddedHypervisor("primary", rig.run_dir).find(domid=4)
    view = toolstack.look(info)
    assert not view.shut
    wait_step(info, view.step + 2)


def test_a_daemon_records_until_it_is_stopped(rig: Rig, tmp_path: Path) -> None:
    guest = rig.guest(4, "--memory", "4MiB", "--program", "dirty:50@50")
    rig.guest_is_up(guest)
    path = tmp_path / "rec"
    recorder = record(rig, path)
    recorder.state("recording")
    (entry,) = (rig.run_dir / "daemons").glob("primary-*.json")
    url = json.loads(entry.read_text())["http"]
    with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:
        assert "not protected" in json.load(answer)["reason"]
    assert recorder.stop() == 0
    with path.open("rb") as file:
        found = survey(file)
    assert found.epochs > 0
    assert found.end == found.octets
    assert os.listdir(rig.run_dir / "daemons") == []
    goes_on(rig)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({}, []),
        ({"to": Path("rec")}, []),
        ({"to": Path("rec"), "secondary": Address("standby.lan", 1, 2)}, [("to", "secondary")]),
    ],
)
def test_epochs_go_to_a_file_or_to_a_secondary(
    options: dict[str, Any], wrong: list[tuple[str, ...]]
) -> None:
    found = PrimaryOptions(domid=4, **options).contradictions()
    assert [fields for fields, _ in found] == wrong
