"""Starts guests, primaries and secondaries as separate processes, watches them, and kills them.

Processes are waited for by what they say through the notify protocol of systemd (READY=1, STATUS=...), never by
sleeping; a process that ends instead is an error that shows its log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from checkpointd.authority.processes import HostIdentity, kill
from checkpointd.errors import CheckpointdError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

# s; a slow machine that starts several interpreters at once needs tens of seconds, a hang needs for ever.
PATIENCE = 60.0
LOG_TAIL = 4000  # characters of a log shown with an error


class RigError(CheckpointdError):
    """A process did not do what the rig waited for; shows the end of its log."""


@dataclass
class Daemon:
    """One process of the installation."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    notify: socket.socket
    said: list[str] = field(default_factory=list)  # every notify assignment so far, oldest first

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(
        self, wanted: Callable[[str], bool], what: str, *, timeout: float = PATIENCE, since: int = 0
    ) -> str:
        """The first word from number `since` on that is `wanted`, waited for if need be."""
        deadline = time.monotonic() + timeout
        checked = since
        while True:
            while checked < len(self.said):
                checked += 1
                if wanted(self.said[checked - 1]):
                    return self.said[checked - 1]
            left = deadline - time.monotonic()
            ended = self.process.poll() is not None
            if not self._listen(0 if ended else min(left, 0.2)) and (ended or left <= 0):
                how = (
                    f"ended with {self.process.returncode}"
                    if ended
                    else f"was silent for {timeout:.0f} s"
                )
                raise RigError(
                    f"{self.name} {how} instead of {what}; it said {self.said[-5:]}\n{self.tail()}"
                )

    def ready(self) -> Self:
        self.wait_for(lambda word: word == "READY=1", "becoming ready")
        return self

    def state(self, *states: str, timeout: float = PATIENCE, since: int = 0) -> str:
        """Wait until the daemon says that it (or one of its domains) is in one of `states`."""
        return self.wait_for(
            lambda word: (
                word.startswith("STATUS=") and word.split()[-1].removeprefix("STATUS=") in states
            ),
            f"reaching {' or '.join(states)}",
            timeout=timeout,
            since=since,
        )

    def _listen(self, timeout: float) -> bool:
        if not select.select([self.notify], [], [], max(0, timeout))[0]:
            return False
        self.said += self.notify.recv(65536).decode(errors="replace").splitlines()
        return True

    def catch_up(self) -> int:
        """Read what has been said until now; the number of words, to be given as `since`."""
        while self._listen(0):
            pass
        return len(self.said)

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout: float = PATIENCE) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float = PATIENCE) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RigError(
                f"{self.name} did not end within {timeout:.0f} s\n{self.tail()}"
            ) from None

    def ended(self, timeout: float) -> bool:
        """Whether it has ended within `timeout` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.poll() is not None

    def tail(self) -> str:
        text = self.log.read_text(errors="replace")[-LOG_TAIL:]
        return f"--- {self.log.name}\n{text}---"

    def close(self) -> None:
        self.kill()
        self.notify.close()


class Rig:
    """An installation in `directory` (short: Unix sockets live there). Everything it started dies with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemons: list[Daemon] = []
        self.ports = {name: free_port() for name in ("control", "bulk", "metrics")}
        self.environment = {
            **os.environ,
            "CHECKPOINTD_STATE_DIR": str(directory / "state"),
            "CHECKPOINTD_RUN_DIR": str(directory / "run"),
            "PYTHONUNBUFFERED": "1",
        }
        for name in ("state", "run", "logs"):
            (directory / name).mkdir(mode=0o700, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, name: str, *arguments: str, faults: str = "") -> Daemon:
        """Run `checkpointd ARGUMENTS`; `name` is unique among those that live."""
        number = len(self.daemons)
        log = self.directory / "logs" / f"{number:02}-{name}.log"
        address = self.directory / f"n{number}"
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(str(address))
        environment = {
            **self.environment,
            "NOTIFY_SOCKET": str(address),
            "CHECKPOINTD_FAULTS": faults,
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "checkpointd.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        daemon = Daemon(name, process, log, notify)
        self.daemons.append(daemon)
        return daemon

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @staticmethod
    def udp_port() -> int:
        return free_port(socket.SOCK_DGRAM)

    def guest_is_up(self, guest: Daemon, *, timeout: float = PATIENCE) -> Daemon:
        """Wait for the one line that a host prints when its guest runs."""
        deadline = time.monotonic() + timeout
        while b" runs: " not in guest.log.read_bytes():
            if guest.ended(0.02) or time.monotonic() > deadline:
                raise RigError(f"{guest.name} did not start\n{guest.tail()}")
        return guest

    def guest(self, domid: int = 4, *arguments: str, faults: str = "") -> Daemon:
        return self.start(
            f"guest{domid}", "guest", "--domid", str(domid), *arguments, faults=faults
        )

    def secondary(self, *arguments: str, faults: str = "") -> Daemon:
        ports = self.ports
        return self.start(
            "secondary",
            *(
                "secondary",
                "--control-port",
                str(ports["control"]),
                "--bulk-port",
                str(ports["bulk"]),
            ),
            *("--metrics", f"127.0.0.1:{ports['metrics']}", *arguments),
            faults=faults,
        )

    def primary(self, domid: int = 4, *arguments: str, faults: str = "") -> Daemon:
        ports = self.ports
        return self.start(
            f"primary{domid}",
            *("primary", "--domid", str(domid)),
            *("--secondary", f"127.0.0.1:{ports['control']}:{ports['bulk']}"),
            *("--metrics", f"127.0.0.1:{free_port()}", *arguments),
            faults=faults,
        )

    def status(self, role: str) -> dict[str, Any]:
        """What /status of the newest daemon of that role says; {} if none answers."""
        for url in self.urls(role):
            with suppress(OSError, ValueError):
                return get_status(url)
        return {}

    def urls(self, role: str) -> list[str]:
        """Where the daemons of that role serve HTTP."""
        found = []
        for path in sorted((self.directory / "run" / "daemons").glob(f"{role}-*.json")):
            with suppress(OSError, ValueError):
                found.append(str(json.loads(path.read_text())["http"]))
        return found

    def logs(self) -> str:
        return "\n".join(daemon.tail() for daemon in self.daemons)

    def close(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.close()
        self._end_activated()

    def _end_activated(self) -> None:
        """Hosts of activated guests outlive the daemon that made them. What a dead host has left has a pid that may be
        another's by now.
        """
        for document in (self.directory / "run" / "embedded").glob("*/*/domain.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                kill(HostIdentity(**json.loads(document.read_text())["host"]))


def get_status(url: str) -> dict[str, Any]:
    """Raises OSError, ValueError."""
    with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:  # noqa: S310 - our own, http
        document: dict[str, Any] = json.load(answer)
        return document


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of loopback that nobody has; found, not kept, so a race is possible but rare."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
