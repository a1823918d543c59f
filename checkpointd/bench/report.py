"""What a run of the bench found: as lines, JSON, and Markdown."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from checkpointd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure, Spread

SCHEMA = 1


def spread(of: Spread, digits: int = 3) -> str:
    """Median and quartiles."""
    return f"{of.median:.{digits}g} ({of.low:.{digits}g} to {of.high:.{digits}g})"


def line(figure: Figure) -> str:
    """For a terminal."""
    text = f"  {figure.what}: {spread(figure.ours)} {figure.unit}"
    if figure.other and figure.ratio:
        text += f" | {figure.against}: {spread(figure.other)} | ratio {spread(figure.ratio)}"
    if figure.goal:
        text += f" | goal {figure.goal}: {'met' if figure.met else 'MISSED'}"
    if figure.notes:
        text += " | " + ", ".join(f"{name} {value}" for name, value in figure.notes.items())
    return text


def as_json(results: Mapping[str, Sequence[Figure]], machine: Machine) -> dict[str, Any]:
    """An interface: `schema` grows when a field changes its meaning or goes; fields may be added."""
    return {
        "schema": SCHEMA,
        "machine": asdict(machine),
        "scenarios": {
            name: [figure.as_dict() for figure in figures] for name, figures in results.items()
        },
    }


def as_markdown(figures: Sequence[Figure], machine: Machine) -> str:
    """Of one scenario."""
    return "\n".join([
        f"{machine}. Medians, with quartiles.",
        "",
        "| | ours | | the other | ratio | goal | |",
        "|---|---:|---|---:|---:|---:|---|",
        *(_row(figure) for figure in figures),
        "",
    ])  # fmt: skip


def put_section(path: Path, name: str, text: str) -> None:
    """`text` in place of what is between the two comments of scenario `name` in a Markdown file.

    Raises UsageError if the file has none.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ends, after = rest.partition(end)
    if not (found and ends):
        raise UsageError(
            f"{path} has no lines `{begin.strip()}` and `{end}` to put a report between"
        )
    path.write_text(before + begin + text + end + after, encoding="utf-8")


def _row(figure: Figure) -> str:
    met = {None: "", True: "met", False: "**missed**"}[figure.met]
    other = f"{spread(figure.other)} {figure.unit}" if figure.other else ""
    ratio = spread(figure.ratio) if figure.ratio else ""
    return (
        f"| {figure.what} | {spread(figure.ours)} {figure.unit} | {figure.against} | {other} | {ratio} "
        f"| {figure.goal or ''} | {met} |"
    )
