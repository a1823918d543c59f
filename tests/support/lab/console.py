"""What a file in dom0 says, line by line as it grows, each with the moment at which it came."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lab.guests import Tick, ticks
from lab.places import LabError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from lab.machine import Machine

TICK_LIMIT = (
    240.0  # s from the creation of a guest to its first tick; 20 s alone on an idle machine
)
CONSOLES = "/var/log/xen/console"


@dataclass(frozen=True, slots=True)
class Line:
    at: float  # s, time.monotonic() of the machine that holds the lab
    text: str


class Follower:
    """Lines of some files of a host. It ends with the host."""

    def __init__(self, machine: Machine, *paths: str) -> None:
        self.lines: list[Line] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            # -F: they need not be there yet. A pipe's line is whole, for tail writes what it reads.
            [*machine.ssh_command(), f"exec tail -q -n +1 -s 0.1 -F {' '.join(paths)} 2>/dev/null"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._thread = threading.Thread(
            target=self._follow, name=f"follow-{machine.name}", daemon=True
        )
        self._thread.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(
                    Line(time.monotonic(), line.decode(errors="replace").rstrip("\r\n"))
                )
                self._changed.notify_all()

    @property
    def text(self) -> str:
        with self._changed:
            return "\n".join(line.text for line in self.lines)

    def wait(self, found: Callable[[list[Line]], bool], limit: float, what: str) -> None:
        """Until `found` says so of the lines; LabError with the last ones after `limit` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: found(self.lines), limit):
                last = "\n".join(line.text for line in self.lines[-20:])
                raise LabError(f"{what}: not seen within {limit:.0f} s; the last lines:\n{last}")

    def wait_for(self, text: str, limit: float) -> Line:
        self.wait(lambda lines: any(text in line.text for line in lines), limit, repr(text))
        return next(line for line in self.lines if text in line.text)

    def close(self) -> None:
        self._process.kill()
        self._thread.join()
        if self._process.stdout:
            self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Console(Follower):
    """Of a guest, on the host where it is or will be: libxl calls it NAME--incoming at first."""

    def __init__(self, machine: Machine, guest: str) -> None:
        super().__init__(
            machine, *(f"{CONSOLES}/guest-{guest}{suffix}.log" for suffix in ("", "--incoming"))
        )

    @property
    def ticks(self) -> list[tuple[float, Tick]]:
        with self._changed:
            return [(line.at, tick) for line in self.lines for tick in ticks(line.text)]

    def wait_ticks(
        self, count: int, limit: float = TICK_LIMIT, *, after: float = 0.0
    ) -> list[tuple[float, Tick]]:
        """At least `count` ticks that came after the moment `after`; each must say that all was well."""

        def come(lines: list[Line]) -> list[tuple[float, Tick]]:
            return [
                (line.at, tick) for line in lines if line.at > after for tick in ticks(line.text)
            ]

        self.wait(lambda lines: len(come(lines)) >= count, limit, f"{count} ticks of the guest")
        seen = come(self.lines)
        wrong = [line.text for line in self.lines if "CORRUPT" in line.text]
        if wrong:
            raise LabError("the guest found its memory wrong:\n" + "\n".join(wrong[:20]))
        return seen
