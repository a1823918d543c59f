"""One epoch: prepares the native call, reads its result, and seals what was staged.

Everything that the pause touches is made here once, at start: arenas, bitmaps, the mapping cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd import native
from checkpointd.wire.frames import Kind

from .dirty import DirtySet

if TYPE_CHECKING:
    from checkpointd.native import DigestKey, Outcome

# Octets of a frame that lists pfns: as large as a frame of pages, so that nothing needs a bigger limit.
LIST_FRAME_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """One bulk frame, sealed: the digest is of what was staged, taken right after the guest ran on."""

    kind: Kind
    payload: memoryview
    digest: bytes  # b"" where nobody asks for it


class EpochTaker:
    """Owns arenas, dirty set and mapping cache of one attached domain. Used by the epoch loop's thread only."""

    def __init__(
        self,
        table: int,
        nr_pfns: int,
        key: DigestKey,
        *,
        arenas: int,
        arena_pages: int,
        mapping_budget: int,
        audit_pages: int,
        suspend_timeout_ns: int,
        detect_zero: bool,
        sealed: bool = True,
    ) -> None:
        """`sealed`: frames are for the wire, and have digests."""
        self._table = table
        self._nr_pfns = nr_pfns
        self.key = key  # of the session; a new session sets another
        self._suspend_timeout_ns = suspend_timeout_ns
        self._detect_zero = detect_zero
        self._with_digests = sealed
        self.mappings = native.Mappings(table, nr_pfns, mapping_budget)
        self.arenas = [
            native.Arena(arena_pages, nr_pfns, audit_pages=audit_pages) for _ in range(arenas)
        ]
        self.dirty = DirtySet(nr_pfns, arenas)
        self.known: bytes | bytearray | None = (
            None  # the secondary's page digests, during a first copy
        )
        self._sealed: list[list[Frame]] = [[] for _ in range(arenas)]
        self._round_cursor = 0
        self._audit_cursor = 0

    def take(self, index: int, *, close_output: bool, stay: bool = False) -> Outcome:
        """Pause the guest and stage all that is dirty into arena `index`; with `stay` it stays suspended."""
        arena = self.arenas[index]
        self._sealed[index] = []
        outcome = native.pause(
            self._table,
            self.mappings,
            self.dirty.pending,
            self.dirty.carried[index],
            arena,
            key=self.key,
            audit_cursor=self._audit_cursor,
            suspend_timeout_ns=self._suspend_timeout_ns,
            close_output=close_output,
            stay=stay,
            detect_zero=self._detect_zero,
        )
        if outcome.status == 0:
            # The secondary gets other versions now: one that comes back is not known any more.
            self.known = None
            self._audit_cursor = outcome.cursor
            self._seal(index, final=True)
        return outcome

    def live_round(self, index: int) -> Outcome:
        """Stage what fits of what is dirty, the guest running."""
        self._sealed[index] = []
        outcome = native.live_round(
            self._table,
            self.mappings,
            self.dirty.pending,
            self.dirty.carried[index],
            self.arenas[index],
            key=self.key,
            cursor=self._round_cursor,
            known=self.known,
            detect_zero=self._detect_zero,
        )
        if outcome.status == 0:
            self._round_cursor = outcome.cursor
            self._seal(index, final=False)
        return outcome

    def frames(self, index: int) -> list[Frame]:
        """What lies sealed in arena `index`, in the order of its sequence numbers."""
        return self._sealed[index]

    def close(self) -> None:
        self._sealed = []
        for arena in self.arenas:
            arena.close()
        self.mappings.close()

    def _seal(self, index: int, *, final: bool) -> None:
        arena = self.arenas[index]
        contents = [(Kind.PAGES, record) for record in arena.records]
        contents += [(Kind.ZERO, part) for part in _slices(arena.zero_pfns)]
        contents += [(Kind.GONE, part) for part in _slices(arena.gone_pfns)]
        if final:
            contents.append((Kind.CONTEXT, arena.context))
            contents += [(Kind.AUDIT, arena.audit)] if len(arena.audit) else []
        self._sealed[index] = [
            Frame(kind, view, self.key.digest(view) if self._with_digests else b"")
            for kind, view in contents
        ]


def _slices(view: memoryview) -> list[memoryview]:
    octets = view.cast("B")
    return [octets[at : at + LIST_FRAME_BYTES] for at in range(0, len(octets), LIST_FRAME_BYTES)]
