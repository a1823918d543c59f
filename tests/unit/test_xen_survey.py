"""What a preflight reads from a Xen host, as far as it can be read without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from checkpointd.hypervisor.xen.autostart import starts_at_boot
from checkpointd.hypervisor.xen.survey import feature_words

if TYPE_CHECKING:
    from pathlib import Path

UUID = "12345678-1234-4234-8234-123456789abc"


def test_features_are_in_the_order_of_xens_feature_sets() -> None:
    leaves = {
        (0x1, 0): {"c": 11, "d": 10},
        (0x80000001, 0): {"c": 13, "d": 1 << 29},
        (0xD, 1): {"a": 14},
        (0x7, 0): {"b": 15, "c": 16, "d": 19},
        (0x80000008, 0): {"b": 18},
        (0x7, 1): {"a": 20, "c": 24},
    }
    assert feature_words(leaves) == (10, 11, 1 << 29, 13, 14, 15, 16, 0, 18, 19, 20, 0, 0, 0, 24, 0)


def test_what_amd_repeats_counts_once() -> None:
    """As Xen 4.17 gave it for a guest on a QEMU CPU: its own feature set of that word is 0x20100800."""
    assert feature_words({(0x80000001, 0): {"d": 0x2193FBFD}})[2] == 0x20100800


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('name = "web"', True),
        ("name='web'", True),
        (f'uuid="{UUID.upper()}"', True),
        ('name = "web2"', False),
        ('# name = "web"', False),
        ('kernel = "/web"', False),
    ],
)
def test_guests_that_start_at_boot_are_found_by_name_or_uuid(
    tmp_path: Path, line: str, found: bool
) -> None:
    (tmp_path / "a.cfg").write_text('name = "other"\n')
    entry = tmp_path / "b.cfg"
    entry.write_text(f"memory = 160\n{line}\n")
    assert starts_at_boot(UUID, "web", tmp_path) == (entry if found else None)


def test_nothing_starts_at_boot_where_there_is_nothing(tmp_path: Path) -> None:
    assert starts_at_boot(UUID, "web", tmp_path / "missing") is None
    (tmp_path / "a.cfg").write_text('name = ""\n')
    assert starts_at_boot(UUID, "", tmp_path) is None
