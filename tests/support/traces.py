"""Recorded dirtying of guests, for what decides by it: how many pages are dirty after any interval is known exactly.

`python tests/support/traces.py` records them anew (half a minute, on embedded guests).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

DIRECTORY = Path(__file__).parents[1] / "unit" / "traces"
SLOT_MS = 5
SECONDS = 10
CLIENTS = 8
FIRST = 0  # in place of a gap: the page was not dirty before


class Trace:
    """For each slot of 5 ms, how many pages were written in it that were written last so many slots before (gap:
    count). A page is dirty for the first time since the beginning of an interval if its gap reaches beyond that.
    """

    def __init__(self, slots: list[dict[int, int]]) -> None:
        self.slots = slots

    @classmethod
    def load(cls, name: str) -> Trace:
        document = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="ascii"))
        return cls([{int(gap): n for gap, n in slot.items()} for slot in document["slots"]])

    def __add__(self, other: Trace) -> Trace:
        """One after the other. What the second writes first has gaps of its own, which no interval reaches beyond."""
        return Trace(self.slots + other.slots)

    def __mul__(self, times: int) -> Trace:
        return Trace(self.slots * times)

    @property
    def seconds(self) -> float:
        return len(self.slots) * SLOT_MS / 1000

    def dirty(self, begin: float, end: float) -> int:
        """Pages written from `begin` to `end`, in seconds."""
        first, last = (round(at * 1000 / SLOT_MS) for at in (begin, end))
        return sum(
            count
            for slot in range(first, min(last, len(self.slots)))
            for gap, count in self.slots[slot].items()
            if gap == FIRST or gap > slot - first
        )


def record(program: str, *, clients: int = 0) -> dict[str, object]:
    from checkpointd.bench.guests import DOMID, Guest
    from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
    from checkpointd.hypervisor.embedded.kv import Load, UdpTransport
    from checkpointd.hypervisor.embedded.lib import ffi, lib
    from checkpointd.native import Bitmap

    last: dict[int, int] = {}
    slots: list[dict[int, int]] = []
    with ExitStack() as stack:
        guest = stack.enter_context(Guest(program, "64MiB"))
        hypervisor = EmbeddedHypervisor("primary", guest.rig.run_dir)
        domain = stack.enter_context(closing(hypervisor.attach(DOMID)))
        domain.output.open()  # nobody acks
        address = str(domain.info.config["address"])
        for number in range(clients):
            load = Load(stack.enter_context(closing(UdpTransport(address))), seed=number)
            load.start()
            stack.callback(load.stop)
        domain.enable_log()
        table = ffi.cast("struct ck_hypervisor *", domain.table)
        due = time.monotonic()
        for slot in range(
            -100, SECONDS * 1000 // SLOT_MS
        ):  # the first ones only tell what was dirty before
            due += SLOT_MS / 1000
            time.sleep(max(0.0, due - time.monotonic()))
            bitmap = Bitmap(domain.info.nr_pfns)
            pointer = ffi.cast("struct ck_bitmap *", bitmap.address)
            assert table.harvest(table.domain, pointer, lib.CK_HARVEST_CLEAN) == 0
            gaps = Counter(slot - last[pfn] if pfn in last else FIRST for pfn in bitmap)
            last |= dict.fromkeys(bitmap, slot)
            if slot >= 0:
                slots.append(dict(sorted(gaps.items())))
    return {"program": program, "clients": clients, "slot_ms": SLOT_MS, "slots": slots}


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for name, program, clients in (
        ("oltp", "kv", CLIENTS),
        ("idle", "kv", 0),
        ("writer", "dirty:4000@20", 0),
    ):
        text = json.dumps(record(program, clients=clients), separators=(",", ":"))
        (DIRECTORY / f"{name}.json").write_text(text + "\n", encoding="ascii")
        sys.stdout.write(f"{name}: {len(text)} octets\n")
