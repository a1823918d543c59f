"""The Xen adapter's p2m on the fake Xen (fake_p2m.c), an engine's native half, and the replica that it keeps."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_hypervisor import EXTENT, KEY, PAGE, SECOND, ZERO, staged, words_of
from fake_xen import adapter, compile_fake_xen

from checkpointd import native
from checkpointd.native import TOO_MANY, Arena, Bitmap, Mappings, Outcome

OUT, IN, OUT_IN, LEAVE = range(4)  # enum change


def compile_fake_p2m(directory: Path) -> Any:
    """The adapter's p2m on the fake, compiled into `directory`: (ffi, lib)."""
    sources = adapter("p2m", "invalidation", "aside", "hypercall", "libs")
    return compile_fake_xen(
        directory / "fake_p2m.so",
        [Path(__file__).with_suffix(".c"), *sources],
        """
        void *fake_new(uint64_t nr_pfns, uint64_t nr_frames, bool marks);
        int fake_begin(bool deaf);
        int fake_watch(void);
        int fake_end(void);
        uint64_t fake_requests(void);
        int fake_ioreq_destroy(uint16_t server);
        bool fake_out(uint64_t pfn);
        bool fake_left(void);
        bool fake_put_grant(uint64_t pfn, uint64_t stack, uint64_t command, uint32_t space, bool is_64bit);
        void fake_hook(int call, uint64_t after, int change, uint64_t pfn);
        """,
    )


@dataclass
class XenGuest:
    """A guest on fake Xen, an engine's native half, and the replica that it keeps."""

    fake: Any
    nr_pfns: int = 2 * EXTENT + 100
    nr_frames: int = 1600  # half of them behind the first pfns
    capacity: int = 600
    budget: int = 64  # extents
    marks: bool = False
    deaf: bool = False
    gone: bool = False  # the domain was destroyed
    replica: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ffi, self.lib = self.fake
        self.facts = self.lib.guest
        table = self.lib.fake_new(self.nr_pfns, self.nr_frames, self.marks)
        assert table, "there is another guest"
        self.server = self.lib.fake_begin(self.deaf)
        assert self.server >= 0
        assert self.lib.fake_watch() == 0
        self.table = int(self.ffi.cast("uintptr_t", table))
        self.mappings = Mappings(self.table, self.nr_pfns, self.budget * EXTENT * PAGE)
        self.pending, self.carried = Bitmap(self.nr_pfns), Bitmap(self.nr_pfns)
        self.arena = Arena(self.capacity, self.nr_pfns, 4096, 4)
        self.pending.fill()
        self.cursor = 0

    def out(self, pfn: int) -> None:
        assert self.lib.fake_out(pfn), "the vcpu was never answered"

    def put(self, pfn: int, value: int) -> bool:
        """A page comes in; False: there is one, or the guest has no frame left."""
        return bool(self.lib.fake_give(pfn, value))

    def write(self, pfn: int, value: int) -> None:
        self.lib.fake_write(pfn, value)

    def value(self, pfn: int) -> int:
        """Its first 8 octets; -1: nothing is there."""
        return int(self.lib.fake_value(pfn))

    def memory(self) -> dict[int, int]:
        return {pfn: self.value(pfn) for pfn in range(self.nr_pfns) if self.value(pfn) >= 0}

    def live_round(self) -> Outcome:
        outcome = native.live_round(
            self.table, self.mappings, self.pending, self.carried, self.arena, cursor=self.cursor
        )
        self.cursor = outcome.cursor
        return self._take(outcome)

    def pause(self) -> Outcome:
        return self._take(
            native.pause(
                self.table,
                self.mappings,
                self.pending,
                self.carried,
                self.arena,
                key=KEY,
                suspend_timeout_ns=SECOND,
            )
        )

    def _take(self, outcome: Outcome) -> Outcome:
        """What was staged is acked and applied at once."""
        if outcome.status == 0:
            pages = staged(self.arena) | dict.fromkeys(words_of(self.arena.zero_pfns), ZERO)
            self.replica |= {pfn: struct.unpack_from("<q", page)[0] for pfn, page in pages.items()}
        self.carried.clear()
        return outcome

    def epoch(self) -> None:
        """Live rounds until what is left fits, and the pause."""
        while (outcome := self.pause()).status == TOO_MANY:
            while self.live_round().remaining > self.capacity // 2:
                pass
        assert outcome.status == 0, outcome

    def wrong(self) -> dict[int, tuple[int, int | None]]:
        """Pages of the guest that the replica does not have as they are: what it has, what they are."""
        return {
            pfn: (value, self.replica.get(pfn))
            for pfn, value in self.memory().items()
            if self.replica.get(pfn) != value
        }

    def close(self) -> None:
        self.mappings.close()
        self.arena.close()
        ended = self.lib.fake_end()
        assert not self.facts.mapped, "extents are still mapped"
        assert ended == 0
        assert self.gone or not self.facts.server, "the ioreq server is still there"
