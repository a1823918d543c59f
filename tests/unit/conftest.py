"""Fixtures that several test modules share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fake_hypervisor import Guest, compile_fake
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The same examples every time, and no machine is too slow for one of them.
settings.register_profile("checkpointd", derandomize=True, deadline=None)
settings.load_profile("checkpointd")


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The fake hypervisor of the native tests, compiled once: (ffi, lib)."""
    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def make_guest(fake: Any) -> Iterator[Callable[..., Guest]]:
    """Makes guests of the fake hypervisor (options: fields of Guest) and checks in the end what they left."""
    guests: list[Guest] = []

    def make(**options: int) -> Guest:
        guests.append(Guest(fake, **options))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
