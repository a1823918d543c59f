"""Terms on stable storage: which side may run a guest, and which epoch numbers are used up.

One small file for each domain, `<uuid>.term`: a line of JSON and a line with its SHA-256. A record
is replaced whole or not at all, and a record that cannot be read stops the daemon: guessing a term
could start a second runner.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import uuid as uuids
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from checkpointd.authority.durable import REAL, make_directory, put
from checkpointd.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.authority.durable import FileSystem

# epochs reserved at a time: at 100 ms one fsync in 17 minutes, and numbers never run out
EPOCH_BLOCK = 10_000
MAX_U64 = (1 << 64) - 1  # terms and epochs are u64 on the wire
RECORD_LIMIT = 4096  # octets; a record has some 200, so anything longer is none of ours

_SUFFIX = ".term"


class Role(StrEnum):
    """What this side was, for this domain, in the recorded term."""

    NONE = "none"
    PRIMARY = "primary"
    # a standby that took the guest over: it may be running here
    SECONDARY_ACTIVE = "secondary-active"


@dataclass(frozen=True, slots=True)
class TermRecord:
    uuid: str
    term: int = 0  # 0: no term was ever seen here
    role: Role = Role.NONE
    next_epoch: int = 1  # the first number that is not reserved


class TermStore:
    """Invariant: once store() has returned, no crash brings an older record back, and at no moment
    is there a record that is neither the old one nor the new one.

    Kept by durable.put(). A term never goes back, and neither does `next_epoch`: store() refuses. One
    process at a time holds the directory (a lock that dies with its process), so what was loaded is
    still true when it is stored.
    """

    def __init__(self, directory: Path, *, files: FileSystem = REAL) -> None:
        """Make the directory if need be, and lock it. Raises StateError."""
        self._directory = directory
        self._files = files
        self._mutex = threading.Lock()
        try:
            make_directory(directory)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(
                f"{directory}: cannot be used for terms ({error.strerror}): make it writable, "
                "or name another directory"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._lock)
            raise StateError(
                f"{directory} is in use by another checkpointd (pid {holder}): stop that one, "
                "or give this one a state directory of its own"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give the directory free. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def load(self, uuid: str) -> TermRecord:
        """The record of a domain; a blank one (term 0) if there is none. Raises StateError for a
        garbled one.
        """
        with self._mutex:
            return self._load(uuid)

    def records(self) -> Iterator[TermRecord]:
        """Every record there is, by UUID. Raises StateError for a garbled one."""
        for name in sorted(os.listdir(self._directory)):
            if name.endswith(_SUFFIX):
                yield self.load(name.removesuffix(_SUFFIX))

    def store(self, record: TermRecord) -> None:
        """Put a record on stable storage; when this returns, it is there. Raises StateError if it
        cannot be written or would take the term or the epochs back.
        """
        with self._mutex:
            self._store(record)

    def reserve_epochs(self, uuid: str, count: int = EPOCH_BLOCK) -> range:
        """Numbers that were never given before and never will be again, whatever crashes. Raises
        StateError.
        """
        with self._mutex:
            record = self._load(uuid)
            first = record.next_epoch
            self._store(replace(record, next_epoch=first + count))
        return range(first, first + count)

    def _path(self, uuid: str) -> str:
        return _record_path(self._directory, uuid)

    def _load(self, uuid: str) -> TermRecord:
        return read_record(self._directory, uuid, files=self._files)

    def _store(self, record: TermRecord) -> None:
        old = self._load(record.uuid)
        terms_grow = old.term <= record.term <= MAX_U64
        if not (terms_grow and old.next_epoch <= record.next_epoch <= MAX_U64):
            raise StateError(
                f"{self._path(record.uuid)} holds {old}, and {record} would go back: a term or an "
                "epoch number must never be used twice"
            )
        path = self._path(record.uuid)
        try:
            put(self._directory, os.path.basename(path), _render(record), files=self._files)
        except OSError as error:
            raise StateError(
                f"{path} cannot be written ({error.strerror}): free space or make it writable; "
                "until then no guest is started in a new term"
            ) from error


def read_record(directory: Path, uuid: str, *, files: FileSystem = REAL) -> TermRecord:
    """What load() gives, without the lock: for a look at the other role's store, whose daemon may
    run. A record is replaced whole, so it is never seen half written. Raises StateError.
    """
    path = _record_path(directory, uuid)
    try:
        fd = files.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = files.read(fd, RECORD_LIMIT)
        finally:
            files.close(fd)
    except FileNotFoundError:
        return TermRecord(str(uuids.UUID(uuid)))
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from error
    record = _parse(data)
    if record is None or record.uuid != str(uuids.UUID(uuid)):
        raise StateError(
            f"{path} is garbled, so it is not known who may run this guest: make sure that the "
            "guest runs on one machine only, then remove the file"
        )
    return record


def _record_path(directory: Path, uuid: str) -> str:
    try:
        canonical = str(uuids.UUID(uuid))
    except ValueError:
        raise StateError(f"{uuid!r} is not a UUID, so it has no term record") from None
    return str(directory / f"{canonical}{_SUFFIX}")


def _render(record: TermRecord) -> bytes:
    body = json.dumps(asdict(record), sort_keys=True).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _parse(data: bytes) -> TermRecord | None:
    """None for anything that _render() did not write."""
    body, _, check = data.partition(b"\n")
    if check != hashlib.sha256(body).hexdigest().encode() + b"\n":
        return None
    try:
        fields = json.loads(body)
        record = TermRecord(
            fields["uuid"], int(fields["term"]), Role(fields["role"]), int(fields["next_epoch"])
        )
    except (KeyError, TypeError, ValueError):
        return None
    return record if _render(record) == data else None
