"""The digest of frames and pages: fast, keyed, of 128 bits; csrc/digest.h defines it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from checkpointd.native.library import ffi, lib

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DIGEST_SIZE = lib.CK_DIGEST_SIZE  # octets
SEED_SIZE = 32  # octets
PRIME = (1 << 61) - 1  # of the polynomial


class DigestKey:
    """A keyed universal hash of 128 bits (csrc/digest.h defines it). The seed is secret and lives
    as long as one session, so that a guest cannot aim at a collision; it is not a signature.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_SIZE:
            raise ValueError(f"a seed of {len(seed)} octets: must be {SEED_SIZE}")
        words = 4 * lib.CK_NH_KEY_WORDS
        stream = hashlib.shake_256(seed).digest(words + 16)
        self.key = ffi.new("struct ck_digest_key *")
        ffi.memmove(self.key.words, stream, words)
        for i in range(2):
            point = stream[words + 8 * i : words + 8 * i + 8]
            self.key.points[i] = int.from_bytes(point, "little") % PRIME

    def digest(self, data: ReadableBuffer) -> bytes:
        """16 octets of `data`, which may be of any length."""
        digest = ffi.new("uint8_t[]", DIGEST_SIZE)
        view = ffi.from_buffer("uint8_t[]", data)
        lib.ck_digest(self.key, view, len(view), digest)
        return bytes(ffi.buffer(digest))

    def digest_pages(self, address: int, nr: int) -> bytes:
        """16 octets for each of the `nr` pages of 4096 octets that begin at `address`."""
        digests = ffi.new("uint8_t[]", nr * DIGEST_SIZE)
        lib.ck_digest_pages(self.key, ffi.cast("uint8_t *", address), nr, digests)
        return bytes(ffi.buffer(digests))
