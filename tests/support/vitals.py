"""What a process takes, seen from outside, and what a daemon of a rig says about itself."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpointd.demo.rig import Daemon, Rig

HTTP_TIMEOUT = 10.0  # s; an answer takes a millisecond
_KIB = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_SAMPLE = re.compile(r"^(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Vitals:
    """Of one process at one moment."""

    rss_kib: int  # with what it has mapped of guests and replicas, as far as it was touched
    own_kib: int  # of it anonymous: what a leak of objects or buffers makes grow
    descriptors: int
    threads: int


def vitals(pid: int) -> Vitals:
    process = Path(f"/proc/{pid}")
    status = dict(_KIB.findall((process / "status").read_text()))
    return Vitals(
        rss_kib=int(status["VmRSS"]),
        own_kib=int(status["RssAnon"]),
        descriptors=len(os.listdir(process / "fd")),
        threads=len(os.listdir(process / "task")),
    )


def url_of(rig: Rig, daemon: Daemon) -> str:
    """Where a daemon that is ready serves HTTP."""
    for path in (rig.run_dir / "daemons").glob("*.json"):
        entry = json.loads(path.read_text())
        if entry["pid"] == daemon.pid:
            return str(entry["http"])
    raise AssertionError(f"{daemon.name} is not on the list of daemons")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT) as answer:
        return str(answer.read().decode())


def status_of(rig: Rig, daemon: Daemon) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(get(f"{url_of(rig, daemon)}/status"))
    return document


def metrics_of(url: str) -> dict[str, float]:
    """Every sample by its name; those of labels other than `domain` as NAME{LABELS}."""
    found: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(get(f"{url}/metrics")):
        rest = ",".join(
            part for part in labels.split(",") if part and not part.startswith("domain=")
        )
        found[f"{name}{{{rest}}}" if rest else name] = float(value)
    return found
