"""The devices of a Xen domain, from a xenstore that is a dictionary: what refuses protection, what is shown."""

from __future__ import annotations

import pytest

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.xen.devices import (
    Allowances,
    Device,
    devices_of,
    judge,
    refuse_or_list,
)

NOTHING = Allowances(disk=False, output=False, untested=False)
EVERYTHING = Allowances(disk=True, output=True, untested=True)
BACKEND = "/local/domain/0/backend"


class Store:
    """A xenstore as a dictionary of paths."""

    def __init__(self, nodes: dict[str, str]) -> None:
        self._nodes = nodes

    def read(self, path: str) -> str | None:
        return self._nodes.get(path)

    def list(self, path: str) -> list[str]:
        inside = (
            node.removeprefix(f"{path}/") for node in self._nodes if node.startswith(f"{path}/")
        )
        return list(dict.fromkeys(rest.partition("/")[0] for rest in inside))


def device(
    kind: str, ident: str, backend: dict[str, str], frontend: dict[str, str] | None = None
) -> dict[str, str]:
    """The nodes that libxl, a backend and a frontend make for one device of domain 4."""
    behind, front = f"{BACKEND}/{kind}/4/{ident}", f"/local/domain/4/device/{kind}/{ident}"
    entry = f"/libxl/4/device/{kind}/{ident}"
    return {
        entry: "",
        f"{entry}/backend": behind,
        f"{entry}/frontend": front,
        **{f"{behind}/{key}": value for key, value in backend.items()},
        **{f"{front}/{key}": value for key, value in (frontend or {}).items()},
    }


def disk(mode: str = "w", theirs: str | None = None, ours: str | None = None) -> dict[str, str]:
    backend = {"dev": "xvda", "type": "phy", "params": "/dev/vg/web", "mode": mode}
    return device(
        "vbd",
        "51712",
        backend if ours is None else {**backend, "feature-persistent": ours},
        {} if theirs is None else {"feature-persistent": theirs},
    )


CONSOLE = {"/libxl/4/device/console/0/backend": f"{BACKEND}/console/4/0"}
VIF = device("vif", "0", {"bridge": "xenbr0", "mac": "00:16:3e:00:00:01"})


def found(*parts: dict[str, str]) -> tuple[Device, ...]:
    return devices_of(Store({key: value for part in parts for key, value in part.items()}), 4)


def test_a_guest_without_devices_has_none() -> None:
    assert found({"/libxl/5/device/vif/0/backend": "another's"}) == ()


def test_devices_are_named_as_a_person_knows_them() -> None:
    disk_there, console, vif = sorted(
        found(disk(), VIF, CONSOLE), key=lambda each: each.kind != "vbd"
    )
    assert str(disk_there) == "xvda (phy:/dev/vg/web)"
    assert str(vif) == "vif0 (bridge xenbr0)"
    assert console.kind == "console"


def test_disks_are_in_the_order_of_their_numbers() -> None:
    parts = [device("vbd", number, {"mode": "r"}) for number in ("51728", "768", "51712")]
    assert [each.ident for each in found(*parts)] == ["768", "51712", "51728"]


def test_console_is_harmless() -> None:
    assert refuse_or_list(found(CONSOLE), NOTHING) == []


def test_a_writable_disk_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(HypervisorError, match=r"xvda .*writable.*read-only.*--unsafe-disk"):
        refuse_or_list(found(disk()), NOTHING)


def test_a_writable_disk_that_is_allowed_is_shown() -> None:
    (shown,) = refuse_or_list(found(disk()), EVERYTHING)
    assert "xvda" in shown
    assert "--unsafe-disk" in shown


def test_a_disk_is_read_only_only_if_its_backend_says_so() -> None:
    assert refuse_or_list(found(disk("r")), NOTHING) == []
    for mode in ("w", "", "R"):
        assert judge(found(disk(mode)), NOTHING).refused, mode
    entry = {"/libxl/4/device/vbd/51712": ""}  # and no backend at all
    assert judge(found(entry), NOTHING).refused


def test_a_vif_is_refused_or_shown() -> None:
    with pytest.raises(HypervisorError, match=r"vif0 .*--unsafe-output"):
        refuse_or_list(found(VIF), NOTHING)
    (shown,) = refuse_or_list(found(VIF), Allowances(disk=False, output=True, untested=False))
    assert "vif0" in shown
    assert "--unsafe-output" in shown


def test_no_allowance_stands_for_another() -> None:
    with pytest.raises(HypervisorError, match="vif0"):
        refuse_or_list(found(VIF), Allowances(disk=True, output=False, untested=True))
    with pytest.raises(HypervisorError, match="xvda"):
        refuse_or_list(found(disk()), Allowances(disk=False, output=True, untested=True))


@pytest.mark.parametrize("mode", ["r", "w"])
def test_persistent_grants_are_refused_in_any_case(mode: str) -> None:
    with pytest.raises(HypervisorError, match=r"persistent grants.*feature_persistent=0"):
        refuse_or_list(found(disk(mode, theirs="1", ours="1")), EVERYTHING)


@pytest.mark.parametrize(("theirs", "ours"), [("1", "0"), ("0", "1"), (None, "1"), ("1", None)])
def test_persistent_grants_need_both_ends(theirs: str | None, ours: str | None) -> None:
    assert refuse_or_list(found(disk("r", theirs, ours)), NOTHING) == []


@pytest.mark.parametrize(
    "kind", ["pci", "dtdev", "vusb", "9pfs", "vtpm", "vfb", "vkb", "virtio", "invented"]
)
def test_passthrough_and_the_unknown_are_refused_in_any_case(kind: str) -> None:
    with pytest.raises(HypervisorError, match=f"{kind} 0"):
        refuse_or_list(found(device(kind, "0", {})), EVERYTHING)


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(HypervisorError) as refusal:
        refuse_or_list(found(disk(), VIF, device("pci", "0", {})), NOTHING)
    assert all(name in str(refusal.value) for name in ("xvda", "vif0", "pci 0"))
