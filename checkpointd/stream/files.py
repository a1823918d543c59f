"""Streams in files: reading in bounded pieces, also from zstd, and replacing a file only by a
whole one.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from typing import TYPE_CHECKING, BinaryIO, cast

from checkpointd.errors import StreamError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.stream.writer import Sink

_CHUNK = 1 << 20  # octets of one read
# Octets of compressed data given to zstd at once. Four of them can mean 128 KiB (a block of one
# repeated octet), so this bounds what a malicious file makes of one call to 32 MiB.
_ZSTD_CHUNK = 1 << 10
# Octets zstd may keep of what it has put out: the most that `zstd -d` itself takes without being
# asked to.
_ZSTD_WINDOW = 128 << 20
_ZSTD_LEVEL = 3  # zstd's own default


def read_chunks(path: str) -> Iterator[bytes]:
    """The content of `path` in pieces; `-` is standard input, and a name in .zst is decompressed.

    Raises UsageError if it cannot be opened, StreamError if it cannot be read or is no whole .zst.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: BinaryIO
            file = sys.stdin.buffer if path == "-" else stack.enter_context(_open(path))
            pieces = iter(lambda: file.read(_CHUNK), b"")
            yield from _decompressed(pieces, path) if path.endswith(".zst") else pieces
    except OSError as error:
        raise StreamError(f"{path}: cannot be read: {error.strerror}") from error


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened: {error.strerror}") from error


def _decompressed(pieces: Iterator[bytes], path: str) -> Iterator[bytes]:
    """Frame after frame, until the input ends; a frame that is cut off is an error."""
    import zstandard  # here: only those who read .zst pay for it

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    try:
        for piece in pieces:
            for start in range(0, len(piece), _ZSTD_CHUNK):
                rest = piece[start : start + _ZSTD_CHUNK]
                while rest:
                    frame = frame or decompressor.decompressobj()
                    if out := frame.decompress(rest):
                        yield out
                    rest = b""
                    if frame.eof:
                        rest, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise StreamError(f"{path}: not zstd, or damaged: {error}") from error
    if frame is not None:
        raise StreamError(f"{path}: the compressed file is cut off; its last frame is not whole")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[Sink]:
    """Write `path` so that it has its old content, or none, until the block ends without an error.

    The new content is on stable storage before the name is given to it. It may hold a guest's
    memory, so a new file is readable by its owner only; an existing one's mode is kept. `-` is
    standard output, where nothing can be taken back. A name in .zst is compressed.
    """
    if path == "-":
        with _compressed(sys.stdout.buffer, path) as sink:
            yield sink
        sys.stdout.buffer.flush()
        return
    path = os.path.realpath(path)  # replace what a link points to, not the link
    mode = _mode_of(path)
    directory, name = os.path.split(path)
    try:
        descriptor, temporary = tempfile.mkstemp(".tmp", f".{name}.", directory)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb", buffering=_CHUNK) as file:
            with _compressed(file, path) as sink:
                yield sink
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(temporary, path)
        _sync_directory(directory)
    except OSError as error:
        raise StreamError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has its name
            os.unlink(temporary)


@contextlib.contextmanager
def _compressed(file: BinaryIO, path: str) -> Iterator[Sink]:
    if not path.endswith(".zst"):
        yield file
        return
    import zstandard  # here: only those who write .zst pay for it

    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
    with compressor.stream_writer(file, closefd=False) as writer:
        yield cast("Sink", writer)


def _mode_of(path: str) -> int:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0o600
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        # Renaming would put a file in the place of the device or pipe.
        raise UsageError(f"{path}: is not a regular file; use - and redirect standard output")
    return stat.S_IMODE(found.st_mode)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
