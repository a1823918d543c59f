"""What leaves smaller comes back the same; and reduction that does not pay turns itself off.

The judgement is tried on machines made of numbers: so many nanoseconds for an octet on the wire, in each stage, and
so much left of it.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.native import Bitmap, DigestKey, address_of
from checkpointd.primary.epoch import Frame
from checkpointd.primary.reducing import Reducer
from checkpointd.primary.worth import LEARN_EVERY, SAMPLE, WARM, Always, Worth
from checkpointd.secondary.epochs import Arrived, Load
from checkpointd.secondary.expander import Expander, NotHeldError
from checkpointd.wire.frames import Kind
from checkpointd.wire.reduced import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.primary.worth import Plan

PAGE = 4096
NR_PFNS = 64
KEY = DigestKey(bytes(32))
MIB = 1 << 20


class Ticks:
    """A clock that goes on by one each time that somebody looks."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now


def pages_frame(pages: dict[int, bytes]) -> Frame:
    words = struct.pack(f"<{len(pages)}Q", *pages)
    data = b"".join(pages.values())
    head = struct.pack("<IIII", 1, 8 + len(words) + len(data), len(pages), 0)
    return sealed(Kind.PAGES, head + words + data)


def sealed(kind: Kind, payload: bytes) -> Frame:
    return Frame(kind, memoryview(payload), KEY.digest(payload))


def words_frame(kind: Kind, *words: int) -> Frame:
    return sealed(kind, struct.pack(f"<{len(words)}Q", *words))


class Pair:
    """A reducer, and the pages that a standby holds."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.reducer = Reducer(plan or Always(), MIB, Ticks())
        self.expander = Expander()
        self.image = bytearray(NR_PFNS * PAGE)
        self.populated = Bitmap(NR_PFNS)
        self.octets = 0  # sent by the last part

    def part(self, *frames: Frame) -> None:
        """Ships a part and lays it in; raises NotHeldError."""
        self.reducer.begin(final=True)
        load, self.octets = Load(1, 0, True, 0), 0
        for frame in frames:
            reduced = self.reducer.reduce(frame)
            self.octets += frame.payload.nbytes if reduced is None else len(reduced)
            if reduced is not None:
                load.reduced.append(Arrived(unpack(reduced)))
            elif frame.kind is Kind.PAGES:
                load.pages.append(frame.payload)
        self.reducer.sent(10)
        image = (address_of(self.image), self.populated)
        for arrived in load.reduced:
            load.pages.append(self.expander.expand(arrived, KEY, NR_PFNS, image, None))
        sent = [frame.payload for frame in frames if frame.kind is Kind.PAGES]
        assert sorted(map(bytes, load.pages)) == sorted(map(bytes, sent))
        for record in load.pages:
            self._lay(bytes(record))

    def _lay(self, record: bytes) -> None:
        (count,) = struct.unpack_from("<I", record, 8)
        for i, pfn in enumerate(struct.unpack_from(f"<{count}Q", record, 16)):
            at = 16 + 8 * count + i * PAGE
            self.image[pfn * PAGE : (pfn + 1) * PAGE] = record[at : at + PAGE]
            self.populated.add(pfn)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.reducer.close()


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def poked(page: bytes, rng: random.Random, words: int) -> bytes:
    changed = bytearray(page)
    for at in rng.sample(range(512), words):
        struct.pack_into("<Q", changed, 8 * at, rng.getrandbits(64))
    return bytes(changed)


@pytest.mark.parametrize(("words", "times"), [(1, 100), (8, 30)])
def test_a_few_changed_words_of_a_page_take_next_to_nothing(
    pair: Pair, words: int, times: int
) -> None:
    rng = random.Random(words)
    pages = {pfn: noise(pfn) for pfn in range(32)}
    pair.part(pages_frame(pages))
    pages = {pfn: poked(page, rng, words) for pfn, page in pages.items()}
    pair.part(pages_frame(pages))
    assert pair.octets * times < 32 * PAGE


def test_what_cannot_be_reduced_goes_as_it_is(pair: Pair) -> None:
    for start in range(3):
        frame = pages_frame({pfn: noise(1000 * start + pfn) for pfn in range(32)})
        pair.part(frame)
        assert pair.octets == frame.payload.nbytes


def test_pages_of_text_are_compressed(pair: Pair) -> None:
    text = b"".join(b"line %d of a log\n" % n for n in range(20_000))
    pages = {pfn: text[pfn * PAGE : (pfn + 1) * PAGE] for pfn in range(32)}
    pair.part(pages_frame(pages))
    assert pair.octets * 4 < 32 * PAGE


def test_pages_that_became_zero_or_went_are_forgotten(pair: Pair) -> None:
    page = noise(1)
    pair.part(pages_frame({3: page, 4: page}))
    pair.part(words_frame(Kind.ZERO, 3), words_frame(Kind.GONE, 0xF << 60 | 4))
    pair.image[3 * PAGE : 5 * PAGE] = bytes(2 * PAGE)
    pair.part(pages_frame({3: poked(page, random.Random(1), 1), 4: page}))


def test_a_history_that_is_wrong_is_found_and_nothing_is_taken_in(pair: Pair) -> None:
    page = noise(1)
    pair.part(pages_frame({3: page}))
    pair.image[3 * PAGE + 100] ^= 1  # the standby has something else
    before = bytes(pair.image)
    with pytest.raises(NotHeldError, match="differ from what the primary staged"):
        pair.part(pages_frame({3: poked(page, random.Random(1), 1)}))
    assert pair.image == before
    # Sent again as it is; what is known begins anew.
    pair.reducer.distrust()
    pair.part(pages_frame({3: noise(2)}))
    pair.part(pages_frame({3: poked(noise(2), random.Random(1), 1)}))
    assert pair.octets < 200


def test_changes_of_a_page_that_is_not_there_are_refused(pair: Pair) -> None:
    pair.part(pages_frame({3: noise(1)}))
    pair.populated = Bitmap(NR_PFNS)
    with pytest.raises(NotHeldError, match="not held"):
        pair.part(pages_frame({3: noise(1)}))


class Whims(Always):
    """Decides by chance, from part to part."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def begin(self, *, final: bool) -> None:
        super().begin(final=final)
        self.every = self._rng.choice([1, 1, 2, SAMPLE])
        self.compress = self._rng.random() < 0.5
        self.as_it_is = self._rng.random() < 0.2


@given(seed=st.integers(0, 1 << 30), whims=st.booleans())
@settings(deadline=None)
def test_whatever_is_sent_arrives(seed: int, whims: bool) -> None:
    """Parts of every kind of page, through a history too small for them, parts going astray in between."""
    rng = random.Random(seed)
    pair = Pair(Whims(rng) if whims else Always())
    for _ in range(rng.randrange(2, 12)):
        pages = {}
        for pfn in rng.sample(range(NR_PFNS), rng.randrange(1, 20)):
            old = bytes(pair.image[pfn * PAGE : (pfn + 1) * PAGE])
            new = poked(old, rng, rng.choice([0, 1, 3, 100, 300]))
            pages[pfn] = rng.choice([new, noise(rng.randrange(3)), b"text" * 1024])
        pair.part(pages_frame(pages))
        if rng.random() < 0.2:  # shipped and never acked: the standby has nothing of it
            pair.reducer.begin(final=True)
            pair.reducer.reduce(pages_frame({rng.randrange(NR_PFNS): noise(7)}))
            if rng.random() < 0.1:
                pair.reducer.refused()
            else:
                pair.reducer.distrust()
    pair.reducer.close()


# ---------------------------------------------------------------- whether it pays


@dataclass
class Machine:
    """What a part of `octets` meets."""

    wire: float  # ns an octet
    changes_cost: float = 0.4
    changes_left: float = 1.0
    codec_cost: float = 2.5
    codec_left: float = 1.0
    octets: int = 8 * MIB
    frame: int = MIB

    def part(self, plan: Worth, *, final: bool = True) -> float:
        """What goes out of an octet."""
        plan.begin(final=final)
        left = self.octets / plan.every
        plan.changed(round(left), round(left * self.changes_left), round(left * self.changes_cost))
        body = self.octets * (self.changes_left if plan.every == 1 else 1.0)
        out = 0.0
        for _ in range(self.octets // self.frame):
            share = body * self.frame / self.octets
            if plan.compress:
                plan.compressed(round(share), round(share * self.codec_left), round(share * self.codec_cost))
                share *= self.codec_left
            out += share
        if plan.as_it_is:
            out = self.octets
        plan.sent(self.octets, round(out), max(1, round(out * self.wire)))
        return out / self.octets


def settled(machine: Machine, plan: Worth | None = None, parts: int = 100) -> Worth:
    plan = plan or Worth()
    for _ in range(20):  # the first copy
        first = Machine(machine.wire, codec_cost=machine.codec_cost, codec_left=machine.codec_left)
        first.part(plan, final=False)
    for _ in range(parts):
        machine.part(plan)
    return plan


ENCRYPTED = 4.0  # ns an octet: CURVE on one core
GIGABIT = 8.0
FAST = 0.3  # no link that we know


def test_changes_that_pay_stay_on() -> None:
    plan = settled(Machine(ENCRYPTED, changes_left=0.03))
    assert plan.every == 1
    assert Machine(ENCRYPTED, changes_left=0.03).part(plan) < 0.05


@pytest.mark.parametrize(
    "machine",
    [
        Machine(ENCRYPTED, changes_left=1.0),  # pages of noise
        Machine(ENCRYPTED, changes_left=0.9),  # what is gained is spent
        Machine(FAST, changes_left=0.03),  # there is nothing to gain
    ],
    ids=["noise", "little", "fast"],
)
def test_changes_that_do_not_pay_are_looked_for_in_a_sample_alone(machine: Machine) -> None:
    plan = settled(machine)
    assert plan.every == SAMPLE
    assert machine.part(plan) == 1


def test_changes_come_back_when_they_pay_and_are_given_time_to() -> None:
    plan = settled(Machine(ENCRYPTED, changes_left=1.0))
    good = Machine(ENCRYPTED, changes_left=0.03)
    parts = 0
    while plan.every != 1:
        good.part(plan)
        parts += 1
    assert parts < 20
    # Nothing is known at first of the pages that were not in the sample.
    for _ in range(WARM):
        Machine(ENCRYPTED, changes_left=0.95).part(plan)
    for _ in range(50):
        good.part(plan)
    assert plan.every == 1


def test_the_codec_is_on_where_the_wire_is_slower_than_it() -> None:
    slow = settled(Machine(GIGABIT, codec_left=0.4))
    assert Machine(GIGABIT, codec_left=0.4).part(slow) < 0.5
    fast = settled(Machine(ENCRYPTED, codec_left=0.4))
    outs = [Machine(ENCRYPTED, codec_left=0.4).part(fast) for _ in range(32)]
    assert min(outs) > 0.9  # one frame of eight is tried, now and then
    assert outs.count(1) >= 29


def test_what_has_been_compressed_already_is_hardly_tried() -> None:
    plan = settled(Machine(GIGABIT))
    begun = sum(plan_compresses(plan) for _ in range(160))
    assert begun == 10


def plan_compresses(plan: Worth) -> bool:
    plan.begin(final=True)
    on = plan.compress
    if on:
        plan.compressed(MIB, MIB, 3 * MIB)
    plan.sent(MIB, MIB, 8 * MIB)
    return on


def test_a_wire_that_has_become_faster_is_noticed() -> None:
    """While all is reduced nothing shows what the wire takes: one part in so many goes as it is."""
    plan = settled(Machine(ENCRYPTED, changes_left=0.03))
    fast = Machine(FAST, changes_left=0.03)
    as_it_is = 0
    for _ in range(20 * LEARN_EVERY):
        as_it_is += fast.part(plan) == 1 and plan.as_it_is
        if plan.every == SAMPLE:
            break
    assert plan.every == SAMPLE
    assert as_it_is <= 10


def test_nothing_flaps_where_gain_and_cost_are_even() -> None:
    """Costs 0.8, saves 0.8 on average, each time a little more or less."""
    rng = random.Random(1)
    plan = settled(Machine(ENCRYPTED, changes_left=0.8))
    changes, before = 0, plan.every
    for _ in range(1000):
        Machine(ENCRYPTED, changes_left=rng.uniform(0.76, 0.84)).part(plan)
        changes += plan.every != before
        before = plan.every
    assert changes <= 1


@pytest.mark.parametrize("stalls", [1, 3])
def test_a_link_that_stood_still_once_has_not_become_slow(stalls: int) -> None:
    machine = Machine(ENCRYPTED, codec_left=0.4)
    plan = settled(machine)
    assert not plan.compress
    for _ in range(stalls):
        Machine(ENCRYPTED * 90, codec_left=0.4).part(plan)
    outs = [machine.part(plan) for _ in range(400)]
    assert min(outs[300:]) > 0.9


def test_epochs_without_pages_teach_nothing_and_hide_nothing() -> None:
    """One in ten has nothing but a context."""
    plan = settled(Machine(ENCRYPTED, changes_left=0.03))
    fast = Machine(FAST, changes_left=0.03)
    for part in range(20 * LEARN_EVERY):
        if part % 10 == 0:
            plan.begin(final=True)
            plan.sent(500, 500, 100_000)
        else:
            fast.part(plan)
    assert plan.every == SAMPLE


def test_small_epochs_do_not_turn_off_what_bursts_gain_by() -> None:
    """Looking at two pages takes as long as looking at fifty: the thread has to wake up."""
    small = Machine(ENCRYPTED, changes_cost=10.0, changes_left=0.03, octets=8 << 10, frame=8 << 10)
    burst = Machine(ENCRYPTED, changes_left=0.03)
    plan = settled(burst)
    for _ in range(100):
        for _ in range(9):
            small.part(plan)
        assert burst.part(plan) < 0.05 or plan.as_it_is


@pytest.mark.parametrize("plan", [Worth(), Always()], ids=["auto", "always"])
def test_after_a_part_was_refused_nothing_is_reduced_for_a_while(plan: Worth | Always) -> None:
    def skipped() -> int:
        count = 0
        while True:
            plan.begin(final=True)
            if not plan.skip:
                return count
            plan.sent(100, 100, 1)
            count += 1

    assert skipped() == 0
    pauses = []
    for _ in range(9):
        plan.refused()
        pauses.append(skipped())
    assert pauses == [15, 31, 63, 127, 255, 511, 1023, 1023, 1023]


def test_a_reducer_whose_part_was_refused_begins_anew(pair: Pair) -> None:
    page = noise(1)
    pair.part(pages_frame({3: page}))
    pair.reducer.refused()
    for _ in range(15):
        pair.part(pages_frame({3: page}))
        assert pair.octets > PAGE
    pair.part(pages_frame({3: page}))
    assert pair.octets > PAGE  # looked at, and not known yet
    pair.part(pages_frame({3: page}))
    assert pair.octets < 200


def test_small_epochs_are_not_sent_as_they_are_in_order_to_learn_nothing() -> None:
    small = Machine(ENCRYPTED, changes_left=0.03, octets=64 << 10, frame=64 << 10)
    plan = settled(small)
    outs = [small.part(plan) for _ in range(4 * LEARN_EVERY)]
    assert sum(out == 1 for out in outs) <= 4
