"""The one door to the compiled hot path (csrc/): bitmaps, digests, mappings, arenas, the pause.

Shapes. A *bitmap* has one bit for each pfn. A *pfn word* is the u64 of a PAGE_DATA record: page type
in bits 63-60, pfn in bits 51-0. An *arena* is one block of memory, allocated and touched at start,
that an epoch is staged into as complete PAGE_DATA records. Addresses are plain integers; whoever
gives one keeps its memory alive during the call.

Every call releases the GIL. None of the classes is thread safe: one thread at a time, by the
caller's care.

The kernels (digest, zero test, bit count, copy, changes of a page) exist in plain C and for AVX2, bit-identical.
CHECKPOINTD_KERNEL demands one by name; without it the best that this CPU runs is taken.
"""

from __future__ import annotations

from checkpointd.native.arena import Arena
from checkpointd.native.bitmap import Bitmap
from checkpointd.native.checkpoint import TOO_MANY, Outcome, live_round, pause
from checkpointd.native.digest import DIGEST_SIZE, DigestKey
from checkpointd.native.image import (
    check_record,
    check_words,
    drop_pages,
    mark,
    mark_extents,
    merge,
    scatter,
    zero_pages,
)
from checkpointd.native.library import address_of, kernel, refuse_stale
from checkpointd.native.mappings import Mappings, MappingStats
from checkpointd.native.reduce import History, Reduction, body_size, expand
from checkpointd.native.selftest import self_test

__all__ = [
    "DIGEST_SIZE",
    "TOO_MANY",
    "Arena",
    "Bitmap",
    "DigestKey",
    "History",
    "MappingStats",
    "Mappings",
    "Outcome",
    "Reduction",
    "address_of",
    "body_size",
    "check_record",
    "check_words",
    "drop_pages",
    "expand",
    "kernel",
    "live_round",
    "mark",
    "mark_extents",
    "merge",
    "pause",
    "refuse_stale",
    "scatter",
    "self_test",
    "zero_pages",
]
