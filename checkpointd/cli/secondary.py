"""checkpointd secondary: keep replicas of guests, and go on with them when their host is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpointd.daemon import settings
from checkpointd.daemon.config import SecondaryOptions

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Keep replicas of any number of guests. When a primary falls silent, make sure that its guest is
stopped, and run the guest here from its last acknowledged epoch. Without that proof nothing is run.

  checkpointd secondary                      for primaries on this machine
  checkpointd secondary --listen 192.0.2.7   for others (first: checkpointd keys --help)

SIGTERM or Ctrl-C ends it, and its replicas with it; guests that it has activated run on. A guest that is
stopped on the other side and does not run here yet is waited for.

Every option may also stand in the file of --config, as `silence = "1s"` under [secondary], and in
the environment, as CHECKPOINTD_SILENCE=1s. A flag wins over the environment, that over the file.
Durations need a unit (500us, 100ms, 1m30s), sizes too (64KiB, 256MiB)."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "secondary",
        help="stand by: keep replicas of guests, and go on with them when their host is lost",
        usage="%(prog)s [--listen ADDRESS] [option ...]",
        description=DESCRIPTION,
    )
    settings.add_arguments(parser, SecondaryOptions)


def run(args: argparse.Namespace) -> int:
    options = settings.load(SecondaryOptions, args)
    from checkpointd import node  # only now: wrong options are told without loading the standby

    return node.run_secondary(options)
