"""A whole secondary for Xen guests on a fake host in a folder, so that one can be killed and another one follow.

Run as a program it is one that tests kill: `xen_standby.py FOLDER CONTROL_PORT BULK_PORT`. Images are on disk if
FOLDER/images is there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fake_xl import FakeDomains

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import TermStore
from checkpointd.daemon.config import SecondaryOptions
from checkpointd.daemon.metrics import SecondaryMetrics
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.secondary.activations import Activations
from checkpointd.secondary.restorers.xl import XlRestorer
from checkpointd.secondary.restorers.xl_process import Limits
from checkpointd.secondary.service import SecondaryService
from checkpointd.secondary.standby import State
from checkpointd.wire.keys import loopback_pair
from checkpointd.wire.sockets import Contexts

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import Hypervisor

SILENCE_NS = 500_000_000
# Where nothing is to hang, no limit is to matter.
PATIENT = Limits(20.0, 20.0, 20.0, 20.0, 20.0, 20.0)


class FakeXen:
    name = "xen"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def domains(self) -> list[DomainInfo]:
        found = []
        for path in (self._folder / "domains").iterdir():
            if path.suffix != ".new":
                fields = json.loads(path.read_text())
                host = HostIdentity("", 0, 0)
                found.append(
                    DomainInfo(path.name, fields["domid"], fields["name"], 0, 0, "xen", host)
                )
        return found


class FenceThatCounts:
    """It works, and leaves a line in FOLDER/fenced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def probe(self, timeout: float) -> HostView:
        return HostView(None, None, "not looked at")

    def fence(self, timeout: float) -> FenceResult:
        with (self._folder / "fenced").open("a") as file:
            file.write("fenced\n")
        return FenceResult(True, "its outlet is off")

    def close(self) -> None: ...


class XenStandby:
    """One life."""

    def __init__(self, folder: Path, control_port: int, bulk_port: int) -> None:
        self.contexts = Contexts.make()
        self.terms = TermStore(folder / "terms")
        images = folder / "images"
        on_disk: dict[str, Any] = {}
        if images.exists():
            on_disk = {"image": "disk", "image_dir": images}
        options = SecondaryOptions(
            state_dir=folder, run_dir=folder, control_port=control_port, bulk_port=bulk_port,
            silence=SILENCE_NS, engine_restart=0, **on_disk,
        )  # fmt: skip
        domains = FakeDomains(folder)
        self.service = SecondaryService(
            options,
            cast("Hypervisor", FakeXen(folder)),
            contexts=self.contexts,
            keys=loopback_pair(folder / "keys")[1],
            terms=self.terms,
            metrics=SecondaryMetrics(list(State)),
            make_fence=lambda *_: FenceThatCounts(folder),
            make_restorer=lambda: XlRestorer(
                domains, folder / "notes", Activations(folder / "activations"), limits=PATIENT
            ),
        )

    def close(self) -> None:
        """After the end of run()."""
        self.terms.close()
        self.contexts.close()


if __name__ == "__main__":
    life = XenStandby(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    life.service.run()
