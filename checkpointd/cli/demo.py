"""checkpointd demo: a failover on this machine, and the proof that nothing was lost."""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.daemon import units

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Runs a guest, a secondary and a primary on this machine, lets clients write to the guest, kills the primary and the
guest's host with SIGKILL in the middle of an epoch, and shows how the secondary goes on with the guest.

Then it proves it: the guest's memory equals, bit for bit, what replaying its input log gives for the same
step, and no client saw an answered write vanish or a counter go back. Takes about twenty seconds; the exit
code is 0 only if all that holds. Nothing is left behind."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="protect a guest, kill its host, and prove that nothing was lost",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--interval", type=units.parse_duration, default="100ms", metavar="TIME",
        help="between two epochs (default: 100ms)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=_size, default="64MiB", metavar="SIZE",
        help="of the guest (default: 64MiB)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the clients (default: random, and shown)")
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON object, as the last line"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="where sockets and logs live meanwhile (default: the system's, such as /tmp)",
    )
    parser.add_argument("--keep", action="store_true", help="leave that directory behind")


def _size(text: str) -> str:
    """Checked here, and passed on as it is written: the guest's own command reads it."""
    units.parse_size(text)
    return text


def run(args: argparse.Namespace) -> int:
    from checkpointd.demo import show  # slow to import: not for --help

    seed = secrets.randbits(31) if args.seed is None else args.seed
    directory = Path(tempfile.mkdtemp(prefix="d", dir=_short(args.work_dir)))
    try:
        figures = show.run(
            directory, interval=args.interval, memory=args.memory, seed=seed, say=_say
        )
    finally:
        if args.keep:
            _say(f"logs, keys and input logs are in {directory}")
        else:
            _remove(directory)
    if args.json:
        print(json.dumps(figures.as_dict()))
    return 0 if figures.ok else 1


# Octets that the longest socket's name takes below the work directory: unix(7) allows 107 in all.
_BELOW = 60


def _short(directory: Path | None) -> Path | None:
    """`directory`, if Unix sockets may live below it; else the system's temporary one."""
    return (
        directory
        if directory is not None and len(str(directory.absolute())) <= 107 - _BELOW
        else None
    )


def _remove(directory: Path) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
