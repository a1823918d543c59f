"""What of the Xen adapter can be told without Xen: which Xen, what xl says, what the flags of a domain mean, what of
its libraries is missing, and the order in which a guest is attached to and let go.
"""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

import _cffi_backend
import pytest

from checkpointd.errors import HypervisorError, NoSuchDomainError
from checkpointd.hypervisor.port import EndReason
from checkpointd.hypervisor.xen import toolstack, versions
from checkpointd.hypervisor.xen.facts import end_of
from checkpointd.hypervisor.xen.lib import ffi, lib
from checkpointd.output.xen import XenOutput

if TYPE_CHECKING:
    from pathlib import Path

# -------------------------------------------------------------------- which Xen


def sysfs(directory: Path, **files: str) -> Path:
    (directory / "version").mkdir()
    for name, text in {"type": "xen", "version/major": "4", "version/minor": "17", **files}.items():
        (directory / name).write_text(text + "\n")
    return directory


def test_the_running_release_is_read_from_sysfs(tmp_path: Path) -> None:
    version = versions.running(sysfs(tmp_path))
    assert (str(version), version.tested) == ("4.17", True)


@pytest.mark.parametrize(
    "files", [{"type": "kvm"}, {"version/minor": "unstable"}, {"version/major": ""}]
)
def test_what_is_no_xen_is_said(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(HypervisorError, match="dom0 of a Xen host"):
        versions.running(sysfs(tmp_path, **files))
    with pytest.raises(HypervisorError, match="dom0 of a Xen host"):
        versions.running(tmp_path / "nowhere")


def test_an_untested_release_is_a_demand() -> None:
    unknown = versions.Version(4, 99)
    with pytest.raises(HypervisorError, match=r"4\.17 and 4\.20.*--unsafe-untested-xen"):
        versions.require_tested(unknown, untested=False)
    versions.require_tested(unknown, untested=True)
    for major, minor in versions.TESTED:
        versions.require_tested(versions.Version(major, minor), untested=False)


@pytest.mark.parametrize("missing", ["libxenctrl.so.4.17", "xc_interface_open"])
def test_a_missing_library_or_function_is_named(tmp_path: Path, missing: str) -> None:
    if missing.startswith("xc_"):
        for name in [
            "libxenctrl.so.4.17",
            "libxenguest.so.4.17",
            "libxenforeignmemory.so.1",
            "libxenevtchn.so.1",
            "libxendevicemodel.so.1",
            "libxenstore.so.4",
        ]:
            # Any library will do: it is one that can be opened, and has none of Xen's functions.
            (tmp_path / name).symlink_to(_cffi_backend.__file__)
    error = ffi.new("char[512]")
    assert lib.xen_libs_open(4, 17, str(tmp_path).encode(), error, len(error)) == ffi.NULL
    assert missing in ffi.string(error).decode()


# -------------------------------------------------------------------- what xl says

LISTING: list[dict[str, Any]] = [
    {
        "domid": 3,
        "config": {
            "c_info": {
                "type": "pvh",
                "name": "web",
                "uuid": "5d1caca9-5ecd-42fe-9eba-28c33703ee01",
            },
            "b_info": {"max_vcpus": 1},
        },
    }
]


def xl(directory: Path, body: str) -> str:
    path = directory / "xl"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_configuration_is_xls_own(tmp_path: Path) -> None:
    script = xl(tmp_path, f"[ \"$*\" = 'list -l 3' ] && echo '{json.dumps(LISTING)}'")
    found = toolstack.configuration(3, xl=script)
    assert json.loads(found.text) == LISTING[0]["config"]
    assert (found.kind, found.vnuma_nodes, found.nested) == ("pvh", 0, False)


def test_what_cannot_be_protected_is_found_in_it() -> None:
    config = json.loads(json.dumps(LISTING))
    config[0]["config"]["b_info"] |= {"vnuma_nodes": [{}, {}], "nested_hvm": "True"}
    found = toolstack.Configuration.parse(json.dumps(config), 3)
    assert found is not None
    assert (found.vnuma_nodes, found.nested) == (2, True)


@pytest.mark.parametrize(
    "listing", ["", '{"domid": 3}', '[{"domid": 3}]', '[{"domid": 3, "config": {}}]']
)
def test_a_description_that_is_none_is_refused(listing: str) -> None:
    with pytest.raises(HypervisorError, match="xl list -l 3"):
        toolstack.Configuration.parse(listing, 3)


def test_a_domain_that_is_being_created_is_waited_for(tmp_path: Path) -> None:
    """xl lists it once it is complete. So it is met after a reboot, which protection follows at once."""
    script = xl(
        tmp_path,
        f"[ -e {tmp_path}/complete ] || {{ echo '[]'; exit 0; }}; echo '{json.dumps(LISTING)}'",
    )
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "complete").touch()

    assert toolstack.configuration(3, xl=script, sleep=sleep).kind == "pvh"
    assert waits == [toolstack.CREATION_LOOK] * 2


def test_a_domain_that_xl_never_knows_is_given_up(tmp_path: Path) -> None:
    times = iter([0.0, 1.0, toolstack.CREATION])
    with pytest.raises(HypervisorError, match="not created by xl"):
        toolstack.configuration(
            3, xl=xl(tmp_path, "echo '[]'"), clock=lambda: next(times), sleep=lambda _: None
        )


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (
            "echo 'libxl: error: Domain 3 does not exist.' >&2; exit 1",
            NoSuchDomainError,
            "no domain 3",
        ),
        ("echo 'cannot open privcmd' >&2; exit 2", HypervisorError, "cannot open privcmd"),
        ("exit 7", HypervisorError, "exit code 7"),
        ("exec cat /proc/self/fd/0 /dev/zero > /dev/null", HypervisorError, "within"),
    ],
)
def test_what_xl_says_is_passed_on(tmp_path: Path, body: str, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        toolstack.configuration(3, xl=xl(tmp_path, body), timeout=0.5 if said == "within" else 20)


def test_a_missing_xl_is_said(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="xen-utils"):
        toolstack.configuration(3, xl=str(tmp_path / "xl"))


# -------------------------------------------------------------------- what flags mean

DYING, SHUTDOWN = lib.XEN_STATE_DYING, lib.XEN_STATE_SHUTDOWN


@pytest.mark.parametrize(
    ("flags", "end"),
    [
        (lib.XEN_STATE_HVM, None),
        (lib.XEN_STATE_PAUSED, None),
        (SHUTDOWN | lib.XEN_SHUTDOWN_SUSPEND << 16, None),
        (SHUTDOWN | lib.XEN_SHUTDOWN_SUSPEND << 16 | DYING, EndReason.DESTROYED),
        (DYING, EndReason.DESTROYED),
        (SHUTDOWN | lib.XEN_SHUTDOWN_POWEROFF << 16, EndReason.POWEROFF),
        (SHUTDOWN | lib.XEN_SHUTDOWN_POWEROFF << 16 | DYING, EndReason.POWEROFF),
        (SHUTDOWN | lib.XEN_SHUTDOWN_REBOOT << 16, EndReason.REBOOT),
        (SHUTDOWN | lib.XEN_SHUTDOWN_CRASH << 16, EndReason.CRASH),
        (SHUTDOWN | lib.XEN_SHUTDOWN_WATCHDOG << 16 | DYING, EndReason.CRASH),
        (SHUTDOWN | 200 << 16, EndReason.CRASH),
    ],
)
def test_why_a_domain_is_no_more(flags: int, end: EndReason | None) -> None:
    assert end_of(flags) is end
    info = ffi.new("struct xen_dominfo *", {"flags": flags})
    assert lib.xen_is_ended(info) == (end is not None)  # C has the same opinion
    suspended = bool(flags & SHUTDOWN) and flags >> 16 & 0xFF == lib.XEN_SHUTDOWN_SUSPEND
    assert lib.xen_is_suspended(info) == (suspended and not flags & DYING)


def test_output_is_never_held() -> None:
    output = XenOutput()
    output.release(1)
    output.open()
    assert not output.stats().shut
    assert output.stats().held_packets == 0
