"""The reports of campaigns: each replaces its own section of docs/campaigns.md, or of docs/lab.md if it ran there."""

from __future__ import annotations

from pathlib import Path

from checkpointd.bench.machine import commit, this_machine

__all__ = ["commit", "machine", "merge_rows", "read_section", "write_section"]

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "docs" / name for name in ("campaigns.md", "lab.md")]


def machine() -> str:
    """What the figures were measured on."""
    this = this_machine()
    return f"{this.processor}, {this.cores} cores, {this.memory_gib:.0f} GiB; Linux {this.linux}, Python {this.python}"


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
