"""One finding of a preflight: an item with its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from checkpointd.errors import CheckpointdError, HypervisorError

MIB: Final = 1 << 20
# Octets of bookkeeping for each pfn of the p2m, holes included: eight bitmaps, on either side.
PER_PFN: Final = 1


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Item:
    name: str
    verdict: Verdict
    text: str  # what was found
    hint: str = ""  # what to do
    exit_code: int = 0  # of a refusal: what `primary` would end with


def refused(
    name: str, text: str, hint: str, error: type[CheckpointdError] = HypervisorError
) -> Item:
    """A refusal that `primary` would answer by the exit code of `error`."""
    return Item(name, Verdict.REFUSED, text, hint, error.exit_code)


def failed(name: str, error: CheckpointdError) -> Item:
    """What could not even be looked at; the error says what to do."""
    return Item(name, Verdict.REFUSED, str(error), "", error.exit_code)


def mib(octets: int) -> str:
    """Rounded up: what is needed must be there."""
    return f"{-(-octets // MIB)} MiB"


def version_item(
    name: str,
    version: str,
    tested: tuple[str, ...],
    *,
    allowed: bool,
    libraries: tuple[str, ...] = (),
) -> Item:
    """A release of Xen, on either side; `libraries`: what was found of its own."""
    found = f"; its libraries: {', '.join(libraries)}" if libraries else ""
    if version in tested:
        return Item(name, Verdict.OK, f"Xen {version}: tests have run on it{found}")
    text = f"Xen {version}: tests have run on {' and '.join(tested)} only{found}"
    if allowed:
        return Item(name, Verdict.WARNING, text, "allowed by --unsafe-untested-xen")
    return refused(name, text, "run one of those, or accept the risk with --unsafe-untested-xen")
