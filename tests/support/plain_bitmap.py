"""A bitmap of the port (csrc/bitmap.h), as the native pause hands it to an adapter: for tests that call the table."""

from __future__ import annotations

from typing import Any

BLOCK = 64  # words


class PlainBitmap:
    """Of `ffi`, which has the struct declared. `pointer` is what the table takes."""

    def __init__(self, ffi: Any, nr_bits: int) -> None:
        blocks = -(-nr_bits // (64 * BLOCK))
        self._words = ffi.new("uint64_t[]", blocks * BLOCK)
        self._blocks = ffi.new("uint64_t[]", -(-blocks // 64))
        self.pointer = ffi.new("struct ck_bitmap *", (nr_bits, self._words, self._blocks))

    def add(self, bit: int) -> None:
        block = bit // 64 // BLOCK
        self._words[bit // 64] |= 1 << bit % 64
        self._blocks[block // 64] |= 1 << block % 64

    def bits(self) -> set[int]:
        """What is set; AssertionError if a block that is said to be empty is not."""
        found = set()
        for at, word in enumerate(self._words):
            if word:
                assert self._blocks[at // BLOCK // 64] >> at // BLOCK % 64 & 1, (
                    f"word {at} is hidden"
                )
                found |= {64 * at + bit for bit in range(64) if word >> bit & 1}
        return found
