"""Proof that nothing was lost: what a guest is, compared with what the replay oracle says it must be."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd import native
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.embedded.replay import replay
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.stream.image import read_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Pages of the buffer that a guest is read through, part by part: 16 MiB.
READ_PAGES = 4096
READ_BUDGET = 64 << 20  # octets of mappings meanwhile


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether memory equals the oracle's at one step."""

    step: int
    pages: int  # compared
    difference: str  # "" if there is none

    @property
    def equal(self) -> bool:
        return not self.difference


class Snapshot:
    """A guest's memory as a flat image, pfn p at octet p * PAGE_SIZE, and which pfns have memory at all."""

    def __init__(self, nr_pfns: int) -> None:
        self.nr_pfns = nr_pfns
        self.image = mmap.mmap(-1, nr_pfns * PAGE_SIZE)
        self.populated = native.Bitmap(nr_pfns)

    def against(self, logs: Sequence[Path], step: int) -> Verdict:
        with replay(logs, step) as oracle:
            difference = oracle.diff(self.image, self.bitmap())
            return Verdict(step, self.populated.count(), str(difference) if difference else "")

    def bitmap(self) -> bytes:
        octets = bytearray((self.nr_pfns + 63) // 64 * 8)
        for pfn in self.populated:
            octets[pfn // 8] |= 1 << pfn % 8
        return bytes(octets)

    def close(self) -> None:
        self.image.close()


def read_guest(hypervisor: EmbeddedHypervisor, domid: int) -> tuple[Snapshot, int]:
    """Memory and step of a guest that nobody protects, read the way an engine reads it. Leaves it paused."""
    info = hypervisor.find(domid=domid)
    toolstack.pause(info)
    domain = hypervisor.attach(domid)
    mappings = native.Mappings(domain.table, info.nr_pfns, READ_BUDGET)
    arena = native.Arena(min(READ_PAGES, info.nr_pfns), info.nr_pfns)
    try:
        domain.enable_log()
        pending, carried = native.Bitmap(info.nr_pfns), native.Bitmap(info.nr_pfns)
        pending.fill()
        snapshot = Snapshot(info.nr_pfns)
        address = native.address_of(snapshot.image)
        cursor = 0
        while pending.count():
            outcome = native.live_round(
                domain.table, mappings, pending, carried, arena, cursor=cursor, detect_zero=False
            )
            if outcome.status:
                raise RuntimeError(f"reading domain {domid}: {outcome.fault}")
            for record in arena.records:
                with record:
                    native.scatter(address, info.nr_pfns, snapshot.populated, record)
            carried.clear()
            cursor = outcome.cursor
        return snapshot, toolstack.look(info).step
    finally:
        arena.close()
        mappings.close()
        domain.close()


def prove_guest(run_dir: Path, domid: int, *, namespace: str = "secondary") -> Verdict:
    """Compare a running guest, activated or not, with its oracle. Leaves it paused."""
    snapshot, step = read_guest(EmbeddedHypervisor(namespace, run_dir), domid)
    try:
        return snapshot.against(input_logs(run_dir, domid, namespace), step)
    finally:
        snapshot.close()


def prove_image(path: Path, logs: Sequence[Path]) -> Verdict:
    """Compare a committed image, as --keep-images writes it, with the oracle of the step it is of."""
    pages: dict[int, bytes | None] = {}

    def on_page(pfn: int, page_type: int, page: memoryview | None) -> None:
        pages[pfn] = None if page is None else bytes(page)

    context = Context.parse(read_image(path, on_page).tail)
    snapshot = Snapshot(context.nr_pfns)
    try:
        for pfn, page in pages.items():
            if page is not None:
                snapshot.image[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE] = page
                snapshot.populated.add(pfn)
        return snapshot.against(logs, context.step)
    finally:
        snapshot.close()


def input_logs(run_dir: Path, domid: int, namespace: str = "secondary") -> list[Path]:
    """The logs that explain a guest: its first host's, and those of the hosts it was activated on."""
    places = ["primary"] if namespace == "primary" else ["primary", namespace]
    return [run_dir / "embedded" / place / str(domid) / "input.log" for place in places]
