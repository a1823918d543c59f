"""On what was measured: the machine, and what of checkpointd."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import checkpointd
from checkpointd import native

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 64 << 20  # octets, where Linux does not tell: few processors have a larger one
_COLD = 8  # times its size, written once, leaves nothing of what was in a cache that is not strictly LRU


@dataclass(frozen=True, slots=True)
class Machine:
    processor: str
    cores: int
    memory_gib: float
    last_level_cache: int  # octets
    linux: str
    python: str
    kernel: str  # of the hot path: avx2 or scalar
    version: str  # of checkpointd
    commit: str  # "": not from a checkout

    @property
    def eviction(self) -> int:
        """Octets to write so that nothing else is in any cache."""
        return _COLD * self.last_level_cache

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gib:.0f} GiB, last-level cache "
            f"{self.last_level_cache >> 20} MiB; Linux {self.linux}, Python {self.python}; checkpointd {self.version}"
            + f" {self.commit}" * bool(self.commit)
            + f", {self.kernel} kernel"
        )


def this_machine() -> Machine:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return Machine(
        processor=cpu[1] if cpu else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        last_level_cache=_last_level_cache(),
        linux=platform.release(),
        python=platform.python_version(),
        kernel=native.kernel(),
        version=checkpointd.__version__,
        commit=commit(),
    )


def _last_level_cache() -> int:
    sizes = [path.read_text(encoding="ascii").strip() for path in _CACHES.glob("index*/size")]
    return max(
        (int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=_UNKNOWN_CACHE
    )


def commit() -> str:
    """Of the checkout that this package is run from, with a note if its code differs from it."""
    root = Path(checkpointd.__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    if not (root / ".git").exists():
        return ""
    try:
        changed = git("status", "--porcelain", "--", ".", ":!docs")
        return git("rev-parse", "--short=10", "HEAD") + ", with local changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""
