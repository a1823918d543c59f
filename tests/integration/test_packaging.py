"""What is shipped: an sdist with all that a build needs, its wheel with all that a run needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT = 300  # s; a build takes some ten
# One call of the build backend, as pip and build make it (PEP 517), with what this environment has.
BACKEND = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


def build(kind: str, source: Path, into: Path) -> Path:
    into.mkdir()
    built = subprocess.run(
        [sys.executable, "-c", BACKEND, kind, str(into)],
        cwd=source, capture_output=True, text=True, timeout=BUILD_TIMEOUT,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the checkout stays as it is."""
    tmp = tmp_path_factory.mktemp("sdist")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
    for name in ("checkpointd", "primary", "secondary"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    return build("build_sdist", source, tmp / "out")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist: what that lacks is missed here."""
    tmp = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        # Debian 12's Python (3.11.2) has no filters, and later ones warn where none is named.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(tmp)
    (source,) = tmp.iterdir()
    return build("build_wheel", source, tmp / "out")


def sources(*kinds: str) -> set[str]:
    """Paths, from the checkout's root, of the package's files of some kinds."""
    return {
        str(Path("checkpointd") / found.relative_to(ROOT / "checkpointd"))
        for kind in kinds
        for found in (ROOT / "checkpointd").rglob(kind)
        if not found.name.startswith("_") or found.suffix == ".pyi" or found.name == "__init__.py"
    }


def test_the_sdist_holds_c_sources_headers_and_licence(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        links = [member.name for member in archive if member.issym() or member.islnk()]
    wanted = sources("*.c", "*.h", "*.py", "*.pyi") | {"LICENSE", "README.md", "setup.py"}
    assert "checkpointd/csrc/hypervisor.h" in wanted
    assert wanted - names == set()
    assert links == []


def test_the_wheel_is_for_every_python_from_3_11(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(
            name for name in archive.namelist() if name.endswith("entry_points.txt")
        )
        assert b"checkpointd = checkpointd.cli.main:main" in archive.read(entry_points)
    assert {"checkpointd/py.typed", "checkpointd/primary/protection.py"} <= names
    assert {name for name in names if name.endswith(".so")} == {
        "checkpointd/_native.abi3.so",
        "checkpointd/_embedded.abi3.so",
        "checkpointd/_xen.abi3.so",
        "checkpointd/_bench.abi3.so",
    }
    assert {
        name for name in names if not name.endswith((".py", ".pyi", ".so", "py.typed"))
    } == set()
    assert {name for name in names if not name.startswith("checkpointd/")} == set()
    assert {name for name in names if "/csrc/" in name} == set()


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from checkpointd import _embedded, native, primary, secondary\n"
        "native.self_test()\n"
        "print(native.__file__, _embedded.__file__, primary.__file__, secondary.__file__)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert all(place.startswith(str(tmp_path)) for place in ran.stdout.split())
