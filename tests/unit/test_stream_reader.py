"""The push parser: slices, positions, layers, limits of memory; and the fuzz target's seeded run."""

from __future__ import annotations

import itertools
import random
import re
import time
import tracemalloc
from typing import Any

import fuzz_stream as fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.stream import writer
from checkpointd.stream.reader import BrokenStreamError, Event, Reader
from checkpointd.stream.records import RECORD_HEADER, RECORD_MAX, Layer, RecordType
from checkpointd.stream.verify import verify

SAMPLES = fuzz.samples()

# The same examples each time, and no limit of time for one: the machine may be busy.
repeatable = settings(derandomize=True, deadline=None)


def read(data: bytes) -> list[Event]:
    reader = Reader()
    events = list(reader.feed(data))
    reader.finish()
    return events


@pytest.mark.parametrize("name", SAMPLES)
def test_every_header_and_record_is_found_where_it_is(name: str) -> None:
    offset = 0
    for event, (label, octets) in zip(read(fuzz.join(SAMPLES[name])), SAMPLES[name], strict=True):
        position = event.position
        assert position.offset == offset
        assert label.split()[-1] == position.name.split()[-1]
        assert label.startswith("libxl") == (position.layer is Layer.LIBXL)
        assert b"".join(bytes(part) for part in writer.encode(event.content)) == octets
        offset += len(octets)


@pytest.mark.parametrize("name", SAMPLES)
def test_octet_by_octet_gives_the_same_events(name: str) -> None:
    data = fuzz.join(SAMPLES[name])
    assert fuzz.read(data[at : at + 1] for at in range(len(data))) == (read(data), None)


@repeatable
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_any_slicing_gives_the_same_events(name: str, data: st.DataObject) -> None:
    stream = fuzz.join(SAMPLES[name])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[first:last] for first, last in itertools.pairwise(edges)]
    assert fuzz.read(pieces) == (read(stream), None)


def test_epochs_and_records_are_numbered_in_each_layer() -> None:
    events = read(fuzz.join(SAMPLES["libxl colo"]))
    found = [
        (str(event.position.layer), event.position.record, event.position.epoch)
        for event in events
        if event.position.name in ("CHECKPOINT", "CHECKPOINT_END", "CHECKPOINT_STATE")
    ]
    assert found == [
        ("libxc", 8, 1),
        ("libxl", 4, 1),
        ("libxc", 13, 2),
        ("libxl", 7, 2),
        ("libxl", 8, 3),
        ("libxc", 18, 3),
        ("libxl", 11, 3),
    ]


def test_an_event_outlives_the_slice_it_came_in() -> None:
    slice_ = bytearray(fuzz.join(SAMPLES["hvm"]))
    events = list(Reader().feed(slice_))
    slice_[:] = bytes(len(slice_))
    assert events == read(fuzz.join(SAMPLES["hvm"]))


def test_octets_behind_the_end_are_counted_not_kept() -> None:
    reader = Reader()
    list(reader.feed(fuzz.join(SAMPLES["hvm"]) + b"abc"))
    list(reader.feed(bytes(100)))
    reader.finish()
    assert reader.ended
    assert reader.trailing == 103


# -- what cannot be read on ------------------------------------------------------------------------

HVM = fuzz.join(fuzz.hvm_start())  # 40 octets of headers, then records
LIBXL = fuzz.join(fuzz.LIBXL_START)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", r"octet 0 .*the stream is empty"),
        (b"\xff\xff", r"octet 0 .*ends at octet 2, with at least 6 octets"),
        (b"not a stream at all", r"octet 0 .*begins no stream"),
        (b"Xen saved domain, XL format\n \0 \r", "file header of xl is damaged"),
        (fuzz.XL_HEADER[1][:32] + bytes.fromhex("01020304") + bytes(12), "big-endian"),
        (fuzz.XL_HEADER[1][:32] + bytes(16), "byte order mark 0x00000000"),
        (fuzz.XL_HEADER[1][:44] + b"\1\0\x10\0", "1048577 octets of configuration"),
        (fuzz.XL_HEADER[1] + b"trailing", "octet 83 .what follows the xl header"),
        (b"LibxlFmt\0\0\0\3\0\0\0\0", "libxl header, epoch 1: version 3 is unknown"),
        (b"LibxlFmt\0\0\0\2\0\0\0\1", "big endian"),
        (HVM[:12] + b"\0\0\0\4" + HVM[16:], "libxc image header, epoch 1: version 4"),
        (HVM[:8] + b"XENG" + HVM[12:], "no image header"),
        (HVM[:16] + b"\0\1" + HVM[18:], "big endian"),
        (LIBXL + bytes(24), "octet 24, libxc image header, epoch 1: no image header"),
        (HVM[:47], "octet 40, libxc record 1 .*ends at octet 47, with at least 1 octets"),
        (HVM[:50], r"octet 40, libxc record 1 \(X86_CPUID_POLICY\).*ends at octet 50"),
        (HVM + b"\1\0\0\0\1\0\0\x08", r"record 4 \(PAGE_DATA\).*134217729 octets; the limit"),
        (
            fuzz.join(SAMPLES["libxl remus"]) + fuzz.join([*fuzz.LIBXL_START[1:]]) + HVM,
            "an image header where a record should begin",
        ),
    ],
)
def test_where_reading_ends_and_why(data: bytes, complaint: str) -> None:
    _, error = fuzz.read([data])
    assert error is not None
    assert re.search(complaint, error), error


def test_a_reader_that_has_given_up_stays_so() -> None:
    reader = Reader()
    with pytest.raises(BrokenStreamError) as first:
        list(reader.feed(b"nonsense"))
    for again in (lambda: list(reader.feed(HVM)), reader.finish):
        with pytest.raises(BrokenStreamError) as later:
            again()
        assert later.value is first.value


# -- bounds ----------------------------------------------------------------------------------------


def peak_of(reader: Reader, data: bytes) -> int:
    """Octets of memory that feeding `data` takes at most, beyond what was taken before."""
    tracemalloc.start()
    try:
        for _ in reader.feed(data):
            pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("length", [RECORD_MAX + 1, 0xFFFFFFFF])
def test_a_length_beyond_the_limit_is_refused_before_memory_is_taken(length: int) -> None:
    reader = Reader()
    list(reader.feed(HVM))
    tracemalloc.start()
    with pytest.raises(BrokenStreamError, match="the limit is 134217728"):
        list(reader.feed(RECORD_HEADER.pack(RecordType.HVM_CONTEXT, length)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10


def test_memory_is_taken_for_what_has_come_not_for_what_is_announced() -> None:
    reader = Reader()
    list(reader.feed(HVM))
    assert peak_of(reader, RECORD_HEADER.pack(RecordType.HVM_CONTEXT, RECORD_MAX)) < 64 << 10
    assert peak_of(reader, bytes(1 << 20)) < 4 << 20


def test_no_more_than_one_record_is_held() -> None:
    body = bytes(1 << 20)
    record = writer.record(RecordType.HVM_CONTEXT, body)
    reader = Reader()
    list(reader.feed(HVM))
    # The one being assembled, the one its reader looks at, and what a growing bytearray has spare.
    assert peak_of(reader, record * 10) < 3 * len(body)


def seconds_octet_by_octet(size: int) -> float:
    reader = Reader()
    record = writer.record(RecordType.HVM_CONTEXT, bytes(size))
    list(reader.feed(HVM))
    started = time.process_time()
    events = [event for at in range(len(record)) for event in reader.feed(record[at : at + 1])]
    assert len(events) == 1
    return time.process_time() - started


def test_octet_by_octet_stays_linear() -> None:
    # Eight times the octets: eight times the time if linear, 64 times if each octet copied all.
    assert seconds_octet_by_octet(1 << 19) < 24 * seconds_octet_by_octet(1 << 16)


# -- fuzzing ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thousands_of_broken_streams_upset_nothing() -> None:
    fuzz.run(2000, seed=2026)


def test_broken_streams_take_bounded_memory() -> None:
    tracemalloc.start()
    try:
        fuzz.run(100, seed=2027)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20  # no mutant is longer than 100 KiB


def test_the_mutants_are_of_both_kinds() -> None:
    corpus = list(SAMPLES.values())
    rng = random.Random(1)
    verdicts = [verify([fuzz.mutate(rng.choice(corpus), corpus, rng)]).ok for _ in range(200)]
    assert 20 < verdicts.count(True) < 150


def test_the_target_notices_a_reader_that_minds_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Reader.feed

    def forgetful(self: Reader, data: bytes) -> Any:
        return feed(self, data if len(data) != 9 else data[:8])

    monkeypatch.setattr(Reader, "feed", forgetful)
    with pytest.raises(AssertionError, match="slices"):
        fuzz.run(200, seed=1)
