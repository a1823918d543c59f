"""Beginnings and ends of a protection, with each daemon a process of its own, as its operator starts and ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from leaks import nothing_leaks
from pair import eventually
from vitals import status_of

from checkpointd.demo.proof import prove_guest, prove_image
from checkpointd.demo.rig import Daemon, Rig
from checkpointd.errors import HostLostError, ProtectionLostError, StateError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.kv import KvClient, UdpTransport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.hypervisor.port import DomainInfo

DOMID = 4
PATIENCE = 60.0  # s; for an answer that a failure, and nothing else, keeps away
QUICK = ("--silence", "1s", "--engine-restart", "0s")
SILENCE_NS = 1_000_000_000  # as in QUICK


@dataclass
class Site:
    """A rig with one guest and what is asked of it."""

    rig: Rig
    guest: Daemon
    info: DomainInfo
    transport: UdpTransport

    @classmethod
    def build(cls, directory: Path, *arguments: str) -> Site:
        rig = Rig(directory)
        address = f"127.0.0.1:{rig.udp_port()}"
        try:
            guest = rig.guest_is_up(rig.guest(DOMID, "--listen", address, *arguments))
        except BaseException:
            rig.close()
            raise
        info = EmbeddedHypervisor("primary", rig.run_dir).find(domid=DOMID)
        return cls(rig, guest, info, UdpTransport(address))

    def client(self, name: str) -> KvClient:
        return KvClient(self.transport, name, patience=PATIENCE)

    def tell(self, words: str) -> None:
        self.transport.send(words.encode())

    def view(self) -> toolstack.GuestView:
        return toolstack.look(self.info)

    def runs_on(self) -> None:
        step = self.view().step
        self.tell(f"prober {step + 1} ping")
        eventually(lambda: self.view().step > step, "a step of the guest")

    def protect(self, *arguments: str, secondary: tuple[str, ...] = QUICK) -> tuple[Daemon, Daemon]:
        """(primary, secondary), the guest protected; both have said so, the secondary maybe after the primary."""
        standby = self.rig.secondary(*secondary).ready()
        primary = self.rig.primary(DOMID, "--interval", "20ms", *arguments)
        primary.state("protected")
        standby.state("standby")
        return primary, standby

    def checkpointd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "checkpointd.cli.main", *arguments],
            env=self.rig.environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip

    def close(self) -> None:
        self.transport.close()
        self.rig.close()


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """Its parameter: arguments of the guest."""
    arguments: tuple[str, ...] = getattr(request, "param", ("--memory", "4MiB"))
    with nothing_leaks():
        made = Site.build(tmp_path, *arguments)
        try:
            yield made
        finally:
            made.close()


# -------------------------------------------------------------------- ends


def test_sigterm_leaves_the_guest_running_unprotected(site: Site) -> None:
    primary, secondary = site.protect()
    assert site.view().shut
    assert primary.stop() == 0
    secondary.state("retired")
    view = site.view()
    assert not view.shut
    assert not view.engine
    assert site.client("after").set("key", "value").version == 1


@pytest.mark.parametrize(
    ("order", "code"), [("poweroff", 0), ("crash", 1), ("destroy", 0)]
)  # fmt: skip
def test_a_guest_that_ends_is_not_activated(site: Site, order: str, code: int) -> None:
    primary, secondary = site.protect()
    if order == "destroy":
        toolstack.destroy(site.info)
    else:
        site.tell(f"operator 1 {order}")
    assert primary.wait() == code
    secondary.state("retired")

    def domain() -> dict[str, Any]:
        found: dict[str, Any] = status_of(site.rig, secondary)["domains"][0]
        return found

    eventually(lambda: domain()["silent_ns"] > 2 * SILENCE_NS, "a silence that would activate")
    assert domain()["state"] == "retired"
    assert not EmbeddedHypervisor("secondary", site.rig.run_dir).domains()


def test_a_reboot_is_followed(site: Site) -> None:
    """Protection begins anew, on the new domid, for the same UUID."""
    primary, secondary = site.protect()
    site.client("before").set("key", "value")
    said = primary.catch_up()
    site.tell("operator 1 reboot")
    primary.state("protected", since=said)
    (again,) = EmbeddedHypervisor("primary", site.rig.run_dir).domains()
    assert again.uuid == site.info.uuid
    assert again.domid != site.info.domid
    assert status_of(site.rig, primary)["domid"] == again.domid
    assert site.client("after").get("key").value == ""
    (standby,) = status_of(site.rig, secondary)["domains"]
    assert standby["domid"] == again.domid
    secondary.catch_up()
    assert "active" not in " ".join(secondary.said)


# -------------------------------------------------------------------- the loss of the standby


def test_without_a_standby_the_output_is_held(site: Site) -> None:
    primary, secondary = site.protect("--standby-loss", "hold", "--standby-timeout", "400ms")
    secondary.kill()
    said = primary.catch_up()
    primary.state("holding")
    site.tell("writer 1 set key value")
    eventually(lambda: site.view().held, "an answer held")
    site.runs_on()
    assert site.view().shut
    assert status_of(site.rig, primary)["standby_loss"] == "hold"
    site.rig.secondary(*QUICK).ready()
    primary.state("protected", since=said)
    assert site.client("writer").set("key", "value").version == 1  # by the answer that was held


def test_without_a_standby_the_guest_runs_if_that_is_wanted(site: Site) -> None:
    """Silence is not enough: only once the secondary's process is found gone does the output open."""
    primary, secondary = site.protect("--standby-loss", "run", "--standby-timeout", "400ms")
    os.kill(secondary.pid, signal.SIGSTOP)
    primary.state("holding")
    site.tell("writer 1 set key value")
    eventually(lambda: site.view().held, "an answer held")
    assert site.view().shut
    primary.catch_up()
    assert "unprotected" not in " ".join(primary.said)
    secondary.kill()
    primary.state("unprotected")
    assert site.client("writer").set("key", "value").version == 1
    assert not site.view().shut
    said = primary.catch_up()
    site.rig.secondary(*QUICK).ready()
    primary.state("protected", since=said)
    eventually(lambda: site.view().shut, "the output shut again")


def test_a_secondary_that_was_frozen_blames_nobody(site: Site) -> None:
    """It slept longer than --silence. What it did not hear then is no silence of the primary: nothing is activated,
    and the session goes on.
    """
    primary, secondary = site.protect("--standby-timeout", "2s")
    session = status_of(site.rig, secondary)["domains"][0]["session"]
    secondary.catch_up()
    before = len(secondary.said)
    os.kill(secondary.pid, signal.SIGSTOP)
    primary.state("holding")  # after 2 s: twice the silence
    said = primary.catch_up()
    os.kill(secondary.pid, signal.SIGCONT)
    primary.state("protected", since=said)
    assert site.client("writer").set("key", "value").version == 1
    secondary.catch_up()
    assert secondary.said[before:] == []  # it was in standby all the while
    (domain,) = status_of(site.rig, secondary)["domains"]
    assert (domain["session"], domain["state"]) == (session, "standby")
    assert domain["stalls"] > 0


def test_a_second_engine_is_turned_away(site: Site) -> None:
    primary, _ = site.protect()
    second = site.rig.primary(DOMID)
    assert (
        second.wait() == StateError.exit_code
    )  # it meets the first one's terms before it meets the guest
    assert f"pid {primary.pid}" in second.tail()
    assert site.client("writer").set("key", "value").version == 1
    assert status_of(site.rig, primary)["state"] == "protected"


@pytest.mark.parametrize(
    "site", [("--memory", "16MiB", "--program", "dirty:4000@200")], indirect=True
)
def test_a_guest_too_fast_for_the_link_is_given_up(site: Site) -> None:
    secondary = site.rig.secondary(*QUICK).ready()
    primary = site.rig.primary(DOMID, "--arena", "1MiB", "--max-live-rounds", "2")
    assert primary.wait() == ProtectionLostError.exit_code
    secondary.state("retired")
    assert not site.view().shut
    assert "protection is given up" in primary.tail()
    site.runs_on()


# -------------------------------------------------------------------- failovers


def test_a_frozen_primary_is_fenced(site: Site) -> None:
    primary, secondary = site.protect()
    answer = site.client("writer").set("key", "value")
    os.kill(primary.pid, signal.SIGSTOP)
    secondary.state("active")
    site.guest.wait()  # by the fence
    os.kill(primary.pid, signal.SIGCONT)
    assert primary.wait() == HostLostError.exit_code
    after = site.client("reader").get("key")
    assert (after.version, after.value) == (answer.version, answer.value)
    assert prove_guest(site.rig.run_dir, DOMID).equal


def test_a_replica_on_disk_and_kept_images(site: Site, tmp_path: Path) -> None:
    """What is kept is a stream that the command line accepts; what is activated is on disk."""
    keep, images = tmp_path / "keep", tmp_path / "images"
    _, secondary = site.protect(
        secondary=(
            *QUICK,
            "--image",
            "disk",
            "--image-dir",
            str(images),
            "--keep-images",
            str(keep),
        )
    )
    assert (images / f"{site.info.uuid}.image").stat().st_size == 4 << 20
    assert site.client("writer").set("key", "value").version == 1
    site.guest.kill()
    secondary.state("active")
    assert site.client("reader").get("key").value == "value"
    latest = keep / f"{site.info.uuid}.latest"
    verified = site.checkpointd("stream", "verify", str(latest))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    logs = [site.rig.run_dir / "embedded" / "primary" / str(DOMID) / "input.log"]
    assert prove_image(latest, logs).equal
    assert prove_guest(site.rig.run_dir, DOMID).equal


def test_no_fencing_stays_visible(site: Site) -> None:
    _, secondary = site.protect(secondary=(*QUICK, "--unsafe-no-fencing"))
    shown = site.checkpointd("status")
    assert "UNSAFE" in shown.stdout, shown
    assert "unsafe-no-fencing" in shown.stdout
    document = json.loads(site.checkpointd("status", "--json").stdout)
    assert "unsafe-no-fencing" in json.dumps(document)
    assert secondary.process.poll() is None
