"""checkpointd check: would protection begin, and would a failover work?

The JSON (--json) is an interface: `schema` grows when a field changes its meaning or goes; fields
may be added.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from checkpointd.daemon import settings
from checkpointd.daemon.config import PrimaryOptions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from checkpointd.preflight.items import Item

SCHEMA = 1

DESCRIPTION = """\
Look, before a guest is protected, whether it can be: at this host, at the guest, and at the other host, which is asked.
Neither guest is touched, and nothing is begun. Give the options that `checkpointd primary` would get; the same files
and environment are read.

  checkpointd check --domid 4 --secondary standby.lan

Each line has a verdict: ok, warning (it goes, mind this), refused (it does not go, do this) or unknown (it could not
be seen). The exit code is 0 if nothing is refused: protection would begin, and were this host lost the secondary would
run the guest, as far as that was seen. Without a secondary to ask only this side was. Else it is that of the first
refusal."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "check",
        help="look whether a guest can be protected, and what is in the way",
        usage="%(prog)s --domid DOMID [--secondary HOST] [--json] [option ...]",
        description=DESCRIPTION,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    settings.add_arguments(parser, PrimaryOptions)


def run(args: argparse.Namespace) -> int:
    options = settings.load(PrimaryOptions, args)
    from checkpointd.preflight.gather import gather  # only now: wrong options are told at once
    from checkpointd.preflight.judge import exit_code, judge

    items = judge(gather(options))
    code = exit_code(items)
    if args.json:
        found = [asdict(item) for item in items]
        print(json.dumps({"schema": SCHEMA, "exit_code": code, "items": found}))
    else:
        print("\n".join(lines(items)))
    return code


def lines(items: Sequence[Item]) -> list[str]:
    """Verdict, item and finding, one item a line, its hint on the next."""
    width = max(len(item.name) for item in items)
    found = []
    for item in items:
        found.append(f"{item.verdict:8} {item.name:{width}}  {printable(item.text)}")
        if item.hint:
            found.append(f"{'':8} {'':{width}}    -> {printable(item.hint)}")
    return found


def printable(text: str) -> str:
    """What a guest or a peer has put into a name stays on its line."""
    return "".join(c if c.isprintable() else "?" for c in text)
