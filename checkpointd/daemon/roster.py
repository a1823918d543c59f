"""The daemons that run on this machine: a small file each, so that `checkpointd status` finds them.

A file that its daemon could not remove (SIGKILL) names a process that is no more; pid and start
time together tell it from another process that got the same pid since.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from checkpointd.authority.processes import start_time
from checkpointd.daemon import paths

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

SCHEMA = 1
_LARGEST = 65536  # octets; what is longer is no entry of ours


@dataclass(frozen=True, slots=True)
class Entry:
    role: str  # "primary" or "secondary"
    id: str  # tells daemons of one role apart: the domid, or the control port
    pid: int
    start_time: int  # clock ticks since boot: field 22 of /proc/PID/stat
    domid: int | None
    http: str | None  # http://HOST:PORT of /status; None with --no-metrics


class Registration:
    """The entry of this process, from its making until close()."""

    def __init__(
        self, run_dir: Path, role: str, ident: str, *, domid: int | None, http: str | None
    ) -> None:
        pid = os.getpid()
        started = start_time(pid)
        assert started is not None  # this process lives
        self.entry = Entry(role, ident, pid, started, domid, http)
        directory = paths.private(paths.private(run_dir) / "daemons")
        self.path = directory / f"{role}-{ident}.json"
        fresh = directory / f".{role}-{ident}.{pid}"
        fresh.write_text(json.dumps({"schema": SCHEMA, **asdict(self.entry)}) + "\n")
        fresh.rename(self.path)  # a reader sees the old entry or the new one, whole

    def close(self) -> None:
        """Remove the entry, unless a successor has written its own. Idempotent."""
        if _read(self.path) == self.entry:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def running(run_dir: Path) -> list[Entry]:
    """The daemons that live, by role and id; files that are stale or no entries are passed over."""
    entries = []
    for path in sorted((run_dir / "daemons").glob("[!.]*.json")):
        entry = _read(path)
        if entry is not None and start_time(entry.pid) == entry.start_time:
            entries.append(entry)
    return entries


def _read(path: Path) -> Entry | None:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        with path.open("rb") as file:
            fields = json.loads(file.read(_LARGEST))
        if isinstance(fields, dict) and fields.pop("schema", None) == SCHEMA:
            return Entry(**fields)
    return None
