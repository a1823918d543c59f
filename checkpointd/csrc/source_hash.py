"""The hash of the C sources that a compiled module carries, so that a stale one is noticed.

Not part of any package: the build scripts and checkpointd.native run this file by its path.
"""

# ruff: noqa: INP001 - deliberately in no package: it must run before anything is installed

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def sources(path: Path) -> list[Path]:
    """What a compiled module is made from in a directory: C, headers, build script; or one file."""
    if path.is_file():
        return [path]
    return sorted(found for kind in ("*.c", "*.h", "build_*.py") for found in path.glob(kind))


def source_hash(*paths: Path) -> str:
    """SHA-256 (hexadecimal) of names and contents of the sources in `paths`, in that order."""
    total = hashlib.sha256()
    for path in (source for given in paths for source in sources(given)):
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()
