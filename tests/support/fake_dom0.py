"""A dom0 with one guest: Xen's libraries (fake_dom0.c) under the names by which the adapter opens them."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from cffi import FFI
from fake_library import compile_library

from checkpointd.authority.processes import HostIdentity
from checkpointd.hypervisor.port import DomainInfo
from checkpointd.hypervisor.xen import lib as xen
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen import versions
from checkpointd.hypervisor.xen.devices import Allowances
from checkpointd.hypervisor.xen.domain import XenDomain

DOMID = 4
UUID = str(uuid.UUID(bytes=bytes(0x11 * i for i in range(16))))
NR_PFNS, RAM = 1000, 900  # pfns, and how many of them have memory
VERSION = versions.Version(4, 17)
SUSPEND = 2  # Xen's shutdown reason
STOPS, ANSWERS_ONLY, IGNORES = range(3)  # enum manner
NODE = f"/local/domain/{DOMID}/control/shutdown"
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
        library = compile_library(directory / "fake_dom0.so", [Path(__file__).with_suffix(".c")])
        for name in NAMES:
            (directory / name).symlink_to(library.name)
        ffi = FFI()
        ffi.cdef(
            """
            struct guest {
                uint32_t flags;
                bool gone;
                int manner;
                uint64_t nr_pfns, tot_pages, log[64];
                bool log_on;
                uint64_t resumes, logs_ended;
                int fail_resume, fail_bind, fail_destroy;
                bool server;
            };
            void dom0_reset(uint64_t nr_pfns, uint64_t tot_pages);
            struct guest *dom0_guest(void);
            void dom0_put(const char *path, const char *value);
            void dom0_drop(const char *path);
            void dom0_stop(uint32_t reason);
            """
        )
        self.lib: Any = ffi.dlopen(str(library))
        self.reset()
        self.libs = xen._open(VERSION, str(directory))

    def reset(self) -> None:
        self.lib.dom0_reset(NR_PFNS, RAM)
        self.put(f"/local/domain/{DOMID}/name", "shop")

    @property
    def guest(self) -> Any:
        """`struct guest`: facts to look at and to change."""
        return self.lib.dom0_guest()

    @property
    def suspended(self) -> bool:
        return bool(self.guest.flags & xen.lib.XEN_STATE_SHUTDOWN)

    def put(self, path: str, value: str) -> None:
        self.lib.dom0_put(path.encode(), value.encode())

    def drop(self, path: str) -> None:
        self.lib.dom0_drop(path.encode())

    def stop(self, reason: int = SUSPEND) -> None:
        self.lib.dom0_stop(reason)

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
