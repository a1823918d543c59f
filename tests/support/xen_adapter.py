"""The Xen adapter of the hypervisor port with the toolstack that its conformance tests need. Runs in dom0."""

from __future__ import annotations

import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from hosts import PATIENCE
from lab.guests import TSC
from port_adapters import Table

from checkpointd.hypervisor.xen.devices import Allowances
from checkpointd.hypervisor.xen.hypervisor import XenHypervisor
from checkpointd.hypervisor.xen.lib import Store, check, ffi, lib, open_libs

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import Domain, DomainInfo

BOOT = 180  # s; Linux in two layers of software emulation, beside others
LOOK = 0.05  # s; between two looks at something that has no event
# Shutdown reasons, public/sched.h, by the name of the end.
REASONS = {"poweroff": 0, "reboot": 1, "crash": 3}
MEMORY = 128  # MiB
KERNEL = Path("/root/vmlinuz")
RAMDISKS = (Path("/root/initrd.gz"), Path("/root/guest-initrd.gz"))  # the lab's, or the one by hand


class XenAdapter:
    """Guests of 128 MiB, PVH, created by xl without its daemon: who looks on is the test."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.hypervisor = XenHypervisor(
            run_dir, Allowances(disk=False, output=False, untested=False)
        )
        self.domains: list[Domain] = []
        self.guests: list[DomainInfo] = []
        self._libs = open_libs()

    def guest(self, program: str = "dirty:16@1", name: str = "", vcpus: int = 1) -> DomainInfo:
        """`program`: "dirty:PAGES@RATE", pages written at random, so many a second."""
        pages, rate = program.removeprefix("dirty:").split("@")
        ramdisk = next(path for path in RAMDISKS if path.exists())
        name = name or f"conformance-{uuid.uuid4().hex[:8]}"
        config = self.run_dir / f"{name}.cfg"
        config.write_text(
            f'name="{name}"\ntype="pvh"\n{TSC}\nkernel="{KERNEL}"\nramdisk="{ramdisk}"\n'
            f"memory={MEMORY}\nvcpus={vcpus}\n"
            f'extra="console=hvc0 quiet rdinit=/init pages={pages} rate={rate}"\n'
        )
        subprocess.run(["xl", "create", "-q", "-e", str(config)], check=True, timeout=BOOT)
        domid = int(subprocess.check_output(["xl", "domid", name], timeout=BOOT))
        info = self.hypervisor.find(domid=domid)
        self.guests.append(info)
        self._await_boot(info)
        return info

    def _await_boot(self, info: DomainInfo) -> None:
        """Until it says that it can be suspended (Linux, setup_shutdown_watcher)."""
        store = Store(self._libs)
        deadline = time.monotonic() + BOOT
        while store.read(f"/local/domain/{info.domid}/control/feature-suspend") != "1":
            assert time.monotonic() < deadline, f"{info.name} does not boot"
            time.sleep(LOOK)
        store.close()

    def attach(self, info: DomainInfo) -> tuple[Domain, Table]:
        domain = self.hypervisor.attach(info.domid)
        self.domains.append(domain)
        return domain, Table(domain)

    def stop(self, info: DomainInfo) -> None:
        """So that it answers nothing until go_on()."""
        check(lib.xen_pause(self._libs, info.domid), "pause")

    def go_on(self, info: DomainInfo) -> None:
        check(lib.xen_unpause(self._libs, info.domid), "unpause")

    def end(self, info: DomainInfo, how: str) -> None:
        """As if the guest did it: "poweroff", "reboot", "crash"."""
        assert self._libs.xc_domain_shutdown(self._libs.ctrl, info.domid, REASONS[how]) == 0

    def destroy(self, info: DomainInfo) -> None:
        subprocess.run(["xl", "destroy", str(info.domid)], check=True, timeout=PATIENCE)

    def is_running(self, info: DomainInfo) -> bool:
        state = ffi.new("struct xen_dominfo *")
        check(lib.xen_domain_state(self._libs, info.domid, state), "state")
        return not state.flags & (lib.XEN_STATE_SHUTDOWN | lib.XEN_STATE_PAUSED)

    def wait_running(self, info: DomainInfo) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.is_running(info):
            assert time.monotonic() < deadline, f"{info.name} does not run"
            time.sleep(LOOK)

    def close(self) -> None:
        for domain in self.domains:
            domain.close()
        for info in self.guests:
            subprocess.run(
                ["xl", "destroy", str(info.domid)], timeout=PATIENCE, capture_output=True
            )
        left = {info.uuid for info in self.hypervisor.domains()}
        assert not left & {info.uuid for info in self.guests}
