"""Records of the libxc migration stream, versions 2 and 3: types, limits, headers.

Source: Xen, docs/specs/libxc-migration-stream.pandoc, revision 3; where spec and code differ, the
code (tools/libs/guest/xg_sr_*). All integers are little endian but those of the image header,
which are always big endian. A record is `u32 type, u32 length, body, 0-7 zero octets`, padded to 8
in all; `length` is the body's alone. docs/stream.md has the tables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import ClassVar, Self

from checkpointd.errors import StreamError

Octets = bytes | bytearray | memoryview

PAGE_SIZE = 4096  # octets: page_shift 12 is the only one a receiver takes
PAGE_SHIFT = 12

# Octets of one body. Xen's reader compares the length without padding, its writer the one with
# padding; both agree at this value, a multiple of 8. It is also the bound of the memory our reader
# takes.
RECORD_MAX = 128 << 20

# Entries of one PAGE_DATA record: Xen's sender never makes more, and its receiver's superpage
# logic wants chunks of 4 MiB.
BATCH_MAX = 1024

OPTIONAL = 1 << 31  # bit of the type: a receiver that does not know the record skips it


class Layer(StrEnum):
    """The nested formats, outermost first; a libxc stream may also come alone."""

    XL = "xl"
    LIBXL = "libxl"
    LIBXC = "libxc"


class RecordType(IntEnum):
    """Types of libxc records (spec, section Record)."""

    END = 0x00
    PAGE_DATA = 0x01
    X86_PV_INFO = 0x02
    X86_PV_P2M_FRAMES = 0x03
    X86_PV_VCPU_BASIC = 0x04
    X86_PV_VCPU_EXTENDED = 0x05
    X86_PV_VCPU_XSAVE = 0x06
    SHARED_INFO = 0x07
    X86_TSC_INFO = 0x08
    HVM_CONTEXT = 0x09
    HVM_PARAMS = 0x0A
    TOOLSTACK = 0x0B  # deprecated: no sender since Xen 4.6
    X86_PV_VCPU_MSRS = 0x0C
    VERIFY = 0x0D  # from here on PAGE_DATA is compared with the guest's memory, not written to it
    CHECKPOINT = 0x0E
    CHECKPOINT_DIRTY_PFN_LIST = 0x0F  # back channel of COLO only
    STATIC_DATA_END = 0x10  # v3
    X86_CPUID_POLICY = 0x11  # v3
    X86_MSR_POLICY = 0x12  # v3


V3_ONLY = frozenset(
    {RecordType.STATIC_DATA_END, RecordType.X86_CPUID_POLICY, RecordType.X86_MSR_POLICY}
)


class DomainType(IntEnum):
    PV = 1
    HVM = 2  # PVH too


class PageType(IntEnum):
    """Bits 63-60 of a pfn word; 5 to 8 are reserved."""

    NOTAB = 0x0  # an ordinary page
    L1TAB = 0x1
    L2TAB = 0x2
    L3TAB = 0x3
    L4TAB = 0x4
    L1TAB_PINNED = 0x9
    L2TAB_PINNED = 0xA
    L3TAB_PINNED = 0xB
    L4TAB_PINNED = 0xC
    BROKEN = 0xD
    XALLOC = 0xE  # populated without data; only senders of Xen 4.2 to 4.5
    XTAB = 0xF  # nothing behind this pfn


TYPES_WITH_DATA = frozenset(PageType) - {PageType.BROKEN, PageType.XALLOC, PageType.XTAB}
PFN_MASK = (1 << 52) - 1
TYPE_SHIFT = 60


def type_name(record_type: int) -> str:
    """Name of a libxc record type, also of one that has none."""
    try:
        return RecordType(record_type).name
    except ValueError:
        kind = "optional" if record_type & OPTIONAL else "unknown"
        return f"{kind} {record_type:#x}"


def padding_of(length: int) -> int:
    """Octets of padding behind a body of `length` octets."""
    return -length % 8


# -- headers --------------------------------------------------------------------------------------

IMAGE_MARKER = b"\xff" * 8
IMAGE_ID = 0x58454E46  # "XENF"
IMAGE_OPTION_BE = 1  # bit 0: the rest of the stream is big endian; no receiver takes it


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """24 octets, big endian: begins every libxc stream."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(">8sIIHHI")

    version: int = 3
    options: int = 0
    reserved: tuple[int, int] = (0, 0)
    marker: bytes = IMAGE_MARKER
    ident: int = IMAGE_ID

    def pack(self) -> bytes:
        return self.FORMAT.pack(
            self.marker, self.ident, self.version, self.options, *self.reserved
        )

    @classmethod
    def unpack(cls, data: Octets) -> Self:
        check_size(cls.FORMAT, data, "image header")
        marker, ident, version, options, reserved, reserved2 = cls.FORMAT.unpack(data)
        return cls(version, options, (reserved, reserved2), marker, ident)


@dataclass(frozen=True, slots=True)
class DomainHeader:
    """16 octets, directly behind the image header."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IHHII")

    type: int
    page_shift: int = PAGE_SHIFT
    reserved: int = 0
    xen_major: int = 4  # 0: made by the converter of streams older than v2
    xen_minor: int = 17

    def pack(self) -> bytes:
        return self.FORMAT.pack(
            self.type, self.page_shift, self.reserved, self.xen_major, self.xen_minor
        )

    @classmethod
    def unpack(cls, data: Octets) -> Self:
        check_size(cls.FORMAT, data, "domain header")
        return cls(*cls.FORMAT.unpack(data))


HEADERS_SIZE = ImageHeader.FORMAT.size + DomainHeader.FORMAT.size  # 40 octets
RECORD_HEADER = struct.Struct("<II")  # type, length


def split_records(buffer: Octets) -> list[tuple[int, memoryview]]:
    """Cut whole, padded records, such as the tail of an epoch, into (type, body view).

    Raises StreamError, with the octet, where the buffer is not exactly whole records.
    """
    view = memoryview(buffer).toreadonly()
    found = []
    at = 0
    while at < len(view):
        if len(view) - at < RECORD_HEADER.size:
            raise StreamError(f"octet {at}: {len(view) - at} octets left, too few for a record")
        record_type, length = RECORD_HEADER.unpack_from(view, at)
        end = at + RECORD_HEADER.size + length
        if length > RECORD_MAX or end + padding_of(length) > len(view):
            raise StreamError(
                f"octet {at}: record {type_name(record_type)} of {length} octets does not fit"
                f" into the {len(view) - at} octets left"
            )
        if any(view[end : end + padding_of(length)]):
            raise StreamError(f"octet {end}: padding of {type_name(record_type)} is not zero")
        found.append((record_type, view[at + RECORD_HEADER.size : end]))
        at = end + padding_of(length)
    return found


def check_size(form: struct.Struct, data: Octets, name: str) -> None:
    if len(data) != form.size:
        raise StreamError(f"{name} has {len(data)} octets, not {form.size}")
