"""What protection puts on the wire, against the same epochs as they were staged; and what that does to their rate."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from checkpointd.bench.guests import Guest
from checkpointd.bench.scenarios import Size
from checkpointd.bench.turns import Goal, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.bench.machine import Machine
    from checkpointd.bench.turns import Figure
    from checkpointd.hypervisor.embedded.kv import UdpTransport

TEXT = "octets sent against octets staged, of the same epochs; and the rate of epochs with and without reduction"

# (memory, dirty pages, turns, epochs of each)
SIZES = {Size.SMALL: ("16MiB", 200, 1, 10), Size.FULL: ("256MiB", 2_000, 6, 100)}
INTERVAL = "100ms"
RATE = 10  # rewrites of each page a second: one line of 64 octets, 8 words, in each epoch
NOISE_RATE = 1_000  # each of its 64 lines in each epoch of INTERVAL: all of a page, of octets without any order
NOISE_SHARE = 8  # of the pages of the others, for that many rewrites are more than a guest has time for
FASTEST = "5ms"  # shorter than such an epoch takes to ship: the wire is what decides the rate
# An OLTP-like load: keys by Zipf's law, values of a row's size, as many reads as writes. Answers are not waited for.
KEYS, REQUESTS, VALUE = 20_000, 4_000, 100  # keys; requests a second; octets of a value

KV, WORDS, NOISE, SAME_RATE = Goal(0.2), Goal(0.1), Goal(1.01), Goal(1.0, least=True)


def run(size: Size, machine: Machine) -> Iterator[Figure]:
    memory, pages, turns, epochs = SIZES[size]
    with Guest("kv", memory) as guest, _clients(guest.transport()):
        yield _reduced("kv, Zipf's law", guest, turns, epochs, KV)
    with Guest(f"dirty:{pages}@{RATE}", memory) as guest:
        yield _reduced(f"{pages:,} pages, 8 words of each", guest, turns, epochs, WORDS)
    with Guest("dirty:1@1", memory) as guest:
        yield _first_copy("a first copy of zeros", guest)
    few = pages // NOISE_SHARE
    with Guest(f"dirty:{few}@{NOISE_RATE}", memory) as guest:
        yield _reduced(f"{few:,} pages of noise", guest, turns, epochs, NOISE)
        yield _rates(f"{few:,} pages, some lines of each, epochs", guest, turns, epochs, SAME_RATE)
    with Guest(f"dirty:{pages}@{RATE * 20}", memory) as guest:
        yield _rates(f"{pages:,} pages, few lines of each, epochs", guest, turns, epochs, SAME_RATE)


def _reduced(what: str, guest: Guest, turns: int, epochs: int, goal: Goal) -> Figure:
    """Octets sent and staged an epoch, by --reduce auto."""
    guest.protect(INTERVAL)
    guest.epochs(30)  # pages have to be sent once, and what does not pay to be found out
    sent, staged = [], []
    before = guest.epochs(1)
    for _ in range(turns):
        after = guest.epochs(epochs)
        done = after["acked_epoch"] - before["acked_epoch"]
        sent.append((after["sent_bytes"] - before["sent_bytes"]) / done)
        staged.append((after["staged_bytes"] - before["staged_bytes"]) / done)
        before = after
    guest.unprotect()
    return compare(what, "KiB", sent, "unreduced", staged, goal, scale=1 / 1024)


def _first_copy(what: str, guest: Guest) -> Figure:
    guest.protect(INTERVAL)
    status = guest.epochs(1)
    guest.unprotect()
    return compare(
        what, "KiB", [status["sent_bytes"]], "its memory", [status["ram_pages"] * 4096], Goal(0.01), scale=1 / 1024
    )  # fmt: skip


def _rates(what: str, guest: Guest, turns: int, epochs: int, goal: Goal) -> Figure:
    """Epochs a second, as many as there can be, in turns."""
    rates: dict[str, list[float]] = {"auto": [], "off": []}
    for _ in range(turns):
        for choice, found in rates.items():
            guest.protect(FASTEST, primary=("--reduce", choice))
            guest.epochs(30)
            first, began = guest.epochs(1), time.monotonic()
            last, ended = guest.epochs(epochs), time.monotonic()
            found.append((last["acked_epoch"] - first["acked_epoch"]) / (ended - began))
            guest.unprotect()
    return compare(what, "/s", rates["auto"], "--reduce off", rates["off"], goal)


@contextmanager
def _clients(transport: UdpTransport) -> Iterator[None]:
    """The load, from a thread of its own, until the block ends."""
    over = threading.Event()
    with ThreadPoolExecutor(1, "clients") as thread:
        asking = thread.submit(_ask, transport, over)
        try:
            yield
        finally:
            over.set()
        asking.result()  # raises what ended the load


def _ask(transport: UdpTransport, over: threading.Event) -> None:
    rng = random.Random(1)
    # Zipf's law: the chance of the k-th key is as 1 / k.
    keys = rng.choices(range(KEYS), [1 / (k + 1) for k in range(KEYS)], k=1 << 16)
    batch = REQUESTS // 100
    number = 0
    while not over.wait(1 / 100):
        for _ in range(batch):
            number += 1
            client, seq = number % 64, number // 64
            key = f"row{keys[number % len(keys)]}"
            if number % 2:
                value = f"{rng.getrandbits(4 * VALUE):0{VALUE}x}"
                transport.send(f"c{client} {seq} set {key} {value}".encode())
            else:
                transport.send(f"c{client} {seq} get {key}".encode())
