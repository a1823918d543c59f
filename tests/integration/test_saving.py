"""`checkpointd save`: a live image against the replay oracle, and what becomes of the guest and of the file."""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from embedded_sides import capture, client_of
from hosts import PATIENCE, wait_exit, wait_step

from checkpointd import native
from checkpointd.archive.restore import Restore, run_restore
from checkpointd.archive.save import After, Save, run_save
from checkpointd.demo.proof import Snapshot, read_guest
from checkpointd.errors import (
    HypervisorError,
    ProtectionLostError,
    StateError,
    StreamError,
    UsageError,
)
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.stream.files import read_chunks
from checkpointd.stream.rebuild import rebuild
from checkpointd.stream.verify import Shape, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from embedded_sides import Side

    from checkpointd.hypervisor.embedded.kv import UdpTransport
    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.primary.saving import Saved


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def save(run_dir: Path) -> Callable[..., Saved]:
    """Saves into FILE in `run_dir`; options are Save's, and `progress`."""

    def run(
        info: DomainInfo, progress: Callable[[int, int], None] = nothing, **options: Any
    ) -> Saved:
        options = {"target": str(run_dir / "guest.save"), "domid": info.domid, **options}
        return run_save(Save(run_dir=run_dir, **options), progress)

    return run


def read(path: Path, info: DomainInfo) -> tuple[Snapshot, int]:
    """The image in a file and the guest's step in it; the caller closes it."""
    snapshot = Snapshot(info.nr_pfns)
    built = rebuild(read_chunks(str(path)), native.address_of(snapshot.image), info.nr_pfns)
    snapshot.populated = native.Bitmap.from_bytes(info.nr_pfns, built.populated)
    return snapshot, Context.parse(built.context).step


def same_as_oracle(path: Path, info: DomainInfo, side: Side) -> int:
    """The step of the image, which is the oracle's of that step."""
    snapshot, step = read(path, info)
    try:
        verdict = snapshot.against([side.log(info)], step)
    finally:
        snapshot.close()
    assert verdict.equal, verdict.difference
    assert verdict.pages > 0
    return step


def left(directory: Path) -> list[str]:
    """Files, hidden ones too: nothing temporary may stay."""
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def test_a_guest_is_saved_while_it_works(
    primary: Side, save: Callable[..., Saved], run_dir: Path, transports: list[UdpTransport]
) -> None:
    info = primary.guest(pages=2048)
    client = client_of(info, transports)
    written = []

    def work(done: int, total: int) -> None:
        written.append(client.incr("n").step)

    saved = save(info, work, arena=1 << 20)  # so small that several rounds are needed
    path = run_dir / "guest.save"
    step = same_as_oracle(path, info, primary)
    assert len(written) > 2
    assert step >= written[-1], "what was done before the pause is in the image"
    assert client.incr("n").step > step, "the guest goes on"
    assert saved.octets == path.stat().st_size
    assert saved.pause_ns > 0
    assert path.stat().st_mode & 0o777 == 0o600
    report = verify(read_chunks(str(path)))
    assert report.ok, report.findings
    assert (report.shape, report.closed, report.notes) == (Shape.PLAIN, True, 0)
    assert left(run_dir) == ["guest.save"]


def test_a_guest_that_is_to_be_paused_is_as_it_is_in_the_file(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest("dirty:200@50", pages=1024)
    save(info, after=After.PAUSE)
    view = toolstack.look(info)
    step = same_as_oracle(run_dir / "guest.save", info, primary)
    assert (view.paused, view.step, view.engine) == (True, step, False)
    now, _ = read_guest(primary.hypervisor, info.domid)
    then, _ = read(run_dir / "guest.save", info)
    assert bytes(now.image) == bytes(then.image)
    assert now.bitmap() == then.bitmap()
    now.close()
    then.close()
    toolstack.unpause(info)
    wait_step(info, step + 1)


def test_a_guest_that_is_to_be_destroyed_is_gone_and_comes_back(
    primary: Side, secondary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest("dirty:200@50", pages=1024)
    save(info, after=After.DESTROY)
    wait_exit(info.host.pid)
    assert primary.hypervisor.domains() == []
    path = run_dir / "guest.save"
    step = same_as_oracle(path, info, primary)
    restored = run_restore(
        Restore(source=path, paused=True, namespace="secondary", run_dir=run_dir), nothing
    )
    assert (restored.epochs, restored.left_over, restored.name) == (0, 0, info.name)
    there = secondary.hypervisor.find(uuid=info.uuid)
    assert toolstack.look(there).step == step
    toolstack.unpause(there)
    wait_step(there, step + 1)


def test_two_of_one_guest_are_refused(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest()
    save(info)
    with pytest.raises(HypervisorError, match=f"domain {info.domid} .* lives here"):
        run_restore(Restore(source=run_dir / "guest.save", run_dir=run_dir), nothing)


def test_pages_that_the_guest_gave_back_are_not_in_the_image(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest(pages=1024)
    out = list(range(600, 800))
    given = toolstack.balloon_out(info, out)  # it keeps those that its program lives in
    assert given
    save(info)
    snapshot, _ = read(run_dir / "guest.save", info)
    assert sum(pfn not in snapshot.populated for pfn in out) == given
    snapshot.close()
    same_as_oracle(run_dir / "guest.save", info, primary)


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let this process write no file larger than so many octets: what a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda octets: resource.setrlimit(resource.RLIMIT_FSIZE, (octets, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("after", After)
def test_a_full_disk_leaves_no_file_and_a_running_guest(
    primary: Side,
    save: Callable[..., Saved],
    run_dir: Path,
    small_files: Callable[[int], None],
    after: After,
) -> None:
    info = primary.guest("dirty:20@50", pages=1024)
    small_files(1024 * PAGE_SIZE // 2)
    with pytest.raises(StreamError, match="cannot be written: File too large"):
        save(info, after=after)
    assert left(run_dir) == []
    wait_step(info, toolstack.look(info).step + 2)


def test_a_failure_after_the_last_pause_leaves_a_running_guest(
    primary: Side, save: Callable[..., Saved], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: all is copied, the guest stands still, and then the file cannot be made."""
    info = primary.guest("dirty:20@50", pages=1024)
    standing = []

    def full(descriptor: int) -> None:
        standing.append(toolstack.look(info).step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StreamError, match="No space left"):
        save(info, after=After.DESTROY)
    assert left(run_dir) == []
    wait_step(info, standing[0] + 2)


def test_a_guest_that_outruns_the_copy_is_told_and_runs_on(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest("dirty:900@1000", pages=1024)

    def outrun(done: int, total: int) -> None:
        wait_step(info, toolstack.look(info).step + 900)  # a step is a page

    with pytest.raises(ProtectionLostError, match="larger --arena"):
        save(info, outrun, arena=1 << 20)
    assert left(run_dir) == []
    wait_step(info, toolstack.look(info).step + 2)
    save(info, arena=4 << 20)  # as large as the guest: always enough
    same_as_oracle(run_dir / "guest.save", info, primary)


def test_a_guest_that_ends_leaves_no_file(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest(pages=1024)
    with pytest.raises(HypervisorError, match="the guest has ended"):
        save(info, lambda done, total: wait_exit(info.host.pid, signal.SIGKILL), arena=1 << 20)
    assert left(run_dir) == []


def test_a_signal_leaves_no_file_and_a_running_guest(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest("dirty:20@50", pages=1024)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        save(info, lambda done, total: os.kill(os.getpid(), signal.SIGTERM), arena=1 << 20)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert left(run_dir) == []
    wait_step(info, toolstack.look(info).step + 2)


def test_a_file_that_exists_is_replaced_only_by_force(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest()
    path = run_dir / "guest.save"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="--force"):
        save(info)
    assert path.read_bytes() == b"precious"
    save(info, force=True)
    same_as_oracle(path, info, primary)


def test_too_little_room_is_told_beforehand(
    primary: Side, save: Callable[..., Saved], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = primary.guest(pages=2048)
    real = os.statvfs(run_dir)
    fields = list(real)
    fields[4] = (4 << 20) // real.f_frsize  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(StateError, match=r"has \d MiB free, .* takes about 8 MiB"):
        save(info)
    assert not toolstack.look(info).engine


# -- the command ----------------------------------------------------------------------------------


def test_standard_output_gets_the_stream(primary: Side, run_dir: Path) -> None:
    info = primary.guest(pages=1024)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "checkpointd.cli.main"),
            *("save", "--domid", str(info.domid), "--run-dir", str(run_dir), "-"),
        ],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"stood still for" in done.stderr
    assert verify([done.stdout]).ok
    (run_dir / "out").write_bytes(done.stdout)
    same_as_oracle(run_dir / "out", info, primary)


def test_compressed_to_save_room(primary: Side, save: Callable[..., Saved], run_dir: Path) -> None:
    info = primary.guest(pages=1024)
    path = run_dir / "guest.save.zst"
    saved = save(info, target=str(path))
    assert path.stat().st_size < saved.octets // 2
    same_as_oracle(path, info, primary)


def test_the_file_says_what_guest_it_is(
    primary: Side, save: Callable[..., Saved], run_dir: Path
) -> None:
    info = primary.guest()
    save(info)
    with (run_dir / "guest.save").open("rb") as file, mmap.mmap(
        file.fileno(), 0, access=mmap.ACCESS_READ
    ) as data:
        length = int.from_bytes(data[48:52], "little")
        config = json.loads(data[52 : 52 + length - 1])
    assert config["checkpointd"]["uuid"] == info.uuid


def test_a_second_engine_is_refused(primary: Side, save: Callable[..., Saved]) -> None:
    info = primary.guest()
    domain = primary.hypervisor.attach(info.domid)
    try:
        with pytest.raises(HypervisorError, match="engine"):
            save(info)
        capture(domain)
    finally:
        domain.close()
