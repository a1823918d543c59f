"""`checkpointd release`: what it says where there is nothing to do, and what it does on a domain made of files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from xen_hands import DOMID, SERVER, UUID, FileHands

from checkpointd import node
from checkpointd.authority.processes import HostIdentity
from checkpointd.cli import main
from checkpointd.hypervisor.xen import release as releases
from checkpointd.hypervisor.xen import state as states

if TYPE_CHECKING:
    from pathlib import Path

OTHER = "22345678-1234-4234-8234-123456789abc"
# Of another boot of this machine: as dead as can be.
DEAD = states.EngineState(UUID, DOMID, HostIdentity("an earlier boot", 4711, 1), SERVER)


@pytest.fixture
def domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileHands:
    """The one domain of a dom0."""
    hands = FileHands(tmp_path / "domain")
    hands.place.mkdir()
    monkeypatch.setattr(node, "is_dom0", lambda: True)
    monkeypatch.setattr(releases, "UndoHands", lambda **_: hands)
    return hands


def run(tmp_path: Path, *words: str) -> int:
    return main.main(["release", "--run-dir", str(tmp_path), *words])


def test_an_embedded_guest_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "is_dom0", lambda: False)
    assert run(tmp_path, "--domid", "4") == 0
    assert "the host of an embedded guest lets it go on by itself" in capsys.readouterr().out


@pytest.mark.parametrize("which", [("--domid", str(DOMID)), ("--uuid", UUID)])
def test_what_a_dead_engine_has_left_is_undone_once(
    tmp_path: Path, domain: FileHands, which: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    domain.set("suspended")
    domain.set(f"ioreq-{SERVER}")
    states.store(tmp_path, DEAD)
    assert run(tmp_path, *which) == 0
    assert "domain 4: destroyed ioreq server 3, resumed the guest" in capsys.readouterr().out
    assert run(tmp_path, *which) == 0
    assert "no engine has left anything behind" in capsys.readouterr().out


def test_another_guest_is_left_alone(tmp_path: Path, domain: FileHands) -> None:
    domain.set("suspended")
    states.store(tmp_path, DEAD)
    assert run(tmp_path, "--uuid", OTHER) == 0
    assert run(tmp_path, "--domid", str(DOMID + 1)) == 0
    assert domain.has("suspended")


def test_force_resumes_what_no_engine_has_left_and_needs_a_domid(
    tmp_path: Path, domain: FileHands
) -> None:
    domain.set("suspended")
    assert run(tmp_path, "--uuid", UUID, "--force") == 2
    assert domain.has("suspended")
    assert run(tmp_path, "--domid", str(DOMID), "--force") == 0
    assert not domain.has("suspended")


@pytest.mark.parametrize("words", [(), ("--domid", "4", "--uuid", UUID), ("--uuid", "me")])
def test_exactly_one_guest_is_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *words)
