"""Compiles what stands in for Xen or its libraries in tests, with the sources of the real thing beside it."""

from __future__ import annotations

import runpy
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PACKAGE = Path(__file__).parents[2] / "checkpointd"
CSRC = _PACKAGE / "csrc"
XEN = _PACKAGE / "hypervisor" / "xen" / "csrc"
# struct ck_hypervisor and what it speaks of, as cffi takes them.
TABLE: str = runpy.run_path(str(CSRC / "declared.py"))["table"]()
FLAGS = [
    "-shared",
    "-fPIC",
    "-O2",
    "-g",
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
]


def compile_library(library: Path, sources: Iterable[Path], *includes: Path) -> Path:
    """`library`, of these C sources; they find headers in `includes` and where the real ones are."""
    compiler = sysconfig.get_config_var("CC").split()[0]
    directories = [f"-I{directory}" for directory in (*includes, CSRC, XEN)]
    subprocess.run([compiler, *FLAGS, *directories, "-o", library, *sources], check=True)
    return library
