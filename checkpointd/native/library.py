"""Loading the compiled hot path: refused when stale, and with the kernel that was demanded."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd.errors import NativeError

try:
    from checkpointd._native import ffi, lib
except ImportError as error:
    raise NativeError(
        f"the compiled hot path cannot be loaded ({error}); build it: pip install -e ."
    ) from error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "MAX_PFNS",
    "PAGE_SIZE",
    "address_of",
    "choose_kernel",
    "ffi",
    "kernel",
    "kernels",
    "lib",
    "refuse_stale",
]

PAGE_SIZE = 4096  # octets, CK_PAGE_SIZE
MAX_PFNS = 1 << 40  # the architecture's 2^52 octets of physical memory; more is a mistake
KERNEL_ENVIRONMENT = "CHECKPOINTD_KERNEL"
SOURCES = Path(__file__).parent.with_name("csrc")  # absent from an installed wheel


def refuse_stale(module: str, compiled: str, *paths: Path) -> None:
    """NativeError if `module` was compiled from other sources than those in `paths` now.

    `compiled` is the hash it carries, of the same `paths` (csrc/source_hash.py). Where there are no
    sources (an installed wheel) there is nothing to compare, and nothing that could have changed.
    """
    helper = SOURCES / "source_hash.py"
    if not helper.exists() or not any(paths[0].glob("*.c")):
        return
    if runpy.run_path(str(helper))["source_hash"](*paths) != compiled:
        raise NativeError(
            f"{module} was compiled from other C sources than those in {paths[0]}; "
            "rebuild it: pip install --no-build-isolation -e . (in the checkout)"
        )


def kernels() -> dict[str, int]:
    """Names of all kernels of this build, the scalar reference first, and their indices."""
    names: dict[str, int] = {}
    while name := lib.ck_kernel_name(len(names)):
        names[ffi.string(name).decode()] = len(names)
    return names


def choose_kernel(demanded: str | None) -> str:
    """Use the kernel `demanded`, or with None the best this CPU runs.

    NativeError if it cannot be had: after a silent fallback every measurement and every test would be
    one of something else.
    """
    known = kernels()
    running = [name for name, index in known.items() if lib.ck_kernel_runs(index)]
    chosen = running[-1] if demanded is None else demanded
    if chosen not in running:
        why = "this CPU does not run it" if chosen in known else "there is none of that name"
        raise NativeError(
            f"{KERNEL_ENVIRONMENT}={demanded}: {why}; here run: {', '.join(running)}. "
            "Unset it to use the best."
        )
    lib.ck_kernel_choose(known[chosen])
    return chosen


refuse_stale("checkpointd._native", ffi.string(lib.CK_SOURCE_HASH).decode(), SOURCES)
_kernel = choose_kernel(os.environ.get(KERNEL_ENVIRONMENT))


def kernel() -> str:
    """The kernel in use: "avx2" or "scalar"."""
    return _kernel


def address_of(buffer: ReadableBuffer) -> int:
    """Where a contiguous buffer (bytes, mmap, memoryview) begins; the caller keeps it alive."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))
