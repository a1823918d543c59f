"""`checkpointd restore` of Xen guests, with a fake xl: a recording cut anywhere, and every failure on the way."""

from __future__ import annotations

import json
import os
import random
import struct
from typing import TYPE_CHECKING

import pytest
from fake_xl import FakeDomains, install
from leaks import nothing_leaks

from checkpointd.archive.restore import Restore, run_restore, through_xl
from checkpointd.errors import HypervisorError, StreamError, UsageError
from checkpointd.stream.bodies import TscInfo
from checkpointd.stream.libxl import Emulator, LibxlType
from checkpointd.stream.reader import Reader
from checkpointd.stream.records import DomainType, RecordType
from checkpointd.stream.remus import RemusStream
from checkpointd.stream.scan import whole_epochs
from checkpointd.stream.writer import headers, record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
CONFIG = {"c_info": {"name": "web", "uuid": UUID}}
STATIC = headers(DomainType.HVM) + record(RecordType.STATIC_DATA_END)
PAGE = 4096
XTAB = 0xF << 60
EPOCHS = 3

Pages = dict[int, bytes]


def tail(epoch: int) -> bytes:
    tsc = TscInfo(0, 2_000_000, epoch, 0).pack()
    return record(RecordType.X86_TSC_INFO, tsc) + record(RecordType.HVM_CONTEXT, b"registers")


def recording(seed: int = 7) -> tuple[bytes, list[Pages]]:
    """A stream, and the memory that it describes at each of its epochs."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    memory: Pages = {}
    history = []
    stream = RemusStream(lambda octets: parts.append(bytes(octets)))
    stream.begin(json.dumps(CONFIG), STATIC)
    for epoch in range(1, EPOCHS + 1):
        data = {pfn: rng.randbytes(8) * 512 for pfn in rng.sample(range(100), 20)}
        body = struct.pack(f"<II{len(data)}Q", len(data), 0, *data) + b"".join(data.values())
        stream.pages(record(RecordType.PAGE_DATA, body))
        zeros = rng.sample(range(100, 120), 3)
        stream.zero(struct.pack("<3Q", *zeros))
        stream.gone(struct.pack("<Q", XTAB | 200 + epoch))
        stream.end_epoch(tail(epoch))
        memory = memory | data | dict.fromkeys(zeros, bytes(PAGE))
        history.append(memory)
    return b"".join(parts), history


STREAM, HISTORY = recording()
ENDS: list[int] = []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rec"
    path.write_bytes(STREAM)
    with path.open("rb") as file:
        ENDS[:] = whole_epochs(file)
    return path


@pytest.fixture
def xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDomains]:
    """A host with the fake xl, and nothing of ours left behind."""
    domains = install(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with nothing_leaks():
        yield domains


def restore(path: Path, domains: FakeDomains, *, paused: bool = False) -> tuple[int, str]:
    with path.open("rb") as file:
        return through_xl(
            Restore(source=path, paused=paused), file, CONFIG, domains, lambda done, total: None
        )


def test_the_last_epoch_of_a_recording_runs(path: Path, xen: FakeDomains) -> None:
    domid, name = restore(path, xen)
    assert (domid, name) == (1, "web")
    found = xen.get(UUID)
    assert found is not None
    assert (found["epochs"], found["pauses"]) == (EPOCHS, 0)
    assert xen.pages(UUID) == HISTORY[-1]


def test_it_stays_paused_if_it_is_to(path: Path, xen: FakeDomains) -> None:
    restore(path, xen, paused=True)
    found = xen.get(UUID)
    assert found is not None
    assert found["pauses"] == 1


@pytest.mark.parametrize(
    "cut", [event.position.offset for event in Reader().feed(STREAM)] + [len(STREAM) - 1]
)
def test_a_cut_at_a_record_leaves_the_epoch_before_it(
    path: Path, xen: FakeDomains, cut: int
) -> None:
    path.write_bytes(STREAM[:cut])
    whole = sum(end <= cut for end in ENDS)
    if not whole:
        with pytest.raises(StreamError, match=r"no whole epoch|cut off"):
            run_restore(Restore(source=path), lambda done, total: None)
        return
    restore(path, xen)
    assert xen.pages(UUID) == HISTORY[whole - 1]


def test_an_xl_that_fails_leaves_no_domain(path: Path, xen: FakeDomains) -> None:
    xen.order("die-at-epoch", "2")
    with pytest.raises(HypervisorError, match=r"signal 9|code -9.*something broke"):
        restore(path, xen)
    assert xen.get(UUID) is None


def test_a_guest_that_lives_here_is_left_alone(path: Path, xen: FakeDomains) -> None:
    xen.put(UUID, domid=9, name="web", pauses=0)
    with pytest.raises(HypervisorError, match=r"domain 9 \(web\).*lives here"):
        restore(path, xen)
    assert xen.get(UUID) == {"domid": 9, "name": "web", "pauses": 0}


def test_a_recording_with_a_device_model_is_refused(path: Path, xen: FakeDomains) -> None:
    """Of `xl remus`, say: what leaves between CHECKPOINT and CHECKPOINT_END must not be cut there."""
    emulator = record(LibxlType.EMULATOR_CONTEXT, Emulator(2, 0, b"qemu").pack())
    path.write_bytes(STREAM[: ENDS[0] - 8] + emulator + STREAM[ENDS[0] - 8 :])
    with pytest.raises(StreamError, match="device model"):
        restore(path, xen)
    assert xen.get(UUID) is None


def test_damage_is_found_before_xl_is_started(path: Path, xen: FakeDomains) -> None:
    data = bytearray(STREAM)
    at = next(e.position.offset for e in Reader().feed(STREAM) if e.position.name == "PAGE_DATA")
    data[at + 12] = 1  # its reserved field
    path.write_bytes(data)
    xen.order("fail", "it was started")
    with pytest.raises(StreamError, match="reserved field"):
        restore(path, xen)


def test_an_image_is_left_to_xl(path: Path) -> None:
    parts: list[bytes] = []
    stream = RemusStream(lambda octets: parts.append(bytes(octets)))
    stream.begin(json.dumps(CONFIG), STATIC)
    stream.end(tail(1))
    path.write_bytes(b"".join(parts))
    with pytest.raises(UsageError, match=r"`xl restore .*/rec` starts it"):
        run_restore(Restore(source=path), lambda done, total: None)


@pytest.mark.parametrize("config", [[], {"checkpointd": {"uuid": 1}}])
def test_a_configuration_of_nobody_is_told(path: Path, config: object) -> None:
    parts: list[bytes] = []
    stream = RemusStream(lambda octets: parts.append(bytes(octets)))
    stream.begin(json.dumps(config), STATIC)
    stream.end_epoch(tail(1))
    path.write_bytes(b"".join(parts))
    with pytest.raises(StreamError, match="configuration"):
        run_restore(Restore(source=path), lambda done, total: None)


def test_a_configuration_without_a_uuid_is_told(path: Path, xen: FakeDomains) -> None:
    with path.open("rb") as file, pytest.raises(StreamError, match="no UUID"):
        through_xl(
            Restore(source=path), file, {"c_info": {}}, xen, lambda done, total: None
        )
