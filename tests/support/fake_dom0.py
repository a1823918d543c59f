"""A dom0 with one guest: the fake Xen under the names by which the adapter opens its libraries."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from fake_xen import DOMID, compile_fake_xen

from checkpointd.authority.processes import HostIdentity
from checkpointd.hypervisor.port import DomainInfo
from checkpointd.hypervisor.xen import lib as xen
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen import versions
from checkpointd.hypervisor.xen.devices import Allowances
from checkpointd.hypervisor.xen.domain import XenDomain

if TYPE_CHECKING:
    from pathlib import Path

UUID = str(uuid.UUID(bytes=bytes(0x11 * i for i in range(16))))
NR_PFNS, RAM = 1000, 900  # pfns, and how many of them have memory
VERSION = versions.Version(4, 17)
SUSPEND = 2  # Xen's shutdown reason
NAMES = (
    *(f"libxenctrl.so.{VERSION}", f"libxenguest.so.{VERSION}", "libxenforeignmemory.so.1"),
    *("libxenevtchn.so.1", "libxendevicemodel.so.1", "libxenstore.so.4"),
)
NOTHING = Allowances(disk=False, output=False, untested=False)


class FakeWatcher:
    """In a watcher's place: was it sent away?"""

    def __init__(self, domid: int, uuid: str, run_dir: Path, **_: Any) -> None:
        self.gone = False
        self.word: object = None  # that it was told to say on

    def start(self) -> int:
        return 1

    def update(self, contact: object) -> None: ...

    def bye(self, word: object = None) -> None:
        self.gone, self.word = True, word


class Dom0:
    """The libraries are opened once for all tests of a run; each test begins with a new guest."""

    def __init__(self, directory: Path) -> None:
        library = directory / "fake_dom0.so"
        _, self.lib = compile_fake_xen(library)
        for name in NAMES:
            (directory / name).symlink_to(library.name)
        self.reset()
        self.libs = xen._open(VERSION, str(directory))

    def reset(self) -> None:
        self.lib.fake_reset(NR_PFNS, 2 * RAM)
        self.put(f"/local/domain/{DOMID}/name", "shop")

    @property
    def guest(self) -> Any:
        """`struct guest`: facts to look at and to change."""
        return self.lib.guest

    @property
    def suspended(self) -> bool:
        return bool(self.guest.flags & xen.lib.XEN_STATE_SHUTDOWN)

    def put(self, path: str, value: str) -> None:
        self.lib.fake_put(path.encode(), value.encode())

    def drop(self, path: str) -> None:
        self.lib.fake_drop(path.encode())

    def stop(self, reason: int = SUSPEND) -> None:
        self.lib.fake_stop(reason)

    def close(self) -> None:
        xen.lib.xen_libs_close(self.libs)


def info_of(nr_pfns: int = NR_PFNS) -> DomainInfo:
    return DomainInfo(
        UUID, DOMID, "shop", nr_pfns, RAM, "xen", HostIdentity("b", 0, 0), {"xen": str(VERSION)}
    )


class Attached:
    """An engine's domain, and what its native half is called with."""

    def __init__(self, dom0: Dom0, run_dir: Path, **options: Any) -> None:
        self.dom0, self.run_dir = dom0, run_dir
        lock = states.DomainLock(run_dir, DOMID)
        try:
            self.domain = XenDomain(
                options.pop("info", info_of()), dom0.libs, run_dir, lock, options.pop("allow", NOTHING), **options
            )  # fmt: skip
        except BaseException:
            lock.close()
            raise
        self.table: Any = xen.ffi.cast("struct ck_hypervisor *", self.domain.table)

    def suspend(self, timeout_ns: int = 10**10) -> int:
        return int(self.table.suspend(self.table.domain, timeout_ns))

    def resume(self) -> int:
        return int(self.table.resume(self.table.domain))

    @property
    def watcher(self) -> Any:
        return self.domain._watcher

    @property
    def state(self) -> states.EngineState | None:
        return states.load(self.run_dir, DOMID)
