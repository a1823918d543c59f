"""checkpointd release: let a guest go on that a dead engine has left suspended."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from checkpointd import node
from checkpointd.daemon import paths
from checkpointd.daemon.settings import uuid_value
from checkpointd.daemon.units import BadValueError
from checkpointd.errors import UsageError

DESCRIPTION = """\
Let a guest go on that a dead engine has left suspended.

Undone is what an engine does to a Xen domain: its ioreq server, its request to suspend, the
suspend, the dirty log. The guest's output stays as it is, shut if it was shut. It is safe to
run at any time: it refuses while an engine lives, does nothing where nothing is left, and leaves
alone what `xl save` or `xl migrate` has suspended.

The watcher beside each engine does the same within a second of its death, and the systemd
unit does it once more. By hand it is needed if both were killed, too."""


def _uuid(text: str) -> str:
    try:
        return str(uuid_value().parse(text))
    except BadValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "release",
        help="let a guest go on that a dead engine has left suspended",
        description=DESCRIPTION,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--domid", type=int, help="the guest, by its domain id here")
    which.add_argument("--uuid", type=_uuid, help="the guest, by its UUID")
    parser.add_argument(
        "--force",
        action="store_true",
        help="kill an engine that lives; resume a guest though nothing says that an engine suspended it",
    )
    parser.add_argument(
        "--hypervisor", choices=("auto", "embedded", "xen"), default="auto", help="as the engine's"
    )
    parser.add_argument(
        "--unsafe-untested-xen",
        action="store_true",
        help="also with a release of Xen that checkpointd was not tested on",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=paths.run_dir(),
        metavar="DIR",
        help="where the engine was told to put its sockets (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if args.hypervisor == "embedded" or (args.hypervisor == "auto" and not node.is_dom0()):
        print("nothing to release: the host of an embedded guest lets it go on by itself")
        return 0
    from checkpointd.hypervisor.xen import state as states
    from checkpointd.hypervisor.xen.release import UndoHands, release

    domids = states.find(args.run_dir, uuid=args.uuid, domid=args.domid)
    if args.force and not domids:
        if args.domid is None:
            raise UsageError("--force needs --domid: no engine has left word where that guest is")
        domids = [args.domid]
    if not domids:
        print("nothing to release: no engine has left anything behind")
        return 0
    for domid in domids:
        hands = UndoHands(untested=args.unsafe_untested_xen)
        done = release(args.run_dir, domid, hands, force=args.force)
        print(f"domain {domid}: {', '.join(done) or 'nothing to release'}")
    return 0
