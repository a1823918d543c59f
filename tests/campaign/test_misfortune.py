"""Misfortunes of all kinds, at seeded random, on a guest that dirties and balloons: the replica is right afterwards.

The moments are the scheduler's, so a seed that fails need not fail again; what it did is in the failure's message.
"""

from __future__ import annotations

import errno
import random
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from pair import MS, Engine, Guest, Standby, Table, pair_in
from proxy import Proxy

from checkpointd import faults
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.secondary.standby.events import ProtocolFault
from checkpointd.wire import messages
from checkpointd.wire.frames import Kind

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.campaign

SECONDS = 8.0  # of misfortune for each seed; a misfortune takes up to half a second
MIB = 1 << 20
CALLS = ["suspend", "harvest", "p2m_changes", "types", "map", "unmap", "context", "output_close"]


class Misfortune:
    """What can go wrong, each until it is over by itself."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._dice = random.Random(seed + 1)  # of the engine's thread
        self._flaky = 0.0  # how often a call of the hypervisor fails
        self.happened: list[str] = []

    def tap(self, table: Table) -> None:
        def call(original: Any, *arguments: Any) -> int:
            failed = self._flaky and self._dice.random() < self._flaky
            return -errno.EIO if failed else int(original(*arguments))

        for name in CALLS:
            table.replace(name, call)

    def happen(
        self, guest: Guest, standby: Standby, engine: Engine, proxies: tuple[Proxy, Proxy]
    ) -> None:
        kinds = ("cut", "calls", "gate", "ship", "deaf", "mute", "balloon", "fault", "full copy")
        what = self._random.choice(kinds)
        self.happened.append(what)
        driver, acks = standby.driver(guest), standby.acks(guest)
        match what:
            case "cut":
                proxy = self._random.choice(proxies)
                proxy.cut()
                self._wait()
                proxy.mend()
            case "calls":
                self._flaky = self._random.choice([0.005, 0.02, 0.1])
                self._wait()
                self._flaky = 0.0
            case "gate":
                kind = self._random.choice(list(Kind))
                engine.gate.hold(lambda header: header.kind is kind)
                self._wait()
                engine.gate.let_go()
            case "ship":
                point = self._random.choice(["ship.frame", "ship.end"])
                faults.arm(f"{point}@{self._random.randrange(1, 5)}=fail")
            case "deaf" | "mute":
                acks.lose, acks.mute = what == "deaf", what == "mute"
                self._wait()
            case "balloon":
                pages = self._random.sample(range(1, guest.info.nr_pfns), 60)
                toolstack.balloon_out(guest.info, pages)
                toolstack.balloon_in(guest.info, pages[: self._random.randrange(60)])
            case "fault":
                standby.service._acceptor.post(
                    lambda: driver.handle(ProtocolFault(driver.machine.session or 0, "bad luck"))
                )
            case "full copy":
                standby.service._acceptor.post(
                    lambda: driver._send(messages.FullCopyWanted("bad luck"))
                )
        acks.stop()

    def _wait(self) -> None:
        time.sleep(self._random.random() * 0.4)


@pytest.mark.parametrize("seed", range(1, 9))
def test_whatever_happens_the_replica_is_right_afterwards(tmp_path: Path, seed: int) -> None:
    misfortune = Misfortune(seed)
    with pair_in(tmp_path) as pair:
        guest = pair.guest("dirty:700@20", 8 * MIB)
        standby = pair.standby(silence=60_000 * MS)
        control, bulk = standby.ports
        with closing(Proxy(control)) as one, closing(Proxy(bulk)) as other:
            # An arena below the dirty set at its worst, and mappings for half of the guest.
            engine = pair.engine(
                guest, standby, via=(one.port, other.port), tap=misfortune.tap, arena=2 * MIB,
                mapping_budget=4 * MIB, standby_timeout=300 * MS, ack_timeout=500 * MS, audit_pages=32,
            )  # fmt: skip
            engine.wait("protected")
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                misfortune.happen(guest, standby, engine, (one, other))
                assert not engine.thread.over, (engine.thread.error, misfortune.happened)
            faults.arm("")
            engine.wait("protected")
            engine.acked_beyond(3)
            engine.wait("protected")
            engine.committed()
            assert standby.replica(guest).equal, misfortune.happened
            assert "active" not in standby.states
            engine.stop()
