"""`checkpointd keys`: the own public key, and the peers that may connect."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd.daemon.paths import state_dir
from checkpointd.errors import KeyFileError
from checkpointd.wire.keys import KeyStore, parse_public, read_public

if TYPE_CHECKING:
    from collections.abc import Sequence

ROLES = ("primary", "secondary")

_DESCRIPTION = """\
Each side of a pair has a key for each role, and accepts only peers whose public key it was told to trust.

On one machine nothing need be done: both daemons trust each other from their first start.
For two machines, exchange the public keys once:

  on the primary's host A      checkpointd keys show --role primary
  on the secondary's host B    checkpointd keys show --role secondary
  on A                         checkpointd keys trust --role primary B 'KEY OF B'
  on B                         checkpointd keys trust --role secondary A 'KEY OF A'

Keys may hold characters that a shell takes for its own: put them in single quotes.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "keys",
        help="show this host's keys, and choose which peers may connect",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="keys_command", metavar="COMMAND", required=True)
    show = _command(commands, "show", "print this side's public key; it is made on first use")
    show.add_argument("--quiet", action="store_true", help="print the key and nothing else")
    trust = _command(commands, "trust", "allow a peer")
    trust.add_argument("name", metavar="NAME", help="what to call the peer")
    trust.add_argument("key", metavar="PUBLICKEY", help="its public key, or a file that has it")
    _command(commands, "list", "print the peers that are allowed")
    remove = _command(commands, "remove", "allow a peer no longer")
    remove.add_argument("name", metavar="NAME", help="the peer, as `keys list` calls it")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument(
        "--role", choices=ROLES, default="primary", help="whose keys (default: primary)"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="where keys are kept, in keys/ROLE (default: $CHECKPOINTD_STATE_DIR,"
        " /var/lib/checkpointd for root, ~/.local/state/checkpointd for others)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code 0; faults are raised as KeyFileError."""
    store = KeyStore((args.state_dir or state_dir()) / "keys" / args.role)
    match args.keys_command:
        case "show":
            _show(store, args.role, quiet=args.quiet)
        case "trust":
            store.trust(args.name, _public_key(args.key))
            print(f"{args.name} is trusted by this host's {args.role}")
        case "list":
            _print_table([(name, key.decode("ascii")) for name, key in store.trusted().items()])
        case "remove":
            store.remove(args.name)
            print(
                f"{args.name} is refused from its next connection on; restart the {args.role} to"
                " end one that it has now"
            )
    return 0


def _show(store: KeyStore, role: str, *, quiet: bool) -> None:
    public = store.own().public.decode("ascii")
    if quiet:
        print(public)
        return
    other = ROLES[1 - ROLES.index(role)]
    print(f"public key of this host's {role}:\n\n  {public}\n")
    print(f"to let it connect, on the {other}'s host:\n")
    print(f"  checkpointd keys trust --role {other} NAME {shlex.quote(public)}")


def _public_key(argument: str) -> bytes:
    """A public key as given, or out of the file that the argument names."""
    try:
        return parse_public(argument)
    except KeyFileError:
        path = Path(argument)
        if not path.is_file():
            raise
        return read_public(path)


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, key in rows:
        print(f"{name:<{width}}  {key}")
