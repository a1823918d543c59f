"""The few octets of a libxc stream that an embedded guest makes itself (image header, context)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

from checkpointd.errors import HypervisorError

# Image header: marker, "XENF", version 3, options (little endian), reserved; big endian as the format asks.
_IMAGE_HEADER = struct.pack(">QIIHHI", 0xFFFFFFFFFFFFFFFF, 0x58454E46, 3, 0, 0, 0)
# Domain header: type 2 (HVM and PVH), page shift 12, reserved, the Xen version whose stream this is.
_DOMAIN_HEADER = struct.pack("<IHHII", 2, 12, 0, 4, 17)
_STATIC_DATA_END = struct.pack("<II", 0x10, 0)

_RECORD = struct.Struct("<II")
_REC_X86_TSC_INFO = 0x08
_REC_HVM_CONTEXT = 0x09
# struct tail in csrc/guest.c: magic, version, reserved, step, nr_pfns, uuid, program.
_CONTEXT = struct.Struct("<8sIIQQ16s64s")


def static_records() -> bytes:
    """What begins the stream of an embedded guest: both headers and STATIC_DATA_END (48 octets, v3)."""
    return _IMAGE_HEADER + _DOMAIN_HEADER + _STATIC_DATA_END


@dataclass(frozen=True, slots=True)
class Context:
    """What the tail records of an embedded guest say."""

    step: int
    nr_pfns: int
    uuid: str
    program: str

    @classmethod
    def parse(cls, tail: bytes) -> Context:
        """Read the tail records of an epoch; HypervisorError if they are no embedded guest's."""
        offset, found = 0, b""
        while offset + _RECORD.size <= len(tail):
            kind, length = _RECORD.unpack_from(tail, offset)
            offset += _RECORD.size
            if kind == _REC_HVM_CONTEXT:
                found = tail[offset : offset + length]
            offset += (length + 7) // 8 * 8
        if offset != len(tail) or len(found) != _CONTEXT.size:
            raise HypervisorError(
                "the context is not that of an embedded guest: wrong records or lengths"
            )
        magic, version, _, step, nr_pfns, uuid, program = _CONTEXT.unpack(found)
        if magic != b"CKEMBCTX" or version != 1:
            raise HypervisorError("the context is not that of an embedded guest of this version")
        return cls(
            step, nr_pfns, str(UUID(bytes=uuid)), program.rstrip(b"\0").decode("ascii", "replace")
        )
