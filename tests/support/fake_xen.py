"""A fake Xen of one guest: libraries under the names and prototypes of Xen's own (xenlibs/), for tests without Xen.

What of the adapter a test is about decides how it is put together: fake_dom0 opens them as the adapter does, and
fake_pause and fake_p2m have a part of the adapter compiled into them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cffi import FFI
from fake_library import XEN, compile_library

if TYPE_CHECKING:
    from collections.abc import Sequence

LIBRARIES = Path(__file__).with_name("xenlibs")
DOMID = 4
NODE = f"/local/domain/{DOMID}/control/shutdown"
STOPS, ANSWERS_ONLY, IGNORES, STOPS_UNANSWERED = range(4)  # enum manner
TYPES, MAP = range(2)  # enum call


def compile_fake_xen(library: Path, beside: Sequence[Path] = (), cdef: str = "") -> Any:
    """`library`, with these sources beside Xen's: (ffi, lib), of guest.h and what `cdef` declares.

    `lib.guest` is `struct guest`: facts to look at and to change.
    """
    compile_library(library, [*sorted(LIBRARIES.glob("*.c")), *beside], LIBRARIES)
    ffi = FFI()
    ffi.cdef((LIBRARIES / "guest.h").read_text(encoding="ascii") + cdef)
    return ffi, ffi.dlopen(str(library))


def adapter(*names: str) -> list[Path]:
    """Sources of the Xen adapter."""
    return [XEN / f"{name}.c" for name in names]
