"""Bodies of libxc records as dataclasses with `pack() -> bytes` and `unpack(body)`.

unpack() raises StreamError where the body's size makes no sense; whether the content is *right* is
the business of rules.py. Reserved fields are not kept: receivers ignore them, senders write 0.
Source: Xen, docs/specs/libxc-migration-stream.pandoc, revision 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from checkpointd.errors import StreamError
from checkpointd.stream.records import (
    PAGE_SIZE,
    PFN_MASK,
    RECORD_HEADER,
    TYPE_SHIFT,
    TYPES_WITH_DATA,
    Octets,
    RecordType,
    check_size,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Body(Protocol):
    def pack(self) -> bytes: ...

    @classmethod
    def unpack(cls, body: Octets) -> Self: ...


@dataclass(frozen=True, slots=True)
class Opaque:
    """A body that only the hypervisor understands (HVM_CONTEXT, SHARED_INFO), or an empty one."""

    data: bytes = b""

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        return cls(bytes(body))


@dataclass(frozen=True, slots=True)
class PvInfo:
    """X86_PV_INFO; only (4, 3) and (8, 4) exist."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<BB6x")

    guest_width: int  # octets of a guest's word
    pt_levels: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.guest_width, self.pt_levels)

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        return cls(*_unpack(cls.FORMAT, body, "X86_PV_INFO"))


@dataclass(frozen=True, slots=True)
class P2mFrames:
    """X86_PV_P2M_FRAMES: the pfns of the frames that hold the p2m entries of start to end
    (inclusive).
    """

    start_pfn: int
    end_pfn: int
    frames: tuple[int, ...]

    def pack(self) -> bytes:
        return struct.pack(
            f"<II{len(self.frames)}Q", self.start_pfn, self.end_pfn, *self.frames
        )

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        start, end = _head(body, 8, "X86_PV_P2M_FRAMES")
        return cls(start, end, _words(body, "X86_PV_P2M_FRAMES"))


@dataclass(frozen=True, slots=True)
class Vcpu:
    """X86_PV_VCPU_BASIC, _EXTENDED, _XSAVE and _MSRS: one vcpu's blob behind its number."""

    vcpu_id: int
    data: bytes

    def pack(self) -> bytes:
        return RECORD_HEADER.pack(self.vcpu_id, 0) + self.data

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        vcpu_id, _ = _head(body, 1, "X86_PV_VCPU_*")
        return cls(vcpu_id, bytes(body[8:]))


@dataclass(frozen=True, slots=True)
class TscInfo:
    """X86_TSC_INFO: in every epoch, else time jumps at failover."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIQI4x")

    mode: int
    khz: int
    nsec: int
    incarnation: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.mode, self.khz, self.nsec, self.incarnation)

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        return cls(*_unpack(cls.FORMAT, body, "X86_TSC_INFO"))


@dataclass(frozen=True, slots=True)
class HvmParams:
    """HVM_PARAMS: (index, value) of each parameter that is not zero."""

    params: tuple[tuple[int, int], ...]

    def pack(self) -> bytes:
        flat = [number for pair in self.params for number in pair]
        return struct.pack(f"<II{len(flat)}Q", len(self.params), 0, *flat)

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        count, _ = _head(body, 16, "HVM_PARAMS")
        words = _words(body, "HVM_PARAMS")
        if 2 * count != len(words):
            raise StreamError(f"HVM_PARAMS announces {count} parameters, holds {len(words) // 2}")
        return cls(tuple(zip(words[::2], words[1::2], strict=True)))


@dataclass(frozen=True, slots=True)
class CpuidPolicy:
    """X86_CPUID_POLICY: (leaf, subleaf, a, b, c, d) of each leaf."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<6I")

    leaves: tuple[tuple[int, ...], ...]

    def pack(self) -> bytes:
        return b"".join(self.FORMAT.pack(*leaf) for leaf in self.leaves)

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        return cls(_table(cls.FORMAT, body, "X86_CPUID_POLICY"))


@dataclass(frozen=True, slots=True)
class MsrPolicy:
    """X86_MSR_POLICY: (index, flags, value) of each MSR."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIQ")

    entries: tuple[tuple[int, ...], ...]

    def pack(self) -> bytes:
        return b"".join(self.FORMAT.pack(*entry) for entry in self.entries)

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        return cls(_table(cls.FORMAT, body, "X86_MSR_POLICY"))


@dataclass(frozen=True, slots=True)
class DirtyPfnList:
    """CHECKPOINT_DIRTY_PFN_LIST: what the secondary's own guest wrote, in any order."""

    pfns: tuple[int, ...]

    def pack(self) -> bytes:
        return struct.pack(f"<{len(self.pfns)}Q", *self.pfns)

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        return cls(tuple(pfn for (pfn,) in _table(struct.Struct("<Q"), body, "DIRTY_PFN_LIST")))


@dataclass(frozen=True, slots=True)
class PageData:
    """PAGE_DATA: views into the record's body; no page octet is copied.

    `words` holds u64 pfn words, `pages` PAGE_SIZE octets for each word whose type has data, in
    order.
    """

    words: memoryview
    pages: memoryview

    def pack(self) -> bytes:
        return page_data_head(self.words) + bytes(self.pages)

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        count, _ = _head(body, 1, "PAGE_DATA")
        view = memoryview(body)
        if len(view) < 8 + 8 * count:
            raise StreamError(f"PAGE_DATA announces {count} entries, too short to hold them")
        data = cls(view[8 : 8 + 8 * count], view[8 + 8 * count :])
        wanted = data.census().pages * PAGE_SIZE
        if len(data.pages) != wanted:
            raise StreamError(
                f"PAGE_DATA holds {len(data.pages)} octets of pages, its entries want {wanted}"
            )
        return data

    def census(self) -> Census:
        return census(self.words)

    def __iter__(self) -> Iterator[tuple[int, int, memoryview | None]]:
        """(pfn, type, page or None), in order; the page is a view."""
        at = 0
        for word in iter_words(self.words):
            page_type = word >> TYPE_SHIFT
            if page_type in TYPES_WITH_DATA:
                yield word & PFN_MASK, page_type, self.pages[at : at + PAGE_SIZE]
                at += PAGE_SIZE
            else:
                yield word & PFN_MASK, page_type, None


@dataclass(frozen=True, slots=True)
class Census:
    """How many entries of each type a run of pfn words holds."""

    types: dict[int, int]  # type -> entries; the values 0-15 that occur
    reserved: bool  # some entry has a reserved bit set (59-52)

    @property
    def pages(self) -> int:
        """Entries that carry a page."""
        return sum(count for kind, count in self.types.items() if kind in TYPES_WITH_DATA)


def census(words: memoryview) -> Census:
    """Count entries by type without making a Python integer of each word (a record may hold 16
    million).

    A word is little endian, so its octet 7 is type and reserved bits 59-56, the upper half of
    octet 6 is the reserved bits 55-52.
    """
    top = words[7::8].tobytes()
    types = {kind: count for kind in range(16) if (count := top.count(kind << 4))}
    strays = len(top) - sum(types.values())
    if strays:  # reserved bits set: rare, so this may be slow
        types = {}
        for octet in top:
            types[octet >> 4] = types.get(octet >> 4, 0) + 1
    return Census(types, bool(strays) or max(words[6::8].tobytes(), default=0) > 0x0F)


def iter_words(words: Octets) -> Iterator[int]:
    """The u64 in `words`, one at a time."""
    return (word for (word,) in struct.iter_unpack("<Q", words))


def page_data_head(words: Octets | Sequence[int]) -> bytes:
    """What comes before the pages in a PAGE_DATA body: count, reserved, pfn words."""
    if not isinstance(words, (bytes, bytearray, memoryview)):
        words = struct.pack(f"<{len(words)}Q", *words)
    return RECORD_HEADER.pack(len(words) // 8, 0) + bytes(words)


BODIES: dict[int, type[Body]] = {
    RecordType.PAGE_DATA: PageData,
    RecordType.X86_PV_INFO: PvInfo,
    RecordType.X86_PV_P2M_FRAMES: P2mFrames,
    RecordType.X86_PV_VCPU_BASIC: Vcpu,
    RecordType.X86_PV_VCPU_EXTENDED: Vcpu,
    RecordType.X86_PV_VCPU_XSAVE: Vcpu,
    RecordType.X86_PV_VCPU_MSRS: Vcpu,
    RecordType.X86_TSC_INFO: TscInfo,
    RecordType.HVM_PARAMS: HvmParams,
    RecordType.CHECKPOINT_DIRTY_PFN_LIST: DirtyPfnList,
    RecordType.X86_CPUID_POLICY: CpuidPolicy,
    RecordType.X86_MSR_POLICY: MsrPolicy,
}


def decode(record_type: int, body: Octets) -> Body:
    """The body as a dataclass; Opaque where there is nothing to see. Raises StreamError."""
    return BODIES.get(record_type, Opaque).unpack(body)


def _unpack(form: struct.Struct, data: Octets, name: str) -> tuple[int, ...]:
    check_size(form, data, name)
    return form.unpack(data)


def _head(body: Octets, unit: int, name: str) -> tuple[int, int]:
    """The two u32 that begin many bodies, once whole units follow them."""
    if len(body) < 8 or (len(body) - 8) % unit:
        raise StreamError(f"{name} has {len(body)} octets, not 8 and a multiple of {unit}")
    first, second = RECORD_HEADER.unpack_from(body)
    return first, second


def _words(body: Octets, name: str) -> tuple[int, ...]:
    return tuple(word for (word,) in _table(struct.Struct("<Q"), memoryview(body)[8:], name))


def _table(form: struct.Struct, body: Octets, name: str) -> tuple[tuple[int, ...], ...]:
    if len(body) % form.size:
        raise StreamError(f"{name} has {len(body)} octets, not a multiple of {form.size}")
    rows: Iterable[tuple[int, ...]] = form.iter_unpack(body)
    return tuple(rows)
