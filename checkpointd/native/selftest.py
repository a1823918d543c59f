"""The start-up self-test: a kernel that gives wrong answers must not go unnoticed, for a wrong zero
test loses memory and a wrong digest hides that.
"""

from __future__ import annotations

import hashlib
import mmap

from checkpointd.errors import NativeError
from checkpointd.native.digest import DIGEST_SIZE, DigestKey
from checkpointd.native.library import PAGE_SIZE, ffi, kernels, lib

# Octets: nothing, around a vector and a cache line, around a block, several blocks.
LENGTHS = (0, 1, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 8192, 12345)
OFFSETS = (0, 1, 7)  # octets from an aligned start: no kernel may need alignment

# digest_of_digests() of a correct kernel; tests/unit computes it once more from the definition in
# csrc/digest.h.
GOLDEN = "ca037047ab41359a18e65aae64d8e0b90e878bf5b7cba12d0554b25a93d3375e"


def self_test() -> None:
    """Every kernel that this CPU runs, on fixed data, against known answers; takes a few
    milliseconds. Raises NativeError, after which nothing of checkpointd may run on this machine.
    """
    for name, index in kernels().items():
        if not lib.ck_kernel_runs(index):
            continue
        answers = {
            "the digest": digest_of_digests(index) == GOLDEN,
            "the zero test": _zero_test_is_right(index),
            "the bit count": _count_is_right(index),
            "the copy of a page": _copy_is_right(index),
            "the changes of a page": _changes_are_right(index),
        }
        if wrong := [what for what, right in answers.items() if not right]:
            raise NativeError(
                f"self-test: kernel {name} gives wrong answers for {', '.join(wrong)}; rebuild the "
                "compiled modules, and if that does not help suspect the compiler or the machine"
            )


def digest_of_digests(index: int) -> str:
    """SHA-256 over the digests, by kernel `index`, of seeded data of all LENGTHS at all OFFSETS."""
    kernel, key = lib.ck_kernel_at(index), DigestKey(bytes(range(32)))
    digest, total = ffi.new("uint8_t[]", DIGEST_SIZE), hashlib.sha256()
    data = ffi.new("uint8_t[]", hashlib.shake_128(b"self-test").digest(max(LENGTHS) + max(OFFSETS)))
    for offset in OFFSETS:
        for length in LENGTHS:
            lib.ck_digest_with(kernel, key.key, data + offset, length, digest)
            total.update(ffi.buffer(digest))
    return total.hexdigest()


def _zero_test_is_right(index: int) -> bool:
    kernel, memory = lib.ck_kernel_at(index), ffi.new("uint8_t[]", PAGE_SIZE + max(OFFSETS) + 1)
    for offset in OFFSETS:
        page = memory + offset
        page[PAGE_SIZE] = 1  # right behind the page, and not of it
        if not kernel.page_is_zero(page):
            return False
        page[PAGE_SIZE] = 0
        for at in (*range(0, PAGE_SIZE, 31), PAGE_SIZE - 1):
            page[at] = 0x80
            if kernel.page_is_zero(page):
                return False
            page[at] = 0
    return True


def _count_is_right(index: int) -> bool:
    kernel, octets = lib.ck_kernel_at(index), hashlib.shake_128(b"bits").digest(8 * 33)
    words = ffi.new("uint64_t[]", 33)
    ffi.memmove(words, octets, len(octets))
    return all(
        kernel.count(words, nr) == int.from_bytes(octets[: 8 * nr], "little").bit_count()
        for nr in range(34)
    )


def _copy_is_right(index: int) -> bool:
    """Whole pages, from any address, and nothing beside them."""
    kernel = lib.ck_kernel_at(index)
    octets = hashlib.shake_128(b"page").digest(PAGE_SIZE + max(OFFSETS))
    source = ffi.new("uint8_t[]", octets)
    with mmap.mmap(-1, 3 * PAGE_SIZE) as memory, ffi.from_buffer("uint8_t[]", memory) as pages:
        for offset in OFFSETS:
            kernel.copy_page(pages + PAGE_SIZE, source + offset)
            kernel.copied()
            page = octets[offset : offset + PAGE_SIZE]
            if memory[:] != bytes(PAGE_SIZE) + page + bytes(PAGE_SIZE):
                return False
    return True


def _changes_are_right(index: int) -> bool:
    """What is found leads from the one page to the other, for a word at each place in a line, and for many."""
    kernel = lib.ck_kernel_at(index)
    octets = hashlib.shake_128(b"was").digest(PAGE_SIZE)
    out = ffi.new("uint8_t[]", lib.CK_CHANGES_ROOM)
    for words in ([], [511], *([word] for word in range(65)), list(range(0, 512, 3))):
        was, now = ffi.new("uint8_t[]", octets), ffi.new("uint8_t[]", octets)
        for word in words:
            now[8 * word + word % 8] ^= 1
        found = kernel.changes(was, now, out)
        if ffi.buffer(out)[:found] != _changes_by_definition(octets, bytes(ffi.buffer(now))):
            return False
        if bytes(ffi.buffer(was)) != bytes(ffi.buffer(now)):
            return False
    ffi.memmove(now, octets[::-1], PAGE_SIZE)  # all of it
    return not kernel.changes(was, now, out)


def _changes_by_definition(was: bytes, now: bytes) -> bytes:
    lines, found = 0, b""
    for line in range(64):
        at = [64 * line + 8 * word for word in range(8)]
        mask = [was[i : i + 8] != now[i : i + 8] for i in at]
        if any(mask):
            lines |= 1 << line
            found += bytes([sum(1 << bit for bit in range(8) if mask[bit])])
            found += b"".join(now[i : i + 8] for i, changed in zip(at, mask, strict=True) if changed)
    return lines.to_bytes(8, "little") + found
