"""The door to the compiled half of the bench: floors, rivals, and a domain to measure on."""

from __future__ import annotations

from pathlib import Path

from checkpointd.errors import NativeError
from checkpointd.native import refuse_stale

try:
    from checkpointd._bench import ffi, lib
except ImportError as error:
    raise NativeError(
        f"the compiled half of the bench cannot be loaded ({error}): "
        "run `pip install --no-build-isolation -e .` in the checkout"
    ) from error

__all__ = ["ffi", "lib"]

_SOURCES = Path(__file__).parent / "csrc"
refuse_stale(
    "checkpointd._bench",
    ffi.string(lib.CK_SOURCE_HASH).decode(),
    _SOURCES,
    _SOURCES.parents[1] / "csrc" / "hypervisor.h",  # whose struct it fills
    _SOURCES.parents[1] / "csrc" / "bitmap.h",
)
