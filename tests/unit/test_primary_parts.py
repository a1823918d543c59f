"""The thin parts of the primary: who owns dirt, the shipper's thread, the watchdog."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.errors import CheckpointdError, StuckError
from checkpointd.native import DigestKey
from checkpointd.primary import shipping
from checkpointd.primary.dirty import DirtySet
from checkpointd.primary.epoch import Frame
from checkpointd.primary.events import Ship, ShipFailed, Shipped
from checkpointd.primary.rounds import LiveRounds
from checkpointd.primary.shipping import Known, Session, Shipper
from checkpointd.primary.watchdog import Watchdog
from checkpointd.wire import frames
from checkpointd.wire.frames import NO_DIGEST, Header, Kind, PartEnd
from checkpointd.wire.initiator import LinkTimeoutError
from checkpointd.wire.messages import EVERYTHING

if TYPE_CHECKING:
    from collections.abc import Iterator

PFNS = 200
PATIENCE = 30.0  # s


# -------------------------------------------------------------------- dirty


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stage", "keep", "settle", "give_back"]),
            st.sets(st.integers(0, PFNS - 1)),
        )
    )
)
def test_a_bit_is_somewhere_until_its_epoch_is_settled(steps: list[tuple[str, set[int]]]) -> None:
    dirty = DirtySet(PFNS, 1)
    owed: set[int] = set()
    for step, pages in steps:
        carried = dirty.carried[0]
        match step:
            case "stage" if not set(carried):
                for page in pages:
                    dirty.pending.add(page)
                owed |= pages
                carried.update(dirty.pending)
                dirty.pending.clear()
            case "keep":
                dirty.keep(0)
            case "settle":
                owed -= set(carried) | set(dirty.unsettled)
                dirty.settle(0)
            case "give_back":
                dirty.give_back()
                assert set(dirty.pending) == owed
        assert set(dirty.pending) | set(carried) | set(dirty.unsettled) == owed


def test_beginning_anew_owes_every_page() -> None:
    dirty = DirtySet(PFNS, 2)
    dirty.begin_anew()
    assert dirty.pending.count() == PFNS


# -------------------------------------------------------------------- live rounds


def test_rounds_go_on_while_they_gain_and_until_half_an_arena_is_left() -> None:
    rounds = LiveRounds(800, 10_000)
    assert [rounds.enough(800, left) for left in (4000, 2000, 600, 401, 400)] == [
        False, False, False, False, True,
    ]  # fmt: skip


def test_a_guest_that_writes_as_fast_as_it_is_copied_is_stopped_for_what_fits() -> None:
    rounds = LiveRounds(800, 100_000)
    assert [rounds.enough(800, left) for left in (4000, 701, 705, 690, 690)] == [
        False, False, False, False, True,
    ]  # fmt: skip
    assert not rounds.used_up


def test_a_guest_that_writes_faster_than_it_is_copied_uses_the_rounds_up() -> None:
    rounds = LiveRounds(800, 2000)
    for used_up in (False, False, True):
        assert not rounds.enough(800, 900)
        assert rounds.used_up is used_up


# -------------------------------------------------------------------- shipping


class FakeLink:
    """Takes frames until it is told to be stuck; holds them until released."""

    def __init__(self) -> None:
        self.sent: list[tuple[Header, bytes]] = []
        self.room = threading.Event()
        self.free = threading.Event()
        self.room.set()
        self.free.set()
        self.tried = threading.Event()
        self.waiting = threading.Event()
        self.abandoned = 0
        self.closed = False
        self.answers: list[tuple[Header, bytes]] = []

    def send(self, header: Header, payload: bytes | memoryview = b"", *, timeout_s: float) -> None:
        self.tried.set()
        if not self.room.wait(timeout_s):
            raise LinkTimeoutError("stuck")
        self.sent.append((header, bytes(payload)))

    def wait_released(self, timeout_s: float) -> bool:
        self.waiting.set()
        return self.free.wait(timeout_s)

    def receive(self, timeout_s: float) -> tuple[Header, memoryview] | None:
        return (lambda a: (a[0], memoryview(a[1])))(self.answers.pop(0)) if self.answers else None

    def abandon(self) -> None:
        self.abandoned += 1
        self.free.set()

    def close(self) -> None:
        self.closed = True


class Bench:
    def __init__(self) -> None:
        self.link = FakeLink()
        self.reports: queue.Queue[Shipped | ShipFailed | Known] = queue.Queue()
        self.fatal: queue.Queue[BaseException] = queue.Queue()
        self.session = Session(7, 1, DigestKey(bytes(32)))
        self.staged = self.octets = 0
        self.shipper = Shipper(self.link, self.reports.put, self.fatal.put, self._count)  # type: ignore[arg-type] # a fake
        self.shipper.start()

    def _count(self, staged: int, octets: int) -> None:
        self.staged += staged
        self.octets += octets

    def frames(self) -> list[Frame]:
        payloads = [b"a" * 16, b"b" * 24]
        return [
            Frame(Kind.PAGES, memoryview(payload), self.session.key.digest(payload))
            for payload in payloads
        ]


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = threading.active_count()
    made = Bench()
    yield made
    made.shipper.close()
    assert made.link.closed
    assert made.fatal.empty()
    assert threading.active_count() == before


def test_closing_waits_until_zeromq_lets_go_of_the_arena(bench: Bench) -> None:
    """The host is lost with a part on the wire: next the arenas are freed."""
    bench.link.free.clear()
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), bench.frames())
    assert bench.link.waiting.wait(PATIENCE)
    bench.shipper.close()
    assert bench.link.free.is_set(), "closed without it"


def test_a_part_goes_out_in_order_and_ends_with_its_sum(bench: Bench) -> None:
    bench.shipper.ship(bench.session, Ship(0, 5, 1, final=True), bench.frames())
    assert bench.reports.get(timeout=PATIENCE) == Shipped(5, 1)
    headers = [header for header, _ in bench.link.sent]
    assert [(h.kind, h.epoch, h.part, h.sequence) for h in headers] == [
        (Kind.PAGES, 5, 1, 0),
        (Kind.PAGES, 5, 1, 1),
        (Kind.PART_END, 5, 1, 2),
    ]
    assert PartEnd.unpack(*bench.link.sent[-1]) == PartEnd(2, True, 40)
    assert all(
        bench.session.key.digest(payload) == header.digest for header, payload in bench.link.sent
    )
    assert bench.octets == 40 + 16


def test_only_what_is_missing_is_shipped_again(bench: Bench) -> None:
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True, ranges=((1, 1),)), bench.frames())
    bench.reports.get(timeout=PATIENCE)
    assert [header.sequence for header, _ in bench.link.sent] == [1, 2]


def test_a_part_is_not_reported_while_zeromq_holds_it(bench: Bench) -> None:
    bench.link.free.clear()
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), bench.frames())
    assert bench.link.waiting.wait(PATIENCE)
    assert bench.reports.empty()
    bench.link.free.set()
    assert bench.reports.get(timeout=PATIENCE) == Shipped(5, 0)


def test_abandoning_interrupts_a_stuck_send_and_reports_nothing(bench: Bench) -> None:
    bench.link.room.clear()
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), bench.frames())
    assert bench.link.tried.wait(PATIENCE)
    assert bench.shipper.abandon(PATIENCE)
    assert bench.link.abandoned == 1
    assert bench.reports.empty()
    bench.link.room.set()
    bench.shipper.ship(bench.session, Ship(0, 6, 0, final=True), bench.frames())
    assert bench.reports.get(timeout=PATIENCE) == Shipped(6, 0)


def test_a_part_that_cannot_go_on_is_reported_once_zeromq_has_let_go(bench: Bench) -> None:
    """Whatever stopped it: its frames may be on their way, and the report says that the arena may be reused."""

    def refuse(*_: object, **__: object) -> None:
        raise CheckpointdError("out of its bounds")

    bench.link.send = refuse  # type: ignore[method-assign]
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), bench.frames())
    assert bench.reports.get(timeout=PATIENCE) == ShipFailed(5, 0, "out of its bounds")
    assert bench.link.abandoned == 1


@pytest.mark.parametrize("stuck", ["room", "free"])
def test_a_part_that_zeromq_does_not_let_go_of_is_never_reported(
    stuck: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "SEND_TIMEOUT", 2 * shipping.SLICE)
    bench = Bench()

    def hold() -> None:
        raise LinkTimeoutError("held for ever")

    bench.link.abandon = hold  # type: ignore[method-assign]
    getattr(bench.link, stuck).clear()
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), bench.frames())
    assert "held for ever" in str(bench.fatal.get(timeout=PATIENCE))
    assert bench.reports.empty()
    bench.shipper.close()


def test_abandoning_does_not_wait_for_the_rest_of_a_part(bench: Bench) -> None:
    """With a link that always has room too: a large part takes longer than the engine waits."""
    seen = threading.Event()
    more = threading.Event()
    send = bench.link.send

    def one(*arguments: Any, **options: Any) -> None:
        send(*arguments, **options)
        seen.set()
        more.wait(PATIENCE)

    bench.link.send = one  # type: ignore[method-assign]
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), bench.frames())
    assert seen.wait(PATIENCE)
    bench.shipper._abandoning.set()  # as abandon() begins
    more.set()
    assert bench.shipper.abandon(PATIENCE)
    assert len(bench.link.sent) == 1
    assert bench.reports.empty()


def test_digests_are_gathered_until_the_last_frame(bench: Bench) -> None:
    def answer(first: int, pages: int, *, last: bool) -> tuple[Header, bytes]:
        payload = first.to_bytes(8, "little") + bytes([first + 1]) * 16 * pages
        header = Header(Kind.DIGESTS, 7, 1, flags=int(last), length=len(payload))
        return Header(
            Kind.DIGESTS,
            7,
            1,
            flags=int(last),
            length=header.length,
            digest=bench.session.key.digest(payload),
        ), payload

    bench.link.answers = [answer(0, 2, last=False), answer(2, 1, last=True)]
    bench.shipper.fetch_known(bench.session, 4)
    known = bench.reports.get(timeout=PATIENCE)
    assert known == Known(bytearray(b"\1" * 32 + b"\3" * 16 + bytes(16)))


def test_digests_that_do_not_fit_are_given_up(bench: Bench) -> None:
    payload = (4).to_bytes(8, "little") + bytes(16)
    header = frames.seal(Header(Kind.DIGESTS, 7, 1, flags=1), payload, bench.session.key)
    bench.link.answers = [(header, payload)]
    bench.shipper.fetch_known(bench.session, 4)
    assert bench.reports.get(timeout=PATIENCE) == Known(None)


def test_a_broken_link_is_fatal_not_silent() -> None:
    bench = Bench()
    bench.link.abandon = lambda: (_ for _ in ()).throw(CheckpointdError("held for ever"))  # type: ignore[method-assign]
    bench.shipper._jobs.put(None) if not bench.shipper.abandon(1.0) else None
    assert "held for ever" in str(bench.fatal.get(timeout=PATIENCE))
    bench.shipper.close()


# -------------------------------------------------------------------- watchdog


def test_the_watchdog_ends_a_process_without_progress() -> None:
    ended: queue.Queue[int] = queue.Queue()
    watchdog = Watchdog(0.01, lambda: 1, ended.put)
    watchdog.start()
    assert ended.get(timeout=PATIENCE) == StuckError.exit_code
    watchdog.stop()


def test_the_watchdog_leaves_progress_alone() -> None:
    ended: queue.Queue[int] = queue.Queue()
    looks = iter(range(10**9))
    seen = threading.Event()

    def progress() -> int:
        look = next(looks)
        if look > 5:
            seen.set()
        return look

    watchdog = Watchdog(0.001, progress, ended.put)
    watchdog.start()
    assert seen.wait(PATIENCE)
    watchdog.stop()
    assert ended.empty()


def test_digests_have_sixteen_octets() -> None:
    assert len(NO_DIGEST) == 16


# -------------------------------------------------------------------- a shipper that reduces


class Reduced:
    """A reducer that makes one octet of each frame of pages, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, *, final: bool) -> None:
        self.told.append("begin")

    def reduce(self, frame: Frame) -> bytes | None:
        self.told.append("reduce")
        return bytes(40) if frame.kind is Kind.PAGES else None

    def sent(self, ns: int) -> None:
        assert ns > 0
        self.told.append("sent")

    def distrust(self) -> None:
        self.told.append("distrust")

    def refused(self) -> None:
        self.told.append("refused")

    def close(self) -> None:
        self.told.append("close")


@pytest.fixture
def reducing(bench: Bench) -> Reduced:
    bench.shipper._reducer = reducer = Reduced()  # type: ignore[assignment]  # a fake
    return reducer


def large(bench: Bench) -> list[Frame]:
    payloads = [b"a" * 800, b"b" * 80]
    return [
        Frame(kind, memoryview(payload), bench.session.key.digest(payload))
        for kind, payload in zip((Kind.PAGES, Kind.ZERO), payloads, strict=True)
    ]


def test_a_reduced_part_counts_as_what_it_stands_for(bench: Bench, reducing: Reduced) -> None:
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), large(bench))
    assert bench.reports.get(timeout=PATIENCE) == Shipped(5, 0)
    assert [(header.kind, len(payload)) for header, payload in bench.link.sent] == [
        (Kind.REDUCED, 40),
        (Kind.ZERO, 80),
        (Kind.PART_END, 16),
    ]
    assert PartEnd.unpack(*bench.link.sent[-1]) == PartEnd(2, True, 880)
    assert all(
        bench.session.key.digest(payload) == header.digest for header, payload in bench.link.sent
    )
    assert (bench.staged, bench.octets) == (880 + 16, 120 + 16)
    assert reducing.told == ["begin", "reduce", "reduce", "sent"]


@pytest.mark.parametrize(
    ("ranges", "told"),
    [(((0, 0),), ["distrust"]), (EVERYTHING, ["distrust", "refused"])],
    ids=["a frame", "all"],
)
def test_what_is_shipped_again_goes_as_it_is(
    bench: Bench, reducing: Reduced, ranges: tuple[tuple[int, int], ...], told: list[str]
) -> None:
    """And what is known of what the standby holds is so no more."""
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True, ranges=ranges), large(bench))
    assert bench.reports.get(timeout=PATIENCE) == Shipped(5, 0)
    assert bench.link.sent[0][0].kind is Kind.PAGES
    assert reducing.told == told


def test_an_abandoned_part_is_forgotten(bench: Bench, reducing: Reduced) -> None:
    bench.link.free.clear()
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), large(bench))
    assert bench.link.waiting.wait(PATIENCE)
    assert bench.shipper.abandon(PATIENCE)
    assert reducing.told == ["begin", "reduce", "reduce", "distrust"]


def test_a_part_that_zeromq_had_to_be_made_to_let_go_of_teaches_nothing(
    bench: Bench, reducing: Reduced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "SEND_TIMEOUT", 0.0)
    bench.link.free.clear()
    bench.shipper.ship(bench.session, Ship(0, 5, 0, final=True), large(bench))
    assert bench.reports.get(timeout=PATIENCE) == Shipped(5, 0)
    assert reducing.told == ["begin", "reduce", "reduce"]
