"""The payload of a REDUCED frame: pages, in fewer octets (docs/wire-protocol.md, section 6).

Pure. Nothing but FrameError leaves this module, whatever the peer sent.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zstandard

from checkpointd.wire.frames import BULK_PAYLOAD_MAX, NO_DIGEST, FrameError

if TYPE_CHECKING:
    from checkpointd.wire.frames import Octets

_HEAD: Final = struct.Struct("<16sIIII")
CHANGES: Final = 1  # flag: pages travel as their changes
ZSTD: Final = 2  # flag: the body is a Zstandard frame
_NAME: Final = "REDUCED"

# Measured on pages of shared libraries and of a key-value store, 1 MiB at a time: level 1 gives nearly all that 3
# gives, in half the time; the levels below 0 are not much faster, and give a quarter less.
LEVEL: Final = 1


@dataclass(frozen=True, slots=True)
class Reduced:
    """What stands for the payload of a PAGES frame."""

    digest: bytes  # of that payload, 16 octets
    length: int  # octets of that payload
    body_length: int  # octets of the body, before compression
    flags: int
    body: Octets

    @property
    def octets(self) -> int:
        """Of the payload."""
        return _HEAD.size + len(self.body)

    @property
    def changes(self) -> bool:
        return bool(self.flags & CHANGES)

    def pack(self) -> bytes:
        head = _HEAD.pack(self.digest, self.length, self.body_length, self.flags, 0)
        return b"".join((head, self.body))


def unpack(payload: Octets) -> Reduced:
    """Raises FrameError unless every length is within its bounds. The body is not looked at."""
    view = memoryview(payload)
    if view.nbytes <= _HEAD.size:
        raise FrameError(_NAME, f"has {view.nbytes} octets: too few")
    digest, length, body_length, flags, reserved = _HEAD.unpack_from(view)
    body = view[_HEAD.size :]
    if digest == NO_DIGEST:
        raise FrameError(_NAME, "has no digest of what it stands for")
    if reserved or flags & ~(CHANGES | ZSTD) or not flags:
        raise FrameError(_NAME, f"has the flags {flags:#x} and {reserved:#x}")
    if length % 8 or not 0 < length <= BULK_PAYLOAD_MAX:
        raise FrameError(_NAME, f"stands for {length} octets")
    if not flags & CHANGES and body_length != length:
        raise FrameError(_NAME, f"has a body of {body_length} octets in place of {length}")
    if not 0 < body_length <= BULK_PAYLOAD_MAX:
        raise FrameError(_NAME, f"has a body of {body_length} octets")
    if not flags & ZSTD and body.nbytes != body_length:
        raise FrameError(_NAME, f"says that its body has {body_length} octets, and has {body.nbytes}")
    return Reduced(digest, length, body_length, flags, body)


class Codec:
    """Zstandard, for one thread."""

    def __init__(self) -> None:
        self._pack = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
        self._unpack = zstandard.ZstdDecompressor()

    def compress(self, body: Octets) -> bytes:
        return self._pack.compress(body)

    def body(self, reduced: Reduced) -> Octets:
        """The body, decompressed. Raises FrameError; takes no memory beyond the length that was checked."""
        if not reduced.flags & ZSTD:
            return reduced.body
        try:
            # The length of a Zstandard frame is its sender's, and decompress() would believe it.
            said = zstandard.get_frame_parameters(reduced.body).content_size
            if said != reduced.body_length:
                raise FrameError(_NAME, f"holds {said} octets, not {reduced.body_length}")
            return self._unpack.decompress(reduced.body)
        except zstandard.ZstdError as error:
            raise FrameError(_NAME, f"cannot be decompressed: {error}") from None
