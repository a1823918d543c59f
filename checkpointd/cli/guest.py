"""checkpointd guest: run an embedded guest, or compute one again from its input logs."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from checkpointd.daemon import units
from checkpointd.errors import UsageError
from checkpointd.hypervisor.port import PAGE_SIZE, EndReason

if TYPE_CHECKING:
    import argparse

    from checkpointd.hypervisor.embedded.replay import Difference, Memory

DIFFERS = 1  # exit code of --compare

DESCRIPTION = """\
Run an embedded guest in this process, in the foreground: a small machine with memory, a dirty log and a UDP
address, for where there is no Xen. One line on standard output says when it runs; from then on protect it with
`checkpointd primary --domid N`. SIGTERM or Ctrl-C destroys it.

Programs:
  kv                a key-value store. Send it datagrams: ID SEQ set KEY VALUE, ID SEQ get KEY, ID SEQ incr KEY,
                    ID SEQ ping, ID SEQ poweroff, ID SEQ reboot, ID SEQ crash. ID names the client, SEQ counts
                    its requests; a retry with the same SEQ is answered, not executed twice.
  dirty:PAGES@RATE  a load: rewrites PAGES pages scattered over the memory, each RATE times a second (10 if not
                    given). It answers ping, poweroff, reboot and crash.

With --replay LOG no guest is run: its memory is computed again from the input log of its host (and of the hosts
that it was activated on, in that order), up to a step, and compared with an image.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "guest", help="run an embedded guest, where there is no Xen", description=DESCRIPTION
    )
    parser.add_argument(
        "--domid",
        type=int,
        metavar="N",
        help="its number here (default: the next free one, from 1)",
    )
    parser.add_argument("--program", default="kv", help="kv or dirty:PAGES@RATE (default: kv)")
    parser.add_argument(
        "--memory", type=units.parse_size, default=64 << 20, metavar="SIZE",
        help="its memory, such as 256MiB; a multiple of 4KiB (default: 64MiB)",
    )  # fmt: skip
    parser.add_argument("--name", default="", help="for people (default: guest-DOMID)")
    parser.add_argument("--uuid", type=UUID, help="who it is (default: random)")
    parser.add_argument(
        "--listen", default="", metavar="HOST:PORT",
        help="its UDP address (default: 127.0.0.1, port 47000 + domid)",
    )  # fmt: skip
    parser.add_argument(
        "--namespace",
        default="primary",
        metavar="NAME",
        help="which side it is on: primary, or where a secondary activates (default: primary)",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR",
        help="where its socket and its input log are (default: as for the daemons)",
    )  # fmt: skip
    parser.add_argument(
        "--output-limit",
        type=units.parse_size,
        default=16 << 20,
        metavar="SIZE",
        help="most of its output that is held at a time; what is beyond is dropped (default: 16MiB)",
    )
    parser.add_argument("--paused", action="store_true", help="begin paused")

    replay = parser.add_argument_group("replay")
    replay.add_argument(
        "--replay",
        type=Path,
        nargs="+",
        metavar="LOG",
        help="compute the guest of these input logs",
    )
    replay.add_argument(
        "--until",
        type=int,
        metavar="STEP",
        help="the last step to compute (default: the logs' last)",
    )
    replay.add_argument(
        "--compare", type=Path, metavar="IMAGE",
        help=f"a raw image, or a libxc stream; exit code {DIFFERS} if it differs",
    )  # fmt: skip
    replay.add_argument(
        "--out", type=Path, metavar="FILE", help="write the memory there as a raw image"
    )


def run(args: argparse.Namespace) -> int:
    if args.replay:
        return _replay(args)
    unusable = [
        f"--{name}" for name in ("until", "compare", "out") if getattr(args, name) is not None
    ]
    if unusable:
        raise UsageError(f"{', '.join(unusable)} only goes with --replay")
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from checkpointd.hypervisor.embedded import fresh, place

    reason = fresh.run(
        fresh.FreshGuest(
            namespace=str(place.namespace_directory(args.namespace, args.run_dir)),
            program=args.program,
            memory=args.memory,
            domid=args.domid,
            uuid=str(args.uuid) if args.uuid else "",
            name=args.name,
            address=args.listen,
            output_limit=args.output_limit,
            paused=args.paused,
        )
    )
    print(f"guest ended: {reason}", flush=True)
    return 1 if reason is EndReason.CRASH else 0


def _replay(args: argparse.Namespace) -> int:
    from checkpointd.hypervisor.embedded.replay import replay

    with replay(args.replay, args.until) as memory:
        populated = sum(octet.bit_count() for octet in memory.populated)
        print(f"step {memory.step}: {populated} of {memory.nr_pfns} pages populated")
        if args.out:
            memory.write(args.out)
        if not args.compare:
            return 0
        difference = _compare(memory, args.compare)
    print(f"{args.compare}: {difference}")
    return DIFFERS if difference else 0


def _compare(memory: Memory, path: Path) -> Difference:
    try:
        with path.open("rb") as file:
            if file.read(8) == b"\xff" * 8:  # the marker of a libxc stream
                return _compare_stream(memory, path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
                return memory.diff(image)
    except (OSError, ValueError) as error:
        raise UsageError(f"--compare {path}: {error}") from error


def _compare_stream(memory: Memory, path: Path) -> Difference:
    """A stream says which pages there are, so holes are compared too."""
    from checkpointd.stream.image import read_image

    image = bytearray(memory.nr_pfns * PAGE_SIZE)
    populated = bytearray((memory.nr_pfns + 63) // 64 * 8)

    def keep(pfn: int, _page_type: int, page: memoryview | None) -> None:
        if page is None:
            return
        if pfn >= memory.nr_pfns:
            raise UsageError(
                f"--compare {path}: it has a pfn {pfn}, and the guest {memory.nr_pfns} pages"
            )
        image[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE] = page
        populated[pfn // 8] |= 1 << pfn % 8

    read_image(path, keep)
    return memory.diff(image, bytes(populated))
