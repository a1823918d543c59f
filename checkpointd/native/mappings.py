"""The mapping cache: extents of guest memory, mapped once and kept."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd.errors import HostLostError, HypervisorError
from checkpointd.native.library import MAX_PFNS, PAGE_SIZE, ffi, lib

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from checkpointd._native import CData

EXTENT_BYTES = 512 * PAGE_SIZE  # CK_EXTENT_PAGES


@dataclass(frozen=True, slots=True)
class MappingStats:
    hits: int  # extents asked for that were mapped (total)
    misses: int  # and that were not (total)
    evicted: int  # unmapped for want of room (total)
    invalidated: int  # unmapped since a page in them has another frame now (total)
    mapped_extents: int
    mapped_bytes: int


class Mappings:
    """The mapping cache of one domain: extents of guest memory, mapped once and kept
    (csrc/mappings.h).

    Invariant 8: a page is never read through a mapping that no longer shows that page. Each pause
    and round first asks the hypervisor what changed and unmaps what that touches, then asks for
    types, then reads.
    """

    def __init__(self, table: int, nr_pfns: int, budget_bytes: int) -> None:
        """`table` is Domain.table; close() comes before the domain's. `budget_bytes` bounds what is
        mapped at once and holds at least one extent of 2 MiB. Raises HypervisorError if the table
        is of another version of the port, ValueError, MemoryError.
        """
        if not 0 < nr_pfns <= MAX_PFNS:
            raise ValueError(f"{nr_pfns} pfns: must be 1 to {MAX_PFNS}")
        if budget_bytes < EXTENT_BYTES:
            raise ValueError(
                f"a mapping budget of {budget_bytes} octets: one extent takes {EXTENT_BYTES}"
            )
        self.table = table
        self.nr_pfns = nr_pfns
        out = ffi.new("struct ck_mappings **")
        budget = min(budget_bytes // EXTENT_BYTES, (1 << 32) - 1)
        status = lib.ck_mappings_new(ffi.cast("void *", table), nr_pfns, budget, out)
        if status == -errno.EPROTONOSUPPORT:
            raise HypervisorError(
                "the hypervisor adapter was compiled against another version of csrc/hypervisor.h; "
                "rebuild both: pip install --no-build-isolation -e ."
            )
        if status:
            raise MemoryError(f"mapping cache for {nr_pfns} pfns: {os.strerror(-status)}")
        # Without close() the memory is freed but nothing unmapped: the table may be gone by then.
        self._handle: CData | None = ffi.gc(out[0], lib.ck_mappings_free)

    @property
    def handle(self) -> CData:
        if self._handle is None:
            raise ValueError("these Mappings are closed")
        return self._handle

    def refresh(self) -> int:
        """Unmap what no longer shows its pages, so that ballooned-out frames are given back
        promptly; for any time off the pause. Returns how many pfns changed; they are dirty at the
        next pause or round.
        """
        changes = lib.ck_mappings_refresh(self.handle)
        _raise_failure("asking which frames changed, or unmapping them,", changes)
        return changes

    def replica_has(self, digests: ReadableBuffer | None) -> None:
        """The replica has the pages with a digest that is not zero (16 octets a pfn), or none at all.
        A hole is told to it only where it may have a page; until the first call it may have any.
        """
        if digests is None:
            lib.ck_mappings_theirs(self.handle, ffi.NULL)
            return
        view = ffi.from_buffer("uint8_t[]", digests)
        if len(view) != self.nr_pfns * lib.CK_DIGEST_SIZE:
            raise ValueError(f"{len(view)} octets of digests for {self.nr_pfns} pfns")
        lib.ck_mappings_theirs(self.handle, view)

    def invalidate_all(self) -> None:
        _raise_failure("unmapping", lib.ck_mappings_invalidate_all(self.handle))

    def stats(self) -> MappingStats:
        stats = self.handle.stats
        return MappingStats(
            stats.hits,
            stats.misses,
            stats.evicted,
            stats.invalidated,
            stats.mapped_extents,
            stats.mapped_pages * PAGE_SIZE,
        )

    def close(self) -> None:
        """Unmap everything; again is harmless. The hypervisor drops what could not be unmapped when
        the domain is closed, so a failure here changes nothing and is not raised.
        """
        if self._handle is not None:
            lib.ck_mappings_invalidate_all(self._handle)
            ffi.release(self._handle)
            self._handle = None


def _raise_failure(what: str, status: int) -> None:
    if status == -errno.EHOSTDOWN:
        raise HostLostError(f"{what} failed: the guest's host is gone")
    if status < 0:
        raise HypervisorError(f"{what} failed: {os.strerror(-status)}")
