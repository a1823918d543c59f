"""Real Xen hosts for tests: they run on this machine, and what they judge runs in the lab's two hosts (docs/lab.md).

`deploy/test --xen` runs them. What lies in inside/ is run in dom0, by test_inside.py.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import daemons, machine, needs, provision
from lab.places import HOSTS, ROOT, SUITES, LabError, Place
from report import commit, merge_rows, read_section, write_section
from report import machine as this_machine
from xen_rig import Rig

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from lab.machine import Machine
    from pluggy import Result

collect_ignore = ["inside"]  # those run in dom0
FAILURES = ROOT / ".state" / "xen-failures"
# What helps at three in the morning, of each host that is on.
EVIDENCE = {
    "checkpointd.log": f"tail -n 400 {daemons.LOGS}/*.log; tail -n 50 {daemons.LOGS}/*.code",
    "consoles.log": "tail -n 200 /var/log/xen/console/*.log",
    "xl.log": "xl list -v; xl dmesg | tail -n 200; tail -n 60 /var/log/xen/xl-*.log",
    "system.log": "dmesg | tail -n 100; journalctl -n 200 --no-pager; ps axf; free -m",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xen")
    group.addoption(
        "--xen-suites", default="a:bookworm,b:bookworm", help="Debian's release of each host"
    )
    group.addoption(
        "--xen-cpus", type=int, help=f"processors of each host (default: what it has, or {machine.CPUS})"
    )
    group.addoption("--keep-lab", action="store_true", help="leave the hosts on at the end")
    group.addoption(
        "--rounds", type=int, default=1, help="how often a test does what it repeats (campaign: 10)"
    )
    group.addoption("--seed", type=int, default=20140619, help="of what a test chooses at random")
    group.addoption(
        "--record",
        action="store_true",
        help="replace the report of all tests in docs/lab.md by this run",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xen)
    # Those that lose a host last: booting it again is what takes longest.
    items.sort(key=lambda item: item.get_closest_marker("loses_host") is not None)


def say(text: str) -> None:
    sys.stderr.write(f"[lab] {text}\n")


def suites(config: pytest.Config) -> dict[str, str]:
    return dict(word.split(":") for word in str(config.getoption("--xen-suites")).split(","))


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Iterator[Place]:
    """The lab's directory; hosts that were off before are switched off at the end."""
    if reason := needs.impossible():
        pytest.skip(reason)
    place = Place.open()
    were_on = any(machine.Machine(place, name).record for name in HOSTS)
    yield place
    if not (were_on or pytestconfig.getoption("--keep-lab")):
        machine.down(place)


def ready(lab: Place, config: pytest.Config, *, keep: bool) -> dict[str, Machine]:
    """Both hosts, on, with this checkout's checkpointd, no guest and no daemon. One that was lost is as it was when it
    was kept last, or has a new disk. `keep`: if one is lost now, let it be as it is in the end here.
    """
    chosen = {name: SUITES[suite] for name, suite in suites(config).items()}
    for name in chosen:
        if not (host := machine.Machine(lab, name)).record and not host.kept:
            host.forget_disk()
    booted = machine.boot(lab, chosen, say, cpus=config.getoption("--xen-cpus"), kept=True)
    for host in booted:  # first: a guest that is left would take the processor from the installation
        daemons.clear(host)
    provision.provision(booted, say)
    daemons.exchange_keys(booted[0], booted[1])
    if keep:
        booted[0].keep()  # no test loses host b
    return {host.name: host for host in booted}


@pytest.fixture
def hosts(
    lab: Place, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> Iterator[dict[str, Machine]]:
    """See ready()."""
    loses = request.node.get_closest_marker("loses_host") is not None
    hosts = ready(lab, pytestconfig, keep=loses and request.node is not request.session.items[-1])
    yield hosts
    for host in hosts.values():
        if host.record:
            daemons.clear(host)


@pytest.fixture
def power_again(lab: Place, pytestconfig: pytest.Config) -> Callable[[], dict[str, Machine]]:
    """Makes both hosts ready once more, within a test that loses them."""
    return lambda: ready(lab, pytestconfig, keep=True)


@pytest.fixture
def rig(hosts: dict[str, Machine], request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Guests on host a, checkpointd on both."""
    with Rig(hosts["a"], hosts["b"]) as rig:
        yield rig
        if request.node.stash.get(_failed, False):
            collect(request.node, hosts)


class EmulatorFaultError(Exception):
    """QEMU broke the guest, so that the test says nothing; it is run again, and counted as such."""


# QEMU's software emulation of AMD-V now and then breaks a guest, which dies of a triple fault: some with the
# hypervisor's own instruction pointer and segments in their state, some in the midst of their own kernel, under
# `xl remus` and `xl migrate` as well. Linux causes none. Nothing that an engine does to a guest can: it reads its
# memory, and Xen stops it and lets it go. What could is a restore of a state that is wrong, so that the fault of a
# guest that was restored is ours.
TRIPLE_FAULT = re.compile(r"d(\d+)v\d+ Triple fault.*(?:\n.*){0,8}")
HYPERVISORS_STATE = re.compile(r"RIP:\s+e008:.*\n.*CONTEXT: hvm guest")
_said_before = pytest.StashKey[dict[Path, int]]()


def emulator_fault(item: pytest.Item) -> str:
    """What Xen said of such a fault since the test began, "" if nothing."""
    for serial, before in item.stash.get(_said_before, {}).items():
        if serial.exists():
            said = serial.read_bytes()
            # A host that was booted again has begun anew.
            text = said[before if before <= len(said) else 0 :].decode(errors="replace")
            text = text.replace("\r", "")
            for found in TRIPLE_FAULT.finditer(text):
                restored = f"HVM{found[1]} restore: LAPIC" in text  # the others are of its creation
                if not restored or HYPERVISORS_STATE.search(found[0]):
                    return found[0]
    return ""


def forget_faults(item: pytest.Item) -> None:
    """What was said until now counts no more."""
    item.stash[_said_before] = {
        host.serial: host.serial.stat().st_size
        for host in getattr(item, "funcargs", {}).get("hosts", {}).values()
        if host.serial.exists()
    }


@pytest.fixture
def guest_was_broken(request: pytest.FixtureRequest) -> Callable[[], bool]:
    """Has QEMU broken a guest since the test began, or since this was asked last? For a test that goes on with another
    guest then.
    """

    def asked() -> bool:
        fault = emulator_fault(request.node)
        forget_faults(request.node)
        return bool(fault)

    return asked


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Result[None], None]:
    forget_faults(item)
    outcome = yield
    if outcome.excinfo and (fault := emulator_fault(item)):
        outcome.force_exception(EmulatorFaultError(f"QEMU broke a guest:\n{fault}"))


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Result[pytest.TestReport], None]:
    outcome = yield
    if call.when == "call" and outcome.get_result().failed:
        item.stash[_failed] = True


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The report of a campaign: each test with what it came to. What ran before, in another part of the campaign,
    stays beside it, under the commit that it ran at.
    """
    if not config.getoption("--record"):
        return
    hosts = " to ".join(SUITES[suite].xen for suite in suites(config).values())
    rows = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if outcome != "passed" or report.when == "call":
                notes = ", ".join(f"{name} {value}" for name, value in report.user_properties)
                name = report.nodeid.removeprefix("tests/xen/")
                rows[f"| `{name}` | {hosts} |"] = (
                    f" {outcome} | {report.duration:.0f} | {commit()} | {notes} |"
                )
    head = [f"{this_machine()}.", "", "| test | Xen | result | s | commit | |", "|---|---|---|---:|---|---|"]
    write_section("runs", "\n".join([*head, *merge_rows(read_section("runs"), rows), ""]))


def collect(item: pytest.Item, hosts: dict[str, Machine]) -> None:
    """What both hosts can tell of a test that failed, as files; the report says where."""
    into = FAILURES / re.sub(r"[^\w.-]+", "_", item.name)
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for name, host in hosts.items():
        if host.serial.exists():
            shutil.copyfile(host.serial, into / f"{name}-serial.log")
        if not host.record:
            continue
        for file, command in EVIDENCE.items():
            try:
                (into / f"{name}-{file}").write_text(
                    host.ssh(command, check=False, timeout=120).out
                )
            except (LabError, OSError) as error:
                (into / f"{name}-{file}").write_text(f"not to be had: {error}\n")
    item.add_report_section("call", "lab", f"what the hosts say: {os.path.relpath(into, ROOT)}/")
