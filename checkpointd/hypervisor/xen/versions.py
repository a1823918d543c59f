"""Which Xen runs here, and whether this adapter was tried on it.

libxenctrl and libxenguest promise no stable ABI. Their declarations in csrc/libs.h were compared with the headers of
the releases listed here, and the lab runs the adapter on them; any other is refused unless demanded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpointd.errors import HypervisorError

TESTED = ((4, 17), (4, 20))  # Debian 12's and Debian 13's


@dataclass(frozen=True, slots=True, order=True)
class Version:
    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def tested(self) -> bool:
        return (self.major, self.minor) in TESTED


def running(sys_hypervisor: Path = Path("/sys/hypervisor")) -> Version:
    """The release of the hypervisor under this machine (sysfs-hypervisor-xen of the kernel's ABI documents)."""
    try:
        kind = (sys_hypervisor / "type").read_text(encoding="ascii").strip()
        numbers = [
            int((sys_hypervisor / "version" / name).read_text(encoding="ascii"))
            for name in ("major", "minor")
        ]
    except (OSError, ValueError) as error:
        raise HypervisorError(
            f"this machine does not run on Xen, or hides it ({error}): run checkpointd in dom0 of a Xen host"
        ) from error
    if kind != "xen":
        raise HypervisorError(
            f"the hypervisor here is {kind!r}, not Xen: run checkpointd in dom0 of a Xen host"
        )
    return Version(*numbers)


def require_tested(version: Version, *, untested: bool) -> None:
    """HypervisorError for a release that no test has run on, unless `untested` allows it."""
    if not version.tested and not untested:
        known = " and ".join(f"{major}.{minor}" for major, minor in TESTED)
        raise HypervisorError(
            f"Xen {version} is not among the releases that checkpointd was tested on ({known}): "
            "run one of those, or demand it by --unsafe-untested-xen"
        )
