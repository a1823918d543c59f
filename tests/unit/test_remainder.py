"""An image on disk that an unfinished activation left is taken up by the next life, if it is certainly that epoch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from checkpointd.authority.processes import HostIdentity, boot_id
from checkpointd.hypervisor.port import DomainInfo
from checkpointd.native import Bitmap, DigestKey
from checkpointd.secondary import remainder
from checkpointd.secondary.activations import Activation, Activations, Phase
from checkpointd.secondary.epochs import Budget, Load
from checkpointd.secondary.remainder import Remainder
from checkpointd.secondary.replica import Replica, State
from checkpointd.secondary.restorers import NothingWholeError
from checkpointd.secondary.standby.events import GuestStarted, StartFailed
from checkpointd.secondary.worker import ReplicaWorker

if TYPE_CHECKING:
    from pathlib import Path

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
NR_PFNS = 128
INFO = DomainInfo(
    UUID, 4, "web", NR_PFNS, 2, "fake", HostIdentity("boot", 1, 1), {"nic": "a", "n": 3}
)
KEPT = Remainder(INFO, b"static", 8, b"registers", bytes(Bitmap(NR_PFNS)))


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    remainder.write(path, KEPT)
    assert remainder.read(path) == KEPT
    assert path.stat().st_mode & 0o077 == 0, "registers are the guest's own"


@pytest.mark.parametrize("spoil", [{"boot_id": "before"}, {"context": "!"}, {"epoch": None}])
def test_of_another_boot_or_spoilt_it_is_none(tmp_path: Path, spoil: dict[str, Any]) -> None:
    path = tmp_path / "kept"
    assert remainder.read(path) is None
    remainder.write(path, KEPT)
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    assert remainder.read(path) is None


class Restorer:
    """Has nothing of an earlier life, and starts whatever it is given."""

    def __init__(self) -> None:
        self.started: list[tuple[DomainInfo, int | None, bytes, bytes, bool]] = []

    def begin(self, info: DomainInfo, static_records: bytes) -> None:
        self.static = static_records

    def resume(self, left: Activation) -> int:
        raise NothingWholeError("nothing is here")

    def start(self, info: DomainInfo, replica: Replica, *, paused: bool) -> DomainInfo:
        assert replica.state is State.WHOLE
        page = b"".join(bytes(contents) for _, contents in replica.pages())
        self.started.append((info, replica.epoch, replica.context, page, paused))
        return replace(info, domid=9)

    def discard(self) -> None: ...


def worker(folder: Path, restorer: Restorer) -> ReplicaWorker:
    return ReplicaWorker(
        Budget(1 << 20),
        cast("Any", restorer),
        Activations(folder / "activations"),
        UUID,
        image_dir=folder,
        keeper=None,
    )


def committed(folder: Path) -> Replica:
    """As a life that has died left it."""
    replica = Replica(UUID, NR_PFNS, Budget(1 << 20), directory=folder)
    load = Load(8, 0, True, 0, context=b"registers")
    load.zero.append((5).to_bytes(8, "little"))
    replica.admit(load)
    replica.commit(load, DigestKey(bytes(32)))
    return replica


def unfinished(folder: Path, epoch: int = 8) -> None:
    Activations(folder / "activations").begin(
        Activation(UUID, "web", "192.0.2.1", 2, epoch, Phase.FEEDING, boot_id())
    )


def test_the_image_is_the_epoch_once_more(tmp_path: Path) -> None:
    replica = committed(tmp_path)
    remainder.write(replica.remainder, replace(KEPT, populated=bytes(replica.populated)))
    unfinished(tmp_path)
    restorer = Restorer()
    done = worker(tmp_path, restorer).resume(paused=True)
    assert done == GuestStarted(9)
    assert restorer.started == [(INFO, 8, b"registers", bytes(4096), True)]
    assert restorer.static == b"static"
    assert not replica.remainder.exists()
    replica.close()


@pytest.mark.parametrize("spoil", ["epoch", "size", "none"])
def test_an_image_that_may_be_another_is_not_taken_up(tmp_path: Path, spoil: str) -> None:
    replica = committed(tmp_path)
    remainder.write(replica.remainder, replace(KEPT, populated=bytes(replica.populated)))
    unfinished(tmp_path, epoch=9 if spoil == "epoch" else 8)
    if spoil == "size":
        (tmp_path / f"{UUID}.image").write_bytes(b"")
    if spoil == "none":
        replica.remainder.unlink()
    restorer = Restorer()
    done = worker(tmp_path, restorer).resume(paused=False)
    assert isinstance(done, StartFailed)
    assert done.text == "nothing is here"
    assert restorer.started == []
    if spoil != "size":
        replica.close()


def test_an_image_that_changes_is_no_epoch_any_more(tmp_path: Path) -> None:
    remainder.write(tmp_path / f"{UUID}.remainder", KEPT)
    replica = committed(tmp_path)
    assert not replica.remainder.exists()
    replica.close()
