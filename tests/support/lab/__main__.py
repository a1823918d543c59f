"""deploy/lab: see docs/lab.md."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab import fence, image, machine, provision
from lab.machine import Machine
from lab.places import ENVIRONMENT, HOSTS, ROOT, SUITES, LabError, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLE = """
  deploy/lab boot                       both hosts, with checkpointd and a guest; builds what is missing
  deploy/lab ssh a xl create pvh.cfg
  deploy/lab ssh a tail -f /var/log/xen/console/guest-pvh.log
  deploy/lab pull-plug a                a power failure
  deploy/lab boot a:bookworm b:trixie   hosts of two releases
"""


def say(text: str) -> None:
    print(f"deploy/lab: {text}", file=sys.stderr, flush=True)


def build(place: Place, arguments: argparse.Namespace) -> None:
    for name in arguments.suite or ["bookworm"]:
        print(image.ensure(place, SUITES[name], say))


def boot(place: Place, arguments: argparse.Namespace) -> None:
    chosen = {}
    for word in arguments.host or HOSTS:
        name, _, suite = word.partition(":")
        record = Machine(place, name).record
        suite = suite or (record.facts["suite"] if record else next(iter(SUITES)))
        if suite not in SUITES:
            raise LabError(f"no suite {suite!r}: there are {', '.join(SUITES)}")
        chosen[name] = SUITES[suite]
    provision.provision(machine.boot(place, chosen, say, cpus=arguments.cpus), say)


def ssh(place: Place, arguments: argparse.Namespace) -> int:
    options = ["-t"] if sys.stdin.isatty() else []
    command = [*Machine(place, arguments.host).ssh_command(*options), *arguments.command]
    return subprocess.run(command, check=False).returncode


def put(place: Place, arguments: argparse.Namespace) -> None:
    Machine(place, arguments.host).put(
        arguments.into, *(path.absolute() for path in arguments.path)
    )


def power_off(place: Place, arguments: argparse.Namespace) -> None:
    Machine(place, arguments.host).power_off()


def pull_plug(place: Place, arguments: argparse.Namespace) -> None:
    Machine(place, arguments.host).pull_plug()


def status(place: Place, _arguments: argparse.Namespace) -> None:
    for name in HOSTS:
        if record := Machine(place, name).record:
            facts = record.facts
            print(
                f"{name}: on, {facts['suite']}, pid {record.process.pid}, ssh port {facts['ssh_port']}"
            )
        else:
            print(f"{name}: off")


def down(place: Place, _arguments: argparse.Namespace) -> None:
    machine.down(place)


def test(place: Place, arguments: argparse.Namespace) -> int:
    environment = {**os.environ, ENVIRONMENT: str(place.path)}
    command = [str(ROOT / "deploy" / "test"), arguments.which, *arguments.for_pytest]
    return subprocess.run(command, env=environment, check=False).returncode


def serve_fence(place: Place, _arguments: argparse.Namespace) -> None:
    fence.serve(place)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="deploy/lab",
        description="Two real Xen hosts on this machine, in software emulation (docs/lab.md).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--dir", type=Path, help="where the lab is kept (default: ~/.cache/checkpointd/lab)"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, body: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(body=body)
        return command

    suites = add("build", build, "make the image of a host: two minutes, as root")
    suites.add_argument(
        "--suite", action="append", choices=SUITES, help="Debian's release (default: bookworm)"
    )
    hosts = add("boot", boot, "switch hosts on, and install this checkout on them")
    hosts.add_argument(
        "host", nargs="*", metavar="HOST[:SUITE]", help="a, b, b:trixie (default: a b)"
    )
    hosts.add_argument(
        "--cpus", type=int, help=f"processors of a host that is off (default: {machine.CPUS})"
    )
    shell = add("ssh", ssh, "a command, or a shell, in a host's dom0")
    shell.add_argument("host", choices=HOSTS)
    shell.add_argument("command", nargs=argparse.REMAINDER)
    copy = add("put", put, "copy files or directories into a directory of a host's dom0")
    copy.add_argument("host", choices=HOSTS)
    copy.add_argument("into", metavar="DIRECTORY")
    copy.add_argument("path", nargs="+", type=Path)
    add("power-off", power_off, "switch a host off in order").add_argument("host", choices=HOSTS)
    add("pull-plug", pull_plug, "a power failure: SIGKILL to the host's QEMU").add_argument(
        "host", choices=HOSTS
    )
    add("status", status, "which hosts are on")
    add("down", down, "pull all plugs and forget the hosts' disks; the images stay")
    tests = add("test", test, "deploy/test --xen with this lab; arguments go to pytest, e.g. -k failover")
    tests.set_defaults(which="--xen")
    campaign = add(
        "campaign",
        test,
        "deploy/test --xen-campaign with this lab: full counts, reports into docs/; arguments go to pytest, "
        "e.g. --rounds 10 -k failover",
    )
    campaign.set_defaults(which="--xen-campaign")
    add("serve-fence", serve_fence, "the lab's fence, which boot starts")
    return top


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """argparse, but that `for_pytest` has what follows `test` or `campaign`; SystemExit for what nobody knows."""
    # Not argparse.REMAINDER: that takes no option as the first word.
    arguments, rest = parser().parse_known_args(words)
    if rest and "which" not in arguments:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.for_pytest = rest
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    try:
        return arguments.body(Place.open(arguments.dir), arguments) or 0
    except LabError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
