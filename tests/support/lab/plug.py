"""Processes of the lab that outlive whoever started them: known by pid and start time, and ended for certain."""

from __future__ import annotations

import json
import os
import select
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lab.places import LabError

PATIENCE = 60.0  # s; SIGKILL takes a moment, or as long as the machine is busy writing memory away


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    start_time: int  # clock ticks since boot (proc(5), stat 22): tells a process from a later one of its number

    @classmethod
    def of(cls, pid: int) -> Self:
        return cls(pid, _start_time(pid))

    def alive(self) -> bool:
        try:
            return _start_time(self.pid) == self.start_time and _state(self.pid) != "Z"
        except OSError:
            return False

    def kill(self, patience: float = PATIENCE) -> None:
        """SIGKILL; returns once it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():  # asked with the handle in hand, so its number cannot pass to another
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                self._wait(handle, patience)
        finally:
            os.close(handle)

    def wait(self, patience: float) -> None:
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():
                self._wait(handle, patience)
        finally:
            os.close(handle)

    def _wait(self, handle: int, patience: float) -> None:
        if not select.select([handle], [], [], patience)[0]:
            raise LabError(f"process {self.pid} is not gone after {patience:.0f} s")


def _start_time(pid: int) -> int:
    return int(_stat(pid)[19])


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _stat(pid: int) -> list[str]:
    """From the third field on: the second may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclass(frozen=True, slots=True)
class Record:
    """On disk, who runs and under what name; all commands of the lab read it."""

    name: str
    process: Process
    facts: dict[str, Any]

    def write(self, directory: Path) -> None:
        path = directory / f"{self.name}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.rename(path)

    @classmethod
    def last(cls, directory: Path, name: str) -> Record | None:
        """Also of one that has ended; None if there never was one."""
        try:
            data = json.loads((directory / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return cls(data["name"], Process(**data["process"]), data["facts"])

    @classmethod
    def read(cls, directory: Path, name: str) -> Record | None:
        """None if nothing of that name runs."""
        record = cls.last(directory, name)
        return record if record and record.process.alive() else None
