"""What is done of the toolstack's part at a guest's end: decided from its configuration, and only if nobody does it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from checkpointd.authority.processes import HostIdentity
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.port import DomainInfo, EndReason
from checkpointd.hypervisor.xen import ends, recreate
from checkpointd.hypervisor.xen.ends import Deed, decide, settle
from checkpointd.hypervisor.xen.lib import ffi, lib
from checkpointd.hypervisor.xen.versions import Version

if TYPE_CHECKING:
    from pathlib import Path

UUID = "2f1e8a34-5b0c-4d0e-9f57-0c6f2b7f4e11"
ATTACHED = json.dumps({"c_info": {"name": "shop"}, "on_reboot": "restart"})  # when protection began
INFO = DomainInfo(UUID, 4, "shop", 1 << 20, 40960, "xen", HostIdentity("b", 0, 0), {"xl": ATTACHED})

POWEROFF, REBOOT, CRASH = (
    lib.XEN_SHUTDOWN_POWEROFF,
    lib.XEN_SHUTDOWN_REBOOT,
    lib.XEN_SHUTDOWN_CRASH,
)


@pytest.mark.parametrize(
    ("code", "config", "deed"),
    [
        (POWEROFF, {}, Deed.DESTROY),  # libxl leaves its default out
        (POWEROFF, {"on_poweroff": "preserve"}, Deed.LEAVE),
        (POWEROFF, {"on_reboot": "restart"}, Deed.DESTROY),
        (REBOOT, {"on_reboot": "restart"}, Deed.RESTART),
        (REBOOT, {}, Deed.DESTROY),
        (REBOOT, {"on_reboot": "restart_rename"}, Deed.LEAVE),
        (CRASH, {"on_crash": "restart", "on_watchdog": "destroy"}, Deed.RESTART),
        (CRASH, {"on_crash": "coredump_restart"}, Deed.LEAVE),
        (lib.XEN_SHUTDOWN_WATCHDOG, {"on_crash": "preserve", "on_watchdog": "restart"}, Deed.RESTART),
        (lib.XEN_SHUTDOWN_SOFT_RESET, {"on_soft_reset": "soft_reset"}, Deed.RESTART),
        (CRASH, {"on_crash": "of a later libxl"}, Deed.LEAVE),
        (200, {"on_crash": "restart"}, Deed.DESTROY),  # a reason of the guest's own making
    ],
)  # fmt: skip
def test_the_configuration_decides(code: int, config: dict[str, str], deed: Deed) -> None:
    assert decide(json.dumps(config), code).deed is deed


# -------------------------------------------------------------------- when it is done


@dataclass
class FakeHands:
    """A domain that stays shut down for `looks` looks; None: for ever."""

    code: int
    looks: int | None = None
    config: str | None = ATTACHED  # None: xl does not answer
    now: float = 0.0
    done: list[tuple[object, ...]] = field(default_factory=list)

    def left(self, domid: int, uuid: str) -> int | None:
        assert (domid, uuid) == (INFO.domid, INFO.uuid)
        if self.looks is not None:
            self.looks -= 1
        return None if self.looks is not None and self.looks < 0 else self.code

    def configuration(self, domid: int) -> str:
        if self.config is None:
            raise HypervisorError("xl says nothing")
        return self.config

    def destroy(self, domid: int) -> None:
        self.done.append(("destroy", domid))

    def restart(self, domid: int, uuid: str, config: str) -> int:
        self.done.append(("restart", domid, uuid, config))
        return domid + 1

    def settle(self, reason: EndReason | None, info: DomainInfo = INFO) -> list[tuple[object, ...]]:
        settle(info, reason, self, limit=3, clock=lambda: self.now, sleep=self.sleep)
        return self.done

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_guest_that_powered_off_is_destroyed() -> None:
    hands = FakeHands(POWEROFF)
    assert hands.settle(EndReason.POWEROFF) == [("destroy", 4)]
    assert hands.now >= 3, "xl had no time to do it"


def test_a_guest_that_reboots_is_created_anew_as_it_is_configured_now() -> None:
    changed = json.dumps({"on_reboot": "restart", "disks": [{}]})
    assert FakeHands(REBOOT, config=changed).settle(EndReason.REBOOT) == [
        ("restart", 4, UUID, changed)
    ]


def test_or_as_it_was_configured_when_protection_began() -> None:
    assert FakeHands(REBOOT, config=None).settle(EndReason.REBOOT) == [
        ("restart", 4, UUID, ATTACHED)
    ]


def test_without_any_configuration_nothing_is_done() -> None:
    bare = DomainInfo(UUID, 4, "shop", 1, 1, "xen", INFO.host)
    hands = FakeHands(REBOOT, config=None)
    with pytest.raises(HypervisorError, match="xl says nothing"):
        hands.settle(EndReason.REBOOT, bare)
    assert hands.done == []


@pytest.mark.parametrize("looks", [0, 1, 29])
def test_what_xl_does_itself_is_left_to_it(looks: int) -> None:
    hands = FakeHands(REBOOT, looks)
    assert hands.settle(EndReason.REBOOT) == []
    assert hands.now == pytest.approx(looks * ends.LOOK)


def test_a_domain_that_is_to_be_kept_is_left_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hands = FakeHands(CRASH, config='{"on_crash": "preserve"}')
    assert hands.settle(EndReason.CRASH) == []
    assert "on_crash=preserve" in caplog.text
    assert "`xl destroy 4`" in caplog.text


@pytest.mark.parametrize("reason", [EndReason.DESTROYED, EndReason.MOVED, EndReason.HOST_LOST])
def test_what_others_did_is_theirs(reason: EndReason, caplog: pytest.LogCaptureFixture) -> None:
    assert FakeHands(REBOOT).settle(reason) == []
    assert caplog.text == ""


def test_of_a_guest_that_lives_on_a_person_has_to_know(caplog: pytest.LogCaptureFixture) -> None:
    assert FakeHands(REBOOT).settle(None) == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "nobody looks after its end" in record.message


# -------------------------------------------------------------------- how it is done


def test_a_restart_that_fails_keeps_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says where it is: with the domain xl has lost it."""
    (tmp_path / "xen").mkdir()
    hands = ends.EndHands(ffi.NULL, tmp_path)
    calls = []

    def refuse(command: tuple[str, ...], text: str) -> str:
        calls.append((command, text))
        raise HypervisorError("libxl does not create the domain (error -3)")

    monkeypatch.setattr(ends, "run", refuse)
    with pytest.raises(HypervisorError, match=r"domain 4 .*error -3.*recreate < /.*\.json"):
        hands.restart(4, UUID, ATTACHED)
    (kept,) = (tmp_path / "xen").iterdir()
    assert kept.read_text() == ATTACHED
    assert kept.stat().st_mode & 0o777 == 0o600
    ((command, text),) = calls
    assert command[-2:] == ("--replace", "4")
    assert text == ATTACHED
    monkeypatch.setattr(ends, "run", lambda command, text: "5\n")
    assert hands.restart(4, UUID, ATTACHED) == 5
    assert not kept.exists()


def test_a_command_gets_its_input_and_says_what_is_wrong() -> None:
    assert ends.run(("cat",), "text", unit=False) == "text"
    with pytest.raises(HypervisorError, match=r"`sh -c .*` failed: no such domain"):
        ends.run(("sh", "-c", "echo no such domain >&2; exit 1"), unit=False)
    with pytest.raises(HypervisorError, match="`nowhere/xl` cannot be run"):
        ends.run(("nowhere/xl",), unit=False)
    with pytest.raises(HypervisorError, match=r"has not ended within 0\.05 s"):
        ends.run(("sleep", "60"), limit=0.05, unit=False)


def test_under_systemd_it_is_a_unit_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What libxl starts must not end with us, nor be kept from writing where we must not."""
    fake = tmp_path / "systemd-run"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("INVOCATION_ID", "1")
    assert ends.run(("xl", "destroy", "4")) == "--quiet --pipe --wait --collect xl destroy 4\n"
    monkeypatch.delenv("INVOCATION_ID")
    assert ends.run(("echo", "plain")) == "plain\n"


# -------------------------------------------------------------------- libxl

LIBXL = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
struct config { char pad[1288]; };
int libxl_ctx_alloc(void **c, int version, unsigned flags, void *lg)
{ *c = c; fprintf(stderr, "alloc %d %u %d\n", version, flags, lg != 0); return 0; }
void libxl_domain_config_init(struct config *d) { memset(d, 1, sizeof *d); }
int libxl_domain_config_from_json(void *c, struct config *d, const char *s)
{ fprintf(stderr, "json %s\n", s); strncpy(d->pad, s, 1000); return strstr(s, "bad") ? -6 : 0; }
int libxl_domain_create_new(void *c, struct config *d, uint32_t *domid, void *how, void *console)
{ *domid = 7; fprintf(stderr, "create %d\n", !how && !console); return strstr(d->pad, "full") ? -3 : 0; }
int libxl_domain_unpause(void *c, uint32_t domid, void *how)
{ fprintf(stderr, "unpause %u %d\n", domid, !how); return 0; }
int libxl_domain_destroy(void *c, uint32_t domid, void *how)
{ fprintf(stderr, "destroy %u %d\n", domid, !how); return 0; }
"""
LOGS = """
void *xtl_createlogger_stdiostream(void *file, int level, unsigned flags)
{ return level == 7 && !flags ? file : 0; }
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("libxl")
    for name, text in {"libxenlight.so.4.17": LIBXL, "libxentoollog.so.1": LOGS}.items():
        command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-o", str(directory / name), "-"]
        subprocess.run(command, input=text.encode(), check=True)
    return directory


def recreated(libraries: Path, config: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The program with libraries that say what they are called with."""
    script = (
        "import sys; from checkpointd.hypervisor.xen import recreate, versions;"
        "versions.running = lambda: versions.Version(4, 17); sys.exit(recreate.main())"
    )
    return subprocess.run(
        (sys.executable, "-c", script, *words),
        input=config,
        env={"LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_domain_is_destroyed_and_created_by_libxl(libraries: Path) -> None:
    config = {"c_info": {"name": "shop", "domid": 4}, "on_reboot": "restart"}
    done = recreated(libraries, json.dumps(config), "--replace", "4")
    assert (done.returncode, done.stdout) == (0, "7\n")
    assert done.stderr.splitlines() == [
        "alloc 0 0 1",
        "destroy 4 1",
        'json {"c_info": {"name": "shop"}, "on_reboot": "restart"}',
        "create 1",
        "unpause 7 1",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [("bad", "understand the configuration (error -6)"), ("full", "create the domain (error -3)")],
)
def test_what_libxl_refuses_is_said(libraries: Path, name: str, said: str) -> None:
    done = recreated(libraries, json.dumps({"c_info": {"name": name}}))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith(f"libxl does not {said}\n")
    assert "unpause" not in done.stderr


def test_what_is_no_configuration_destroys_nothing(libraries: Path) -> None:
    for text in ("", "[]", "{}"):
        done = recreated(libraries, text, "--replace", "4")
        assert done.returncode == 3
        assert "destroy" not in done.stderr


def test_a_missing_libxl_is_said() -> None:
    with pytest.raises(HypervisorError, match=r"libxl cannot be used.*libxenlight\.so\.9\.99"):
        recreate.Libxl(Version(9, 99))
