"""Beginnings and ends of a protection, on real hosts and over real sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pair import MS, Pair, pair_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_in(tmp_path) as made:
        yield made


def test_a_guest_smaller_than_the_arena_is_protected(pair: Pair) -> None:
    """The default arena has room for 32 MiB: a guest of 1 MiB once ended the engine with a traceback."""
    guest = pair.guest(memory=1 << 20)
    standby = pair.standby()
    engine = pair.engine(guest, standby, arena=32 << 20, interval=10 * MS)
    engine.wait("protected")
    engine.committed()
    assert standby.replica(guest).equal
