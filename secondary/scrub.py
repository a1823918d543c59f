"""The audit: is the replica what the primary says its clean pages are (invariant 10)?

With each epoch the primary sends digests, taken in the pause, of a rotating sample of pages that it
believes clean. After the commit they must be those of the replica's pages; a page that differs was
dirtied and missed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

from checkpointd.hypervisor.port import PAGE_SIZE

if TYPE_CHECKING:
    from checkpointd.native import Bitmap

ENTRY = struct.Struct("<Q16s")  # pfn, digest of its page under the session's key


class PageDigester(Protocol):
    def digest_pages(self, address: int, nr: int) -> bytes:
        """16 octets for each of `nr` pages from `address` on."""
        ...


def audit(
    entries: bytes, image: int, populated: Bitmap, key: PageDigester
) -> tuple[int, tuple[int, ...]]:
    """How many pages were compared, and the pfns that differ, in the order they came.

    `entries`: checked AUDIT payloads; `image`: the address of the image, which holds every pfn named.
    A page that has no memory here differs, whatever it holds there.
    """
    compared = 0
    differing = []
    for pfn, digest in ENTRY.iter_unpack(entries):
        compared += 1
        if pfn not in populated or key.digest_pages(image + pfn * PAGE_SIZE, 1) != digest:
            differing.append(pfn)
    return compared, tuple(differing)
