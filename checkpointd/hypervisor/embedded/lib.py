"""The door to the compiled half of the embedded hypervisor: refuses a module that is not of these sources."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd import faults
from checkpointd.errors import HypervisorError, NativeError, UsageError
from checkpointd.native import refuse_stale

try:
    from checkpointd._embedded import ffi, lib
except ImportError as error:
    raise NativeError(
        f"the compiled embedded hypervisor cannot be loaded ({error}): "
        "run `pip install --no-build-isolation -e .` in the checkout"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["arm", "check", "ffi", "lib"]


_SOURCES = Path(__file__).parent / "csrc"
refuse_stale(
    "checkpointd._embedded",
    ffi.string(lib.CK_SOURCE_HASH).decode(),
    _SOURCES,
    _SOURCES.parents[2] / "csrc" / "hypervisor.h",  # whose struct it fills
    _SOURCES.parents[2] / "csrc" / "bitmap.h",
)

# The points in C, by the names that CHECKPOINTD_FAULTS uses (faults.py).
ENGINE_POINTS = {
    "hv.suspend": lib.FAULT_SUSPEND,
    "hv.resume": lib.FAULT_RESUME,
    "hv.harvest": lib.FAULT_HARVEST,
    "hv.p2m_changes": lib.FAULT_P2M_CHANGES,
    "hv.types": lib.FAULT_TYPES,
    "hv.map": lib.FAULT_MAP,
    "hv.unmap": lib.FAULT_UNMAP,
    "hv.context": lib.FAULT_CONTEXT,
    "hv.output_close": lib.FAULT_OUTPUT_CLOSE,
}
HOST_POINTS = {
    "host.step": lib.FAULT_HOST_STEP,
    "host.input-logged": lib.FAULT_HOST_INPUT_LOGGED,
    "host.suspended": lib.FAULT_HOST_SUSPENDED,
    "host.release": lib.FAULT_HOST_RELEASE,
}


def check(rc: int, doing: str) -> int:
    """`rc` if it is not negative; else HypervisorError: `doing` says what failed."""
    if rc < 0:
        raise HypervisorError(f"{doing}: {os.strerror(-rc)}")
    return rc


def arm(points: Mapping[str, int], pids: Mapping[str, int], add: Callable[[Any], int]) -> None:
    """Hand the rules in force at `points` to C.

    `pids`: the actions possible there, each with the process it strikes (0 for "fail").
    """
    for rule in faults.armed():
        if rule.point.startswith("hv.") and rule.point not in (ENGINE_POINTS | HOST_POINTS):
            raise UsageError(f"{faults.ENVIRONMENT}: there is no point {rule.point!r}")
        if rule.point not in points:
            continue
        acts = [action for action in rule.actions if action != "again"]
        if len(acts) > lib.FAULT_ACTIONS:
            raise UsageError(
                f"{faults.ENVIRONMENT}: more than {lib.FAULT_ACTIONS} actions at {rule.point}"
            )
        compiled = ffi.new("struct fault_rule *")
        compiled.point, compiled.at = points[rule.point], rule.at
        compiled.again, compiled.nr_actions = "again" in rule.actions, len(acts)
        for index, action in enumerate(acts):
            if action not in pids:
                raise UsageError(
                    f"{faults.ENVIRONMENT}: {action!r} is not possible at {rule.point}"
                )
            compiled.action[index] = (
                lib.FAULT_FAIL if action == "fail" else
                lib.FAULT_STOP if action == "stop" else lib.FAULT_KILL
            )  # fmt: skip
            compiled.pid[index] = pids[action]
        check(add(compiled), f"{faults.ENVIRONMENT}: cannot arm {rule.point}")
