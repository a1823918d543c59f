"""An engine that comes to one step of an epoch, says so, and stays there: for tests that kill it.

python engine_at.py DOMID RUN_DIR attached|asked|suspended|harvested|resumed
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from checkpointd.hypervisor.xen.devices import Allowances
from checkpointd.hypervisor.xen.hypervisor import XenHypervisor
from checkpointd.hypervisor.xen.lib import Store, check, ffi, lib, open_libs
from checkpointd.native import Bitmap

ALL = Allowances(disk=True, output=True, untested=False)
SUSPEND_TIMEOUT = 300 * 10**9  # ns; software emulation beside other hosts is slow
ASKED = 30 * 10**9  # ns; for so long its watcher looks whether the guest stops


def engine(domid: int, run_dir: Path, step: str) -> None:
    domain = XenHypervisor(run_dir, ALL).attach(domid)
    table: Any = ffi.cast("struct ck_hypervisor *", domain.table)
    if step != "attached":
        domain.enable_log()
    if step == "asked":
        # What a pause does first, without the wait that follows.
        assert domain._asked is not None
        domain._asked.memory[:] = ASKED.to_bytes(8, sys.byteorder)
        Store(open_libs()).write(f"/local/domain/{domid}/control/shutdown", "suspend")
    elif step != "attached":
        check(table.suspend(table.domain, SUSPEND_TIMEOUT), "suspend")
    if step in ("harvested", "resumed"):
        bitmap = Bitmap(domain.info.nr_pfns)
        harvested = ffi.cast("struct ck_bitmap *", bitmap.address)
        check(table.harvest(table.domain, harvested, lib.CK_HARVEST_FINAL), "harvest")
    if step == "resumed":
        check(table.resume(table.domain), "resume")
    sys.stdout.write("there\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    engine(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
