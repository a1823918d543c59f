"""The header: its octets, its checks, and that nothing but FrameError comes of wrong ones."""

from __future__ import annotations

import pickle
from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.wire.frames import (
    BULK_PAYLOAD_MAX,
    HEADER_BYTES,
    Channel,
    FrameError,
    Header,
    Kind,
    PartEnd,
    check_digest,
    pack,
    seal,
    split,
    unpack,
)

PAGES = Header(Kind.PAGES, session=7, term=1, epoch=3, part=2, sequence=5, length=16)


class Blake:
    """Stands in for the session's digest key: any function of 16 octets will do."""

    def digest(self, data: bytes | bytearray | memoryview, /) -> bytes:
        return blake2b(data, digest_size=16).digest()


def test_layout_is_that_of_the_specification() -> None:
    header = Header(
        Kind.ACK,
        session=0x1112131415161718,
        term=0x2122232425262728,
        epoch=0x3132333435363738,
        part=0x41424344,
        flags=1,
    )
    assert pack(header).hex() == (
        "43484b31" "0400" "4400" "01000000" "44434241"
        "1817161514131211" "2827262524232221" "3837363534333231"
        "00000000" "00000000" + 16 * "00"
    )  # fmt: skip
    pages = replace(PAGES, digest=bytes(range(16)))
    assert pack(pages)[40:].hex() == "05000000" + "10000000" + bytes(range(16)).hex()


def test_kinds_are_those_of_the_specification() -> None:
    assert {kind.name: kind.value for kind in Kind} == {
        "HELLO": 0x01, "HEARTBEAT": 0x02, "QUERY": 0x03, "RETIRE": 0x04, "END": 0x05,
        "ENGINE_LOST": 0x06,
        "CHECK": 0x20, "CHECKED": 0x60,
        "WELCOME": 0x41, "REFUSED": 0x42, "ECHO": 0x43, "ACK": 0x44, "MISSING": 0x45,
        "COMMITTED": 0x46, "FULL_COPY_WANTED": 0x47, "RETIRED": 0x48,
        "ENGINE_LOST_HEARD": 0x49,
        "PAGES": 0x81, "ZERO": 0x82, "GONE": 0x83, "CONTEXT": 0x84, "AUDIT": 0x85,
        "PART_END": 0x86, "DIGESTS_WANTED": 0x87, "REDUCED": 0x88,
        "DIGESTS": 0xC1,
    }  # fmt: skip


@given(
    st.integers(1, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(2, BULK_PAYLOAD_MAX // 8),
    st.binary(min_size=16, max_size=16),
)
def test_what_is_packed_is_unpacked(
    session: int, term: int, epoch: int, part: int, sequence: int, words: int, digest: bytes
) -> None:
    header = Header(Kind.PAGES, session, term, epoch, part, sequence, 0, words * 8, digest)
    assert unpack(pack(header)) == header


@pytest.mark.parametrize(
    ("field", "offset", "octets"),
    [
        ("magic", 0, b"CHK2"),
        ("version", 4, b"\x05\x00"),
        ("version", 4, b"\x03\x00"),
        ("kind", 6, b"\x00\x00"),
        ("kind", 6, b"\x81\x01"),
        ("flags", 8, b"\x01\x00\x00\x00"),  # PAGES has none
        ("flags", 8, b"\x00\x00\x00\x80"),
        ("session", 16, bytes(8)),
        ("length", 44, b"\x00\x00\x00\x00"),
        ("length", 44, b"\x11\x00\x00\x00"),  # not a multiple of 8
        ("length", 44, b"\xff\xff\xff\xff"),
    ],
)
def test_each_wrong_field_is_named(field: str, offset: int, octets: bytes) -> None:
    data = bytearray(pack(PAGES))
    data[offset : offset + len(octets)] = octets
    with pytest.raises(FrameError) as caught:
        unpack(bytes(data))
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("field", "header"),
    [
        ("epoch", Header(Kind.RETIRED, 1, 1, epoch=1)),
        ("part", Header(Kind.COMMITTED, 1, 1, epoch=1, part=1, length=16)),
        ("sequence", Header(Kind.ACK, 1, 1, epoch=1, sequence=1)),
        ("digest", Header(Kind.ACK, 1, 1, epoch=1, digest=b"x" * 16)),
        ("digest", replace(PAGES, digest=b"short")),
        ("term", replace(PAGES, term=-1)),
        ("sequence", replace(PAGES, sequence=1 << 32)),
        ("length", Header(Kind.DIGESTS, 1, 1, length=20)),
        ("length", Header(Kind.AUDIT, 1, 1, length=32)),
    ],
)
def test_a_wrong_header_is_not_sent(field: str, header: Header) -> None:
    with pytest.raises(FrameError) as caught:
        pack(header)
    assert caught.value.field == field


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_garbage_is_a_frame_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        unpack(data)


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255), st.sampled_from(list(Kind)))
def test_a_changed_octet_is_another_header_or_a_frame_error(
    at: int, change: int, kind: Kind
) -> None:
    lengths = {Kind.HELLO: 2, Kind.HEARTBEAT: 32, Kind.AUDIT: 24, Kind.DIGESTS: 24}
    for length in (lengths.get(kind, 16), 0):
        try:
            good = pack(Header(kind, 1, 1, length=length))
        except FrameError:
            continue
        data = bytearray(good)
        data[at] ^= change
        try:
            changed = unpack(data)
        except FrameError:
            return
        assert pack(changed) == bytes(data)
        assert changed != unpack(good)


@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("message", []),
        ("message", [pack(PAGES), bytes(16), b""]),
        ("header", [b""]),
        ("length", [pack(PAGES)]),
        ("length", [pack(PAGES), bytes(8)]),
        ("message", [pack(Header(Kind.DIGESTS_WANTED, 1, 1)), b""]),
        ("kind", [pack(Header(Kind.ACK, 1, 1))]),
    ],
)
def test_split_names_what_is_wrong(field: str, parts: list[bytes]) -> None:
    with pytest.raises(FrameError) as caught:
        split(parts, Channel.BULK_TO_SECONDARY)
    assert caught.value.field == field


def test_split_takes_what_belongs() -> None:
    header, payload = split([pack(PAGES), bytes(16)], Channel.BULK_TO_SECONDARY)
    assert (header, bytes(payload)) == (PAGES, bytes(16))
    header, payload = split([pack(Header(Kind.DIGESTS_WANTED, 1, 1))], Channel.BULK_TO_SECONDARY)
    assert (header.kind, payload.nbytes) == (Kind.DIGESTS_WANTED, 0)


def test_the_digest_finds_memory_that_changed_after_it_was_sealed() -> None:
    memory = bytearray(4096)
    header = seal(replace(PAGES, length=0), memory, Blake())
    assert header.length == 4096
    check_digest(header, memory, Blake())
    memory[100] ^= 1
    with pytest.raises(FrameError, match="sequence 5"):
        check_digest(header, memory, Blake())


def test_a_frame_without_payload_has_no_digest() -> None:
    header = seal(Header(Kind.DIGESTS_WANTED, 1, 1), b"", Blake())
    assert header.digest == bytes(16)
    check_digest(header, b"", Blake())


@pytest.mark.parametrize("final", [True, False])
def test_part_end(final: bool) -> None:
    end = PartEnd(frames=5, final=final, octets=4096)
    header = Header(Kind.PART_END, 1, 1, 1, 0, 5, length=16)
    assert PartEnd.unpack(header, end.pack()) == end


@pytest.mark.parametrize(
    ("field", "payload"),
    [
        ("frames", PartEnd(4, True, 0).pack()),
        ("octets", PartEnd(5, True, 5 * BULK_PAYLOAD_MAX + 1).pack()),
        ("flags of PART_END", b"\x05\0\0\0\x02\0\0\0" + bytes(8)),
        ("length", b""),
    ],
)
def test_part_end_names_what_is_wrong(field: str, payload: bytes) -> None:
    header = Header(Kind.PART_END, 1, 1, 1, 0, 5, length=16)
    with pytest.raises(FrameError) as caught:
        PartEnd.unpack(header, payload)
    assert caught.value.field == field


def test_a_frame_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(FrameError("term", "is wrong")))
    assert (error.field, str(error)) == ("term", "malformed message: term is wrong")
