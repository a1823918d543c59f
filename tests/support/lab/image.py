"""A host's image, from Debian packages: Xen, dom0 with what checkpointd needs, ssh.

What is made for a suite is kept in SUITE-KEY/ of the lab: root/ (dom0's files, also a place to build in), dom0.img,
xen.elf, vmlinuz, initrd.img. KEY is a hash of this module and of the files in dom0/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from lab import needs
from lab.places import DOM0_FILES, HERE, HOSTS, LabError, digest
from lab.plug import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.places import Place, Suite

PACKAGES = """
    linux-image-amd64 initramfs-tools systemd-sysv udev dbus kmod busybox-static e2fsprogs procps
    xen-utils-{xen} xen-hypervisor-{xen}-amd64 xenstore-utils
    openssh-server iproute2 bridge-utils iputils-ping
    python3 python3-venv python3-pip python3-dev python3-setuptools python3-wheel
    python3-cffi python3-zmq python3-prometheus-client python3-zstandard
    python3-pytest python3-hypothesis
    gcc libc6-dev libffi-dev libxen-dev
"""
IMAGE_SIZE = "6G"  # most of it a hole
# Timers that would wake up in the middle of a measurement.
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "dpkg-db-backup.timer",
)
# A console that nobody reads: on a slow machine its device comes late, and the boot waits for it.
UNUSED = ("serial-getty@hvc0.service", "getty@tty1.service", "e2scrub_reap.service")
ENABLED = ("lab-network.service",)
VENV = "/opt/checkpointd"  # dom0's Python side: Debian's packages, and checkpointd by pip
_MIRROR = re.compile(r"(?:^URIs:|^deb(?:\s+\[[^]]*\])?)\s+(\S+?/debian)/?(?:\s|$)", re.MULTILINE)


def ensure(place: Place, suite: Suite, say: Callable[[str], None]) -> Path:
    """The suite's image directory, built if it is not there (about two minutes, 3 GB)."""
    path = place.path / f"{suite.name}-{digest([HERE / 'image.py', DOM0_FILES], suite.xen)}"
    with place.locked():
        if not path.exists():
            needs.install()
            if os.geteuid():
                raise LabError(
                    "building an image needs root, for mmdebstrap and chroot: sudo deploy/lab build"
                )
            _identity(place)
            _forget_others(place, suite)
            unfinished = path.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _build(place, suite, unfinished, say)
            unfinished.rename(path)
    return path


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PATH": needs.PATH, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LabError(
            f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout[-4000:]}"
        )
    return done.stdout


def _mirror() -> str:
    """This machine's own Debian mirror."""
    for path in sorted(Path("/etc/apt").glob("sources.list*/*.sources")) + sorted(
        Path("/etc/apt").rglob("*.list")
    ):
        if found := _MIRROR.search(path.read_text()):
            return found[1]
    raise LabError(
        "no Debian mirror in /etc/apt/sources.list*: add one, such as deb http://.../debian SUITE main"
    )


def _identity(place: Place) -> None:
    if not place.identity.exists():
        run(
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-C",
            "checkpointd lab",
            "-N",
            "",
            "-f",
            place.identity,
        )


def _forget_others(place: Place, suite: Suite) -> None:
    """Images of this suite that were made of something else; they are large. A host that is on needs its own."""
    records = [Record.read(place.run, name) for name in HOSTS]
    in_use = {record.facts["image"] for record in records if record}
    for path in place.path.glob(f"{suite.name}-*"):
        if str(path) not in in_use:
            shutil.rmtree(path)


def _build(place: Place, suite: Suite, path: Path, say: Callable[[str], None]) -> None:
    say(f"{suite.name}: installing Debian with Xen {suite.xen}")
    root = path / "root"
    packages = ",".join(PACKAGES.format(xen=suite.xen).split())
    (path / "sources.list").write_text(f"deb {_mirror()} {suite.name} main\n")
    run(
        "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={packages}", suite.name, root, "sources.list",
        cwd=path,
    )  # fmt: skip
    _configure(place, root)
    run("chroot", root, "python3", "-m", "venv", "--system-site-packages", VENV)
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd.img", "initrd.img-*")):
        (found,) = (root / "boot").glob(pattern)
        shutil.copyfile(found, path / name)
    (path / "xen.elf").write_bytes(
        subprocess.run(
            ["zcat", root / "boot" / f"xen-{suite.xen}-amd64.gz"],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    shutil.copyfile(path / "vmlinuz", root / "root" / "vmlinuz")  # of the guests
    say(f"{suite.name}: writing the image")
    image = path / "dom0.img"
    run("truncate", "-s", IMAGE_SIZE, image)
    run("mke2fs", "-q", "-t", "ext4", "-d", root, image)


def _configure(place: Place, root: Path) -> None:
    run("cp", "-r", "--no-target-directory", DOM0_FILES, root)
    (root / "etc/fstab").write_text("/dev/sda / ext4 rw,noatime 0 1\n")
    ssh = root / "root" / ".ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    public = place.identity.with_suffix(".pub").read_text()
    (ssh / "authorized_keys").write_text(public)
    shutil.copyfile(place.identity, ssh / "id_ed25519")
    (ssh / "id_ed25519").chmod(0o600)
    units = root / "etc/systemd/system"
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    for name in ENABLED:
        (wanted / name).symlink_to(f"../{name}")
    for name in (*MASKED, *UNUSED):
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    for path in (root / "etc/ssh").glob("ssh_host_*"):
        path.unlink()
    run("ssh-keygen", "-A", "-f", root)
