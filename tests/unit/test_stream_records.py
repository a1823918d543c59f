"""The bodies of records, their framing, and images written and read back."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.errors import StreamError
from checkpointd.stream import bodies, image, reader, writer
from checkpointd.stream.libxl import Emulator, LibxlHeader, XlHeader, pack_xenstore
from checkpointd.stream.records import (
    BATCH_MAX,
    PAGE_SIZE,
    RECORD_MAX,
    TYPES_WITH_DATA,
    DomainType,
    ImageHeader,
    RecordType,
    split_records,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The same examples each time, and no limit of time for one: the machine may be busy.
repeatable = settings(derandomize=True, deadline=None)
U8, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 32, 64))

# -- golden octets ---------------------------------------------------------------------------------


def test_headers_are_those_of_xen() -> None:
    octets = writer.headers(DomainType.HVM, version=3, xen=(4, 17))
    assert octets == bytes.fromhex(
        "ffffffffffffffff 58454e46 00000003 0000 0000 00000000"
        "02000000 0c00 0000 04000000 11000000"
    )


def test_libxl_and_xl_headers_are_those_of_xen() -> None:
    assert LibxlHeader().pack() == b"LibxlFmt" + bytes.fromhex("00000002 00000000")
    assert XlHeader.with_config("{}").pack() == (
        b"Xen saved domain, xl format\n \0 \r"
        + bytes.fromhex("04030201 03000000 00000000 07000000 03000000")
        + b"{}\0"
    )


@pytest.mark.parametrize(
    ("body", "octets"),
    [
        (bodies.PvInfo(8, 4), "0804000000000000"),
        (bodies.TscInfo(1, 2, 3, 4), "01000000 02000000 0300000000000000 04000000 00000000"),
        (bodies.HvmParams(((17, 5),)), "01000000 00000000 1100000000000000 0500000000000000"),
        (bodies.P2mFrames(1, 513, (7, 8)), "01000000 01020000 0700000000000000 0800000000000000"),
        (bodies.Vcpu(3, b"\xaa"), "03000000 00000000 aa"),
        (bodies.MsrPolicy(((0xCE, 0, 1),)), "ce000000 00000000 0100000000000000"),
        (Emulator(2, 0, b"x"), "02000000 00000000 78"),
    ],
)
def test_bodies_have_the_layout_of_the_spec(body: bodies.Body, octets: str) -> None:
    assert body.pack() == bytes.fromhex(octets)


def test_records_are_padded_to_eight_octets() -> None:
    assert writer.record(RecordType.HVM_CONTEXT, b"abc") == b"\x09\0\0\0\x03\0\0\0abc\0\0\0\0\0"
    assert writer.record(RecordType.END) == bytes(8)


def test_xenstore_data_is_keys_and_values_each_with_a_nul() -> None:
    assert pack_xenstore([("a/b", "1"), ("c", "")]) == b"a/b\x001\0c\0\0"


# -- round trips -----------------------------------------------------------------------------------


@st.composite
def page_data(draw: st.DrawFn) -> bodies.PageData:
    words = draw(
        st.lists(
            st.builds(
                lambda kind, pfn: kind << 60 | pfn,
                st.sampled_from((0, 1, 4, 9, 12, 13, 14, 15)),
                st.integers(0, (1 << 52) - 1),
            ),
            min_size=1,
            max_size=12,
        )
    )
    data = sum(word >> 60 in TYPES_WITH_DATA for word in words)
    octets = draw(st.binary(min_size=1, max_size=3)) * (12 * PAGE_SIZE)
    return bodies.PageData(
        memoryview(struct.pack(f"<{len(words)}Q", *words)), memoryview(octets[: data * PAGE_SIZE])
    )


opaque = st.builds(bodies.Opaque, st.binary(max_size=100))
vcpu = st.builds(bodies.Vcpu, U32, st.binary(max_size=100))
BODIES: dict[RecordType, st.SearchStrategy[bodies.Body]] = {
    RecordType.END: st.just(bodies.Opaque()),
    RecordType.PAGE_DATA: page_data(),
    RecordType.X86_PV_INFO: st.builds(bodies.PvInfo, U8, U8),
    RecordType.X86_PV_P2M_FRAMES: st.builds(
        bodies.P2mFrames, U32, U32, st.lists(U64, max_size=9).map(tuple)
    ),
    RecordType.X86_PV_VCPU_BASIC: vcpu,
    RecordType.X86_PV_VCPU_EXTENDED: vcpu,
    RecordType.X86_PV_VCPU_XSAVE: vcpu,
    RecordType.SHARED_INFO: opaque,
    RecordType.X86_TSC_INFO: st.builds(bodies.TscInfo, U32, U32, U64, U32),
    RecordType.HVM_CONTEXT: opaque,
    RecordType.HVM_PARAMS: st.builds(
        bodies.HvmParams, st.lists(st.tuples(U64, U64), max_size=9).map(tuple)
    ),
    RecordType.TOOLSTACK: opaque,
    RecordType.X86_PV_VCPU_MSRS: vcpu,
    RecordType.VERIFY: st.just(bodies.Opaque()),
    RecordType.CHECKPOINT: st.just(bodies.Opaque()),
    RecordType.CHECKPOINT_DIRTY_PFN_LIST: st.builds(
        bodies.DirtyPfnList, st.lists(U64, max_size=9).map(tuple)
    ),
    RecordType.STATIC_DATA_END: st.just(bodies.Opaque()),
    RecordType.X86_CPUID_POLICY: st.builds(
        bodies.CpuidPolicy, st.lists(st.tuples(*[U32] * 6), max_size=9).map(tuple)
    ),
    RecordType.X86_MSR_POLICY: st.builds(
        bodies.MsrPolicy, st.lists(st.tuples(U32, U32, U64), max_size=9).map(tuple)
    ),
}


def test_every_record_type_has_a_round_trip() -> None:
    assert set(BODIES) == set(RecordType)


@repeatable
@given(st.data(), st.sampled_from(RecordType), st.sampled_from((2, 3)))
def test_what_is_written_is_read_back(data: st.DataObject, kind: RecordType, version: int) -> None:
    body = data.draw(BODIES[kind])
    stream = writer.headers(DomainType.HVM, version=version) + writer.record(kind, body.pack())
    parser = reader.Reader()
    header, _domain, event = parser.feed(stream)
    parser.finish()
    assert header.content == ImageHeader(version)
    assert isinstance(event.content, reader.Record)
    assert event.content.type == kind
    assert bodies.decode(kind, event.content.body) == body
    assert b"".join(bytes(part) for part in writer.encode(event.content)) == stream[40:]


@repeatable
@given(st.lists(U64, min_size=1, max_size=40))
def test_census_counts_as_one_would_by_hand(words: list[int]) -> None:
    types = [word >> 60 for word in words]
    expected = {kind: types.count(kind) for kind in set(types)}
    found = bodies.census(memoryview(struct.pack(f"<{len(words)}Q", *words)))
    assert found.types == expected
    assert found.reserved == any(word >> 52 & 0xFF for word in words)
    assert found.pages == sum(kind in TYPES_WITH_DATA for kind in types)


def test_page_data_copies_no_page() -> None:
    body = bytearray(bodies.page_data_head([0xF << 60 | 4, 5]) + bytes(PAGE_SIZE))
    (gone, (pfn, kind, page)) = bodies.PageData.unpack(body)
    assert gone == (4, 0xF, None)
    assert (pfn, kind) == (5, 0)
    body[-1] = 7  # seen through the view: it is the same memory
    assert page is not None
    assert page[-1] == 7


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (RecordType.PAGE_DATA, bytes(7)),
        (RecordType.PAGE_DATA, b"\x02\0\0\0\0\0\0\0" + bytes(8)),
        (RecordType.PAGE_DATA, b"\x01\0\0\0\0\0\0\0" + bytes(8 + 4095)),
        (RecordType.X86_PV_INFO, bytes(7)),
        (RecordType.X86_PV_P2M_FRAMES, bytes(12)),
        (RecordType.X86_PV_VCPU_BASIC, bytes(4)),
        (RecordType.X86_TSC_INFO, bytes(20)),
        (RecordType.HVM_PARAMS, b"\x02\0\0\0\0\0\0\0" + bytes(16)),
        (RecordType.HVM_PARAMS, b"\x01\0\0\0\0\0\0\0" + bytes(8)),
        (RecordType.CHECKPOINT_DIRTY_PFN_LIST, bytes(9)),
        (RecordType.X86_CPUID_POLICY, bytes(23)),
        (RecordType.X86_MSR_POLICY, bytes(15)),
    ],
)
def test_bodies_of_impossible_size_are_refused(kind: RecordType, body: bytes) -> None:
    with pytest.raises(StreamError):
        bodies.decode(kind, body)


# -- split_records ---------------------------------------------------------------------------------


@repeatable
@given(st.lists(st.tuples(U32, st.binary(max_size=40)), max_size=6))
def test_records_are_split_as_they_were_joined(records: list[tuple[int, bytes]]) -> None:
    joined = b"".join(writer.record(kind, body) for kind, body in records)
    assert [(kind, bytes(body)) for kind, body in split_records(joined)] == records


@pytest.mark.parametrize(
    ("tail", "complaint"),
    [
        (bytes(4), "octet 0: 4 octets left"),
        (bytes(8) + b"\x09\0\0\0\x08\0\0\0" + bytes(7), "octet 8: record HVM_CONTEXT of 8 octets"),
        (b"\x09\0\0\0\x01\0\0\0" + b"a\0\0\0\0\0\0\1", "octet 9: padding of HVM_CONTEXT"),
        (b"\x09\0\0\0\xff\xff\xff\xff", "does not fit"),
    ],
)
def test_a_spoilt_tail_is_refused(tail: bytes, complaint: str) -> None:
    with pytest.raises(StreamError, match=complaint):
        split_records(tail)


def test_the_writer_counts_padding_where_xen_does() -> None:
    assert writer.record_header(1, RECORD_MAX)
    with pytest.raises(StreamError, match="over the limit"):
        writer.record_header(1, RECORD_MAX + 1)


# -- images ----------------------------------------------------------------------------------------

STATIC = writer.headers(DomainType.HVM) + writer.record(RecordType.STATIC_DATA_END)
TAIL = writer.record(RecordType.X86_TSC_INFO, bytes(24)) + writer.record(
    RecordType.HVM_CONTEXT, b"registers"
)


def page(number: int) -> bytes:
    return struct.pack("<I", number) * (PAGE_SIZE // 4)


def test_an_image_comes_back_page_by_page(tmp_path: Path) -> None:
    many = list(range(100, 100 + BATCH_MAX + 1))
    batches: list[tuple[list[int], bytes]] = [
        ([0xF << 60 | 9, 3, 0xD << 60 | 8], page(3)),
        ([], b""),
        (many, b"".join(page(number) for number in many)),
        ([3], page(33)),
    ]
    path = tmp_path / "image"
    with path.open("wb") as file:
        written = writer.write_image(file, STATIC, batches, TAIL)
    assert written == path.stat().st_size

    seen: dict[int, tuple[int, bytes | None]] = {}

    def on_page(pfn: int, kind: int, data: memoryview | None) -> None:
        seen[pfn] = kind, None if data is None else bytes(data)

    found = image.read_image(path, on_page)
    assert (found.static, found.tail, found.entries) == (STATIC, TAIL, 3 + len(many) + 1)
    assert seen == {
        9: (0xF, None),
        8: (0xD, None),
        3: (0, page(33)),
        **{number: (0, page(number)) for number in many},
    }


def test_an_image_has_records_no_longer_than_xens() -> None:
    file = io.BytesIO()
    writer.write_image(file, STATIC, [(range(2500), bytes(2500 * PAGE_SIZE))], TAIL)
    records = split_records(file.getvalue()[len(STATIC) :])
    counts = [len(body) // (PAGE_SIZE + 8) for kind, body in records if kind == 1]
    assert counts == [BATCH_MAX, BATCH_MAX, 2500 - 2 * BATCH_MAX]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda static, pages, tail: (static[:40], pages, tail), "STATIC_DATA_END"),
        (lambda static, pages, tail: (static[8:], pages, tail), "begin with the image"),
        (lambda static, pages, tail: (static, pages, tail[:-4]), "does not fit"),
        (lambda static, pages, tail: (static, pages, tail + bytes(8)), "no place in the tail"),
        (lambda static, pages, tail: (static, [([1], b"")], tail), "too few pages"),
        (lambda static, pages, tail: (static, [([], page(1))], tail), "too many"),
        (lambda static, pages, tail: (static, [([7 << 60], b"")], tail), "reserved type 7"),
    ],
)
def test_an_image_that_could_not_be_read_is_not_written(
    spoil: Callable[..., tuple[bytes, list[tuple[list[int], bytes]], bytes]], complaint: str
) -> None:
    with pytest.raises(StreamError, match=complaint):
        writer.write_image(io.BytesIO(), *spoil(STATIC, [([1], page(1))], TAIL))


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        (STATIC + TAIL, "without END"),
        (STATIC + TAIL[:-1], "cut off"),
        (STATIC + TAIL + writer.record(RecordType.CHECKPOINT), "no plain libxc image"),
        (STATIC + writer.record(RecordType.PAGE_DATA, bytes(8)), "count is 0"),
        (b"nonsense", "begins no stream"),
    ],
)
def test_what_is_no_image_is_not_read(tmp_path: Path, stream: bytes, complaint: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(stream)
    with pytest.raises(StreamError, match=complaint):
        image.read_image(path, lambda *_: None)
