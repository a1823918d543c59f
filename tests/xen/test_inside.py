"""What is run in dom0 itself: the port's conformance tests on the Xen adapter, and all that lies in inside/."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.image import VENV
from lab.places import ROOT

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet
    from lab.machine import Machine

INSIDE = Path(__file__).parent / "inside"
PORT = sorted(ROOT.glob("tests/integration/test_port_*.py"))
THERE = "/root/checkout"  # without the package: what is tested is what pip installed
LIMIT = 2400  # s for one file; the slowest takes ten minutes on two idle cores


SHORT: set[str] = set()  # for CI; conformance is not whole on Xen yet (docs/lab.md)


def marked(path: Path) -> ParameterSet:
    return pytest.param(path, id=path.stem, marks=[pytest.mark.short] if path.stem in SHORT else [])


def run_inside(host: Machine, *words: str) -> None:
    host.put(THERE, ROOT / "pyproject.toml", ROOT / "tests")
    command = shlex.join(["timeout", str(LIMIT), f"{VENV}/bin/python", "-m", "pytest", *words])
    # Debian's pytest is the older one; a warning of its own is not ours to mend. Its dump of a test that takes long can
    # crash the interpreter, whose frames it reads while they run.
    result = host.ssh(
        f"cd {THERE} && {command} -q -p no:cacheprovider -W default"
        f" -o faulthandler_timeout={LIMIT}",
        timeout=LIMIT + 60,
        check=False,
    )
    if result.code:
        pytest.fail(
            f"in dom0: {command}: exit code {result.code}\n{result.out}{result.err}", pytrace=False
        )


@pytest.mark.parametrize("path", sorted(INSIDE.glob("test_*.py")), ids=lambda path: path.stem)
def test_inside(hosts: dict[str, Machine], path: Path) -> None:
    run_inside(hosts["a"], str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", [marked(path) for path in PORT])
def test_port_conformance(hosts: dict[str, Machine], path: Path) -> None:
    """What the port promises, on real guests: the same tests that the embedded hypervisor passes."""
    run_inside(hosts["a"], str(path.relative_to(ROOT)), "--adapter", "xen")
