"""The framing of a Remus stream, and the search for whole epochs in one that was cut."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import fuzz_stream as fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.errors import StreamError
from checkpointd.stream import bodies
from checkpointd.stream.reader import Reader, Record
from checkpointd.stream.records import PAGE_SIZE, Layer, RecordType
from checkpointd.stream.remus import RemusStream
from checkpointd.stream.scan import Survey, survey, whole_epochs
from checkpointd.stream.verify import Shape, verify
from checkpointd.stream.writer import record

if TYPE_CHECKING:
    from checkpointd.stream.records import Octets

CONFIG = '{"c_info": {"name": "sample"}}'
STATIC = fuzz.join(fuzz.hvm_start())
XTAB = 0xF << 60


def tail(number: int) -> bytes:
    return fuzz.join(fuzz.hvm_epoch(number)[1:])


def words(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


class Output:
    """What was written, in the pieces it came in."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.stream = RemusStream(self.write)

    def write(self, octets: Octets) -> None:
        self.pieces.append(bytes(octets))

    @property
    def octets(self) -> bytes:
        return b"".join(self.pieces)

    def records(self) -> list[Record]:
        events = list(Reader().feed(self.octets))
        return [event.content for event in events if isinstance(event.content, Record)]


@pytest.fixture
def out() -> Output:
    output = Output()
    output.stream.begin(CONFIG, STATIC)
    return output


def test_epochs_are_framed_as_libxl_reads_them(out: Output) -> None:
    for number in (1, 2, 3):
        out.stream.pages(fuzz.pages(0, 1, seed=number)[1])
        out.stream.end_epoch(tail(number))
    report = verify([out.octets])
    assert report.ok, report.findings
    assert report.formats == [Layer.XL, Layer.LIBXL, Layer.LIBXC]
    assert (report.shape, report.whole_epochs, report.notes) == (Shape.CHECKPOINTED, 3, 0)


def test_an_image_is_plain_and_closed(out: Output) -> None:
    out.stream.pages(fuzz.pages(0, 1)[1])
    out.stream.end(tail(1))
    report = verify([out.octets])
    assert report.ok, report.findings
    assert (report.shape, report.closed, report.notes) == (Shape.PLAIN, True, 0)


def test_what_ends_an_epoch_leaves_in_one_piece(out: Output) -> None:
    out.stream.pages(fuzz.pages(0)[1])
    before = len(out.pieces)
    out.stream.end_epoch(tail(1))
    (last,) = out.pieces[before:]
    assert last == tail(1) + record(RecordType.CHECKPOINT) + record(4)


def test_the_tail_may_go_ahead_of_the_seal(out: Output) -> None:
    other = Output()
    other.stream.begin(CONFIG, STATIC)
    for one in (out, other):
        one.stream.pages(fuzz.pages(0)[1])
    out.stream.tail(tail(1))
    out.stream.end_epoch()
    other.stream.end_epoch(tail(1))
    assert out.octets == other.octets
    assert out.pieces[-1] == record(RecordType.CHECKPOINT) + record(4)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1025])
def test_zero_pages_are_pages_of_zeros(out: Output, count: int) -> None:
    begun = len(out.records())
    out.stream.zero(words(*range(count)))
    found = [bodies.PageData.unpack(one.body) for one in out.records()[begun:]]
    assert [pfn for data in found for pfn, _, _ in data] == list(range(count))
    assert all(bytes(page or b"") == bytes(PAGE_SIZE) for data in found for _, _, page in data)
    assert all(len(data.words) <= 8 * 256 for data in found)


@pytest.mark.parametrize("count", [0, 1, 1024, 1025, 3000])
def test_pages_that_have_gone_carry_no_data(out: Output, count: int) -> None:
    begun = len(out.records())
    out.stream.gone(words(*(XTAB | pfn for pfn in range(count))))
    found = [bodies.PageData.unpack(one.body) for one in out.records()[begun:]]
    assert [(pfn, kind) for data in found for pfn, kind, _ in data] == [
        (pfn, 0xF) for pfn in range(count)
    ]
    assert all(len(data.words) <= 8 * 1024 for data in found)


def test_words_may_come_as_any_octets(out: Output) -> None:
    before = len(out.octets)
    out.stream.zero(memoryview(words(1, 2)).cast("Q"))
    first = out.octets[before:]
    out.stream.zero(bytearray(words(1, 2)))
    assert out.octets[before + len(first) :] == first


@pytest.mark.parametrize(
    "page_data",
    [
        record(RecordType.HVM_CONTEXT, bytes(16)),
        record(RecordType.PAGE_DATA, words(0)),
        fuzz.pages(*(XTAB | pfn for pfn in range(1025)))[1],
    ],
)
def test_what_is_no_batch_of_pages_is_refused(out: Output, page_data: bytes) -> None:
    before = out.octets
    with pytest.raises(StreamError, match="PAGE_DATA"):
        out.stream.pages(page_data)
    assert out.octets == before


@pytest.mark.parametrize("kind", [RecordType.END, RecordType.CHECKPOINT, 1 << 31])
def test_what_would_spoil_an_epoch_is_refused_in_its_tail(out: Output, kind: int) -> None:
    before = out.octets
    for end in (out.stream.tail, out.stream.end_epoch, out.stream.end):
        with pytest.raises(StreamError, match="no place in the tail"):
            end(tail(1) + record(kind))
    assert out.octets == before


def test_static_records_without_their_end_are_refused() -> None:
    output = Output()
    with pytest.raises(StreamError, match="STATIC_DATA_END"):
        output.stream.begin(CONFIG, STATIC[:-8])
    assert output.octets == b""


# -- the scan -------------------------------------------------------------------------------------


def recording(epochs: int) -> tuple[bytes, list[int], list[int]]:
    """A stream, where its epochs end, and where each of its records does."""
    output = Output()
    output.stream.begin(CONFIG, STATIC)
    ends = []
    for number in range(1, epochs + 1):
        output.stream.pages(fuzz.pages(0, 1, XTAB | 2, seed=number)[1])
        output.stream.zero(words(3))
        output.stream.gone(words(XTAB | 4))
        output.stream.end_epoch(tail(number))
        ends.append(len(output.octets))
    events = list(Reader().feed(output.octets))
    return output.octets, ends, [event.position.offset for event in events]


STREAM, ENDS, BOUNDARIES = recording(3)


def whole(data: bytes) -> list[int]:
    return list(whole_epochs(io.BytesIO(data)))


def test_the_whole_epochs_of_a_whole_recording() -> None:
    assert whole(STREAM) == ENDS
    assert survey(io.BytesIO(STREAM)) == Survey(len(STREAM), 3, ENDS[-1], plain=False)


@pytest.mark.parametrize("cut", BOUNDARIES)
def test_a_cut_between_two_records_leaves_the_epochs_before_it(cut: int) -> None:
    assert whole(STREAM[:cut]) == [end for end in ENDS if end <= cut]


@given(st.integers(0, len(STREAM)))
def test_a_cut_anywhere_leaves_the_epochs_before_it(cut: int) -> None:
    assert whole(STREAM[:cut]) == [end for end in ENDS if end <= cut]


@given(st.integers(ENDS[0], len(STREAM)), st.integers(1, 10_000))
def test_a_tail_of_zeros_is_no_epoch(cut: int, zeros: int) -> None:
    """What a power failure may leave of data that was written and not synced."""
    found = whole(STREAM[:cut] + bytes(zeros))
    assert found[: len(ENDS)] == found
    assert {end for end in ENDS if end <= cut} <= set(found)
    # An epoch whose last octets are zeros anyway may be completed by the very octets that it lacks.
    extra = [end for end in found if end > cut]
    assert all(not any(STREAM[cut:end]) for end in extra)


@pytest.mark.parametrize("name", fuzz.samples())
def test_streams_of_every_shape(name: str) -> None:
    data = fuzz.join(fuzz.samples()[name])
    report = verify([data])
    found = survey(io.BytesIO(data))
    assert found.epochs == report.whole_epochs
    assert found.plain == (report.shape is Shape.PLAIN)
    if not report.closed:
        assert found.end == len(data)


@pytest.mark.parametrize("cut", [8, 100])
def test_an_image_that_was_cut_is_not_plain(cut: int) -> None:
    data = fuzz.join(fuzz.samples()["xl"])
    assert not survey(io.BytesIO(data[:-cut])).plain
    assert not survey(io.BytesIO(data + bytes(8))).plain


def test_nothing_is_whole_in_an_empty_file() -> None:
    assert survey(io.BytesIO()) == Survey(0, 0, 0, plain=False)


def test_what_is_no_stream_is_told() -> None:
    with pytest.raises(StreamError, match="begins no stream"):
        survey(io.BytesIO(b"#!/bin/sh\nexit 0\n"))


def test_bodies_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO(STREAM)
    read = file.read
    octets = 0

    def counting(size: int = -1) -> bytes:
        nonlocal octets
        octets += size
        return read(size)

    monkeypatch.setattr(file, "read", counting)
    assert list(whole_epochs(file)) == ENDS
    assert octets < 4096 + 8 * len(BOUNDARIES) + 8
