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

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    # Reports are written into docs, by the campaign before this one, too.
    changed = git("status", "--porcelain", "--", ".", ":!docs")
    return git("rev-parse", "--short=10", "HEAD") + ", with local changes" * bool(changed)


def _split(name: str) -> tuple[Path, str, str, str]:
    """(document, what is before section `name`, the section, what is after it); the section must be there."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    for path in DOCUMENTS:
        head, found, rest = path.read_text(encoding="utf-8").partition(begin)
        if found:
            section, ends, tail = rest.partition(end)
            assert ends, f"the section {name} of {path} has no end"
            return path, head + begin, section, end + tail
    raise AssertionError(f"no document has a section {name}")


def read_section(name: str) -> str:
    """What is between the markers of section `name`."""
    return _split(name)[2]


def write_section(name: str, text: str) -> None:
    """Put `text` there."""
    path, before, _, after = _split(name)
    path.write_text(before + text + after, encoding="utf-8")


def merge_rows(section: str, rows: dict[str, str]) -> list[str]:
    """The lines of a table, sorted, with those of `rows` (beginning: rest) in place of the ones that begin alike."""
    old = [line for line in section.splitlines() if line.startswith("| `")]
    kept = [line for line in old if not any(line.startswith(key) for key in rows)]
    return sorted(kept + [key + rest for key, rest in rows.items()])
