"""A whole secondary over real sockets, with an engine, a fence and a hypervisor that the test plays.

Waiting is always for a condition, with a limit that only a failure reaches.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import zmq

from checkpointd import faults
from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import TermStore
from checkpointd.daemon.config import SecondaryOptions
from checkpointd.daemon.metrics import SecondaryMetrics
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
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
        static: bytes = b"",
        tail: bytes = TAIL,
    ) -> None:
        """`static`: records that begin its stream; `tail`: those that end each epoch."""
        endpoint = Endpoint("127.0.0.1", keys.trusted()["loopback"], *ports)
        self.got: list[m.Message] = []
        self.fatal: list[BaseException] = []
        self.session, self.term = session, term
        self.tail = tail
        self.control = ControlLink(
            contexts.control, endpoint, keys.own(), heartbeat_s=0.02,
            deliver=self.got.append, on_error=self.fatal.append, on_fatal=self.fatal.append,
        )  # fmt: skip
        self.bulk = BulkLink(contexts.bulk, endpoint, keys.own())
        self.control.start()
        self.control.hello(m.Hello(session, term, info, 10**8, SEED, static, 1, resume=resume))

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
        content += [(Kind.CONTEXT, self.tail)] if final else []
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


@contextmanager
def lab_in(directory: Path) -> Iterator[Lab]:
    """Closed at the end, which must leave nothing behind and have met no failure."""
    _start_collector_of_pyzmq()
    threads = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    lab = Lab(directory)
    yield lab
    faults.arm("")
    lab.close()
    assert not lab.secondary.failures
    assert set(threading.enumerate()) <= threads
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors closed")


@cache
def _start_collector_of_pyzmq() -> None:
    """pyzmq starts a thread for the whole process at its first send without copying: before we count."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as a, context.socket(zmq.PAIR) as b:
        a.bind("inproc://warm")
        b.connect("inproc://warm")
        b.send(bytes(1 << 17), copy=False)
        assert len(a.recv()) == 1 << 17


def page_of(memory: bytes, pfn: int) -> bytes:
    return memory[pfn * 4096 : (pfn + 1) * 4096]
