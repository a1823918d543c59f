"""Compiles what stands in for Xen or its libraries in tests, with the sources of the real thing beside it."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PACKAGE = Path(__file__).parents[2] / "checkpointd"
CSRC = _PACKAGE / "csrc"
XEN = _PACKAGE / "hypervisor" / "xen" / "csrc"
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


def compile_library(directory: Path, fake: Path, adapter: Sequence[str] = ()) -> Path:
    """The library of `fake`, a C source, in `directory`; `adapter`: which of the Xen adapter's sources go into it."""
    library = directory / f"{fake.stem}.so"
    sources = [fake, *(XEN / f"{name}.c" for name in adapter)]
    compiler = sysconfig.get_config_var("CC").split()[0]
    subprocess.run([compiler, *FLAGS, f"-I{CSRC}", f"-I{XEN}", "-o", library, *sources], check=True)
    return library
