"""checkpointd restore: the last whole epoch of a recording runs again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.cli.progress import shown
from checkpointd.daemon import paths

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Start a guest from FILE, a recording of `checkpointd primary --to FILE`: as it was in the last epoch that
FILE holds whole. FILE may be cut off anywhere, and is not changed. The whole file is checked first.

A Xen guest is built by `xl`, and gets its configuration from FILE. What `checkpointd save` wrote of one is
restored by `xl restore`; what it wrote of an embedded guest, by this.

Exactly one may run: restore a guest only if it runs nowhere else."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "restore",
        help="start a guest from the last whole epoch of a recording",
        description=DESCRIPTION,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--paused", action="store_true", help="leave it paused")
    parser.add_argument(
        "--unsafe-untested-xen",
        action="store_true",
        help="also on a version of Xen that no test of ours has run on",
    )
    parser.add_argument(
        "--namespace", default="primary", metavar="NAME",
        help="where an embedded guest is put (default: primary)",
    )  # fmt: skip
    parser.add_argument(
        "--run-dir", type=Path, default=paths.run_dir(), metavar="DIR",
        help="where the daemons keep their sockets (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from checkpointd.archive.restore import Restore, run_restore

    wanted = Restore(
        source=args.file,
        paused=args.paused,
        namespace=args.namespace,
        run_dir=args.run_dir,
        unsafe_untested_xen=args.unsafe_untested_xen,
    )
    with shown("restore") as update:
        restored = run_restore(wanted, update)
    what = f"epoch {restored.epochs}" if restored.epochs else "the image"
    rest = f" ({restored.left_over} octets behind it are of no whole epoch)" * bool(restored.left_over)
    does = "is there, paused" if args.paused else "runs"
    print(f"{restored.name} {does} as domain {restored.domid}, from {what} of {args.file}{rest}")
    return 0
