"""checkpointd bench: what protection costs, as ratios to what this machine can do and to how it is done elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.bench.scenarios import NAMES, Size, scenario
from checkpointd.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from checkpointd.bench.turns import Figure

DESCRIPTION = """\
Measures, in turns, what is ours and a limit of this machine or another way to do it. Each line gives medians with
quartiles, and the ratio: absolute times mean nothing on another machine, nor beside other work on this one. A goal that
is missed is said, and is no failure; docs/performance.md has a recorded run and the reasons.

scenarios, all of them by default:
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    table = "\n".join(f"  {name:10} {scenario(name).TEXT}" for name in NAMES)
    parser = subparsers.add_parser(
        "bench",
        help="measure what protection costs, as ratios",
        description=DESCRIPTION + table,
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    parser.add_argument(
        "--smallest",
        action="store_true",
        help="in seconds, to see that it runs: its figures mean little",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR",
        help="draw what has a size to be drawn against, as DIR/SCENARIO.png (needs matplotlib)",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="put each scenario's table into its place in this Markdown file, such as docs/performance.md",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.scenarios if name not in NAMES]
    if unknown:
        raise UsageError(f"no scenario {', '.join(unknown)}; there are {', '.join(NAMES)}")
    from checkpointd.bench import plots, report, scenarios  # slow to import: not for --help
    from checkpointd.bench.machine import this_machine

    machine = this_machine()
    if not args.json:
        print(machine, flush=True)
    results: dict[str, list[Figure]] = {}
    for name in args.scenarios or NAMES:
        if not args.json:
            print(f"{name}: {scenario(name).TEXT}", flush=True)
        results[name] = []
        for figure in scenarios.run(name, Size.SMALL if args.smallest else Size.FULL, machine):
            results[name].append(figure)
            if not args.json:
                print(report.line(figure), flush=True)
        if args.report:
            report.put_section(args.report, name, report.as_markdown(results[name], machine))
    if args.plots:
        plots.draw(args.plots, results)
    if args.json:
        print(json.dumps(report.as_json(results, machine)))
    return 0
