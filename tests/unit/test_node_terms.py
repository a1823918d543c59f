"""In which term a guest is protected: that of its activation, where it came here by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from checkpointd import node
from checkpointd.authority.terms import Role, TermRecord, TermStore
from checkpointd.hypervisor.port import DomainInfo, HostIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"


def guest(hypervisor: str) -> DomainInfo:
    return DomainInfo(UUID, 4, "web", 1024, 1024, hypervisor, HostIdentity("boot", 1, 1))


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[TermStore]:
    store = TermStore(tmp_path / "terms" / "primary" / UUID)
    yield store
    store.close()


@pytest.fixture
def secondary(tmp_path: Path) -> Iterator[TermStore]:
    """Held by the daemon of that role, as it is while a guest is protected back."""
    store = TermStore(tmp_path / "terms" / "secondary")
    yield store
    store.close()


def test_the_first_term_is_one(primary: TermStore, tmp_path: Path) -> None:
    record = node._term_of(primary, tmp_path, guest("xen"))
    assert record == primary.load(UUID) == TermRecord(UUID, 1, Role.PRIMARY, 1)


def test_a_guest_activated_here_goes_on_in_its_term(
    primary: TermStore, secondary: TermStore, tmp_path: Path
) -> None:
    primary.store(TermRecord(UUID, 1, Role.PRIMARY, 10_001))
    secondary.store(TermRecord(UUID, 2, Role.SECONDARY_ACTIVE, 20_001))
    record = node._term_of(primary, tmp_path, guest("xen"))
    assert record == primary.load(UUID) == TermRecord(UUID, 2, Role.PRIMARY, 20_001)


def test_a_later_term_of_the_primary_stays(
    primary: TermStore, secondary: TermStore, tmp_path: Path
) -> None:
    primary.store(TermRecord(UUID, 3, Role.PRIMARY, 30_001))
    secondary.store(TermRecord(UUID, 2, Role.SECONDARY_ACTIVE, 20_001))
    assert node._term_of(primary, tmp_path, guest("xen")).term == 3


def test_an_embedded_guest_is_not_the_one_activated_beside_it(
    primary: TermStore, secondary: TermStore, tmp_path: Path
) -> None:
    """Both sides may be on one machine: the old guest's engine must stay in its term, so that it is refused."""
    primary.store(TermRecord(UUID, 1, Role.PRIMARY, 10_001))
    secondary.store(TermRecord(UUID, 2, Role.SECONDARY_ACTIVE, 20_001))
    assert node._term_of(primary, tmp_path, guest("embedded")).term == 1
