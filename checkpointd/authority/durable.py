"""Small files that are on stable storage once their writer has gone on, and never half written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

_TEMPORARY = ".new"


class FileSystem(Protocol):
    """The calls of module `os` that stand between a record and the disk; tests put a crashing disk
    here.
    """

    def open(self, path: str, flags: int, mode: int = 0o777) -> int: ...
    def read(self, fd: int, length: int, /) -> bytes: ...
    def write(self, fd: int, data: bytes, /) -> int: ...
    def fsync(self, fd: int) -> None: ...
    def close(self, fd: int) -> None: ...
    def replace(self, src: str, dst: str) -> None: ...


REAL: Final = cast("FileSystem", os)


def put(directory: Path, name: str, data: bytes, *, files: FileSystem = REAL) -> None:
    """Replace the file whole or not at all; when this returns, no crash brings the old one back. Raises OSError.

    Kept by this order: write a temporary file, fsync it, rename it over the file, fsync the directory.
    """
    path = str(directory / name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    fd = files.open(path + _TEMPORARY, flags, 0o600)
    try:
        view = data
        while view:
            view = view[files.write(fd, view) :]
        files.fsync(fd)
    finally:
        files.close(fd)
    files.replace(path + _TEMPORARY, path)
    _fsync_directory(directory, files)


def remove(directory: Path, name: str) -> None:
    """When this returns, no crash brings the file back. Idempotent. Raises OSError."""
    (directory / name).unlink(missing_ok=True)
    _fsync_directory(directory, REAL)


def make_directory(directory: Path) -> None:
    """Like mkdir -p with mode 0700, and on stable storage: a record in a directory that a crash
    takes away is lost.
    """
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        _fsync_directory(path.parent, REAL)


def _fsync_directory(path: Path, files: FileSystem) -> None:
    fd = files.open(str(path), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        files.fsync(fd)
    finally:
        files.close(fd)
