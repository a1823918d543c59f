"""Where a lab keeps what it makes, and what it can be made of."""

from __future__ import annotations

import fcntl
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HERE = Path(__file__).parent
ROOT = HERE.parents[2]  # the checkout
DOM0_FILES = HERE / "dom0"  # part of the image
TOOLS = HERE / "tools"  # put into hosts that run
GUEST_FILES = ROOT / "tests" / "xen" / "guest"
ENVIRONMENT = "CHECKPOINTD_LAB_DIR"

HOSTS = {"a": 1, "b": 2}  # name: last number of its address on the replication link
LINK_NET = "198.18.0"  # of the range for benchmarks (RFC 2544): it is nobody's
GUEST_NET = (
    "10.77.0"  # dom0 is .1 in it, on both hosts, so that a guest finds it again after a failover
)

_SOCKET_PATH = 107  # octets that the path of a Unix socket may have (unix(7))
_LONGEST_SOCKET = len("/run/a.ssh.0123456789abcdef")  # ssh adds 17 to its own while it makes it


class LabError(Exception):
    """str() says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A release of Debian."""

    name: str
    xen: str
    memory: int  # MiB that its host machine needs


SUITES = {
    "bookworm": Suite("bookworm", "4.17", 1536),
    "trixie": Suite("trixie", "4.20", 2560),
}


def default_place() -> Path:
    if given := os.environ.get(ENVIRONMENT):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "checkpointd" / "lab"


@dataclass(frozen=True, slots=True)
class Place:
    """A lab's directory: what is built, kept between runs, and under run/ what belongs to the hosts that are on."""

    path: Path

    @classmethod
    def open(cls, path: Path | None = None) -> Place:
        place = cls((path or default_place()).absolute())
        if len(os.fsencode(place.path)) + _LONGEST_SOCKET > _SOCKET_PATH:
            raise LabError(
                f"{place.path}: too long a path for the sockets in it: choose another with --dir"
            )
        place.run.mkdir(parents=True, exist_ok=True)
        return place

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def identity(self) -> Path:
        """The ssh key by which the machine enters its hosts, and they each other."""
        return self.path / "id"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One build at a time."""
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def digest(paths: Iterable[Path], *words: str) -> str:
    """A key for what is made of these files (directories with all in them) and words."""
    total = hashlib.sha256("\0".join(words).encode())
    for top in paths:
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"\0{path.relative_to(top.parent)}\0".encode())
                total.update(path.read_bytes())
    return total.hexdigest()[:16]
