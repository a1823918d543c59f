"""Embedded guests, unprotected and protected, with every process that a user would have: what is seen from outside."""

from __future__ import annotations

import shutil
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.daemon.units import parse_duration
from checkpointd.demo.rig import Rig
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.kv import KvClient, UdpTransport

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from checkpointd.demo.rig import Daemon

DOMID = 4
COPIED = 600.0  # s for a first copy, of 8 GiB on a slow machine
LOOK_EVERY = 0.2  # s


class Guest:
    """One guest, in a directory of its own; a context manager. Its words are those of `checkpointd guest`."""

    def __init__(self, program: str, memory: str) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
        self.rig = Rig(self._directory)
        self._clients = 0
        self._transports: list[UdpTransport] = []
        try:
            self.process = self.rig.guest(
                DOMID, "--memory", memory, "--program", program, "--listen", f"127.0.0.1:{self.rig.udp_port()}"
            )  # fmt: skip
            self.rig.guest_is_up(self.process)
            self._info = EmbeddedHypervisor("primary", self.rig.run_dir).find(domid=DOMID)
        except BaseException:
            self.close()
            raise

    def client(self, retry: float = 5.0) -> KvClient:
        """One that asks again after `retry` s: by default only when something is lost."""
        self._clients += 1
        return KvClient(self.transport(), f"bench{self._clients}", retry=retry)

    def transport(self) -> UdpTransport:
        """To the guest's address, for as long as it is."""
        self._transports.append(UdpTransport(str(self._info.config["address"])))
        return self._transports[-1]

    def step(self) -> int:
        """How many things it has done since its start."""
        return toolstack.look(self._info).step

    def protect(
        self, interval: str, *, secondary: tuple[str, ...] = (), primary: tuple[str, ...] = ()
    ) -> Daemon:
        """Until it is protected; `secondary` and `primary` are further words for each."""
        self.begin(interval, secondary=secondary, primary=primary)
        self.engine.state("protected", timeout=COPIED)
        return self.engine

    def begin(
        self, interval: str, *, secondary: tuple[str, ...] = (), primary: tuple[str, ...] = ()
    ) -> Daemon:
        """The same, until the engine begins."""
        self._interval = parse_duration(interval) / 1e9
        self.standby = self.rig.secondary(*secondary).ready()
        self.engine = self.rig.primary(DOMID, "--interval", interval, *primary).ready()
        return self.engine

    def pause(self) -> None:
        """It stands still from here on."""
        toolstack.pause(self._info)

    def unprotect(self) -> None:
        """In order: the guest goes on by itself."""
        self.engine.stop()
        self.standby.stop()

    def epochs(self, count: int) -> dict[str, Any]:
        """The engine's status once it has had so many more epochs acked."""
        last = self.rig.status("primary")["acked_epoch"] + count
        time.sleep(count * self._interval)  # nobody asks meanwhile: that would be measured, too
        while (status := self.rig.status("primary"))["acked_epoch"] < last:
            time.sleep(LOOK_EVERY)
        return status

    def url(self, role: str) -> str:
        """Where the daemon of that role serves HTTP."""
        (url,) = self.rig.urls(role)
        return url

    def close(self) -> None:
        for transport in self._transports:
            transport.close()
        self.rig.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own, http
        return bytes(answer.read())
