"""Many guests, each with its engine, into one standby, with as many dirty pages in all as one guest has alone."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd.bench.guests import COPIED
from checkpointd.bench.scenarios import Size
from checkpointd.bench.turns import Figure, Goal, Spread, compare
from checkpointd.demo.rig import Rig, get_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine

TEXT = "guests into one standby, the dirty rate of all together held equal: median pause, memory, processor"

# (guests, dirty pages of all, memory of each, seconds)
SIZES = {
    Size.SMALL: ((2,), 512, "16MiB", 1.0),
    Size.FULL: ((8, 64), 2_048, "16MiB", 20.0),
}
INTERVAL = "100ms"
RATE = 10  # rewrites a second of each page, so that all are dirty in every epoch
SAME = Goal(1.2)


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    counts, pages, memory, seconds = SIZES[size]
    one = _measure(1, pages, memory, seconds)[0]
    for count in counts:
        share = pages // count
        pauses, standby_mib, processor = _measure(count, share, memory, seconds)
        what = f"{count} of {share:,} pages"
        yield compare(
            f"{what}, median pause", "ms", pauses, f"1 of {pages:,}", one * count, SAME, scale=1e-6, guests=count
        )  # fmt: skip
        alone = _measure(1, share, memory, seconds)[0]
        yield compare(
            f"{what}, median pause", "ms", pauses, f"1 of {share:,}", alone * count, scale=1e-6, guests=count
        )  # fmt: skip
        yield Figure(
            f"{what}, standby's memory a guest", "MiB", Spread.of([standby_mib / count]),
            notes={"processors_busy": round(processor, 2)},
        )  # fmt: skip


def _measure(
    count: int, pages: int, memory: str, seconds: float
) -> tuple[list[float], float, float]:
    """The median pause of each guest (ns), the standby's own memory (MiB), and how many processors all of it took."""
    directory = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    try:
        with Rig(directory) as rig:
            for domid in range(1, count + 1):
                rig.guest_is_up(
                    rig.guest(
                        domid,
                        "--memory",
                        memory,
                        "--program",
                        f"dirty:{pages}@{RATE}",
                        "--listen",
                        f"127.0.0.1:{rig.udp_port()}",
                    )
                )
            standby = rig.secondary().ready()
            for domid in range(1, count + 1):
                rig.primary(domid, "--interval", INTERVAL).state("protected", timeout=COPIED)
            before = _processor(rig)
            time.sleep(seconds)
            used = (_processor(rig) - before) / seconds
            pauses = [
                float(status["pause_p50_ns"]) for status in map(get_status, rig.urls("primary"))
            ]
            return pauses, _own_mib(standby.pid), used
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _processor(rig: Rig) -> float:
    """Seconds of processor time that all processes of the rig have taken."""
    total = 0
    for daemon in rig.daemons:
        fields = (
            Path(f"/proc/{daemon.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        )
        total += int(fields[11]) + int(fields[12])  # utime and stime
    return total / os.sysconf("SC_CLK_TCK")


def _own_mib(pid: int) -> float:
    """Anonymous and shared memory: with the images, which are memfds."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kib = {
        line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.endswith("kB")
    }
    return (int(kib["RssAnon"]) + int(kib["RssShmem"])) / 1024
