"""`checkpointd check` in dom0: on guests that can be protected, and on those that cannot, with the reason."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import pytest
from lab.guests import DISK, Guest

from checkpointd.authority.processes import HostIdentity, boot_id
from checkpointd.cli import main as cli
from checkpointd.hypervisor.xen import autostart, state, toolstack
from checkpointd.hypervisor.xen.lib import Store, open_libs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "check-me"  # of the guest that most tests share
OTHER = "check-me-too"  # of one that a test has for itself, beside it
LIMIT = 300.0  # s for one call of xl, and for a guest's kernel to reach its disk; seconds on an idle machine
LOOK = 0.2  # s between two looks at what nothing announces
REFUSED, BUSY_THERE, NO_DOMAIN = (
    3,
    9,
    4,
)  # exit codes: HypervisorError, RefusedError, NoSuchDomainError


def xl(*words: str) -> str:
    done = subprocess.run(["xl", *words], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"xl {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


@contextmanager
def running(name: str, config: str, directory: Path) -> Iterator[int]:
    """A guest of that name and configuration; its domid."""
    path = directory / "guest.cfg"
    path.write_text(config)
    xl("create", "-q", str(path))
    try:
        yield int(xl("domid", name))
    finally:
        xl("destroy", name)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A PVH guest with nothing in the way, for the tests that leave it as it was."""
    config = Guest(NAME, pages=64, rate=0).config()
    with running(NAME, config, tmp_path_factory.mktemp("guest")) as domid:
        yield domid


def check(tmp_path: Path, domid: int, *options: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit code, and the items by name. In this process: a new one costs half a minute in software emulation."""
    arguments = [
        *("check", "--json", "--domid", str(domid), "--hypervisor", "xen"),
        *("--run-dir", str(tmp_path / "run"), "--state-dir", str(tmp_path / "state"), *options),
    ]
    said = io.StringIO()
    with redirect_stdout(said):
        code = cli.main(arguments)
    document = json.loads(said.getvalue())
    assert document["exit_code"] == code
    items: dict[str, list[dict[str, Any]]] = {}
    for item in document["items"]:
        items.setdefault(item["name"], []).append(item)
    return code, items


def refused(items: dict[str, list[dict[str, Any]]]) -> set[str]:
    return {name for name, found in items.items() for item in found if item["verdict"] == "refused"}


def test_a_pvh_guest_can_be_protected_and_is_left_as_it_was(tmp_path: Path, idle: int) -> None:
    for _ in range(2):  # the dirty log is tried: what the first look began it has ended
        code, items = check(tmp_path, idle)
        assert code == 0, refused(items)
        assert items["type"][0]["text"] == "PVH"
        assert items["dirty log"][0]["text"] == "can begin"
        assert items["output"][0]["verdict"] == items["memory here"][0]["verdict"] == "ok"
        assert items["secondary"][0]["verdict"] == "unknown"


def test_a_guest_that_is_paused_or_is_not_there(tmp_path: Path, idle: int) -> None:
    xl("pause", NAME)
    try:
        code, items = check(tmp_path, idle)
    finally:
        xl("unpause", NAME)
    assert (code, refused(items)) == (REFUSED, {"state"})
    code, items = check(tmp_path, 4000)
    assert (code, refused(items)) == (NO_DOMAIN, {"domain"})
    assert NAME in items["domain"][0]["text"]  # what there is instead


def test_what_a_dead_engine_left(tmp_path: Path, idle: int) -> None:
    gone = HostIdentity(boot_id(), os.getpid(), 1)  # no process of this number began then
    uuid = xl("list", "-v", NAME).split()[-1]
    state.store(tmp_path / "run", state.EngineState(uuid, idle, gone))
    code, items = check(tmp_path, idle)
    assert code == 0
    assert items["engine"][0]["verdict"] == "warning"
    assert f"checkpointd release --domid {idle}" in items["engine"][0]["hint"]


def test_a_guest_that_starts_at_boot(tmp_path: Path, idle: int) -> None:
    autostart.AUTOSTART.mkdir(exist_ok=True)
    entry = autostart.AUTOSTART / "check-me.cfg"
    entry.write_text(Guest(NAME).config())
    try:
        code, items = check(tmp_path, idle)
    finally:
        entry.unlink()
    assert code == 0
    assert str(entry) in items["start at boot"][0]["text"]


def test_a_secondary_on_the_same_host_finds_the_guest_there(tmp_path: Path, idle: int) -> None:
    """Not how it is used, but every item of the other side is judged on a real Xen."""
    secondary = subprocess.Popen(
        [
            *("checkpointd", "secondary", "--no-metrics", "--unsafe-no-fencing"),
            *("--epoch-memory", "64MiB"),  # the lab's dom0 has 1 GiB in all
            *("--run-dir", str(tmp_path / "run"), "--state-dir", str(tmp_path / "state")),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + LIMIT
        code, items = check(tmp_path, idle, "--secondary", "127.0.0.1:10946:10947")
        while "ports" not in items or items["ports"][0]["verdict"] != "ok":
            assert time.monotonic() < deadline, items
            code, items = check(tmp_path, idle, "--secondary", "127.0.0.1:10946:10947")
    finally:
        secondary.terminate()
        secondary.wait(LIMIT)
    assert (code, refused(items)) == (BUSY_THERE, {"guest there"})
    assert items["CPU"][0]["verdict"] == "ok", items["CPU"]
    assert items["releases"][0]["verdict"] == items["memory there"][0]["verdict"] == "ok"
    assert items["fence"][0]["verdict"] == "warning"


def test_disks_and_networks_need_leave(tmp_path: Path) -> None:
    config = Guest(OTHER, pages=64, rate=0, network=True, disk=True).config()
    with running(OTHER, config.replace("access=ro", "access=rw"), tmp_path) as domid:
        code, items = check(tmp_path, domid)
        assert (code, refused(items)) == (REFUSED, {"disk", "output"})
        code, items = check(tmp_path, domid, "--unsafe-disk", "--unsafe-output")
        assert (code, refused(items)) == (0, set())
        assert items["disk"][0]["verdict"] == items["output"][0]["verdict"] == "warning"


@pytest.mark.parametrize("persistent", [False, True])
def test_a_read_only_disk_is_fine_without_persistent_grants(
    tmp_path: Path, persistent: bool
) -> None:
    config = Guest(OTHER, pages=64, rate=0, disk=True, persistent_grants=persistent).config()
    with running(OTHER, config, tmp_path) as domid:
        connected(domid)
        code, items = check(tmp_path, domid, "--unsafe-disk")
    if persistent:
        assert (code, refused(items)) == (REFUSED, {"disk"})
        assert "persistent grants" in items["disk"][0]["text"]
    else:
        assert (code, refused(items)) == (0, set())
        assert DISK in items["disk"][0]["text"]


def connected(domid: int) -> None:
    """Wait until the guest's disk is: only then both ends have said what they can do."""
    store = Store(open_libs())
    try:
        top = f"/local/domain/{domid}/device/vbd"
        deadline = time.monotonic() + LIMIT
        while not (ids := store.list(top)) or store.read(f"{top}/{ids[0]}/state") != "4":
            assert time.monotonic() < deadline, "the guest's disk is never connected"
            time.sleep(LOOK)
    finally:
        store.close()


def test_a_pv_guest_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = Guest(OTHER, pages=64, rate=0).config().replace('type="pvh"', 'type="pv"')
    with running(OTHER, config, tmp_path) as domid:
        assert toolstack.configuration(domid).kind == "pv"
        code, items = check(tmp_path, domid)
    # Debian's Xen 4.17 was built without shadow paging once, and is built with it by now.
    capable = xl("info", "virt_caps").split()
    assert (code, refused(items)) == (
        REFUSED, {"type"} if "shadow" in capable else {"type", "dirty log"},
    )  # fmt: skip
    assert "shadow paging" in items["type"][0]["text"]
    assert "shadow" in capable or "shadow paging" in items["dirty log"][0]["text"]
