"""Both services in threads of the test's own process, against a real embedded host and over real sockets, so that
code can be replaced (a bug be planted) between any two parts of them.

What can be hooked into without patching: the native table (`Table`), the bulk link (`Gate`), the acks (`Standby.acks`)
and the moment of the next epoch (`Engine.no_epochs`).
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from leaks import nothing_leaks

from checkpointd import faults
from checkpointd.authority.processes import ProcessWatch, kill, start_time
from checkpointd.authority.terms import Role, TermRecord, TermStore
from checkpointd.daemon.config import PrimaryOptions, SecondaryOptions
from checkpointd.daemon.metrics import PrimaryMetrics, SecondaryMetrics
from checkpointd.daemon.settings import Endpoint as Address
from checkpointd.daemon.settings import Listen
from checkpointd.demo.proof import Snapshot, Verdict
from checkpointd.demo.rig import free_port
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.fresh import FreshGuest
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.kv import KvClient, UdpTransport
from checkpointd.hypervisor.embedded.lib import ffi
from checkpointd.hypervisor.embedded.place import namespace_directory
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.primary import protection
from checkpointd.primary.service import Ending, PrimaryService
from checkpointd.secondary import standby
from checkpointd.secondary.service import SecondaryService
from checkpointd.wire import messages
from checkpointd.wire.bulk import BulkLink, LinkTimeoutError
from checkpointd.wire.initiator import ControlLink
from checkpointd.wire.keys import loopback_pair
from checkpointd.wire.sockets import Contexts, Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from checkpointd.hypervisor.embedded.domain import EmbeddedDomain
    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.secondary.driver import Driver
    from checkpointd.wire.frames import Header, Octets

MS = 1_000_000  # ns
LIMIT = 30.0  # s, for any wait; only a failure reaches it
POLL = 0.002  # s


def eventually(condition: Callable[[], object], what: str, *, limit: float = LIMIT) -> None:
    """Wait until `condition` holds; `what` names it when it never does."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(POLL)


class Guest:
    """A fresh embedded guest in a host process of its own."""

    def __init__(self, run_dir: Path, program: str, memory: int, domid: int = 4) -> None:
        """`memory` in octets."""
        self.run_dir = run_dir
        fresh = FreshGuest(
            namespace=str(namespace_directory("primary", run_dir)),
            program=program,
            memory=memory,
            domid=domid,
            address=f"127.0.0.1:{free_port(socket.SOCK_DGRAM)}",
        )
        self.process, self.info = toolstack.create(fresh)
        self._transports: list[UdpTransport] = []

    @property
    def step(self) -> int:
        return toolstack.look(self.info).step

    @property
    def address(self) -> str:
        return str(self.info.config["address"])

    @property
    def logs(self) -> list[Path]:
        """What explains the guest, wherever it runs: its first host's log, and that of its activation."""
        places = [self.run_dir / "embedded" / side for side in ("primary", "secondary")]
        paths = [place / str(self.info.domid) / "input.log" for place in places]
        return [path for path in paths if path.exists()]

    def transport(self) -> UdpTransport:
        transport = UdpTransport(self.address)
        self._transports.append(transport)
        return transport

    def client(self, name: str) -> KvClient:
        return KvClient(self.transport(), name, patience=LIMIT)

    def consume(self, datagram: str) -> None:
        """Send it, and wait until the guest has executed it; its answer may be held."""
        before = self.step
        self.transport().send(datagram.encode())
        eventually(lambda: self.step > before, f"a step that consumes {datagram!r}")

    def kill(self) -> None:
        """SIGKILL its host, as a power failure would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for transport in self._transports:
            transport.close()
        self.process.kill()
        self.process.communicate()


class Table:
    """A copy of a domain's native table, some of whose functions are Python's: where bugs are planted below the
    engine. Replacements get the original as their first argument.
    """

    def __init__(self, domain: EmbeddedDomain) -> None:
        self._original = ffi.cast("struct ck_hypervisor *", domain.table)
        self._copy = ffi.new("struct ck_hypervisor *", self._original[0])
        self._alive: list[Any] = []

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", self._copy))

    def replace(self, name: str, function: Callable[..., int]) -> None:
        original = getattr(self._original, name)
        callback = ffi.callback(
            ffi.typeof(original), lambda *arguments: function(original, *arguments), error=-5
        )  # error: -EIO, should the replacement itself fail
        self._alive.append(callback)
        setattr(self._copy, name, callback)


class Tapped:
    """A domain whose table, or description, is another; all else is its own."""

    def __init__(self, domain: EmbeddedDomain, table: int, info: DomainInfo) -> None:
        self._domain = domain
        self.table = table
        self.info = info

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)


class Gate(BulkLink):
    """A bulk link that can hold frames back as a dead peer would: by letting send() wait in vain."""

    _held: Callable[[Header], bool] | None = None
    waiting: Header | None = None  # the frame that waits at the gate

    def hold(self, which: Callable[[Header], bool]) -> None:
        self._held = which

    def let_go(self) -> None:
        self._held = self.waiting = None

    def send(self, header: Header, payload: Octets = b"", *, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while (held := self._held) is not None and held(header):
            self.waiting = header
            if time.monotonic() >= deadline:
                raise LinkTimeoutError("held back by the test")
            time.sleep(POLL)
        return super().send(header, payload, timeout_s=max(0.0, deadline - time.monotonic()))


class Acks:
    """Sees every word of one standby's driver, and can lose its acks, or all it says, on the way."""

    def __init__(self, driver: Driver) -> None:
        self.sent: list[int] = []  # epochs acked in whole, in order
        self.lose = False
        self.mute = False
        self._driver = driver
        self._send = driver._send
        driver._send = self  # type: ignore[method-assign]  # the tap

    def stop(self) -> None:
        """Let everything through again, and be gone."""
        self._driver._send = self._send  # type: ignore[method-assign]  # the tap

    def __call__(self, message: messages.FromSecondary) -> None:
        if self.mute:
            return
        if isinstance(message, messages.Ack):
            if self.lose:
                return
            if message.final:
                self.sent.append(message.epoch)
        self._send(message)


class _Thread:
    """A service in a thread of its own: its states, and what became of it."""

    def __init__(self, name: str, run: Callable[[], Ending | None]) -> None:
        self._run = run
        self.ending: Ending | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name=name)

    def _main(self) -> None:
        try:
            self.ending = self._run()
        except BaseException as error:  # noqa: BLE001 - a planted bug may raise anything; the test looks at it
            self.error = error

    def start(self) -> None:
        self._thread.start()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(LIMIT)
        assert self.over, f"{self._thread.name} does not end"


class Standby:
    """A SecondaryService in a thread."""

    def __init__(self, directory: Path, **options: Any) -> None:
        """`options` are SecondaryOptions'; state and run directories and free ports are given."""
        self._stack = ExitStack()
        with ExitStack() as stack:
            state = directory / "state"
            terms = TermStore(state / "terms" / "secondary")
            stack.callback(terms.close)
            contexts = Contexts.make()
            stack.callback(contexts.close)
            chosen = {
                "control_port": 0, "bulk_port": 0, "silence": 1000 * MS, "engine_restart": 0,
                "metrics": Listen("127.0.0.1", 0), **options,
            }  # fmt: skip
            self.metrics = SecondaryMetrics(list(standby.State))
            self.service = SecondaryService(
                SecondaryOptions(state_dir=state, run_dir=directory / "run", **chosen),
                EmbeddedHypervisor("secondary", directory / "run"),
                keys=loopback_pair(state / "keys")[1],
                contexts=contexts,
                terms=terms,
                metrics=self.metrics,
            )
            self.states: list[str] = []
            self.service.on_state = lambda _, state: self.states.append(str(state))
            self.thread = _Thread("standby", self.service.run)
            self.thread.start()
            self._stack = stack.pop_all()

    @property
    def ports(self) -> tuple[int, int]:
        return self.service.ports

    def driver(self, guest: Guest) -> Driver:
        return self.service._drivers[guest.info.uuid]

    def acks(self, guest: Guest) -> Acks:
        return Acks(self.driver(guest))

    def state(self, guest: Guest) -> str:
        return str(self.driver(guest).machine.state)

    def wait(self, guest: Guest, *states: str) -> None:
        eventually(
            lambda: guest.info.uuid in self.service._drivers and self.state(guest) in states,
            f"the standby in {' or '.join(states)}; it was in {self.states}",
        )

    def alarm(self, guest: Guest) -> str:
        return str(self.driver(guest).status()["alarm"] or "")

    def replica(self, guest: Guest) -> Verdict:
        """The committed replica against the oracle of its own step."""
        driver = self.driver(guest)

        def copy() -> tuple[Snapshot, int]:
            replica = driver._worker._replica
            assert replica is not None, f"no replica: {driver.status()}"
            assert replica.epoch is not None, f"no committed epoch: {driver.status()}"
            snapshot = Snapshot(replica.nr_pfns)
            for words, contents in replica.pages():
                at = words[0] * PAGE_SIZE
                snapshot.image[at : at + len(contents)] = contents
                snapshot.populated.add(words[0], len(words))
            return snapshot, Context.parse(replica.context).step

        # On the one thread that may touch it, and so between two commits.
        snapshot, step = driver._replica_jobs._thread.submit(copy).result(LIMIT)
        try:
            return snapshot.against(guest.logs[:1], step)
        finally:
            snapshot.close()

    def owe_nobody(self) -> None:
        """Stop as if by SIGKILL: not even a fenced guest that cannot be started is waited for."""
        for driver in self.service._drivers.values():
            driver.may_end = lambda: True  # type: ignore[method-assign]

    def stop(self) -> None:
        self.service.stop()
        self.thread.join()
        self._stack.close()
        if self.thread.error is not None:
            raise self.thread.error


class Engine:
    """A PrimaryService in a thread, attached to one guest."""

    def __init__(
        self,
        directory: Path,
        guest: Guest,
        ports: tuple[int, int],
        *,
        tap: Callable[[Table], object] | None = None,
        info: DomainInfo | None = None,
        **options: Any,
    ) -> None:
        """`tap` may replace functions of the native table, `info` the guest's description; `options` are
        PrimaryOptions'.
        """
        self._guest = guest
        self._stack = ExitStack()
        with ExitStack() as stack:
            state = directory / "state"
            chosen = {
                "interval": 20 * MS, "heartbeat": 20 * MS, "arena": 4 << 20, "mapping_budget": 64 << 20,
                "standby_timeout": 1000 * MS, "metrics": Listen("127.0.0.1", 0), **options,
            }  # fmt: skip
            terms = TermStore(state / "terms" / "primary" / guest.info.uuid)
            stack.callback(terms.close)
            contexts = Contexts.make()
            stack.callback(contexts.close)
            own, peer = loopback_pair(state / "keys")
            endpoint = Endpoint("127.0.0.1", peer.own().public, *ports)
            domain = EmbeddedHypervisor("primary", directory / "run").attach(guest.info.domid)
            stack.callback(domain.close)
            self.domain = domain
            self._table = Table(domain)
            if tap:
                tap(self._table)
            if terms.load(guest.info.uuid).term == 0:
                terms.store(TermRecord(guest.info.uuid, 1, Role.PRIMARY, 1))
            block = terms.reserve_epochs(guest.info.uuid)
            self.gate = Gate(contexts.bulk, endpoint, own.own())
            self.metrics = PrimaryMetrics(guest.info.name, list(protection.State))
            self.service = PrimaryService(
                PrimaryOptions(
                    domid=guest.info.domid, state_dir=state, run_dir=directory / "run",
                    secondary=Address("127.0.0.1", *ports), **chosen,
                ),
                Tapped(
                    domain, self._table.address if tap else domain.table, info or domain.info
                ),
                term=terms.load(guest.info.uuid).term,
                first_epoch=block.start,
                reserve=lambda _: None,  # no test here uses up a block
                control=lambda deliver, fatal: ControlLink(
                    contexts.control, endpoint, own.own(), heartbeat_s=chosen["heartbeat"] / 1e9,
                    deliver=deliver, on_error=fatal, on_fatal=fatal,
                ),
                bulk=self.gate,
                watch=ProcessWatch,
                metrics=self.metrics,
            )  # fmt: skip
            self.states: list[str] = []
            self.service.on_state = self.states.append
            self._between = threading.Lock()
            self._take = self.service._taker.take
            self.service._taker.take = self._taken  # type: ignore[method-assign]  # the tap
            self.thread = _Thread("engine", self.service.run)
            self.thread.start()
            self._stack = stack.pop_all()

    def _taken(self, index: int, *, close_output: bool, stay: bool = False) -> Any:
        with self._between:
            return self._take(index, close_output=close_output, stay=stay)

    @contextmanager
    def no_epochs(self) -> Iterator[None]:
        """While the block runs no pause is taken: all that it does is in one epoch."""
        with self._between:
            yield

    @property
    def machine(self) -> protection.Protection:
        return self.service._machine

    @property
    def epoch(self) -> int:
        """The epoch in the making."""
        return self.machine.epoch

    @property
    def acked(self) -> int:
        return self.machine.acked_epoch or 0

    def wait(self, *states: str) -> None:
        eventually(
            lambda: self.machine.state in states or self.thread.over,
            f"the engine in {' or '.join(states)}; it was in {self.states}",
        )
        assert self.machine.state in states, (
            f"the engine ended instead: {self.thread.ending or self.thread.error!r}"
        )

    def committed(self) -> None:
        """Wait until all that the guest has done until now is in the replica."""
        wanted = self.epoch + 1  # the one in the making may have been harvested already
        eventually(
            lambda: (self.service._figures.committed or 0) >= wanted or self.thread.over,
            f"the commit of epoch {wanted}; {self.service.status()}",
        )
        assert not self.thread.over, (
            f"the engine ended: {self.thread.ending or self.thread.error!r}"
        )

    def acked_beyond(self, epochs: int) -> None:
        """Wait for the acks of so many more epochs."""
        wanted = self.acked + epochs
        eventually(lambda: self.acked >= wanted, f"the ack of epoch {wanted}")

    def stop(self) -> None:
        """SIGTERM's way; what a planted bug raised is in `thread.error`."""
        self.gate.let_go()
        self.service.stop()
        self.thread.join()
        self._stack.close()


class Pair:
    """A guest, a standby and engines in one directory. Everything it made ends with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()

    def guest(self, program: str = "kv", memory: int = 2 << 20, domid: int = 4) -> Guest:
        guest = Guest(self.directory / "run", program, memory, domid)
        self._stack.callback(guest.close)
        return guest

    def standby(self, **options: Any) -> Standby:
        made = Standby(self.directory, **options)
        self._stack.callback(made.stop)
        return made

    def engine(
        self, guest: Guest, to: Standby, *, via: tuple[int, int] | None = None, **options: Any
    ) -> Engine:
        """`via`: other ports than the standby's own, of proxies before it."""
        made = Engine(self.directory, guest, via or to.ports, **options)
        self._stack.callback(made.stop)
        return made

    def activated(self, guest: Guest) -> DomainInfo:
        return EmbeddedHypervisor("secondary", self.directory / "run").find(uuid=guest.info.uuid)

    def close(self) -> None:
        try:
            self._stack.close()
        finally:
            faults.arm("")
            for info in EmbeddedHypervisor("secondary", self.directory / "run").domains():
                _end(info)


def _end(info: DomainInfo) -> None:
    """End the host of an activated guest: it outlives the standby, as it should."""
    kill(info.host)
    eventually(lambda: start_time(info.host.pid) != info.host.start_time, "the end of its host")


@contextmanager
def pair_in(directory: Path) -> Iterator[Pair]:
    """A Pair that fails the test if it leaves a thread, a descriptor or a process behind."""
    with nothing_leaks():
        pair = Pair(directory)
        try:
            yield pair
        finally:
            pair.close()
