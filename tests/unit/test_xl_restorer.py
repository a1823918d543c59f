"""The xl restorer against a fake xl: deaths and hangs of xl and of ourselves, and the epoch bit for bit."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_xl import FakeDomains, install
from leaks import nothing_leaks

from checkpointd.authority.processes import identify
from checkpointd.errors import HypervisorError, StateError
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.native import DigestKey
from checkpointd.secondary.epochs import Budget, Load
from checkpointd.secondary.replica import Replica
from checkpointd.secondary.restorers.xl import RESTART, Feed, XlRestorer
from checkpointd.secondary.restorers.xl_process import InterruptedFeedError, Limits, XlReceive
from checkpointd.stream.bodies import TscInfo
from checkpointd.stream.records import DomainType, RecordType
from checkpointd.stream.remus import SEAL, RemusStream
from checkpointd.stream.writer import headers, record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
NR_PFNS = 1200  # a first feed of four records, with 800 of them populated
KEY = DigestKey(bytes(range(32)))
XTAB = 0xF << 60
STATIC = headers(DomainType.HVM) + record(RecordType.STATIC_DATA_END)
CONFIG = f'{{"c_info":{{"name":"guest","uuid":"{UUID}"}}}}'
INFO = DomainInfo(
    UUID,
    7,
    "guest",
    NR_PFNS,
    NR_PFNS,
    "xen",
    HostIdentity("boot", 0, 0),
    {"xl": CONFIG, "type": "pvh"},
)
# Where nothing is to hang, no limit is to matter; where something is, none is to be waited for long.
PATIENT = Limits(20.0, 20.0, 20.0, 20.0, 20.0)
HASTY = Limits(banner=2.0, domain=0.5, stall=0.5, exit=0.5, destroy=1.0)
PATIENCE = 20.0  # s; for what happens within milliseconds

Pages = dict[int, bytes]


def tail(epoch: int) -> bytes:
    tsc = TscInfo(0, 2_000_000, epoch * 1_000_000, 0).pack()
    return record(RecordType.X86_TSC_INFO, tsc) + record(RecordType.HVM_CONTEXT, b"registers" * 8)


class Guest:
    """Makes epochs of a guest, keeps the oracle of its memory, and commits them to a replica."""

    def __init__(self, replica: Replica, seed: int = 1) -> None:
        self.replica = replica
        self.random = random.Random(seed)
        self.memory: Pages = {}
        self.history: dict[int, Pages] = {}  # by epoch
        self.epoch = 0

    def page(self) -> bytes:
        return struct.pack("<Q", self.random.getrandbits(64)) * 512

    def run(self, pages: int = 40, *, live: int = 0) -> int:
        """One more epoch: `pages` written, as many as that zeroed or gone by a tenth; `live` in a part before."""
        self.epoch += 1
        for part, count in enumerate((live, pages) if live else (pages,)):
            data = {self.random.randrange(NR_PFNS): self.page() for _ in range(count)}
            zero = {self.random.randrange(NR_PFNS) for _ in range(count // 10)} - data.keys()
            gone = {self.random.randrange(NR_PFNS) for _ in range(count // 10)} - data.keys() - zero
            final = not live or part == 1
            load = Load(self.epoch, part, final, 0, context=tail(self.epoch) if final else b"")
            if data:
                body = struct.pack(f"<II{len(data)}Q", len(data), 0, *data) + b"".join(
                    data.values()
                )
                load.pages.append(record(RecordType.PAGE_DATA, body))
            load.zero.append(struct.pack(f"<{len(zero)}Q", *zero))
            load.gone.append(struct.pack(f"<{len(gone)}Q", *(XTAB | pfn for pfn in gone)))
            for pfn in gone:
                self.memory.pop(pfn, None)
            self.memory |= dict.fromkeys(zero, bytes(4096)) | data
            self.replica.admit(load)
        self.history[self.epoch] = dict(self.memory)
        assert self.replica.commit(load, KEY) == (0, ())
        return self.epoch


@pytest.fixture
def xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDomains]:
    """A host with the fake xl, and nothing of ours left behind."""
    domains = install(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with nothing_leaks():
        yield domains


@pytest.fixture
def guest(xen: FakeDomains) -> Iterator[Guest]:
    budget = Budget(1 << 24)
    replica = Replica(UUID, NR_PFNS, budget)
    yield Guest(replica)
    replica.close()
    assert budget.used == 0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(xen: FakeDomains) -> Iterator[Callable[..., XlRestorer]]:
    made: list[XlRestorer] = []

    def make(limits: Limits = PATIENT, clock: Callable[[], float] = time.monotonic) -> XlRestorer:
        made.append(XlRestorer(xen, xen.folder / "notes", limits=limits, clock=clock))
        made[-1].begin(INFO, STATIC)
        return made[-1]

    yield make
    for restorer in made:
        restorer.discard()


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)  # what another process does is announced by nothing


def same_memory(xen: FakeDomains, expected: Pages) -> None:
    """Each page that the guest has, and no other."""
    assert xen.pages(UUID) == expected


def runs(xen: FakeDomains) -> bool:
    domain = xen.get(UUID)
    return domain is not None and domain["pauses"] == 0


# ---------------------------------------------------------------- the whole way


def test_warm_activation_is_the_last_committed_epoch(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    for live in (0, 30, 0, 50, 0, 0, 20):
        epoch = guest.run(live=live)
        restorer.committed(guest.replica)
        if epoch % 2:
            until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not applied")
    assert not runs(xen)
    started = restorer.start(INFO, guest.replica, paused=False)
    domain = xen.get(UUID)
    assert domain is not None
    assert (started.domid, domain["name"], domain["pauses"]) == (domain["domid"], "guest", 0)
    same_memory(xen, guest.memory)
    assert not list((xen.folder / "notes").iterdir())


def test_without_a_warm_domain_one_is_built_from_the_image(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    guest.run(300)
    guest.run(live=20)
    make().start(INFO, guest.replica, paused=False)
    assert runs(xen)
    same_memory(xen, guest.memory)


def test_activated_paused_it_stays_paused(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    guest.run()
    make().start(INFO, guest.replica, paused=True)
    domain = xen.get(UUID)
    assert domain is not None
    assert (domain["name"], domain["pauses"]) == ("guest", 1)


def test_a_replica_that_is_not_whole_is_not_started(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    with pytest.raises(StateError, match="copying, not one whole epoch"):
        make().start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is None


def test_discard_leaves_no_domain(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: xen.get(UUID), "no domain")
    restorer.discard()
    assert xen.get(UUID) is None
    assert guest.replica.changed is None
    assert not list((xen.folder / "notes").iterdir())


def test_another_description_begins_anew(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not applied")
    restorer.begin(INFO, STATIC)
    assert xen.get(UUID) is not None, "the same description keeps it"
    restorer.begin(INFO, STATIC + record(RecordType.STATIC_DATA_END))
    assert xen.get(UUID) is None


# ---------------------------------------------------------------- a domain that is here already


def test_a_domain_of_the_same_uuid_is_neither_doubled_nor_destroyed(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    xen.put(UUID, domid=3, name="guest", pauses=1)
    guest.run()
    with pytest.raises(HypervisorError, match=r"domain 3 .* lives here.*xl destroy 3"):
        make().start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is not None


def test_one_that_runs_is_not_destroyed_though_a_note_is_there(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make()
    guest.run()
    restorer._write_note(UUID)
    xen.put(UUID, domid=3, name="guest", pauses=0)
    with pytest.raises(HypervisorError, match="lives here"):
        restorer.start(INFO, guest.replica, paused=False)
    assert runs(xen)


def test_one_that_a_living_process_takes_in_is_not_destroyed(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    xen.put(UUID, domid=3, name="guest--incoming", pauses=2)
    guest.run()
    (xen.folder / "notes").mkdir()
    note = xen.folder / "notes" / f"incoming-{UUID}.json"
    note.write_text(json.dumps({"uuid": UUID, **asdict(identify(os.getppid()))}))
    with pytest.raises(HypervisorError, match="lives here"):
        make().start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is not None


# ---------------------------------------------------------------- xl dies, hangs, fails


def test_death_of_xl_is_an_alarm_and_a_new_one_comes_later(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    clock = Clock()
    restorer = make(clock=clock)
    xen.order("die-at-epoch", "1")
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer._feed and not restorer._feed.alive, "the feed goes on without xl")
    guest.run()
    restorer.committed(guest.replica)
    assert "killed by signal 9" in restorer.alarm
    assert "something broke" in restorer.alarm, "what xl said belongs to it"
    assert xen.get(UUID) is None
    (xen.folder / "orders" / "die-at-epoch").unlink()
    clock.now += RESTART - 1
    guest.run()
    restorer.committed(guest.replica)
    assert xen.get(UUID) is None
    clock.now += 2
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not warm again")
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


@pytest.mark.parametrize("order", ["die-at-epoch", "stop-at-epoch"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_activation_that_meets_a_lost_xl_builds_anew(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer], order: str, epoch: int
) -> None:
    restorer = make(HASTY)
    xen.order(order, str(epoch))
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: (xen.get(UUID) or {}).get("epochs") == 1, "not applied")
    guest.run()
    if epoch == 2:
        restorer.committed(guest.replica)
        until(lambda: (xen.get(UUID) or {}).get("epochs") == 2, "not applied")
    first = (xen.get(UUID) or {}).get("xl")
    (xen.folder / "orders" / order).unlink()
    restorer.start(INFO, guest.replica, paused=False)
    domain = xen.get(UUID)
    assert domain is not None
    assert domain["xl"] != first
    assert runs(xen)
    same_memory(xen, guest.memory)


def test_an_xl_that_does_not_finish_is_replaced(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    restorer = make(HASTY)
    xen.order("no-finish")
    guest.run()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not applied")
    with pytest.raises(HypervisorError, match=r"did not finish the domain within 0\.5 s"):
        restorer.start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is None
    (xen.folder / "orders" / "no-finish").unlink()
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


@pytest.mark.parametrize(
    ("order", "text", "says"),
    [
        ("fail", "failed to free memory for the domain", "ended .*failed to free memory"),
        ("mute", "", "did not say that it is ready within"),
        ("no-domain", "", "made no domain within"),
    ],
)
def test_what_keeps_xl_from_beginning_is_said(
    xen: FakeDomains,
    guest: Guest,
    make: Callable[..., XlRestorer],
    order: str,
    text: str,
    says: str,
) -> None:
    xen.order(order, text)
    guest.run()
    with pytest.raises(HypervisorError, match=says):
        make(HASTY).start(INFO, guest.replica, paused=False)
    assert xen.get(UUID) is None


def test_without_xl_it_says_what_to_install(
    guest: Guest, make: Callable[..., XlRestorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    guest.run()
    with pytest.raises(HypervisorError, match="install xen-utils"):
        make().start(INFO, guest.replica, paused=False)


# ---------------------------------------------------------------- one receiver


def begin(receive: XlReceive) -> RemusStream:
    parts: list[object] = []
    receive.start()
    stream = RemusStream(parts.append)
    stream.begin(CONFIG, STATIC)
    receive.feed(parts.pop())  # type: ignore[arg-type]  # octets
    receive.hold()
    return stream


def one_page(pfn: int) -> bytes:
    return record(RecordType.PAGE_DATA, struct.pack("<IIQ", 1, 0, pfn) + bytes(4096))


def test_what_is_left_in_the_pipe_tells_that_an_epoch_is_not_applied(xen: FakeDomains) -> None:
    receive = XlReceive(xen, UUID, limits=PATIENT)
    os.mkfifo(xen.folder / "orders" / "gate-open")
    xen.order("gate")
    try:
        begin(receive)
        for epoch in (1, 2):
            receive.feed(one_page(epoch))
            receive.feed(tail(epoch))
            receive.seal(tail(epoch))
            if epoch == 2:
                until(lambda: receive.unread == 8, "CHECKPOINT_END has not been read")
                with pytest.raises(HypervisorError, match="has not applied an epoch"):
                    receive.wait_applied(0.05)
                (xen.folder / "orders" / "gate-open").write_bytes(b"1")
            receive.wait_applied(PATIENCE)
            domain = xen.get(UUID)
            assert domain is not None
            assert domain["epochs"] == epoch
        assert receive.finish() == receive.domid
        assert set(xen.pages(UUID)) == {1, 2}
    finally:
        receive.abort()


def test_an_xl_that_reads_nothing_is_given_up_and_no_seal_is_torn(xen: FakeDomains) -> None:
    receive = XlReceive(xen, UUID, limits=HASTY)
    try:
        begin(receive)
        domain = xen.get(UUID)
        assert domain is not None
        os.kill(domain["xl"], signal.SIGSTOP)
        with pytest.raises(HypervisorError, match="read nothing for"):
            receive.feed(one_page(1) * 2000)  # more than any pipe takes
        full = receive.unread
        with pytest.raises(HypervisorError, match="read nothing for"):
            receive.seal(tail(1))
        assert receive.unread == full, "all of the seal or nothing"
    finally:
        receive.abort()
    assert xen.get(UUID) is None


def test_an_interrupted_feed_ends_at_once(xen: FakeDomains) -> None:
    interrupt = os.eventfd(0)
    receive = XlReceive(xen, UUID, interrupt=interrupt, limits=PATIENT)
    try:
        begin(receive)
        os.eventfd_write(interrupt, 1)
        with pytest.raises(InterruptedFeedError):
            receive.wait(receive._exited)
    finally:
        receive.abort()
        os.close(interrupt)


# ---------------------------------------------------------------- our own death


@pytest.mark.parametrize(
    ("point", "epochs", "here"),
    [
        ("xl.pages", 0, False),
        ("xl.before-seal", 0, False),
        ("xl.after-seal", 1, True),
        ("xl.pages@5", 1, True),
        ("xl.before-seal@2", 1, True),
        ("xl.after-seal@2", 2, True),
        ("xl.before-release", 3, True),
    ],
)
def test_our_death_never_starts_the_guest(
    xen: FakeDomains,
    guest: Guest,
    make: Callable[..., XlRestorer],
    point: str,
    epochs: int,
    here: bool,
) -> None:
    """A process like ours is killed at every step. The pipe ends; the domain stays paused, or is none. The
    next life finds it, destroys it, and goes on.
    """
    done = subprocess.run(
        (sys.executable, __file__, str(xen.folder)),
        env={
            **os.environ,
            "CHECKPOINTD_FAULTS": f"{point}=kill",
            "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
        },
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    if here:
        until(lambda: (xen.get(UUID) or {}).get("name") == "guest", "xl has not finished it")
        domain = xen.get(UUID)
        assert domain is not None
        assert (domain["epochs"], domain["pauses"]) == (epochs, 1), "held"
    else:
        until(lambda: xen.get(UUID) is None, "xl has not given up")
    guest.run()
    restorer = make()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not warm")
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


def live_and_die(folder: Path) -> None:
    """Two epochs, each applied, and an activation."""
    domains = FakeDomains(folder)
    guest = Guest(Replica(UUID, NR_PFNS, Budget(1 << 24)), seed=2)
    restorer = XlRestorer(domains, folder / "notes", limits=PATIENT)
    restorer.begin(INFO, STATIC)
    guest.run(NR_PFNS)
    for _ in range(2):
        restorer.committed(guest.replica)
        until(lambda: restorer.status()["applied_epoch"] == guest.epoch, "not applied")
        guest.run(30)
    restorer.start(INFO, guest.replica, paused=False)


# ---------------------------------------------------------------- whole epochs, whatever comes between


class Recorder:
    """In the place of an XlReceive: keeps what it is fed, applies it at each seal, and lets something happen between
    any two records.
    """

    def __init__(self, happen: Callable[[], None]) -> None:
        self.happen = happen
        self.memory: Pages = {}
        self.seals: list[tuple[bytes, Pages]] = []
        self.octets = b""

    def start(self) -> None: ...
    def hold(self) -> None:
        self.octets = b""  # the headers

    def feed(self, data: bytes) -> None:
        self.octets += bytes(data)
        self.happen()

    def seal(self, context: bytes) -> None:
        octets, self.octets = self.octets, b""
        assert octets.endswith(context)
        at = 0
        while at < len(octets) - len(context):
            kind, length, count = struct.unpack_from("<III", octets, at)
            assert kind == RecordType.PAGE_DATA
            words = struct.unpack_from(f"<{count}Q", octets, at + 16)
            page = at + 16 + 8 * count
            for word in words:
                if word >> 60 == 0:
                    self.memory[word] = octets[page : page + 4096]
                    page += 4096
            at += 8 + length + -length % 8
            assert page <= at
        self.seals.append((context, dict(self.memory)))

    def wait_applied(self, limit: float) -> None: ...
    def abort(self) -> None: ...

    def wait(self, wake: int) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), "never woken"


@pytest.mark.parametrize("seed", range(6))
def test_each_sealed_epoch_is_one_committed_epoch_though_commits_go_on(
    guest: Guest, seed: int
) -> None:
    chance = random.Random(seed)
    left = 12  # commits that happen in the middle of a feed

    def happen() -> None:
        nonlocal left
        if left and chance.random() < 0.3:
            left -= 1
            guest.run(chance.choice((1, 40, 300)), live=chance.choice((0, 20)))

    guest.run(NR_PFNS)
    recorder = Recorder(happen)
    feed = Feed(lambda stop: recorder, lambda: None, INFO, STATIC, guest.replica, PATIENT)  # type: ignore[arg-type, return-value]  # the recorder
    try:
        for _ in range(4):
            feed.committed()
            until(lambda: feed.epoch == guest.epoch or feed.error, "not fed")
        feed._last = True
        feed.committed()
        feed._thread.join(PATIENCE)
        assert feed.error is None
    finally:
        feed.close()
    assert recorder.seals
    for context, memory in recorder.seals:
        epochs = [epoch for epoch in guest.history if tail(epoch) == context]
        (epoch,) = epochs
        expected = guest.history[epoch]
        assert {pfn: memory.get(pfn) for pfn in expected} == expected, f"epoch {epoch}"


def test_a_guest_that_changes_faster_than_xl_takes_it_in_is_given_up(guest: Guest) -> None:
    """Else xl, which holds an epoch until it is whole, would grow without bound."""

    def happen() -> None:
        if recorder.seals:
            guest.run(5)

    guest.run(NR_PFNS)
    recorder = Recorder(happen)
    small = replace(INFO, ram_pages=20)
    feed = Feed(lambda stop: recorder, lambda: None, small, STATIC, guest.replica, PATIENT)  # type: ignore[arg-type, return-value]  # the recorder
    try:
        until(lambda: recorder.seals, "not fed")
        guest.run(5)
        feed.committed()
        until(lambda: not feed.alive, "it goes on")
        assert "changes faster than xl takes it in" in str(feed.error)
        assert len(recorder.seals) == 1
    finally:
        feed.close()


def test_a_seal_is_small_enough_to_be_written_as_a_whole() -> None:
    assert len(SEAL) + 8 <= 512, "POSIX's least PIPE_BUF"


if __name__ == "__main__":
    live_and_die(Path(sys.argv[1]))
