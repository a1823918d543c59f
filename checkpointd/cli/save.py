"""checkpointd save: a guest into a file, at the cost of one pause."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from checkpointd.cli.progress import shown
from checkpointd.daemon import paths, units
from checkpointd.errors import UsageError

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Save a running guest to FILE. Its memory is copied while it runs; then it stands still for one pause,
in which the rest is taken, and by default goes on running. FILE appears only when it is whole.

  checkpointd save --domid 4 /backup/web.save      the guest goes on, as after `xl save -c`
  xl restore /backup/web.save                      it runs again as it was in the pause

An embedded guest's file has the same form; `checkpointd restore` starts it.
Exactly one of the two may run: restore a guest only where the saved one has been destroyed."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "save", help="save a running guest to a file", description=DESCRIPTION
    )
    parser.add_argument(
        "file", metavar="FILE",
        help="- is standard output; one in .zst is compressed (`xl restore` wants it unpacked)",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--domid", type=int, metavar="N", help="the guest, by its domain id here")
    which.add_argument("--uuid", type=UUID, help="the guest, by its UUID")
    after = parser.add_mutually_exclusive_group()
    after.add_argument("--pause", action="store_true", help="leave the guest paused, as it is in FILE")
    after.add_argument(
        "--destroy", action="store_true", help="destroy the guest once FILE is there, as `xl save` does"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--arena", type=units.parse_size, default=64 << 20, metavar="SIZE",
        help="what the pause may take at most: larger for a guest that dirties much (default: 64MiB)",
    )  # fmt: skip
    parser.add_argument(
        "--unsafe-disk",
        action="store_true",
        help="also with a writable disk and a guest that goes on: FILE and disk will not fit each other",
    )
    parser.add_argument(
        "--unsafe-untested-xen",
        action="store_true",
        help="also on a version of Xen that no test of ours has run on",
    )
    parser.add_argument(
        "--hypervisor", choices=("auto", "xen", "embedded"), default="auto",
        help="auto: Xen where there is one, else embedded",
    )  # fmt: skip
    parser.add_argument(
        "--namespace", default="primary", metavar="NAME",
        help="where an embedded guest is looked for (default: primary)",
    )  # fmt: skip
    parser.add_argument(
        "--run-dir", type=Path, default=paths.run_dir(), metavar="DIR",
        help="where the daemons keep their sockets (default: %(default)s)",
    )  # fmt: skip


ARENA_MIN = 1 << 20  # octets


def run(args: argparse.Namespace) -> int:
    if args.arena < ARENA_MIN:
        raise UsageError("--arena: at least 1MiB")
    from checkpointd.archive.save import After, Save, run_save

    after = After.PAUSE if args.pause else After.DESTROY if args.destroy else After.RUN
    wanted = Save(
        target=args.file,
        domid=args.domid,
        uuid=str(args.uuid) if args.uuid else None,
        after=after,
        force=args.force,
        arena=args.arena,
        hypervisor=args.hypervisor,
        namespace=args.namespace,
        run_dir=args.run_dir,
        unsafe_disk=args.unsafe_disk,
        unsafe_untested_xen=args.unsafe_untested_xen,
    )
    with shown("save") as update:
        saved = run_save(wanted, update)
    ends = {
        After.RUN: f"stood still for {units.format_duration(saved.pause_ns // 1000 * 1000)} and runs on",
        After.PAUSE: "is paused",
        After.DESTROY: "is destroyed",
    }
    print(f"{args.file}: {saved.octets} octets; the guest {ends[after]}", file=sys.stderr)
    return 0
