"""The door to the compiled half of the Xen adapter and, through it, to Xen's own libraries."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.errors import HypervisorError, NativeError
from checkpointd.hypervisor.xen import versions
from checkpointd.native import refuse_stale

try:
    from checkpointd._xen import ffi, lib
except ImportError as error:
    raise NativeError(
        f"the compiled Xen adapter cannot be loaded ({error}): "
        "run `pip install --no-build-isolation -e .` in the checkout"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator

    Fired = list[tuple[str, str]]  # (path, token) of watches

__all__ = ["Store", "check", "ffi", "lib", "open_libs"]

_SOURCES = Path(__file__).parent / "csrc"
_PORT = _SOURCES.parents[2] / "csrc"
refuse_stale(
    "checkpointd._xen",
    ffi.string(lib.CK_SOURCE_HASH).decode(),
    _SOURCES,
    _PORT / "hypervisor.h",  # whose struct it fills
    _PORT / "bitmap.h",
    _PORT / "strict.h",
)

_lock = threading.Lock()
_opened: dict[str, Any] = {}  # by directory; Xen's handles are for the life of the process


def check(rc: int, doing: str) -> int:
    """`rc` if it is not negative; else HypervisorError: `doing` says what failed."""
    if rc < 0:
        said = ffi.string(lib.xen_libs_said()).decode(errors="replace")
        raise HypervisorError(f"{doing}: {os.strerror(-rc)}{f' ({said})' if said else ''}")
    return rc


def open_libs(*, untested: bool = False, directory: str = "") -> Any:
    """Xen's libraries and handles: the one `struct xen_libs *` of this process.

    Raises HypervisorError: no Xen, an untested release, a library or function is missing, no privilege, or answers
    that are not of the layout that this adapter knows. `directory`: where the libraries are, for tests.
    """
    version = versions.running()
    versions.require_tested(version, untested=untested)
    with _lock:
        if directory not in _opened:
            _opened[directory] = _open(version, directory)
        return _opened[directory]


def _open(version: versions.Version, directory: str) -> Any:
    error = ffi.new("char[512]")
    libs = lib.xen_libs_open(version.major, version.minor, directory.encode(), error, len(error))
    if libs == ffi.NULL:
        raise HypervisorError(
            f"Xen {version} is running, and its libraries cannot be used: {ffi.string(error).decode()}. "
            "Run as root in dom0, with the libxenctrl of the running release (Debian: xen-utils)"
        )
    try:
        _check_layout(libs)
    except BaseException:
        lib.xen_libs_close(libs)
        raise
    return libs


def _check_layout(libs: Any) -> None:
    """Does Xen describe dom0 as the layout that libs.h declares would have it?"""
    info = ffi.new("struct xen_dominfo *")
    check(lib.xen_domain_state(libs, 0, info), "Xen does not describe dom0")
    sane = (
        info.domain == 0
        and not info.flags & (lib.XEN_STATE_DYING | lib.XEN_STATE_SHUTDOWN)
        and 0 < info.tot_pages <= info.max_pages
        and 0 < info.nr_online_vcpus <= info.max_vcpu_id + 1 <= 1 << 16
        and 32 <= info.gpaddr_bits <= 64
    )
    if not sane:
        raise HypervisorError(
            "Xen's description of dom0 makes no sense in the layout that this adapter was made for: "
            "its libraries are not of a release that checkpointd knows"
        )


class Store:
    """A connection to xenstored. Any thread may call it; watches are for one reader."""

    def __init__(self, libs: Any) -> None:
        self._libs = libs
        self._handle = libs.xs_open(0)
        if self._handle == ffi.NULL:
            raise HypervisorError(
                f"xenstored does not answer ({os.strerror(ffi.errno)}): is it running, and are you root?"
            )

    @property
    def handle(self) -> Any:
        """The `struct xen_store *`, for lib's functions; valid until close()."""
        if self._handle is None:
            raise HypervisorError("the connection to xenstored is closed")
        return self._handle

    def read(self, path: str, transaction: int = 0) -> str | None:
        """What is at `path`; None: there is nothing. (A guest may write any octets: none of them is lost.)"""
        length = ffi.new("unsigned *")
        value = self._libs.xs_read(self.handle, transaction, path.encode(), length)
        if value == ffi.NULL:
            if ffi.errno in (errno.ENOENT, errno.EACCES):
                return None
            raise self._error(f"cannot read {path}")
        try:
            return bytes(ffi.buffer(value, length[0])).decode(errors="surrogateescape")
        finally:
            lib.free(value)

    def write(self, path: str, value: str, transaction: int = 0) -> None:
        data = value.encode(errors="surrogateescape")
        if not self._libs.xs_write(self.handle, transaction, path.encode(), data, len(data)):
            raise self._error(f"cannot write {path}")

    def list(self, path: str, transaction: int = 0) -> list[str]:
        """Names of what is right below `path`."""
        number = ffi.new("unsigned *")
        names = self._libs.xs_directory(self.handle, transaction, path.encode(), number)
        if names == ffi.NULL:
            if ffi.errno in (errno.ENOENT, errno.EACCES):
                return []
            raise self._error(f"cannot list {path}")
        try:
            return [ffi.string(names[i]).decode() for i in range(number[0])]
        finally:
            lib.free(names)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Reads and writes that happen at once or, if somebody came in between, not at all (see Transaction.done)."""
        number = self._libs.xs_transaction_start(self.handle)
        if number == 0:
            raise self._error("xenstored begins no transaction")
        transaction = Transaction(number)
        try:
            yield transaction
        except BaseException:
            self._libs.xs_transaction_end(self.handle, number, True)
            raise
        ok = self._libs.xs_transaction_end(self.handle, number, False)
        if not ok and ffi.errno != errno.EAGAIN:
            raise self._error("xenstored does not end a transaction")
        transaction.done = bool(ok)

    def watch(self, path: str, token: str) -> None:
        """From now on fired() gives (path, token) for each change at or below `path`, and once at first."""
        if not self._libs.xs_watch(self.handle, path.encode(), token.encode()):
            raise self._error(f"cannot watch {path}")

    def unwatch(self, path: str, token: str) -> None:
        if not self._libs.xs_unwatch(self.handle, path.encode(), token.encode()):
            raise self._error(f"cannot stop watching {path}")

    def fileno(self) -> int:
        """Readable once a watch has fired."""
        return int(self._libs.xs_fileno(self.handle))

    def fired(self) -> Fired:
        """The watches that have fired, as (path, token), without waiting."""
        found: Fired = []
        while True:
            pair = self._libs.xs_check_watch(self.handle)
            if pair == ffi.NULL:
                return found
            found.append((ffi.string(pair[0]).decode(), ffi.string(pair[1]).decode()))
            lib.free(pair)

    def close(self) -> None:
        if self._handle is not None:
            self._libs.xs_close(self._handle)
            self._handle = None

    def _error(self, doing: str) -> HypervisorError:
        return HypervisorError(f"xenstore: {doing}: {os.strerror(ffi.errno)}")


class Transaction:
    """`number` goes to the calls within; `done` says afterwards whether it took place."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.done = False
