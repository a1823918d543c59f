"""An epoch in the making: any order, loss, repetition and corruption of its frames."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.native import DigestKey
from checkpointd.secondary.epochs import (
    FRAME_OVERHEAD,
    Acked,
    Arrived,
    Budget,
    EpochAssembler,
    Lacking,
    Load,
)
from checkpointd.stream.records import RecordType
from checkpointd.stream.writer import record
from checkpointd.wire.frames import (
    U32_MAX,
    FrameError,
    Header,
    Kind,
    PartEnd,
    seal,
)
from checkpointd.wire.messages import EVERYTHING
from checkpointd.wire.reduced import CHANGES, Reduced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NR_PFNS = 1000
KEY = DigestKey(bytes(range(32)))
Frame = tuple[Header, bytes]
TAIL = record(RecordType.HVM_CONTEXT, b"registers" * 9)


def words(*pfns: int) -> bytes:
    return struct.pack(f"<{len(pfns)}Q", *pfns)


def pages(*pfns: int, content: int = 7) -> bytes:
    head = struct.pack("<II", len(pfns), 0) + words(*pfns)
    return record(RecordType.PAGE_DATA, head + bytes([content]) * 4096 * len(pfns))


def frame(kind: Kind, payload: bytes, epoch: int = 1, part: int = 0, sequence: int = 0) -> Frame:
    header = Header(kind, 1, 1, epoch=epoch, part=part, sequence=sequence)
    return seal(header, payload, KEY), payload


def a_part(
    epoch: int = 1, part: int = 0, *, final: bool = True, kinds: int = 3, start: int = 0
) -> list[Frame]:
    """Frames of a part with PART_END last."""
    content = [(Kind.PAGES, pages(start + i)) for i in range(kinds)]
    content += [(Kind.ZERO, words(500, 501)), (Kind.GONE, words(0xF << 60 | 600))]
    if final:
        content += [(Kind.CONTEXT, TAIL[:16]), (Kind.CONTEXT, TAIL[16:])]
        content += [(Kind.AUDIT, words(5) + bytes(16))]
    frames = [
        frame(kind, payload, epoch, part, sequence)
        for sequence, (kind, payload) in enumerate(content)
    ]
    octets = sum(len(payload) for _, payload in frames)
    end = PartEnd(len(frames), final, octets).pack()
    return [*frames, frame(Kind.PART_END, end, epoch, part, len(frames))]


class Bench:
    """An assembler whose reservations are all accounted for at the end."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.budget = Budget(limit)
        self.assembler = EpochAssembler(NR_PFNS, KEY, self.budget, first_epoch=1)
        self.loads: list[Load] = []

    def feed(self, *frames: Frame) -> list[Load | Lacking | Acked]:
        answers = []
        for header, payload in frames:
            answer = self.assembler.frame(header, payload)
            if isinstance(answer, Load):
                self.loads.append(answer)
            if answer is not None:
                answers.append(answer)
        return answers

    def ack(self, load: Load) -> None:
        self.assembler.acked(load.epoch, load.part, final=load.final)

    def close(self) -> None:
        for load in self.loads:
            self.budget.give_back(load.octets)
        self.assembler.discard()
        assert self.budget.used == 0


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def check_load(load: Load, frames: list[Frame]) -> None:
    def of(kind: Kind) -> list[bytes]:
        return [payload for header, payload in frames if header.kind is kind]

    assert load.pages == of(Kind.PAGES)
    assert load.zero == of(Kind.ZERO)
    assert load.gone == of(Kind.GONE)
    assert load.context == b"".join(of(Kind.CONTEXT))
    assert load.audit == b"".join(of(Kind.AUDIT))


def test_a_part_is_whole_with_its_last_frame_and_not_before(bench: Bench) -> None:
    frames = a_part()
    assert bench.feed(*frames[:-1]) == []
    (load,) = bench.feed(frames[-1])
    assert isinstance(load, Load)
    assert (load.epoch, load.part, load.final) == (1, 0, True)
    check_load(load, frames)
    assert bench.budget.used == load.octets


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_any_order_with_losses_and_repetitions_ends_in_the_same_load(seed: int) -> None:
    """A sender that ships what Lacking says, over a network that reorders, repeats and loses."""
    dice = random.Random(seed)
    bench = Bench()
    frames = a_part(kinds=8)
    by_sequence = {header.sequence: (header, payload) for header, payload in frames}
    waiting = [*frames, *dice.sample(frames[:-1], 3)]
    dice.shuffle(waiting)
    for _ in range(20):
        for header, payload in waiting:
            if dice.random() < 0.3:
                continue
            bench.feed((header, payload))
        if bench.loads:
            break
        answer = bench.assembler.query(1, 0)
        assert isinstance(answer, Lacking)
        lacking = {
            sequence
            for sequence in by_sequence
            if any(first <= sequence <= last for first, last in answer.ranges)
        }
        waiting = [by_sequence[sequence] for sequence in lacking]
        dice.shuffle(waiting)
    assert len(bench.loads) == 1
    check_load(bench.loads[0], frames)
    assert bench.feed(*frames) == []  # whole once, whatever comes again
    bench.close()


def test_an_end_with_gaps_says_which(bench: Bench) -> None:
    frames = a_part(kinds=6)
    end = len(frames) - 1
    kept = [frames[i] for i in (0, 1, 4, 7)]
    (lacking,) = bench.feed(*kept, frames[-1])
    assert lacking == Lacking(1, 0, ((2, 3), (5, 6), (8, end - 1)))


def test_before_the_end_the_end_is_missing_too(bench: Bench) -> None:
    frames = a_part()
    bench.feed(frames[0], frames[2])
    assert bench.assembler.query(1, 0) == Lacking(1, 0, ((1, 1), (3, U32_MAX)))
    assert bench.assembler.query(7, 0) == Lacking(7, 0, ((0, U32_MAX),))


def test_live_parts_come_one_after_another(bench: Bench) -> None:
    live, last = a_part(part=0, final=False), a_part(part=1)
    (load,) = bench.feed(*live)
    assert isinstance(load, Load)
    assert not load.final
    with pytest.raises(FrameError, match="part 0 is not acked"):
        bench.feed(last[0])
    bench.ack(load)
    (load,) = bench.feed(*last)
    assert isinstance(load, Load)
    assert (load.part, load.final) == (1, True)


def test_planted_no_ack_before_whole(bench: Bench) -> None:
    """A query for what is under way, or whole and not acked, is never answered by an ack."""
    frames = a_part()
    for header, payload in frames[:-1]:
        bench.feed((header, payload))
        assert isinstance(bench.assembler.query(1, 0), Lacking)
    (load,) = bench.feed(frames[-1])
    assert bench.assembler.query(1, 0) is None
    assert bench.feed(frames[-1]) == []
    assert isinstance(load, Load)
    bench.ack(load)
    assert bench.assembler.query(1, 0) == Acked(1, 0, final=True)


def test_a_lost_ack_is_given_again(bench: Bench) -> None:
    live, last = a_part(part=0, final=False), a_part(part=1)
    for frames in (live, last):
        (load,) = bench.feed(*frames)
        assert isinstance(load, Load)
        bench.ack(load)
        assert bench.feed(*frames) == [Acked(1, load.part, load.final)]
    assert bench.assembler.query(1, 0) == Acked(1, 0, final=False)
    assert bench.assembler.query(1, 1) == Acked(1, 1, final=True)


def test_a_higher_epoch_leaves_no_trace_of_a_partial_one(bench: Bench) -> None:
    bench.feed(*a_part(1, kinds=5)[:-1])
    frames = a_part(2, kinds=1, start=40)
    (load,) = bench.feed(*frames)
    assert isinstance(load, Load)
    check_load(load, frames)
    assert bench.assembler.discarded == 1
    assert bench.feed(*a_part(1)) == []  # the past
    assert bench.budget.used == load.octets


def test_epochs_of_another_session_are_none_of_ours() -> None:
    budget = Budget(1 << 20)
    assembler = EpochAssembler(NR_PFNS, KEY, budget, first_epoch=10)
    for header, payload in a_part(9):
        assert assembler.frame(header, payload) is None
    assert budget.used == 0


def corrupted(frames: list[Frame], at: int) -> Frame:
    header, payload = frames[at]
    return header, payload[:-1] + bytes([payload[-1] ^ 1])


BAD: dict[str, Callable[[], Frame]] = {
    "digest": lambda: corrupted(a_part(), 0),
    "digest of the end": lambda: corrupted(a_part(), -1),
    "pfn beyond the guest": lambda: frame(Kind.PAGES, pages(NR_PFNS)),
    "no record": lambda: frame(Kind.PAGES, bytes(16)),
    "cut record": lambda: frame(Kind.PAGES, pages(1)[:-8]),
    "zero beyond the guest": lambda: frame(Kind.ZERO, words(NR_PFNS)),
    "zero that has gone": lambda: frame(Kind.ZERO, words(0xF << 60)),
    "gone that is here": lambda: frame(Kind.GONE, words(1)),
    "audit beyond the guest": lambda: frame(Kind.AUDIT, words(NR_PFNS, 0, 0)),
    "a kind of no part": lambda: frame(Kind.DIGESTS_WANTED, b""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_is_told_and_not_kept(bench: Bench, name: str) -> None:
    used = bench.budget.used
    with pytest.raises(FrameError):
        bench.feed(BAD[name]())
    assert bench.budget.used == used
    bench.assembler.restart_part()
    assert isinstance(bench.feed(*a_part())[-1], Load)


def ends_badly(*, count: int | None = None, octets: int | None = None) -> list[Frame]:
    frames = a_part()
    end = PartEnd.unpack(*frames[-1])
    end = replace(end, frames=count or end.frames, octets=octets or end.octets)
    return [*frames[:-1], frame(Kind.PART_END, end.pack(), sequence=end.frames)]


def live_with(kind: Kind, payload: bytes) -> list[Frame]:
    frames = [frame(kind, payload)]
    end = PartEnd(1, final=False, octets=len(payload)).pack()
    return [*frames, frame(Kind.PART_END, end, sequence=1)]


def final_of(*frames: Frame) -> list[Frame]:
    octets = sum(len(payload) for _, payload in frames)
    end = PartEnd(len(frames), final=True, octets=octets).pack()
    return [*frames, frame(Kind.PART_END, end, sequence=len(frames))]


BAD_ENDS: dict[str, Callable[[], list[Frame]]] = {
    "octets": lambda: ends_badly(octets=1),
    "fewer frames than came": lambda: ends_badly(count=2),
    "context in a live part": lambda: live_with(Kind.CONTEXT, TAIL),
    "audit in a live part": lambda: live_with(Kind.AUDIT, words(1, 0, 0)),
    "no context": lambda: final_of(frame(Kind.PAGES, pages(1))),
    "cut context": lambda: final_of(frame(Kind.CONTEXT, TAIL[:-8])),
    "a frame after the end": lambda: [a_part()[-1], frame(Kind.ZERO, words(1), sequence=99)],
}


@pytest.mark.parametrize("name", BAD_ENDS)
def test_a_bad_part_is_told_and_leaves_no_trace(bench: Bench, name: str) -> None:
    with pytest.raises(FrameError):
        bench.feed(*BAD_ENDS[name]())
    bench.assembler.restart_part()
    assert bench.budget.used == 0
    assert bench.loads == []
    assert isinstance(bench.feed(*a_part())[-1], Load)


def test_the_smallest_frames_count_too() -> None:
    """A flood of frames with 8 octets each meets the limit after as many as their real cost allows."""
    bench = Bench(limit=100 * FRAME_OVERHEAD)
    flood = [frame(Kind.ZERO, words(1), sequence=sequence) for sequence in range(200)]
    with pytest.raises(FrameError, match="exceed the limit"):
        bench.feed(*flood)
    assert bench.budget.used > bench.budget.limit // 2
    assert bench.budget.used <= bench.budget.limit
    bench.close()


def test_memory_that_others_hold_is_waited_for() -> None:
    bench = Bench()
    held = bench.budget.limit - 6000
    assert bench.budget.take(held)
    frames = a_part()
    assert bench.feed(*frames) == []  # no Lacking: asking at once would only turn in circles
    assert bench.assembler.starved
    bench.budget.give_back(held)
    lacking = bench.assembler.query(1, 0)
    assert isinstance(lacking, Lacking)
    again = [
        (header, payload)
        for header, payload in frames
        if any(first <= header.sequence <= last for first, last in lacking.ranges)
    ]
    assert 0 < len(again) < len(frames)
    assert isinstance(bench.feed(*again)[-1], Load)
    bench.close()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Kind)[13:20]),
            st.integers(1, 3),
            st.integers(0, 2),
            st.integers(0, 4),
            st.binary(max_size=64),
            st.booleans(),
        ),
        max_size=20,
    )
)
def test_whatever_a_trusted_peer_sends_ends_in_an_answer_or_a_frame_error(
    frames: list[tuple[Kind, int, int, int, bytes, bool]],
) -> None:
    bench = Bench(limit=10_000)
    for kind, epoch, part, sequence, payload, true in frames:
        header = Header(kind, 1, 1, epoch, part, sequence, length=len(payload))
        header = replace(header, digest=KEY.digest(payload)) if true else header
        try:
            bench.feed((header, payload))
        except FrameError:
            bench.assembler.restart_part()
        assert bench.budget.used <= bench.budget.limit
    bench.close()


# ---------------------------------------------------------------- frames that come reduced


def reduced(record: bytes, octets: int = 100, sequence: int = 0) -> Frame:
    """A REDUCED frame that stands for a record, its body of so many octets, whatever they hold."""
    body = Reduced(KEY.digest(record), len(record), octets, CHANGES, bytes(octets))
    return frame(Kind.REDUCED, body.pack(), sequence=sequence)


def reduced_part(octets: int = 100, *, final: bool = True) -> list[Frame]:
    """Two frames of pages, the first of them reduced."""
    first, second = pages(1, 2), pages(3)
    frames = [reduced(first, octets), frame(Kind.PAGES, second, sequence=1)]
    length = len(first) + len(second)
    if final:
        frames.append(frame(Kind.CONTEXT, TAIL, sequence=2))
        length += len(TAIL)
    end = PartEnd(len(frames), final, length).pack()
    return [*frames, frame(Kind.PART_END, end, sequence=len(frames))]


def test_a_reduced_frame_counts_as_what_it_stands_for(bench: Bench) -> None:
    frames = reduced_part()
    (load,) = bench.feed(*frames)
    assert isinstance(load, Load)
    assert [part.length for part in load.reduced] == [len(pages(1, 2))]
    assert load.pages == [frames[1][1]]
    # Until it is expanded, both are to be kept.
    kept = [len(pages(1, 2)) + len(frames[0][1]), len(frames[1][1]), len(TAIL)]
    assert bench.budget.used == sum(kept) + 3 * FRAME_OVERHEAD
    assert load.surplus == len(frames[0][1])


def test_a_malformed_reduced_frame_is_named(bench: Bench) -> None:
    with pytest.raises(FrameError, match="REDUCED has a body of 0"):
        bench.feed(frame(Kind.REDUCED, reduced(pages(1), 0)[1] + b"?"))


def test_where_memory_is_short_reduced_frames_are_asked_for_as_they_are() -> None:
    """They take more than what they stand for: a part that fits must not starve because it came reduced."""
    frames = reduced_part(octets=4000)
    size = len(pages(1, 2)) + len(pages(3)) + len(TAIL)
    bench = Bench(size + 3 * FRAME_OVERHEAD)
    assert bench.feed(*frames) == []
    assert bench.assembler.query(1, 0) == Lacking(1, 0, EVERYTHING)
    assert bench.budget.used == 0
    frames[0] = frame(Kind.PAGES, pages(1, 2))
    (load,) = bench.feed(*frames)
    assert isinstance(load, Load)
    assert load.surplus == 0
    bench.close()


def test_what_is_expanded_needs_no_memory_for_what_it_came_as(bench: Bench) -> None:
    frames = reduced_part()
    bench.feed(frames[0])
    (content,) = (content for _, content in bench.assembler._frames.values())
    assert isinstance(content, Arrived)
    before = bench.budget.used
    bench.assembler.foreseen(content)  # it could not be expanded
    assert bench.budget.used == before
    content.record = pages(1, 2)
    bench.assembler.foreseen(content)
    assert bench.budget.used == len(pages(1, 2)) + FRAME_OVERHEAD
    assert not len(content.reduced.body)
    (load,) = bench.feed(*frames[1:])
    assert isinstance(load, Load)
    assert (load.surplus, load.reduced) == (0, [content])
    bench.assembler.foreseen(content)  # late: the load is its owner's
    assert load.octets == bench.budget.used


class Ahead:
    def __init__(self) -> None:
        self.waiting: list[object] = []

    def frame(self, epoch: int, content: object) -> None:
        self.waiting.append((epoch, content))

    def over(self) -> None:
        self.waiting.clear()


def test_what_is_made_ready_ahead_is_frames_of_pages_that_are_kept(bench: Bench) -> None:
    bench.assembler.ahead = ahead = Ahead()
    frames = a_part()
    bench.feed(*frames[:-1], frames[0])
    assert ahead.waiting == [(1, payload) for header, payload in frames[:3]]
    bench.feed(frames[-1])
    assert ahead.waiting == []


@pytest.mark.parametrize("how", ["restart", "higher epoch", "discard"])
def test_nothing_that_was_thrown_away_waits_to_be_made_ready(bench: Bench, how: str) -> None:
    bench.assembler.ahead = ahead = Ahead()
    bench.feed(*a_part()[:2])
    if how == "restart":
        bench.assembler.restart_part()
    elif how == "discard":
        bench.assembler.discard()
    else:
        bench.feed(frame(Kind.ZERO, words(1), epoch=2))
    assert ahead.waiting == []


def test_a_part_that_is_too_large_is_refused_however_it_comes() -> None:
    bench = Bench(len(pages(1, 2)) + FRAME_OVERHEAD - 1)
    with pytest.raises(FrameError, match="exceed the limit"):
        bench.feed(reduced(pages(1, 2)))
    bench.close()
