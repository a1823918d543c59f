"""What devices a Xen domain has, and which of them stand in the way of its protection.

Devices are read from the toolstack's own list in xenstore, /libxl/DOMID/device/CLASS/ID, which the guest cannot write;
each entry names its backend's node, which has the rest. Pure over a Reader, so that it is tested without Xen.

A device is a way around the checkpoint. What a guest writes to a disk, or sends by a vif, is not undone when the guest
goes on elsewhere from an earlier epoch; what a backend writes into the guest's memory through a grant that it keeps
mapped is in the dirty log only once it is unmapped (xen/common/grant_table.c), so the replica would lack it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from checkpointd.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DISK: Final = "vbd"
NETWORK: Final = "vif"
PASSTHROUGH: Final = ("pci", "dtdev", "vusb")
# The console carries text for a person, and is set up anew by whoever builds the domain.
HARMLESS: Final = ("console",)

NO_PERSISTENT_GRANTS: Final = (
    "start the guest with xen_blkfront.feature_persistent=0 on its kernel's command line, or load dom0's xen_blkback "
    "with feature_persistent=0 and create the guest anew"
)


class Reader(Protocol):
    """Xenstore, as far as it is needed here."""

    def read(self, path: str) -> str | None:
        """The value of a node, None if there is no such node."""
        ...

    def list(self, path: str) -> list[str]:
        """Names of a node's children; none if there is no such node."""
        ...


@dataclass(frozen=True, slots=True)
class Allowances:
    """What the user allows in spite of its danger."""

    disk: bool  # --unsafe-disk: writable disks, which are not replicated
    output: bool  # --unsafe-output: networks whose output is not held
    untested: bool  # --unsafe-untested-xen: a version of Xen that no test of ours has run on


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a guest, as toolstack, backend and frontend have it."""

    kind: str  # its class in xenstore: "vbd", "vif", "pci", ...
    ident: str  # its number there
    name: str  # as a person knows it: "xvda", or kind and number
    target: str = ""  # what is behind it: "phy:/dev/vg/web", "bridge xenbr0"
    writable: bool = False  # disks; also where the backend does not say
    persistent_grants: bool = False  # disks: both ends agreed to keep pages mapped

    def __str__(self) -> str:
        return f"{self.name} ({self.target})" if self.target else self.name


@dataclass(frozen=True, slots=True)
class Judgement:
    """One sentence for each device that is in the way."""

    refused: tuple[str, ...]  # why protection must not begin, and what to do
    unprotected: tuple[str, ...]  # allowed by an unsafe option; for status, as long as it holds


def devices_of(store: Reader, domid: int) -> tuple[Device, ...]:
    """Every device of a domain, in the order of class and number."""
    top = f"/libxl/{domid}/device"
    return tuple(
        _read(store, f"{top}/{kind}/{ident}", kind, ident)
        for kind in sorted(store.list(top))
        for ident in sorted(store.list(f"{top}/{kind}"), key=lambda text: (len(text), text))
    )


def _read(store: Reader, entry: str, kind: str, ident: str) -> Device:
    backend = store.read(f"{entry}/backend") or ""
    frontend = store.read(f"{entry}/frontend") or ""

    def at(node: str, key: str) -> str:
        return (store.read(f"{node}/{key}") or "") if node else ""

    if kind == DISK:
        driver, image = at(backend, "type"), at(backend, "params")
        return Device(
            kind,
            ident,
            at(backend, "dev") or f"disk {ident}",
            f"{driver}:{image}" if image else "empty",
            writable=at(backend, "mode") != "r",
            # Only what both say is done (Linux, xen-blkback), and only when they connect.
            persistent_grants=at(backend, "feature-persistent") == "1"
            and at(frontend, "feature-persistent") == "1",
        )
    if kind == NETWORK:
        bridge = at(backend, "bridge")
        return Device(kind, ident, f"vif{ident}", f"bridge {bridge}" if bridge else "")
    return Device(kind, ident, f"{kind} {ident}")


def judge(devices: Iterable[Device], allow: Allowances) -> Judgement:
    """What the devices mean for protection under these allowances."""
    refused: list[str] = []
    unprotected: list[str] = []
    for device in devices:
        for problem in _problems(device):
            if problem.option and getattr(allow, problem.option):
                unprotected.append(f"{device}: {problem.risk} (--unsafe-{problem.option})")
            else:
                refused.append(f"{device}: {problem.risk}; {problem.remedy}")
    return Judgement(tuple(refused), tuple(unprotected))


@dataclass(frozen=True, slots=True)
class _Problem:
    risk: str
    remedy: str
    option: str = ""  # the allowance that it can be let pass by; empty: none


def _problems(device: Device) -> Iterator[_Problem]:
    if device.kind == DISK:
        if device.writable:
            yield _Problem(
                "a writable disk is not replicated, so that after a failover memory and disk do not fit each other",
                "make it read-only, or accept that with --unsafe-disk",
                "disk",
            )
        if device.persistent_grants:
            yield _Problem(
                "its backend keeps the guest's pages mapped (persistent grants), and what it reads into them is not in "
                "the dirty log",
                NO_PERSISTENT_GRANTS,
            )
    elif device.kind == NETWORK:
        yield _Problem(
            "what the guest sends leaves before the epoch that sent it is acknowledged",
            "detach it, or accept with --unsafe-output that a failover may take back what others have seen",
            "output",
        )
    elif device.kind in PASSTHROUGH:
        yield _Problem(
            "a device of the machine writes past the dirty log and exists on no other host",
            f"detach it (`xl {device.kind}-detach`, or its line in the guest's configuration)",
        )
    elif device.kind not in HARMLESS:
        yield _Problem(
            "nothing is known of how this kind of device behaves in a failover",
            "remove it from the guest's configuration",
        )


def refuse_or_list(devices: Iterable[Device], allow: Allowances) -> list[str]:
    """The unprotected things that status must show; HypervisorError with every reason if one is not allowed."""
    judgement = judge(devices, allow)
    if judgement.refused:
        raise HypervisorError(
            "the guest's devices cannot be protected: " + "; and ".join(judgement.refused)
        )
    return list(judgement.unprotected)


def changed(before: Iterable[Device], now: Iterable[Device]) -> list[str]:
    """What has come and gone, in words. What both ends agree on when they connect is no change."""
    then, today = ({replace(d, persistent_grants=False): d for d in each} for each in (before, now))
    return [
        *(f"{then[d]} is gone" for d in then if d not in today),
        *(f"{today[d]} is new" for d in today if d not in then),
    ]
