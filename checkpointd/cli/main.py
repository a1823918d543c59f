"""The command `checkpointd`: finds the module of a command, runs it, and turns errors into exit
codes.

A command NAME is the module checkpointd.cli.NAME with ``add_parser(subparsers)`` and ``run(args) ->
int``. Only the module named on the command line is imported.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from checkpointd import __version__, errors

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "primary": "protect a guest: send its checkpoints to a secondary",
    "secondary": "stand by: keep replicas of guests, and go on with them when their host is lost",
    "save": "save a running guest to a file",
    "restore": "start a guest from the last whole epoch of a recording",
    "release": "let a guest go on that a dead engine has left suspended",
    "guest": "run an embedded guest, where there is no Xen",
    "check": "look whether a guest can be protected, and what is in the way",
    "status": "show the daemons of this machine and the guests they protect",
    "keys": "show, trust and forget the keys by which the two sides know each other",
    "stream": "show, verify and copy files in Xen's migration stream format",
    "demo": "protect a guest, kill its host, and prove that nothing was lost",
    "bench": "measure what protection costs, as ratios",
}

INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE


class Parser(argparse.ArgumentParser):
    """No abbreviated options (one typed short today is ambiguous tomorrow), and help as it is
    written.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**options, "allow_abbrev": False})


def exit_codes() -> dict[int, str]:
    """What each exit code means: the first paragraph of its error class's docstring."""
    codes = {0: "All well.", 1: "Ended degraded, as the message says."}
    for error in vars(errors).values():
        if inspect.isclass(error) and issubclass(error, errors.CheckpointdError):
            text = inspect.getdoc(error) or ""
            codes.setdefault(error.exit_code, " ".join(text.split("\n\n")[0].split()))
    return dict(sorted(codes.items()))


def build_parser(command: str | None) -> Parser:
    """The parser of the whole command line; only `command`'s own options are in it."""
    parser = Parser(
        prog="checkpointd",
        description="Continuous checkpointing (Remus): a guest survives the loss of its host.",
    )
    if command is None:
        table = "\n".join(f"  {code:3}  {text}" for code, text in exit_codes().items())
        parser.epilog = f"`checkpointd COMMAND --help` tells more.\n\nexit codes:\n{table}\n  128+n  Ended by signal n."
    parser.add_argument("--version", action="version", version=f"checkpointd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    if command in COMMANDS:
        importlib.import_module(f"checkpointd.cli.{command}").add_parser(subparsers)
    else:
        for name, text in COMMANDS.items():
            subparsers.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says how it ended (`checkpointd --help` lists them)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((text for text in arguments if not text.startswith("-")), None)
    try:
        parser = build_parser(command)
        args, unknown = parser.parse_known_args(arguments)
        if unknown and not hasattr(args, "reports_unknown"):
            parser.error(f"unknown arguments: {' '.join(unknown)}")
        args.unknown = unknown
        code: int = importlib.import_module(f"checkpointd.cli.{command}").run(args)
        sys.stdout.flush()
        return code
    except errors.CheckpointdError as error:
        print(f"checkpointd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Python would try to flush the rest once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


if __name__ == "__main__":
    sys.exit(main())
