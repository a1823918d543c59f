"""The standby of any number of domains: one acceptor, one driver for each domain.

run() serves in the caller's thread until stop(). Memory that primaries can claim is bounded: epochs by
--epoch-memory, domains by their number, images by the machine's memory.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from checkpointd import faults
from checkpointd.authority.processes import identify
from checkpointd.authority.terms import Role
from checkpointd.errors import CheckpointdError, StateError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.wire import messages
from checkpointd.wire.acceptor import Acceptor

from . import preflight
from .activations import Activations
from .driver import Driver
from .epochs import Budget
from .fences import fence_of
from .keep import ImageKeeper
from .restorers.image import ImageRestorer
from .restorers.xl import XlRestorer
from .surroundings import Limits, Surroundings
from .worker import ReplicaWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    import zmq

    from checkpointd.authority.fence import Fence
    from checkpointd.authority.terms import TermRecord, TermStore
    from checkpointd.daemon.config import SecondaryOptions
    from checkpointd.hypervisor.port import DomainInfo, Hypervisor
    from checkpointd.hypervisor.xen.incoming import Domains
    from checkpointd.wire.acceptor import Peer
    from checkpointd.wire.frames import FrameError, Header
    from checkpointd.wire.keys import KeyStore
    from checkpointd.wire.messages import Message
    from checkpointd.wire.sockets import Contexts

    from .activations import Activation
    from .restorers import Restorer
    from .standby import State
    from .surroundings import DomainMetrics

log = logging.getLogger(__name__)

# Guests that one daemon stands by for. A trusted peer that makes up UUIDs meets this, and a real machine
# has not the memory for so many replicas.
MAX_DOMAINS = 1024
# A p2m has holes (that of a small PVH guest covers 4 GiB), and an image is sparse, so only bitmaps grow with it:
# this many octets of memory for each pfn let six of them take a sixteenth of the machine's memory.
MEMORY_PER_PFN = 12
# So ends the name of a domain that xl is still building (libxl): it is a replica, not the guest.
INCOMING = "--incoming"
# ns; the detector is asked this often, or ten times within the silence that it looks for.
TICK_NS = 50_000_000
TICKS_IN_SILENCE = 10
# ns; alive without progress beyond this is an alarm. The primary gives protection up by itself after
# 60 s (--give-up-after), so a person hears of it well before.
STUCK_NS = 20_000_000_000
NS = 1_000_000_000


class Metrics(Protocol):
    """What the service counts (checkpointd.daemon.metrics.SecondaryMetrics)."""

    def bad_frame(self) -> None: ...
    def strangers_denied(self, total: int) -> None: ...
    def epoch_memory(self, octets: int) -> None: ...
    def domain(self, name: str) -> DomainMetrics: ...


class SecondaryService:
    """Binds both ports in the constructor; raises WireError, StateError."""

    def __init__(
        self,
        options: SecondaryOptions,
        hypervisor: Hypervisor,
        *,
        contexts: Contexts,
        keys: KeyStore,
        terms: TermStore,
        metrics: Metrics,
        make_fence: Callable[[DomainInfo, str], Fence] | None = None,
        make_restorer: Callable[[], Restorer] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._options = options
        self._hypervisor = hypervisor
        self._terms = terms
        self._metrics = metrics
        self._clock = clock
        self._budget = Budget(options.epoch_memory)
        self._activations = Activations(options.state_dir / "activations")
        self._make_restorer = make_restorer or self._restorer
        self._keeper = ImageKeeper(options.keep_images) if options.keep_images else None
        self._xen: Domains | None = None  # once a domain needs it
        self._drivers: dict[str, Driver] = {}  # by UUID
        self._labels: set[str] = set()  # of the metrics, each one guest's
        self._dropped: Counter[str] = Counter()  # frames and words of no session here, by kind
        self._stopping = False
        tick_ns = min(TICK_NS, options.silence // TICKS_IN_SILENCE)
        self._around = Surroundings(
            limits=Limits(
                silence_ns=options.silence,
                engine_restart_ns=options.engine_restart,
                stuck_ns=STUCK_NS,
                tick_ns=tick_ns,
                fence_timeout=options.fence_timeout / NS,
                activate_paused=options.activate_paused,
            ),
            budget=self._budget,
            terms=terms,
            activations=self._activations,
            make_fence=make_fence or (lambda info, address: fence_of(options, info, address)),
            identity=identify(),
            clock=clock,
            image_exists=self._image_exists,
            on_state=self._state_changed,
        )
        self.on_ready: Callable[[], None] | None = None  # once run() serves
        self.on_state: Callable[[str, State], None] | None = None  # (UUID, its new state)
        if options.image_dir:
            options.image_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._most_pfns = memory // MEMORY_PER_PFN
        self._most_pages = memory // PAGE_SIZE  # of replicas in memory
        taken_over = [r for r in terms.records() if r.role is Role.SECONDARY_ACTIVE]
        left = {found.uuid: found for found in self._activations.left()}
        self._acceptor = Acceptor(
            contexts,
            options.listen,
            options.control_port,
            options.bulk_port,
            keys,
            on_control=self._control,
            on_bulk=self._bulk,
            on_error=self._bad_frame,
            on_tick=self._tick,
            tick_s=tick_ns / NS,
            on_fatal=lambda _: None,  # of start(), which is not used: run() raises
        )
        for record in taken_over:
            self._add(record, left=left.pop(record.uuid, None))
        for uuid, activation in left.items():
            if activation.is_ahead_of(record := terms.load(uuid)):
                self._add(record, activation.name, left=activation)
            else:
                self._activations.forget(uuid)  # the guest has lived on in another term

    @property
    def ports(self) -> tuple[int, int]:
        """Control and bulk, as bound."""
        return self._acceptor.control_port, self._acceptor.bulk_port

    def run(self) -> None:
        """Serve until stop(); raises what went wrong in any of the threads."""
        if self.on_ready:
            self._acceptor.post(self.on_ready)
        try:
            self._acceptor.run()
        finally:
            self.close()

    def stop(self) -> None:
        """End run(), once no guest depends on this process alone; from any thread or signal handler."""
        self._stopping = True

    def close(self) -> None:
        """Free everything. Idempotent."""
        self._acceptor.close()
        for driver in self._drivers.values():
            driver.close()
        self._drivers = {}
        if self._xen is not None:
            self._xen.close()
            self._xen = None

    def status(self) -> dict[str, Any]:
        """A snapshot for people and programs; from any thread."""
        armed = (f"faults armed: {rule.point}" for rule in faults.armed())
        return {
            "role": "secondary",
            "domains": [driver.status() for driver in list(self._drivers.values())],
            "epoch_memory_used": self._budget.used,
            "epoch_memory": self._budget.limit,
            "dropped": dict(self._dropped),
            "stopping": self._stopping,
            "unsafe": [*self._options.unsafe, *armed],
        }

    def not_ready(self) -> list[str]:
        """Which domains that ought to be protected could not be activated at this moment, and why."""
        return [
            f"{driver.uuid}: {why}"
            for driver in list(self._drivers.values())
            if (why := driver.not_ready())
        ]

    # ------------------------------------------------------------ on the acceptor's thread

    def _control(self, peer: Peer, header: Header, message: Message) -> None:
        if isinstance(message, messages.Hello):
            self._hello(peer, message)
            return
        if isinstance(message, messages.Check):
            self._check(peer, header, message)
            return
        driver = self._of(peer, header)
        if driver is not None:
            driver.control(peer, message)
        elif isinstance(message, messages.EngineLost):
            self._of_an_earlier_life(peer, header, message)
        else:
            self._dropped[header.kind.name] += 1

    def _check(self, peer: Peer, header: Header, check: messages.Check) -> None:
        """A preflight: answered, and forgotten."""
        here = self._guest_here(check.uuid)
        checked = preflight.answer(check, self._options, self._hypervisor.name, guest_here=here)
        self._acceptor.send(peer, checked, session=header.session, term=header.term)

    def _of_an_earlier_life(self, peer: Peer, header: Header, message: messages.EngineLost) -> None:
        """A watcher has to know that this side runs its guest, also if we took over and then began anew."""
        driver = self._drivers.get(message.uuid)
        if driver is None or not driver.machine.taken_over:
            self._dropped[header.kind.name] += 1
            return
        term = driver.machine.term
        refused = messages.Refused(header.session, term, "active", driver.machine.reason)
        self._acceptor.send(peer, refused, session=header.session, term=term)

    def _bulk(self, peer: Peer, header: Header, payload: zmq.Frame | bytes) -> None:
        driver = self._of(peer, header)
        if driver is None:
            self._dropped[header.kind.name] += 1
            return
        driver.bulk(peer, header, payload if isinstance(payload, bytes) else payload.buffer)

    def _of(self, peer: Peer, header: Header) -> Driver | None:
        """The driver whose session this is, if this peer is the one that opened it."""
        for driver in self._drivers.values():
            if driver.owns(peer.key, header.session, header.term):
                return driver
        return None

    def _hello(self, peer: Peer, hello: messages.Hello) -> None:
        uuid = hello.info.uuid
        driver = self._drivers.get(uuid)
        try:
            if hello.info.nr_pfns > self._most_pfns or (
                self._options.image == "memory" and hello.info.ram_pages > self._most_pages
            ):
                raise CheckpointdError(
                    f"a guest of {hello.info.ram_pages} pages among {hello.info.nr_pfns} is too large "
                    "for this machine: give it more memory, or use --image disk"
                )
            if driver is None:
                if len(self._drivers) >= MAX_DOMAINS:
                    raise CheckpointdError(f"this secondary has {MAX_DOMAINS} guests already")
                driver = self._add(self._terms.load(uuid), hello.info.name)
        except CheckpointdError as error:
            log.error("%s: refused: %s", uuid, error)
            code = "state" if isinstance(error, StateError) else "memory"
            refused = messages.Refused(hello.session, hello.term, code, str(error))
            self._acceptor.send(peer, refused, session=hello.session, term=hello.term)
            return
        driver.hello(peer, hello, guest_here=self._guest_here(uuid))

    def _add(self, record: TermRecord, name: str = "", left: Activation | None = None) -> Driver:
        """`name`: the guest's, where it is known: what the primary's metrics call it, too. `left`: its activation
        that an earlier life did not finish.
        """
        worker = ReplicaWorker(
            self._budget,
            self._make_restorer(),
            self._activations,
            record.uuid,
            image_dir=self._options.image_dir,
            keeper=self._keeper,
            clock=self._clock,
        )
        label = name if name and name not in self._labels else record.uuid
        self._labels.add(label)
        metrics = self._metrics.domain(label)
        driver = Driver(record, self._around, self._acceptor, worker, metrics, left)
        self._drivers[record.uuid] = driver
        return driver

    def _restorer(self) -> Restorer:
        if self._hypervisor.name != "xen":
            return ImageRestorer(self._hypervisor)
        if self._xen is None:
            # Where there is no Xen, nothing of its adapter is loaded.
            from checkpointd.hypervisor.xen.incoming import Domains
            from checkpointd.hypervisor.xen.lib import open_libs

            self._xen = Domains(open_libs(untested=self._options.unsafe_untested_xen))
        return XlRestorer(self._xen, self._options.run_dir / "xen", self._activations)

    def _state_changed(self, uuid: str, state: State) -> None:
        if self.on_state:
            self.on_state(uuid, state)

    def _guest_here(self, uuid: str) -> bool:
        try:
            return any(
                info.uuid == uuid and not info.name.endswith(INCOMING)
                for info in self._hypervisor.domains()
            )
        except CheckpointdError as error:
            log.warning("cannot tell whether %s runs here: %s", uuid, error)
            return True  # the safe guess: it only ever refuses

    def _image_exists(self, uuid: str) -> bool:
        directory = self._options.image_dir
        return directory is not None and (directory / f"{uuid}.image").exists()

    def _bad_frame(self, peer: Peer, error: FrameError) -> None:
        self._metrics.bad_frame()
        for driver in self._drivers.values():
            if peer in (driver.peer, driver.bulk_peer):
                driver.fault(str(error))

    def _tick(self) -> None:
        # Before anybody is ticked: no fence begins any more. A list: each of them says what it waits for.
        if self._stopping and all([driver.may_end() for driver in self._drivers.values()]):  # noqa: C419
            self._acceptor.stop()
            return
        now = self._clock()
        for driver in self._drivers.values():
            driver.tick(now)
        self._metrics.epoch_memory(self._budget.used)
        self._metrics.strangers_denied(self._acceptor.authenticator.denied)
