"""Notes of activations on stable storage, and that nobody is fenced without one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import pytest

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.processes import HostIdentity, boot_id
from checkpointd.authority.terms import TermStore
from checkpointd.errors import HypervisorError, StateError
from checkpointd.hypervisor.port import DomainInfo
from checkpointd.secondary.activations import Activation, Activations, Phase
from checkpointd.secondary.authority import Authority
from checkpointd.secondary.restorers.image import ImageRestorer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.hypervisor.port import Hypervisor

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
NOTE = Activation(UUID, "web", "192.0.2.1", 2, 8, Phase.FENCING, "boot")
INFO = DomainInfo(UUID, 4, "web", 64, 64, "fake", HostIdentity("boot", 1, 1))


class Fence:
    """One that works as told, and looks what is noted meanwhile."""

    def __init__(self, activations: Activations, *, fenced: bool) -> None:
        self.fenced = fenced
        self.activations = activations
        self.seen: list[Activation | None] = []

    def probe(self, timeout: float) -> HostView:
        return HostView(None, None, "")

    def fence(self, timeout: float) -> FenceResult:
        self.seen.append(self.activations.load(UUID))
        return FenceResult(self.fenced, "so")

    def close(self) -> None: ...


@pytest.fixture
def activations(tmp_path: Path) -> Activations:
    return Activations(tmp_path / "activations")


@pytest.fixture
def terms(tmp_path: Path) -> Iterator[TermStore]:
    store = TermStore(tmp_path / "terms")
    yield store
    store.close()


def authority(terms: TermStore, activations: Activations, fence: Fence) -> Authority:
    made = Authority(UUID, terms, activations, lambda *_: fence, 1.0, lambda: 0)
    assert made.begin(INFO, "192.0.2.1") == ""
    return made


def test_a_note_comes_back_as_it_was_until_it_is_forgotten(activations: Activations) -> None:
    activations.begin(NOTE)
    assert activations.left() == [NOTE]
    activations.advance(UUID, Phase.SEALED, domid=5)
    found = activations.load(UUID)
    assert found is not None
    assert (found.phase, found.domid) == (Phase.SEALED, 5)
    activations.forget(UUID)
    activations.forget(UUID)
    assert activations.left() == []
    activations.advance(UUID, Phase.FINISHED)
    assert activations.left() == [], "nothing is begun by advancing"


def test_a_note_of_another_version_is_understood(activations: Activations) -> None:
    document = asdict(NOTE) | {"builder": None}
    del document["paused"]
    activations.path(UUID).write_text(json.dumps(document))
    assert activations.left() == [NOTE]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"uuid": 3}', "\x00" * 5000])
def test_a_note_that_cannot_be_read_stops_the_daemon_and_says_what_to_do(
    activations: Activations, text: str
) -> None:
    activations.path(UUID).write_text(text)
    with pytest.raises(StateError, match="runs on one machine only, then remove the file"):
        activations.left()


@pytest.mark.parametrize("fenced", [False, True])
def test_the_note_is_there_before_anybody_is_fenced_and_stays_after_a_failure(
    terms: TermStore, activations: Activations, fenced: bool
) -> None:
    fence = Fence(activations, fenced=fenced)
    done = authority(terms, activations, fence).fence(1, 2, 8)
    assert done.result.fenced is fenced
    (seen,) = fence.seen
    assert seen is not None
    assert (seen.phase, seen.term, seen.epoch, seen.address) == (Phase.FENCING, 2, 8, "192.0.2.1")
    assert seen.boot_id == boot_id()
    found = activations.load(UUID)
    assert found is not None
    assert found.phase is (Phase.FEEDING if fenced else Phase.FENCING)
    assert found.proof == ("so" if fenced else "")


def test_without_a_note_nobody_is_fenced(
    terms: TermStore, activations: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Activations, activation: Activation) -> None:
        raise OSError(28, "No space left on device")

    fence = Fence(activations, fenced=True)
    made = authority(terms, activations, fence)
    monkeypatch.setattr(Activations, "_put", full)
    done = made.fence(1, 2, 8)
    assert not done.result.fenced
    assert "No space left on device" in done.result.detail
    assert "free space" in done.result.detail
    assert fence.seen == []


def test_a_later_phase_that_cannot_be_noted_stops_nothing_and_is_told(
    activations: Activations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Activations, activation: Activation) -> None:
        raise OSError(28, "No space left on device")

    activations.begin(NOTE)
    monkeypatch.setattr(Activations, "_put", full)
    activations.advance(UUID, Phase.SEALED)
    assert "not noted that the activation is sealed" in caplog.text


class Somewhere:
    """A hypervisor with these guests."""

    name = "embedded"

    def __init__(self, *guests: DomainInfo) -> None:
        self.guests = guests

    def domains(self) -> list[DomainInfo]:
        return list(self.guests)


def test_an_embedded_guest_runs_by_itself_or_is_lost() -> None:
    """Its host dies with its creator before it is started, and lives without it afterwards."""
    assert ImageRestorer(cast("Hypervisor", Somewhere(INFO))).resume(NOTE) == INFO.domid
    with pytest.raises(HypervisorError, match=r"epoch 8 is lost .*nobody runs web"):
        ImageRestorer(cast("Hypervisor", Somewhere())).resume(NOTE)
