"""What a test must leave as it found it: threads, file descriptors and child processes of this process."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

if TYPE_CHECKING:
    from collections.abc import Iterator

# s; threads and sockets of libzmq end a moment after they are closed. Only a leak waits so long.
PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Census:
    """Of this process, each with a name that helps to find its owner."""

    threads: frozenset[str]
    descriptors: frozenset[str]
    children: frozenset[str]

    def __sub__(self, before: Census) -> str:
        """What is here and was not before; "" if nothing."""
        gained = {
            "threads": self.threads - before.threads,
            "descriptors": self.descriptors - before.descriptors,
            "children": self.children - before.children,
        }
        return "; ".join(f"{kind}: {sorted(what)}" for kind, what in gained.items() if what)


def census() -> Census:
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists the directory
            descriptors.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return Census(
        frozenset(f"{thread.name} {thread.ident}" for thread in threading.enumerate()),
        frozenset(descriptors),
        frozenset(_children(os.getpid())),
    )


def _children(parent: int) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            text = path.read_text(errors="replace")
            head, _, rest = text.rpartition(")")
            if int(rest.split()[1]) == parent:
                yield head + ")"


@cache
def _send_once_without_copying() -> None:
    """From its first such send to the end of the process pyzmq has a thread and some descriptors for all of them."""
    with (
        zmq.Context() as context,
        context.socket(zmq.PAIR) as one,
        context.socket(zmq.PAIR) as other,
    ):
        one.bind("inproc://once")
        other.connect("inproc://once")
        other.send(bytes(1 << 20), copy=False, track=True)
        one.recv()


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """Fails with the names of what the block left behind."""
    _send_once_without_copying()
    before = census()
    yield
    deadline = time.monotonic() + PATIENCE
    while gained := census() - before:
        assert time.monotonic() < deadline, f"left behind: {gained}"
        time.sleep(0.01)  # nothing tells when libzmq's threads have ended
