"""What the machine must have to hold a lab."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from lab.places import LabError

# A program that shows that a Debian package is there.
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "ssh": "openssh-client",
    "gcc": "gcc",
    "xz": "xz-utils",
}
LIBC = Path(
    "/usr/include/stdio.h"
)  # libc6-dev: the guest's program is linked statically against it
MEMORY_MIB = 5120  # two hosts, each with the memory of its suite and QEMU itself, and a little
# Programs of system administrators are not on everybody's path.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def missing() -> list[str]:
    """Debian packages that a lab needs and the machine has not."""
    packages = [
        package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATH)
    ]
    return packages if LIBC.exists() else [*packages, "libc6-dev"]


def install() -> None:
    """Install what is missing, as root; else say what it is."""
    packages = missing()
    if not packages:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise LabError(f"the lab needs these Debian packages: apt-get install {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "-q", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"apt-get {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def impossible() -> str | None:
    """Why no QEMU can run here at all; None if it can. All else that is missing is an error, not a reason to skip."""
    if os.uname().machine != "x86_64":
        return f"this machine is {os.uname().machine}: the lab's hosts and guests are x86_64"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    if memory < MEMORY_MIB:
        return f"this machine has {memory} MiB of memory: two Xen hosts need {MEMORY_MIB} MiB"
    return None
