"""checkpointd primary: protect one guest of this host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from checkpointd.cli.progress import Progress
from checkpointd.daemon import settings
from checkpointd.daemon.config import PrimaryOptions

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Protect a guest of this host: stop it for a moment at a fixed interval, take what changed since the
last time (an epoch), let it run on, and send the epoch to a secondary. What the guest sends to its
network leaves only once the secondary has the epoch that sent it.

  checkpointd primary --domid 4                          a secondary on this machine
  checkpointd primary --domid 4 --secondary standby.lan  on another (first: checkpointd keys --help)
  checkpointd primary --domid 4 --to web.remus           no protection: epochs are recorded in a file

SIGTERM or Ctrl-C ends protection in order: the guest goes on unprotected.

Every option may also stand in the file of --config, as `interval = "100ms"` under [primary], and in
the environment, as CHECKPOINTD_INTERVAL=100ms. A flag wins over the environment, that over the file.
Durations need a unit (500us, 100ms, 1m30s), sizes too (64KiB, 256MiB)."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "primary",
        help="protect a guest: send its checkpoints to a secondary",
        usage="%(prog)s --domid DOMID [--secondary HOST | --to FILE] [--interval TIME] [option ...]",
        description=DESCRIPTION,
    )
    settings.add_arguments(parser, PrimaryOptions)


def run(args: argparse.Namespace) -> int:
    options = settings.load(PrimaryOptions, args)
    from checkpointd import node  # only now: wrong options are told without loading the engine

    if not sys.stderr.isatty() or options.log_format != "text":
        return node.run_primary(options)
    with Progress("first copy") as progress:
        return node.run_primary(options, progress.update)
