"""A guest whose epochs are made here and committed to a replica, for tests of the xl restorer on a fake host.

Run as a program it is a life of the secondary that tests kill: `xl_guest.py FOLDER` (see live_and_die()).
"""

from __future__ import annotations

import random
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fake_xl import FakeDomains

from checkpointd.authority.processes import boot_id
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.native import DigestKey
from checkpointd.secondary.activations import Activation, Activations, Phase
from checkpointd.secondary.epochs import Budget, Load
from checkpointd.secondary.replica import Replica
from checkpointd.secondary.restorers.xl import XlRestorer
from checkpointd.secondary.restorers.xl_process import Limits
from checkpointd.stream.bodies import TscInfo
from checkpointd.stream.records import DomainType, RecordType
from checkpointd.stream.writer import headers, record

if TYPE_CHECKING:
    from collections.abc import Callable

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
NR_PFNS = 1200  # a first feed of four records, with 800 of them populated
KEY = DigestKey(bytes(range(32)))
XTAB = 0xF << 60
STATIC = headers(DomainType.HVM) + record(RecordType.STATIC_DATA_END)
CONFIG = f'{{"c_info":{{"name":"guest","uuid":"{UUID}"}}}}'
INFO = DomainInfo(
    UUID,
    7,
    "guest",
    NR_PFNS,
    NR_PFNS,
    "xen",
    HostIdentity("boot", 0, 0),
    {"xl": CONFIG, "type": "pvh"},
)
# In the place of a Claim: nothing is in the way.
CLAIM: Any = SimpleNamespace(make_way=lambda: None, started=lambda builder: None, made=True)
# Where nothing is to hang, no limit is to matter; where something is, none is to be waited for long.
PATIENT = Limits(20.0, 20.0, 20.0, 20.0, 20.0)
HASTY = Limits(banner=2.0, domain=0.5, stall=0.5, exit=0.5, destroy=1.0)
PATIENCE = 20.0  # s; for what happens within milliseconds

Pages = dict[int, bytes]


def tail(epoch: int) -> bytes:
    tsc = TscInfo(0, 2_000_000, epoch * 1_000_000, 0).pack()
    return record(RecordType.X86_TSC_INFO, tsc) + record(RecordType.HVM_CONTEXT, b"registers" * 8)


class Guest:
    """Makes epochs of a guest, keeps the oracle of its memory, and commits them to a replica."""

    def __init__(self, replica: Replica, seed: int = 1) -> None:
        self.replica = replica
        self.random = random.Random(seed)
        self.memory: Pages = {}
        self.history: dict[int, Pages] = {}  # by epoch
        self.epoch = 0

    def page(self) -> bytes:
        return struct.pack("<Q", self.random.getrandbits(64)) * 512

    def run(self, pages: int = 40, *, live: int = 0) -> int:
        """One more epoch: `pages` written, as many as that zeroed or gone by a tenth; `live` in a part before."""
        self.epoch += 1
        for part, count in enumerate((live, pages) if live else (pages,)):
            data = {self.random.randrange(NR_PFNS): self.page() for _ in range(count)}
            zero = {self.random.randrange(NR_PFNS) for _ in range(count // 10)} - data.keys()
            gone = {self.random.randrange(NR_PFNS) for _ in range(count // 10)} - data.keys() - zero
            final = not live or part == 1
            load = Load(self.epoch, part, final, 0, context=tail(self.epoch) if final else b"")
            if data:
                body = struct.pack(f"<II{len(data)}Q", len(data), 0, *data) + b"".join(
                    data.values()
                )
                load.pages.append(record(RecordType.PAGE_DATA, body))
            load.zero.append(struct.pack(f"<{len(zero)}Q", *zero))
            load.gone.append(struct.pack(f"<{len(gone)}Q", *(XTAB | pfn for pfn in gone)))
            for pfn in gone:
                self.memory.pop(pfn, None)
            self.memory |= dict.fromkeys(zero, bytes(4096)) | data
            self.replica.admit(load)
        self.history[self.epoch] = dict(self.memory)
        assert self.replica.commit(load, KEY) == (0, ())
        return self.epoch


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)  # what another process does is announced by nothing


def same_memory(xen: FakeDomains, expected: Pages) -> None:
    """Each page that the guest has, and no other."""
    assert xen.pages(UUID) == expected


def runs(xen: FakeDomains) -> bool:
    domain = xen.get(UUID)
    return domain is not None and domain["pauses"] == 0


def activations_in(folder: Path) -> Activations:
    return Activations(folder / "activations")


def fenced(epoch: int, *, phase: Phase = Phase.FEEDING) -> Activation:
    """An activation of `epoch` in term 2, as it is noted once the old guest is stopped."""
    return Activation(UUID, "guest", "192.0.2.1", 2, epoch, phase, boot_id())


def live_and_die(folder: Path) -> None:
    """Two epochs, each applied, and an activation of a third, if none is noted yet; else that one is resumed."""
    domains, activations = FakeDomains(folder), activations_in(folder)
    restorer = XlRestorer(domains, folder / "notes", activations, limits=PATIENT)
    left = activations.load(UUID)
    if left is not None:
        restorer.resume(left)
        return
    guest = dying_guest()
    restorer.begin(INFO, STATIC)
    guest.run(NR_PFNS)
    for _ in range(2):
        restorer.committed(guest.replica)
        until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not applied")
        guest.run(30)
    activations.begin(fenced(guest.epoch))
    restorer.start(INFO, guest.replica, paused=(folder / "paused").exists())


def dying_guest() -> Guest:
    """The guest of the life that dies, as it begins: what is made of it can be made again."""
    return Guest(Replica(UUID, NR_PFNS, Budget(1 << 24)), seed=2)


if __name__ == "__main__":
    live_and_die(Path(sys.argv[1]))
