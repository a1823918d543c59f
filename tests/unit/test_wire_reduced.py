"""REDUCED payloads: what goes in comes out, and what nobody sane would send takes no memory."""

from __future__ import annotations

import contextlib
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.wire.frames import BULK_PAYLOAD_MAX, FrameError
from checkpointd.wire.reduced import CHANGES, ZSTD, Codec, Reduced, unpack

DIGEST = bytes(range(1, 17))


def payload(  # what it has is what a test says
    digest: bytes = DIGEST,
    length: int = 4096,
    body_length: int = 4,
    flags: int = CHANGES,
    reserved: int = 0,
    body: bytes = b"body",
) -> bytes:
    return struct.pack("<16sIIII", digest, length, body_length, flags, reserved) + body


def test_layout_is_that_of_the_specification() -> None:
    reduced = Reduced(DIGEST, 4120, 4, CHANGES, b"body")
    assert reduced.pack() == DIGEST + b"\x18\x10\0\0" b"\x04\0\0\0" b"\x01\0\0\0" b"\0\0\0\0" b"body"
    assert unpack(reduced.pack()) == reduced


@given(body=st.binary(min_size=1, max_size=5000), coded=st.booleans())
def test_a_body_comes_back(body: bytes, coded: bool) -> None:
    codec = Codec()
    content = codec.compress(body) if coded else body
    sent = Reduced(DIGEST, 4120, len(body), CHANGES | (ZSTD if coded else 0), content)
    assert codec.body(unpack(sent.pack())) == body


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (payload()[:32], "too few"),
        (b"", "too few"),
        (payload(digest=bytes(16)), "no digest"),
        (payload(flags=0), "flags 0x0"),
        (payload(flags=5), "flags 0x5"),
        (payload(reserved=1), "flags 0x1 and 0x1"),
        (payload(length=0), "stands for 0"),
        (payload(length=4095), "stands for 4095"),
        (payload(length=BULK_PAYLOAD_MAX + 8), "stands for"),
        (payload(body_length=0, flags=CHANGES | ZSTD), "a body of 0"),
        (payload(body_length=BULK_PAYLOAD_MAX + 1, flags=CHANGES | ZSTD), "a body of"),
        (payload(body_length=5), "says that its body has 5"),
        (payload(flags=ZSTD), "a body of 4 octets in place of 4096"),
    ],
)
def test_lengths_are_checked_before_anything_else(bad: bytes, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        unpack(bad)


def test_a_bomb_is_found_by_what_it_says_of_itself() -> None:
    """A megabyte of zeros in a few octets: not a single one more than was announced is decompressed."""
    codec = Codec()
    packed = codec.compress(bytes(64 << 20))
    bomb = unpack(payload(flags=CHANGES | ZSTD, body_length=100, body=packed))
    with pytest.raises(FrameError, match="holds 67108864 octets, not 100"):
        codec.body(bomb)


def test_what_does_not_say_how_long_it_is_is_not_decompressed() -> None:
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    silent = unpack(payload(flags=CHANGES | ZSTD, body_length=100, body=packed))
    with pytest.raises(FrameError, match="octets, not 100"):
        Codec().body(silent)


@given(at=st.integers(0, 200), octet=st.integers(0, 255), cut=st.integers(0, 30))
def test_no_octets_harm_the_codec(at: int, octet: int, cut: int) -> None:
    codec = Codec()
    packed = bytearray(codec.compress(bytes(range(256)) * 4))
    packed[at % len(packed)] = octet
    content = bytes(packed[: len(packed) - cut % len(packed)])
    reduced = unpack(payload(flags=CHANGES | ZSTD, body_length=1024, body=content or b"\0"))
    with contextlib.suppress(FrameError):
        assert len(codec.body(reduced)) == 1024
