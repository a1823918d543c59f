"""What is put into hosts that run, and is made anew when its sources change: the guest, and checkpointd's wheel.

Both are built on the machine, natively: a compiler in software emulation takes minutes. The wheel is built in the
files of the host's own suite, by that suite's pip, setuptools and compiler, and is installed in dom0 by pip.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from lab.image import run
from lab.places import GUEST_FILES, ROOT, LabError, digest

if TYPE_CHECKING:
    from collections.abc import Callable

# The sources of the wheel. The two links in checkpointd/ lead to primary/ and secondary/.
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "checkpointd",
    "primary",
    "secondary",
)
MODULES = (
    "drivers/net/xen-netfront.ko",
    "drivers/block/xen-blkfront.ko",
)  # neither needs another module
DISK_BLOCKS = 2048  # of 4 KiB: 8 MiB, which no page cache of the guest holds whole for long


def guest(image: Path) -> Path:
    """A directory with initrd.gz and disk.img for the suite of `image`."""
    path = image / f"guest-{digest([GUEST_FILES])}"
    if path.exists():
        return path
    for old in image.glob("guest-*"):
        shutil.rmtree(old)
    root = image / "root"
    unfinished = image / "guest.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    tree = unfinished / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    shutil.copy2(root / "bin" / "busybox", tree / "bin")
    shutil.copy2(GUEST_FILES / "init", tree / "init")
    (tree / "init").chmod(0o755)
    work = tree / "bin" / "work"
    run(
        "gcc",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-static",
        "-pthread",
        "-o",
        work,
        GUEST_FILES / "work.c",
    )
    for module in MODULES:
        _module(root, module, tree / "modules")
    run(work, "make-disk", unfinished / "disk.img", str(DISK_BLOCKS))
    archive = subprocess.run(
        "find . | LC_ALL=C sort | cpio --quiet -o -H newc | gzip -n", shell=True, cwd=tree, stdout=subprocess.PIPE,
        check=True,
    )  # fmt: skip
    (unfinished / "initrd.gz").write_bytes(archive.stdout)
    shutil.rmtree(tree)
    unfinished.rename(path)
    return path


def _module(root: Path, module: str, into: Path) -> None:
    found = list((root / "lib" / "modules").glob(f"*/kernel/{module}*"))
    if len(found) != 1:
        raise LabError(f"{module}: not one of it in {root}/lib/modules, but {len(found)}")
    content = found[0].read_bytes()
    if found[0].suffix == ".xz":
        content = lzma.decompress(content)
    (into / Path(module).name).write_bytes(content)


def wheel(image: Path, say: Callable[[str], None]) -> Path:
    """The wheel of the checkout as it is now, committed or not."""
    path = image / f"wheel-{digest([ROOT / name for name in SOURCES])}"
    if not path.exists():
        say("building the wheel")
        for old in image.glob("wheel-*"):
            shutil.rmtree(old)
        build = image / "root" / "build"
        shutil.rmtree(build, ignore_errors=True)
        source = build / "checkpointd"
        source.mkdir(parents=True)
        ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "_*.c")
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
            else:
                shutil.copy2(ROOT / name, source / name)
        run(
            "chroot", image / "root", "python3", "-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation",
            "--no-deps", "--wheel-dir", "/build/out", "/build/checkpointd",
        )  # fmt: skip
        (build / "out").rename(path)
        shutil.rmtree(build)
    (found,) = path.glob("*.whl")
    return found
