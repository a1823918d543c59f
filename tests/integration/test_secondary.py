"""The whole secondary over real sockets, with an engine, a fence and a hypervisor that the test plays.

Waiting is always for a condition, with a limit that only a failure reaches.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import zmq

from checkpointd import faults
from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import Role, TermStore
from checkpointd.daemon.config import SecondaryOptions
from checkpointd.daemon.metrics import SecondaryMetrics
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.port import DomainInfo, EndReason, HostIdentity
from checkpointd.native import DigestKey
from checkpointd.secondary.service import SecondaryService
from checkpointd.secondary.standby import State
from checkpointd.stream.records import RecordType
from checkpointd.stream.writer import record
from checkpointd.wire import messages as m
from checkpointd.wire.bulk import BulkLink
from checkpointd.wire.frames import Header, Kind, PartEnd, seal
from checkpointd.wire.initiator import ControlLink
from checkpointd.wire.keys import loopback_pair
from checkpointd.wire.notices import Notices
from checkpointd.wire.sockets import Contexts, Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from checkpointd.hypervisor.port import Hypervisor, Incoming
    from checkpointd.secondary.epochs import Load
    from checkpointd.wire.keys import KeyStore

LIMIT_S = 20.0  # for any wait; none comes near it
SILENCE_NS = 1_000_000_000  # a busy machine may keep a thread waiting for a good part of this
NR_PFNS = 1024
HOST = HostIdentity("boot", 1, 1)
INFO = DomainInfo("12345678-1234-4234-8234-123456789abc", 4, "g", NR_PFNS, NR_PFNS, "fake", HOST)
OTHER = replace(INFO, uuid="22345678-1234-4234-8234-123456789abc", domid=5)
TAIL = record(RecordType.HVM_CONTEXT, b"registers" * 8)
SEED = bytes(range(32))
KEY = DigestKey(SEED)


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.002)


class FakeFence:
    """What the test says of the old host."""

    def __init__(self) -> None:
        self.view = HostView(False, False, "the host has exited")
        self.result = FenceResult(True, "it has exited")
        self.calls: list[str] = []

    def probe(self, timeout: float) -> HostView:
        self.calls.append("probe")
        return self.view

    def fence(self, timeout: float) -> FenceResult:
        self.calls.append("fence")
        return self.result

    def close(self) -> None:
        pass


class FakeHypervisor:
    """Starts guests by remembering what memory and registers they would have."""

    name = "fake"

    def __init__(self) -> None:
        self.started: list[tuple[DomainInfo, bytes, bytes]] = []
        self.trouble: Exception | None = None  # why no guest can be started
        self.failed = 0  # starts that met it

    def domains(self) -> list[DomainInfo]:
        return [info for info, _, _ in self.started]

    def prepare(self, info: DomainInfo, memory_fd: int) -> Incoming:
        hypervisor = self
        fd = os.dup(memory_fd)

        class Domain:
            def start(
                self, context: bytes, populated: bytes, *, paused: bool = False
            ) -> DomainInfo:
                if hypervisor.trouble is not None:
                    hypervisor.failed += 1
                    raise hypervisor.trouble
                memory = os.pread(fd, NR_PFNS * 4096, 0)
                os.close(fd)
                hypervisor.started.append((info, memory, context))
                return info

            def discard(self) -> None:
                os.close(fd)

        return Domain()


class Secondary:
    def __init__(self, directory: Path, contexts: Contexts, keys: KeyStore, **more: Any) -> None:
        self.hypervisor = FakeHypervisor()
        self.fence = FakeFence()
        played = not more.pop("own_fence", False)
        self.terms = TermStore(directory / "terms")
        self.metrics = SecondaryMetrics(list(State))
        self.failures: list[BaseException] = []
        options = SecondaryOptions(
            state_dir=directory, run_dir=directory, control_port=0, bulk_port=0,
            silence=SILENCE_NS, keep_images=directory / "keep", **{"engine_restart": 0, **more},
        )  # fmt: skip
        self.service = SecondaryService(
            options,
            cast("Hypervisor", self.hypervisor),
            contexts=contexts,
            keys=keys,
            terms=self.terms,
            metrics=self.metrics,
            make_fence=(lambda *_: self.fence) if played else None,
        )
        self.ports = self.service.ports
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.service.run()
        except BaseException as error:  # noqa: BLE001 - given to the test
            self.failures.append(error)

    def domain(self, info: DomainInfo = INFO) -> dict[str, Any]:
        for domain in self.service.status()["domains"]:
            if domain["uuid"] == info.uuid:
                return cast("dict[str, Any]", domain)
        return {"state": "none"}

    def wait_state(self, state: State, info: DomainInfo = INFO) -> dict[str, Any]:
        eventually(lambda: self.domain(info)["state"] == state or self.failures, f"state {state}")
        assert not self.failures
        return self.domain(info)

    def close(self) -> None:
        self.service.stop()
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        self.terms.close()


class Engine:
    """A primary's engine: real links, and epochs made up here."""

    def __init__(
        self,
        contexts: Contexts,
        keys: KeyStore,
        ports: tuple[int, int],
        *,
        session: int,
        term: int = 1,
        info: DomainInfo = INFO,
        resume: bool = False,
    ) -> None:
        endpoint = Endpoint("127.0.0.1", keys.trusted()["loopback"], *ports)
        self.got: list[m.Message] = []
        self.fatal: list[BaseException] = []
        self.session, self.term = session, term
        self.control = ControlLink(
            contexts.control, endpoint, keys.own(), heartbeat_s=0.02,
            deliver=self.got.append, on_error=self.fatal.append, on_fatal=self.fatal.append,
        )  # fmt: skip
        self.bulk = BulkLink(contexts.bulk, endpoint, keys.own())
        self.control.start()
        self.control.hello(m.Hello(session, term, info, 10**8, SEED, b"", 1, resume=resume))

    def wait(self, kind: type[m.Message], count: int = 1) -> Any:
        def found() -> list[m.Message]:
            return [message for message in list(self.got) if isinstance(message, kind)]

        eventually(lambda: len(found()) >= count or self.fatal, f"{count} {kind.__name__}")
        assert not self.fatal
        return found()[count - 1]

    def frames(
        self,
        epoch: int,
        pages: dict[int, int],
        *,
        part: int = 0,
        final: bool = True,
        audit: bytes = b"",
    ) -> list[tuple[Header, bytes]]:
        """`pages`: pfn and the octet that fills it."""
        body = struct.pack("<II", len(pages), 0) + struct.pack(f"<{len(pages)}Q", *pages)
        body += b"".join(bytes([fill]) * 4096 for fill in pages.values())
        content = [(Kind.PAGES, record(RecordType.PAGE_DATA, body))]
        content += [(Kind.CONTEXT, TAIL)] if final else []
        content += [(Kind.AUDIT, audit)] if audit else []
        octets = sum(len(payload) for _, payload in content)
        content.append((Kind.PART_END, PartEnd(len(content), final, octets).pack()))
        frames = []
        for sequence, (kind, payload) in enumerate(content):
            header = Header(kind, self.session, self.term, epoch, part, sequence)
            frames.append((seal(header, payload, KEY), payload))
        return frames

    def send(self, frames: list[tuple[Header, bytes]]) -> None:
        for header, payload in frames:
            self.bulk.send(header, payload, timeout_s=LIMIT_S)
        assert self.bulk.wait_released(LIMIT_S)

    def protect(self, epoch: int = 1, fill: int = 1) -> None:
        """One whole epoch, committed."""
        self.wait(m.Welcome)
        self.send(self.frames(epoch, {1: fill, 2: fill}))
        eventually(
            lambda: any(isinstance(g, m.Committed) and g.epoch == epoch for g in list(self.got)),
            f"commit of {epoch}",
        )

    def close(self) -> None:
        self.control.close()
        self.bulk.close()


class Lab:
    """Makes engines and secondaries, and closes them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.contexts = Contexts.make()
        self.primary_keys, self.secondary_keys = loopback_pair(directory / "keys")
        self.secondary = Secondary(directory, self.contexts, self.secondary_keys)
        self.engines: list[Engine] = []

    def engine(self, session: int = 7, **more: Any) -> Engine:
        ports = self.secondary.ports
        self.engines.append(
            Engine(self.contexts, self.primary_keys, ports, session=session, **more)
        )
        return self.engines[-1]

    def watcher(self, session: int = 7, term: int = 1) -> Notices:
        """What speaks for a dead engine. The test closes it."""
        keys = self.primary_keys
        endpoint = Endpoint("127.0.0.1", keys.trusted()["loopback"], *self.secondary.ports)
        return Notices(self.contexts.control, endpoint, keys.own(), session=session, term=term)

    def restart_secondary(self, **options: Any) -> None:
        started = self.secondary.hypervisor
        self.secondary.close()
        self.secondary = Secondary(self.directory, self.contexts, self.secondary_keys, **options)
        self.secondary.hypervisor.started += started.started

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.secondary.close()
        self.contexts.close()


@pytest.fixture(scope="module", autouse=True)
def _collector_of_pyzmq() -> None:
    """pyzmq starts a thread for the whole process at its first send without copying: before we count."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as a, context.socket(zmq.PAIR) as b:
        a.bind("inproc://warm")
        b.connect("inproc://warm")
        b.send(bytes(1 << 17), copy=False)
        assert len(a.recv()) == 1 << 17


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    threads = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    lab = Lab(tmp_path)
    yield lab
    faults.arm("")
    lab.close()
    assert not lab.secondary.failures
    assert set(threading.enumerate()) <= threads
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors closed")


def page_of(memory: bytes, pfn: int) -> bytes:
    return memory[pfn * 4096 : (pfn + 1) * 4096]


def test_a_silent_primarys_guest_goes_on_from_the_last_acked_epoch(lab: Lab) -> None:
    engine = lab.engine()
    engine.wait(m.Welcome)
    engine.send(engine.frames(1, {1: 1, 2: 1}, final=False))
    assert engine.wait(m.Ack) == m.Ack(1, 0, final=False)
    engine.send(engine.frames(1, {2: 2}, part=1))
    assert engine.wait(m.Ack, 2) == m.Ack(1, 1, final=True)
    engine.protect(2, fill=3)
    engine.send(engine.frames(3, {1: 9})[:-1])  # never whole
    lab.secondary.wait_state(State.STANDBY)
    assert lab.secondary.fence.calls == []
    engine.close()
    domain = lab.secondary.wait_state(State.ACTIVE)
    assert (domain["committed_epoch"], domain["term"]) == (2, 2)
    assert lab.secondary.fence.calls == ["probe", "fence"]
    ((info, memory, context),) = lab.secondary.hypervisor.started
    assert (info, context) == (INFO, TAIL)
    assert page_of(memory, 1) == page_of(memory, 2) == b"\3" * 4096
    assert page_of(memory, 0) == bytes(4096)
    assert lab.secondary.terms.load(INFO.uuid).role is Role.SECONDARY_ACTIVE

    back = lab.engine(resume=True)
    assert back.wait(m.Refused).code == "term"
    lab.restart_secondary()
    again = lab.engine(session=8)
    assert again.wait(m.Refused).code == "term"
    assert lab.engine(session=9, term=2).wait(m.Refused).code == "active"
    assert lab.engine(session=10, term=3).wait(m.Refused).code == "active"  # it runs here
    assert not any(isinstance(got, m.Welcome) for got in back.got + again.got)


@pytest.mark.parametrize("whole", [True, False])
def test_what_came_while_the_old_guest_was_fenced_is_let_go(lab: Lab, whole: bool) -> None:
    """It was not acked; its memory is that of all guests."""
    fencing, going_on = threading.Event(), threading.Event()

    def slowly(timeout: float) -> FenceResult:
        fencing.set()
        assert going_on.wait(LIMIT_S)
        return FenceResult(True, "it has exited")

    lab.secondary.fence.fence = slowly  # type: ignore[method-assign]  # to stop it at the right place
    engine = lab.engine()
    engine.protect()
    engine.control.close()
    assert fencing.wait(LIMIT_S)
    frames = engine.frames(2, {1: 5})
    engine.send(frames if whole else frames[:-1])
    used = lab.secondary.service._budget
    eventually(lambda: used.used, "the frames")
    if whole:
        eventually(lambda: lab.secondary.service._drivers[INFO.uuid].machine._held, "the part")
    going_on.set()
    lab.secondary.wait_state(State.ACTIVE)
    eventually(lambda: used.used == 0, "memory given back")


def test_without_a_fence_nothing_is_activated_and_a_returning_primary_goes_on(lab: Lab) -> None:
    lab.secondary.fence.result = FenceResult(False, "it does not answer; pull its plug")
    engine = lab.engine()
    engine.protect()
    engine.close()
    domain = lab.secondary.wait_state(State.FAILED)
    assert "pull its plug" in domain["reason"]
    assert lab.secondary.service.not_ready()
    back = lab.engine(resume=True)
    welcome = back.wait(m.Welcome)
    assert (welcome.last_epoch, welcome.committed_epoch) == (1, 1)
    back.protect(2, fill=2)
    lab.secondary.wait_state(State.STANDBY)
    assert lab.secondary.hypervisor.started == []


@pytest.mark.parametrize(
    "trouble", [HypervisorError("not enough free memory"), KeyError("a mistake of ours")]
)
def test_a_fenced_guest_that_cannot_be_started_holds_up_the_end(
    lab: Lab, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    """`systemctl restart` of a standby that has the only copy of a guest there is."""
    hypervisor = lab.secondary.hypervisor
    hypervisor.trouble = trouble
    engine = lab.engine()
    engine.protect()
    engine.close()
    lab.secondary.wait_state(State.FAILED)
    lab.secondary.service.stop()
    failed = hypervisor.failed
    lives = lab.secondary._thread.is_alive
    eventually(lambda: hypervisor.failed > failed + 1 or not lives(), "two more starts")
    (told,) = [text for text in caplog.messages if "not ending yet: its old guest is stopped" in text]
    assert "epoch 1 is here alone; mend this" in told
    assert str(trouble) in told
    assert f"kill -KILL {os.getpid()}" in told
    assert lab.secondary.service.status()["stopping"]
    hypervisor.trouble = None
    eventually(lambda: not lives(), "the end")
    ((info, memory, _),) = hypervisor.started
    assert (info, page_of(memory, 1)) == (INFO, b"\1" * 4096)


def test_that_a_guest_could_not_be_fenced_is_told_from_the_beginning(lab: Lab) -> None:
    lab.restart_secondary(own_fence=True)
    engine = lab.engine()
    engine.protect()
    domain = lab.secondary.domain()
    assert "nothing here can stop g on 127.0.0.1: give --fence-command" in domain["no_fence"]
    assert domain["no_fence"] in domain["alarm"]
    engine.close()
    assert "--fence-command" in lab.secondary.wait_state(State.FAILED)["reason"]


def test_a_fence_command_lets_the_guest_go_on(lab: Lab) -> None:
    lab.restart_secondary(own_fence=True, fence_command=("/bin/echo", "outlet 4 is off"))
    engine = lab.engine()
    engine.protect()
    assert lab.secondary.domain()["no_fence"] is None
    engine.close()
    lab.secondary.wait_state(State.ACTIVE)


LOST = m.EngineLost(INFO.uuid, m.LeftGuest.RUNNING, "engine 4711 died")


def answered(watcher: Notices, word: m.FromPrimary, kind: type[m.Message]) -> Any:
    """Say it as a watcher does until there is such an answer."""
    found: list[m.Message] = []

    def said() -> bool:
        watcher.say(word)
        time.sleep(0.05)
        found.extend(answer for answer in watcher.heard() if isinstance(answer, kind))
        return bool(found)

    eventually(said, kind.__name__)
    return found[0]


def test_a_watcher_keeps_the_standby_waiting_for_a_new_engine(lab: Lab) -> None:
    lab.restart_secondary(engine_restart=3600 * SILENCE_NS)
    lab.secondary.fence.view = HostView(None, None, "it cannot be looked at")
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        answered(watcher, LOST, m.EngineLostHeard)
        domain = lab.secondary.wait_state(State.ENGINE_LOST)
        assert "the guest is running; engine 4711 died" in domain["reason"]
        silent_at = time.monotonic() + 2 * SILENCE_NS / 1e9
        eventually(
            lambda: answered(watcher, LOST, m.EngineLostHeard) and time.monotonic() > silent_at,
            "more than the silence",
        )
        assert lab.secondary.domain()["state"] == State.ENGINE_LOST
        lab.engine(session=8).protect(2)
        lab.secondary.wait_state(State.STANDBY)
        watcher.say(LOST)  # of the old session: dropped
    dropped = lab.secondary.service.status
    eventually(lambda: dropped()["dropped"].get("ENGINE_LOST"), "the old session's word")
    assert lab.secondary.domain()["state"] == State.STANDBY
    assert lab.secondary.fence.calls == []


def test_a_watcher_that_falls_silent_too_is_a_lost_host(lab: Lab) -> None:
    lab.restart_secondary(engine_restart=3600 * SILENCE_NS)
    lab.secondary.fence.view = HostView(None, None, "it cannot be looked at")
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        answered(watcher, LOST, m.EngineLostHeard)
        lab.secondary.wait_state(State.ENGINE_LOST)
    lab.secondary.wait_state(State.ACTIVE)
    assert lab.secondary.fence.calls == ["probe", "fence"]


def test_a_watcher_learns_that_its_guest_was_taken_over(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        refused = answered(watcher, LOST, m.Refused)  # after the limit, which is 0 here
        assert refused.code == "active"
    lab.secondary.wait_state(State.ACTIVE)
    lab.restart_secondary()
    with closing(lab.watcher()) as watcher:
        assert answered(watcher, LOST, m.Refused).code == "active"  # of a session before this life


def test_a_guest_that_ends_after_its_engine_is_not_activated(lab: Lab) -> None:
    lab.restart_secondary(engine_restart=3600 * SILENCE_NS)
    engine = lab.engine()
    engine.protect()
    engine.close()
    with closing(lab.watcher()) as watcher:
        answered(watcher, m.End(EndReason.POWEROFF), m.Retired)
    lab.secondary.wait_state(State.RETIRED)


@pytest.mark.parametrize("word", [m.Retire("stopped"), m.End(EndReason.POWEROFF)])
def test_what_is_retired_is_never_activated(lab: Lab, word: m.Retire | m.End) -> None:
    engine = lab.engine()
    engine.protect()
    assert engine.control.send(word)
    engine.wait(m.Retired)
    engine.close()
    eventually(lambda: lab.secondary.domain()["silent_ns"] > 2 * SILENCE_NS, "silence")
    assert lab.secondary.domain()["state"] == State.RETIRED
    assert lab.secondary.fence.calls == []
    kept = sorted(path.name for path in (lab.directory / "keep").iterdir())
    assert (
        kept == []
    )  # static records are empty here, so no image could be written: logged, no more


def test_a_missed_page_is_found_and_a_new_session_begins_with_a_full_copy(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    audit = struct.pack("<Q", 2) + KEY.digest(b"\7" * 4096)
    engine.send(engine.frames(2, {1: 5}, audit=audit))
    assert "pfn 0x2" in engine.wait(m.FullCopyWanted).reason
    lab.secondary.wait_state(State.RETIRED)
    again = lab.engine(session=8)
    assert again.wait(m.Welcome).has_image is False
    again.protect(3)
    lab.secondary.wait_state(State.STANDBY)


def test_a_commit_that_fails_all_the_same_retires_the_replica(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    faults.arm("secondary.mid-commit=fail")
    engine.send(engine.frames(2, {1: 5}))
    assert "injected" in engine.wait(m.FullCopyWanted).reason
    lab.secondary.wait_state(State.RETIRED)


def test_a_new_engine_learns_what_is_here_already(lab: Lab) -> None:
    lab.engine().protect(fill=6)
    again = lab.engine(session=8)
    assert again.wait(m.Welcome).has_image
    again.bulk.send(Header(Kind.DIGESTS_WANTED, 8, 1), timeout_s=LIMIT_S)
    received = again.bulk.receive(LIMIT_S)
    assert received is not None
    header, payload = received
    assert header.flags == 1
    digests = bytes(payload[8:])
    assert len(digests) == 16 * NR_PFNS
    assert digests[16:48] == KEY.digest(b"\6" * 4096) * 2
    assert not any(digests[:16]) and not any(digests[48:])  # noqa: PT018 - one statement


def test_a_guest_that_began_anew_is_not_taken_back_to_what_it_was_before(lab: Lab) -> None:
    """A reboot whose End was lost: the new domain's output is open, and the replica is of the old one."""
    lab.engine().protect()
    again = lab.engine(session=8, info=replace(INFO, domid=INFO.domid + 1))
    welcome = again.wait(m.Welcome)
    assert (welcome.committed_epoch, welcome.has_image) == (None, False)
    again.close()
    eventually(lambda: lab.secondary.domain()["silent_ns"] > 2 * SILENCE_NS, "silence")
    assert lab.secondary.domain()["state"] == State.SYNCING
    assert lab.secondary.fence.calls == []


def test_what_is_lost_on_the_way_is_asked_for(lab: Lab) -> None:
    engine = lab.engine()
    engine.wait(m.Welcome)
    first, *rest = engine.frames(1, {1: 1})
    engine.send(rest)
    assert engine.wait(m.Missing) == m.Missing(1, 0, ((0, 0),))
    assert engine.control.send(m.Query(1, 0))
    assert engine.wait(m.Missing, 2) == m.Missing(1, 0, ((0, 0),))
    engine.send([first])
    assert engine.wait(m.Ack) == m.Ack(1, 0, final=True)
    assert engine.control.send(m.Query(1, 0))
    assert engine.wait(m.Ack, 2) == m.Ack(1, 0, final=True)


def test_an_epoch_given_up_while_it_is_made_ready_is_not_acked(lab: Lab) -> None:
    """Else its commit would come after parts of the next one had touched the replica."""
    engine = lab.engine()
    engine.protect()
    worker = lab.secondary.service._drivers[INFO.uuid]._worker
    admit, going_on, waiting = worker.admit, threading.Event(), threading.Event()

    def slowly(load: Load) -> None:
        waiting.set()
        assert going_on.wait(LIMIT_S)
        admit(load)

    worker.admit = slowly  # type: ignore[method-assign]  # to stop it at the right place
    engine.send(engine.frames(2, {1: 5}))
    assert waiting.wait(LIMIT_S)
    engine.send(engine.frames(3, {3: 6}, final=False))
    eventually(lambda: lab.secondary.service._drivers[INFO.uuid]._discarded, "epoch 2 given up")
    going_on.set()
    eventually(lambda: m.Ack(3, 0, final=False) in list(engine.got), "ack of epoch 3")
    assert m.Ack(2, 0, final=True) not in engine.got
    assert lab.secondary.domain()["committed_epoch"] == 1
    engine.send(engine.frames(3, {1: 7}, part=1))
    eventually(lambda: lab.secondary.domain()["committed_epoch"] == 3, "commit of 3")


@pytest.mark.parametrize("disk", [False, True])
def test_a_copy_that_does_not_fit_beside_the_replica_costs_it_and_goes_on(
    lab: Lab, disk: bool
) -> None:
    """300 pages of live parts, where --epoch-memory has room for 256."""
    on_disk = {"image": "disk", "image_dir": lab.directory / "images"} if disk else {}
    lab.restart_secondary(epoch_memory=1 << 20, **on_disk)
    engine = lab.engine()
    engine.protect()
    for part in range(3):
        pages = dict.fromkeys(range(part * 100, part * 100 + 100), 5 + part)
        engine.send(engine.frames(2, pages, part=part, final=False))
        engine.wait(m.Ack, 2 + part)
    assert lab.secondary.domain()["state"] == State.SYNCING
    assert "--epoch-memory" in lab.secondary.domain()["alarm"]
    assert lab.secondary.service.not_ready()
    engine.send(engine.frames(2, {900: 9}, part=3))
    lab.secondary.wait_state(State.STANDBY)
    assert lab.secondary.service.not_ready() == []
    assert lab.secondary.service.status()["epoch_memory_used"] == 0
    engine.close()
    lab.secondary.wait_state(State.ACTIVE)
    ((_, memory, _),) = lab.secondary.hypervisor.started
    assert [memory[pfn * 4096] for pfn in (0, 99, 100, 299, 300, 900)] == [5, 5, 6, 7, 0, 9]


def test_a_bad_frame_harms_its_own_session_only_and_not_its_replica(lab: Lab) -> None:
    engine, other = lab.engine(), lab.engine(session=17, info=OTHER)
    engine.protect()
    other.protect()
    (header, payload), *rest = engine.frames(2, {1: 5})
    engine.send([(header, payload[:-1] + b"\0"), *rest])
    eventually(lambda: lab.secondary.domain()["alarm"], "an alarm")
    assert "digest" in lab.secondary.domain()["alarm"]
    other.protect(2)
    assert lab.secondary.domain()["committed_epoch"] == 1
    back = lab.engine(resume=True)
    back.protect(2)
    assert lab.secondary.domain(OTHER)["committed_epoch"] == 2


def test_a_secondary_that_restarted_acks_nothing_of_an_old_session(lab: Lab) -> None:
    engine = lab.engine()
    engine.protect()
    lab.restart_secondary()
    back = lab.engine(resume=True)
    welcome = back.wait(m.Welcome)
    assert (welcome.last_epoch, welcome.committed_epoch, welcome.has_image) == (0, None, False)
    back.send(back.frames(2, {1: 5}))
    assert back.control.send(m.Query(2, 0))
    back.wait(m.FullCopyWanted)
    assert not any(isinstance(got, m.Ack) for got in back.got)
    back.close()
    eventually(lambda: lab.secondary.domain()["silent_ns"] > 2 * SILENCE_NS, "silence")
    assert lab.secondary.fence.calls == []


def test_an_unexpected_error_on_any_thread_ends_the_daemon_and_is_told(lab: Lab) -> None:
    lab.secondary.fence.probe = lambda timeout: 1 // 0  # type: ignore[method-assign,assignment,return-value]  # planted
    lab.engine().protect()
    lab.engines[0].close()
    eventually(lambda: lab.secondary.failures, "the end of run()")
    (failure,) = lab.secondary.failures
    assert isinstance(failure, ZeroDivisionError)
    lab.secondary.failures.clear()
