"""A host with the fake xl, a guest whose epochs are committed there, and restorers of it."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from fake_xl import FakeDomains, install
from leaks import nothing_leaks
from xl_guest import INFO, NR_PFNS, PATIENT, STATIC, UUID, Guest, activations_in

from checkpointd.secondary.epochs import Budget
from checkpointd.secondary.replica import Replica
from checkpointd.secondary.restorers.xl import XlRestorer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from checkpointd.secondary.restorers.xl_process import Limits


@pytest.fixture
def xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDomains]:
    """A host with the fake xl, and nothing of ours left behind."""
    domains = install(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with nothing_leaks():
        yield domains


@pytest.fixture
def guest(xen: FakeDomains) -> Iterator[Guest]:
    budget = Budget(1 << 24)
    replica = Replica(UUID, NR_PFNS, budget)
    yield Guest(replica)
    replica.close()
    assert budget.used == 0


@pytest.fixture
def old_xl() -> Iterator[subprocess.Popen[bytes]]:
    """A process that an earlier life may have started to take in a domain: alive, and the leader of its group."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


@pytest.fixture
def make(xen: FakeDomains) -> Iterator[Callable[..., XlRestorer]]:
    made: list[XlRestorer] = []

    def make(limits: Limits = PATIENT, clock: Callable[[], float] = time.monotonic) -> XlRestorer:
        activations = activations_in(xen.folder)
        made.append(XlRestorer(xen, xen.folder / "notes", activations, limits=limits, clock=clock))
        made[-1].begin(INFO, STATIC)
        return made[-1]

    yield make
    for restorer in made:
        restorer.discard()
