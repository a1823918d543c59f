"""The reports of campaigns: each replaces its own section of docs/campaigns.md, or of docs/lab.md if it ran there."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "docs" / name for name in ("campaigns.md", "lab.md")]


def machine() -> str:
    """What the figures were measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def commit() -> str:
    """The commit that was tested, with a note if the code differs from it."""
    return subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--abbrev=10", "--dirty=, with local changes"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


def write_section(name: str, text: str) -> None:
    """Put `text` between the markers of section `name`, which must be there."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    for path in DOCUMENTS:
        document = path.read_text(encoding="utf-8")
        if begin in document:
            assert end in document, f"the section {name} of {path} has no end"
            head, _, rest = document.partition(begin)
            path.write_text(head + begin + text + end + rest.partition(end)[2], encoding="utf-8")
            return
    raise AssertionError(f"no document has a section {name}")
