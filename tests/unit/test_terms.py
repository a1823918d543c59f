"""Terms on stable storage, on a disk that forgets whatever was not fsynced."""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING

import pytest

from checkpointd.authority.terms import EPOCH_BLOCK, Role, TermRecord, TermStore
from checkpointd.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
OLD = TermRecord(UUID, 3, Role.PRIMARY, 20_001)
NEW = TermRecord(UUID, 4, Role.SECONDARY_ACTIVE, 20_001)


class CrashError(BaseException):
    """The power goes: nothing may catch it."""


class Disk:
    """The calls of `os` that TermStore makes, over a disk that a power cut takes back to what was fsynced.

    Octets are on it after fsync of their file, names after fsync of their directory. `crash_at` is the call
    before which the power goes; `fail_at` the one that fails with EIO.
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}  # as seen now: path to inode
        self.stable_names: dict[str, int] = {}
        self.octets: dict[int, bytes] = {}
        self.stable_octets: dict[int, bytes] = {}
        self.handles: dict[int, tuple[str, int]] = {}
        self.numbers = count(100)
        self.calls = 0
        self.crash_at = 0
        self.fail_at = 0

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.crash_at:
            raise CrashError
        if self.calls == self.fail_at:
            raise OSError(5, "Input/output error")

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self._call()
        if not flags & os.O_DIRECTORY:
            if flags & os.O_CREAT and path not in self.names:
                self.names[path] = next(self.numbers)
                self.octets[self.names[path]] = b""
            if path not in self.names:
                raise FileNotFoundError(2, "No such file or directory", path)
            if flags & os.O_TRUNC:
                self.octets[self.names[path]] = b""
        fd = next(self.numbers)
        self.handles[fd] = (path, self.names.get(path, 0))
        return fd

    def read(self, fd: int, length: int, /) -> bytes:
        self._call()
        return self.octets[self.handles[fd][1]][:length]

    def write(self, fd: int, data: bytes, /) -> int:
        self._call()
        some = data[: max(1, len(data) // 2)]  # writes may be short
        self.octets[self.handles[fd][1]] += some
        return len(some)

    def fsync(self, fd: int) -> None:
        self._call()
        path, inode = self.handles[fd]
        if inode:
            self.stable_octets[inode] = self.octets[inode]
        else:
            inside = {name: number for name, number in self.names.items() if name.startswith(path)}
            self.stable_names = inside

    def close(self, fd: int) -> None:
        del self.handles[fd]

    def replace(self, src: str, dst: str) -> None:
        self._call()
        self.names[dst] = self.names.pop(src)

    def power_cut(self, *, kept_names: bool) -> None:
        """What was not fsynced is gone; a file system may have written names early."""
        self.handles.clear()
        self.names = dict(self.names if kept_names else self.stable_names)
        self.octets = {inode: self.stable_octets.get(inode, b"") for inode in self.octets}
        self.stable_names = dict(self.names)
        self.calls = self.crash_at = self.fail_at = 0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TermStore]:
    store = TermStore(tmp_path / "terms")
    yield store
    store.close()


def test_a_record_comes_back_as_it_was_stored(store: TermStore) -> None:
    store.store(OLD)
    assert store.load(UUID) == OLD
    assert store.load(UUID.upper()) == OLD
    assert list(store.records()) == [OLD]


def test_a_domain_never_seen_has_a_blank_record(store: TermStore) -> None:
    assert store.load(UUID) == TermRecord(UUID, 0, Role.NONE, 1)
    assert list(store.records()) == []


@pytest.mark.parametrize(
    "back", [TermRecord(UUID, 2, Role.NONE, 30_000), TermRecord(UUID, 3, Role.PRIMARY, 20_000)]
)
def test_neither_term_nor_epochs_go_back(store: TermStore, back: TermRecord) -> None:
    store.store(OLD)
    with pytest.raises(StateError, match="would go back"):
        store.store(back)
    assert store.load(UUID) == OLD


def test_epochs_are_reserved_in_blocks_that_never_meet(store: TermStore) -> None:
    blocks = [store.reserve_epochs(UUID), store.reserve_epochs(UUID, 5), store.reserve_epochs(UUID)]
    assert [len(block) for block in blocks] == [EPOCH_BLOCK, 5, EPOCH_BLOCK]
    numbers = [number for block in blocks for number in (block[0], block[-1])]
    assert numbers == sorted(set(numbers))
    assert store.load(UUID).next_epoch == blocks[-1][-1] + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data.replace(b'"term": 3', b'"term": 2'),
        lambda data: b"\xff" * 100,
        lambda data: b"{}\n" + data.split(b"\n")[1] + b"\n",
    ],
)
def test_a_garbled_record_stops_the_daemon_and_names_the_file(
    tmp_path: Path, store: TermStore, damage: object
) -> None:
    store.store(OLD)
    path = tmp_path / "terms" / f"{UUID}.term"
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    for use in (store.load, store.reserve_epochs):
        with pytest.raises(StateError, match=rf"{UUID}.term is garbled.*remove the file"):
            use(UUID)
    with pytest.raises(StateError, match="garbled"):
        store.store(NEW)


def test_a_record_of_another_domain_is_not_taken(tmp_path: Path, store: TermStore) -> None:
    store.store(OLD)
    other = UUID.replace("6", "7")
    (tmp_path / "terms" / f"{UUID}.term").rename(tmp_path / "terms" / f"{other}.term")
    with pytest.raises(StateError, match="garbled"):
        store.load(other)


@pytest.mark.parametrize("uuid", ["", "../../etc/passwd", "6f1c1bd4"])
def test_only_uuids_name_files(store: TermStore, uuid: str) -> None:
    with pytest.raises(StateError, match="not a UUID"):
        store.load(uuid)


def test_one_process_at_a_time(tmp_path: Path, store: TermStore) -> None:
    with pytest.raises(StateError, match=f"in use by another checkpointd .pid {os.getpid()}"):
        TermStore(tmp_path / "terms")
    store.close()
    TermStore(tmp_path / "terms").close()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used for terms"):
        TermStore(tmp_path / "file" / "terms")


def test_its_files_are_the_owners_alone(tmp_path: Path, store: TermStore) -> None:
    store.store(OLD)
    assert (tmp_path / "terms").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "terms" / f"{UUID}.term").stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------- power cuts


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def on_disk(tmp_path: Path, disk: Disk) -> Iterator[TermStore]:
    store = TermStore(tmp_path, files=disk)
    store.store(OLD)
    yield store
    store.close()


@pytest.mark.parametrize("kept_names", [False, True])
def test_a_power_cut_before_any_call_leaves_one_whole_record(
    on_disk: TermStore, disk: Disk, kept_names: bool
) -> None:
    seen = set()
    for crash_at in count(1):
        disk.power_cut(kept_names=False)
        base = TermRecord(UUID, OLD.term + 2 * crash_at, OLD.role, OLD.next_epoch)
        on_disk.store(base)
        new = TermRecord(UUID, base.term + 1, NEW.role, NEW.next_epoch)
        disk.calls, disk.crash_at = 0, crash_at
        try:
            on_disk.store(new)
        except CrashError:
            disk.power_cut(kept_names=kept_names)
            found = on_disk.load(UUID)
            assert found in (base, new)
            seen.add(found == new)
        else:
            break
    disk.power_cut(kept_names=False)
    assert on_disk.load(UUID) == new  # store() had returned, so it is there
    assert crash_at > 8  # open, read, open, write.., fsync, replace, open, fsync
    assert False in seen


def test_a_failing_call_is_told_and_a_retry_makes_it_stable(on_disk: TermStore, disk: Disk) -> None:
    """Above all the last fsync: after it failed the new record can be read, and is not on the disk."""
    failures = 0
    for fail_at in count(1):
        disk.calls, disk.fail_at = 0, fail_at
        new = TermRecord(UUID, OLD.term + fail_at, NEW.role, NEW.next_epoch)
        try:
            on_disk.store(new)
        except StateError:
            failures += 1
        else:
            break
        disk.fail_at = 0
        on_disk.store(new)
        disk.power_cut(kept_names=False)
        assert on_disk.load(UUID) == new
    assert failures > 8
    assert disk.handles == {}
