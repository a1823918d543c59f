"""What an engine has done to a Xen domain, written down, so that whoever is left after its death can undo it.

In RUN_DIR/xen there are, for each domain, DOMID.json, DOMID.asked and DOMID.lock. The lock is held by the engine for
its life, and by whoever undoes what a dead one did: flock(2) ends with its holder, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Self

from checkpointd.authority.processes import HostIdentity, boot_id, start_time
from checkpointd.errors import DomainBusyError, HypervisorError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

# s; what holds the lock for a moment only, undoing what a dead engine did, has ended by then.
LOCK_TIMEOUT: Final = 2.0
LOCK_LOOK: Final = 0.02  # s; between two tries: flock has no timeout of its own


@dataclass(frozen=True, slots=True)
class EngineState:
    """Written before what it names can block the guest, removed when nothing of it is left."""

    uuid: str  # of the guest
    domid: int
    engine: HostIdentity  # the engine's process
    ioreq_server: int | None = None  # its id in Xen, while there is one
    watcher_pid: int | None = None
    # Its request to suspend was out when it was found dead, and somebody else was saving the guest: if it is found
    # suspended once he has ended, nobody can tell for whom.
    contested: bool = False

    @property
    def engine_lives(self) -> bool:
        engine = self.engine
        return engine.boot_id == boot_id() and start_time(engine.pid) == engine.start_time


def path_of(run_dir: Path, domid: int) -> Path:
    return run_dir / "xen" / f"{domid}.json"


def store(run_dir: Path, state: EngineState) -> None:
    """Put it there whole. It need not survive a power cut: the domain would not either."""
    path = path_of(run_dir, state.domid)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(json.dumps(asdict(state)) + "\n", encoding="ascii")
        os.replace(temporary, path)
    except OSError as error:
        raise HypervisorError(_no_room(path, error)) from error


def _no_room(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be written ({error.strerror}), and without it nobody could release the guest after a crash: "
        "make room there, or choose another --run-dir"
    )


def load(run_dir: Path, domid: int) -> EngineState | None:
    """None: no engine has left anything behind. Raises HypervisorError for a file that is none of ours."""
    path = path_of(run_dir, domid)
    try:
        fields = json.loads(path.read_text(encoding="ascii"))
        return EngineState(**{**fields, "engine": HostIdentity(**fields["engine"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HypervisorError(
            f"{path} cannot be read ({error}): look whether domain {domid} runs, then remove it"
        ) from error


def find(run_dir: Path, *, uuid: str | None = None, domid: int | None = None) -> list[int]:
    """The domains of which something is written here: this domid, or all of this UUID."""
    if domid is not None:
        return [domid] if path_of(run_dir, domid).exists() else []
    found = []
    for path in sorted((run_dir / "xen").glob("*.json")):
        state = load(run_dir, int(path.stem)) if path.stem.isdecimal() else None
        if state is not None and state.uuid == uuid:
            found.append(state.domid)
    return found


def remove(run_dir: Path, domid: int) -> None:
    path_of(run_dir, domid).unlink(missing_ok=True)
    _asked_path(run_dir, domid).unlink(missing_ok=True)


def _asked_path(run_dir: Path, domid: int) -> Path:
    return path_of(run_dir, domid).with_suffix(".asked")


def asked(run_dir: Path, domid: int) -> float | None:
    """Within how many s the guest was to stop that an engine has asked to suspend and not resumed yet; 0.0: nothing of
    the kind is out. None: nobody knows.
    """
    try:
        return int.from_bytes(_asked_path(run_dir, domid).read_bytes(), "little") / 1e9
    except OSError:
        return None


class Asked:
    """What asked() reads, as memory for the engine's native half (xen_domain_keep). It is written to twice an epoch,
    which costs no call, and outlives the engine.
    """

    def __init__(self, run_dir: Path, domid: int, late: float = 0.0) -> None:
        """`late`: s; what asked() said of a dead engine's request, if the guest may obey that one yet."""
        path = _asked_path(run_dir, domid)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                # Written before it is mapped: a full file system is an error here, and would be a SIGBUS later.
                os.write(fd, int(late * 1e9).to_bytes(8, "little"))
                self.memory = mmap.mmap(fd, 8)
            finally:
                os.close(fd)
        except OSError as error:
            raise HypervisorError(_no_room(path, error)) from error

    def close(self) -> None:
        """Nobody writes to it any more."""
        self.memory.close()


class DomainLock:
    """One at a time: an engine, or the undoing of a dead one's work. A context manager, or close() it."""

    def __init__(self, run_dir: Path, domid: int, timeout: float = LOCK_TIMEOUT) -> None:
        """Take it within `timeout` seconds, or raise DomainBusyError."""
        path = path_of(run_dir, domid).with_suffix(".lock")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + timeout
        while not self._try():
            if time.monotonic() >= deadline:
                holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                self.close()
                raise DomainBusyError(
                    f"an engine (pid {holder}) protects domain {domid} already: stop that one first"
                )
            time.sleep(LOCK_LOOK)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Give it free. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
