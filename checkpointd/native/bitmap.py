"""Bitmaps: one bit for each pfn, held in C so that the pause reads and writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from checkpointd.native.library import MAX_PFNS, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer

    from checkpointd._native import CData


class Bitmap:
    """A set of pfns below nr_bits, one bit for each (csrc/bitmap.h): what is mostly empty costs next to nothing."""

    def __init__(self, nr_bits: int) -> None:
        if not 0 < nr_bits <= MAX_PFNS:
            raise ValueError(f"a bitmap of {nr_bits} bits: must be 1 to {MAX_PFNS}")
        self.nr_bits = nr_bits
        self._memory = ffi.new("uint64_t[]", lib.ck_bitmap_size(nr_bits) // 8)
        self.handle = ffi.new("struct ck_bitmap *")
        lib.ck_bitmap_init(self.handle, self._memory, nr_bits)

    @property
    def address(self) -> int:
        """Of its struct ck_bitmap, for another compiled module."""
        return int(ffi.cast("uintptr_t", self.handle))

    @property
    def _octets(self) -> int:
        """Of the words that have bits."""
        return (self.nr_bits + 63) // 64 * 8

    @classmethod
    def from_bytes(cls, nr_bits: int, data: ReadableBuffer) -> Self:
        """From what bytes() of a bitmap of the same size gives."""
        bitmap = cls(nr_bits)
        with memoryview(data) as view:
            if view.nbytes != bitmap._octets:
                raise ValueError(f"{view.nbytes} octets for a bitmap of {nr_bits} bits")
        ffi.memmove(bitmap._memory, data, bitmap._octets)
        lib.ck_bitmap_loaded(bitmap.handle)
        return bitmap

    def __bytes__(self) -> bytes:
        """Little endian u64 words, bit p in word p // 64."""
        return bytes(ffi.buffer(self._memory, self._octets))

    def count(self) -> int:
        return lib.ck_bitmap_count(self.handle)

    def __bool__(self) -> bool:
        """Is any bit set?"""
        return lib.ck_bitmap_any(self.handle)

    def add(self, first: int, count: int = 1) -> None:
        if not (first >= 0 and 0 <= count <= self.nr_bits - first):
            raise ValueError(f"bits {first} to {first + count} of a bitmap of {self.nr_bits}")
        lib.ck_bitmap_add(self.handle, first, count)

    def fill(self) -> None:
        lib.ck_bitmap_fill(self.handle)

    def clear(self) -> None:
        lib.ck_bitmap_clear(self.handle)

    def update(self, other: Bitmap) -> None:
        """Add all of `other`, which has the same size."""
        lib.ck_bitmap_or(self.handle, handle_of(other, self.nr_bits))

    def __contains__(self, bit: int) -> bool:
        return 0 <= bit < self.nr_bits and bool(self._memory[bit // 64] >> (bit % 64) & 1)

    def __iter__(self) -> Iterator[int]:
        """Ascending. What is added behind the iterator while it runs is not seen."""
        chunk = ffi.new("uint64_t[]", 1024)  # bits a call
        first = 0
        while found := lib.ck_bitmap_list(self.handle, first, self.nr_bits, chunk, len(chunk)):
            bits = ffi.unpack(chunk, found)
            yield from bits
            first = bits[-1] + 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.nr_bits == other.nr_bits and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]  # it changes; as for a set

    def __repr__(self) -> str:
        return f"<Bitmap: {self.count()} of {self.nr_bits}>"


def handle_of(bitmap: Bitmap, nr_pfns: int) -> CData:
    """For C, if it is a bitmap of nr_pfns; else the C code would go beyond its end."""
    if bitmap.nr_bits != nr_pfns:
        raise ValueError(f"a bitmap of {bitmap.nr_bits} bits where one of {nr_pfns} is needed")
    return bitmap.handle
