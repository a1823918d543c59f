"""checkpointd status: the daemons of this machine and the guests they protect.

The JSON (--json) is an interface: `schema` grows when a field changes its meaning or goes; fields
may be added.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.daemon import paths, roster
from checkpointd.daemon.units import MICROSECOND, format_duration

if TYPE_CHECKING:
    import argparse

SCHEMA = 1
TIMEOUT = (
    2.0  # s for a daemon's answer: it takes milliseconds, and a stuck one must not hide the others
)
LARGEST = 4 << 20  # octets of an answer; a thousand domains take less than one MiB
ASKED_AT_ONCE = 8

# A daemon is on this machine: no proxy of the environment has a part in it.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

DESCRIPTION = """\
Show the daemons of this machine and the guests they protect, a line for each guest:

  STATE   primary: connecting, syncing, protected, holding (the secondary is lost), unprotected, retiring
          secondary: waiting, syncing, standby (it could go on with the guest), active (it runs the guest), ...
  ACKED   the last epoch that the secondary has whole
  LAG     primary: parts sent and not acknowledged; secondary: epochs acknowledged and not yet in the replica
  PAUSE   how long the guest stands still for an epoch: the median, and 99 of 100 epochs
  NOTES   why it is so, the last alarm, and whatever is unsafe"""

HEADS = ("ROLE", "DOMAIN", "DOMID", "STATE", "ACKED", "LAG", "PAUSE p50", "p99", "NOTES")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "status",
        help="show the daemons of this machine and the guests they protect",
        description=DESCRIPTION,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--exit-code",
        action="store_true",
        help="end with 1 if there is no daemon, or one that is not ready",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=paths.run_dir(),
        metavar="DIR",
        help="where the daemons were told to put their sockets (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    entries = roster.running(args.run_dir)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        daemons = list(pool.map(ask, entries))
    if args.json:
        print(json.dumps({"schema": SCHEMA, "daemons": daemons}))
    elif daemons:
        print(table([HEADS, *(row for daemon in daemons for row in rows(daemon))]))
    else:
        print(f"no daemon is running (none has its name in {args.run_dir})", file=sys.stderr)
    well = bool(daemons) and not any(daemon["not_ready"] for daemon in daemons)
    return 0 if well or not args.exit_code else 1


def ask(entry: roster.Entry) -> dict[str, Any]:
    """The entry of a daemon, its domains and why it is not ready."""
    daemon: dict[str, Any] = {**asdict(entry), "domains": [], "not_ready": [], "not_live": []}
    if entry.http is None:
        return daemon
    try:
        with DIRECT.open(f"{entry.http}/status", timeout=TIMEOUT) as answer:
            document = json.loads(answer.read(LARGEST))
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        daemon["not_ready"] = [f"does not answer at {entry.http}: {reason}"]
        return daemon
    try:
        for field in ("not_ready", "not_live", "unsafe"):
            daemon[field] = [str(text) for text in document.pop(field, [])]
        # A primary speaks of its one domain, a secondary of each of its own.
        daemon["domains"] = [dict(domain) for domain in document.pop("domains", [document])]
    except (AttributeError, TypeError, ValueError):
        daemon["not_ready"] = [f"does not answer as a daemon does at {entry.http}"]
    return daemon


def rows(daemon: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each domain of a daemon; one for the daemon itself if it has none."""
    shared = [*daemon["not_live"], *daemon["not_ready"], *map(loud, daemon.get("unsafe", ()))]
    found: list[tuple[str, ...]] = []
    for domain in daemon["domains"] or [{}]:
        # A primary waits for acks, a secondary for its own commits.
        lag = domain.get("in_flight", domain.get("uncommitted"))
        notes = [str(domain[key]) for key in ("reason", "alarm") if domain.get(key)]
        found.append(
            (
                daemon["role"],
                shown(domain.get("domain")),
                shown(domain.get("domid", daemon["domid"])),
                shown(domain.get("state")),
                shown(domain.get("acked_epoch")),
                shown(lag),
                shown_time(domain.get("pause_p50_ns")),
                shown_time(domain.get("pause_p99_ns")),
                "; ".join(dict.fromkeys([*notes, *shared])),
            )
        )
    return found


def loud(option: str) -> str:
    return f"UNSAFE: {option}"


def shown(value: object) -> str:
    return "-" if value is None else str(value)


def shown_time(nanoseconds: int | None) -> str:
    """To the microsecond: what is below it is noise."""
    if nanoseconds is None:
        return "-"
    return format_duration(nanoseconds // MICROSECOND * MICROSECOND)


def table(lines: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; whatever a peer put into a name stays on its line."""
    clean = [
        ["".join(c if c.isprintable() else "?" for c in cell) for cell in line] for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in clean
    )
