"""Plots of a run: what ours and the other take, by how much there is to do. Needs matplotlib, as nothing else does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from checkpointd.bench.turns import Figure, Spread

SIZE = (7, 4.5)  # inches
DPI = 110
# What is on the x axis, by the note of a figure that has it.
AXES = {"pages": "dirty pages", "frames": "frames of the guest's map"}


def draw(directory: Path, results: Mapping[str, Sequence[Figure]]) -> list[Path]:
    """DIRECTORY/SCENARIO.png of each scenario whose figures have an axis: medians, with quartiles as bands.

    Raises UsageError without matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UsageError("--plots needs matplotlib: pip install 'checkpointd[bench]'") from None
    mpl.use("Agg")  # no display
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figures in results.items():
        for axis, label in AXES.items():
            lines = _lines(figures, axis)
            if lines:
                made.append(directory / f"{name}.png")
                _draw(made[-1], name, label, figures[0].unit, lines)
    return made


def _lines(figures: Iterable[Figure], axis: str) -> dict[str, list[tuple[int, Spread]]]:
    """Points (x, y) by the line that they are on; only lines of more than one."""
    lines: dict[str, list[tuple[int, Spread]]] = {}
    for figure in figures:
        if axis not in figure.notes:
            continue
        kind = str(figure.notes.get("kind", ""))
        ours = lines.setdefault(f"checkpointd {kind}".strip(), [])
        if figure.notes[axis] not in (x for x, _ in ours):
            ours.append((figure.notes[axis], figure.ours))
        if figure.other:
            lines.setdefault(figure.against, []).append((figure.notes[axis], figure.other))
    return {
        name: sorted(points, key=lambda at: at[0])
        for name, points in lines.items()
        if len(points) > 1
    }


def _draw(
    path: Path, name: str, label: str, unit: str, lines: Mapping[str, Sequence[tuple[int, Spread]]]
) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = canvas.subplots()
    for line, points in lines.items():
        xs = [x for x, _ in points]
        axes.plot(xs, [y.median for _, y in points], marker="o", label=line)
        axes.fill_between(xs, [y.low for _, y in points], [y.high for _, y in points], alpha=0.2)
    axes.set(xscale="log", xlabel=label, ylabel=unit, title=name)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    canvas.savefig(path)
