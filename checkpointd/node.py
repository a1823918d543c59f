"""Composes the roles: here the parts are made, given to one another, and taken down in order."""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd import native
from checkpointd.authority.processes import ProcessWatch
from checkpointd.authority.terms import Role, TermRecord, TermStore, read_record
from checkpointd.daemon import logs, systemd
from checkpointd.daemon.health import HealthServer
from checkpointd.daemon.roster import Registration
from checkpointd.errors import KeyFileError, NoSuchDomainError
from checkpointd.hypervisor.port import Contact, EndReason
from checkpointd.hypervisor.xen.devices import Allowances
from checkpointd.wire.keys import KeyStore, loopback_pair
from checkpointd.wire.sockets import Contexts, Endpoint, is_loopback, raise_file_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry

    from checkpointd.daemon.config import CommonOptions, PrimaryOptions, SecondaryOptions
    from checkpointd.daemon.metrics import PrimaryMetrics
    from checkpointd.hypervisor.port import Domain, DomainInfo, Hypervisor
    from checkpointd.primary.recording import Recording
    from checkpointd.primary.service import Ending, PrimaryService

log = logging.getLogger(__name__)

# A dom0 says so here (Linux, drivers/xen/xenfs); elsewhere the file is missing or lacks the word.
XEN_CAPABILITIES = Path("/proc/xen/capabilities")
# s; from the end of the old domain to the beginning of the new one: a toolstack, or a new interpreter, has to build it.
REBOOT_TIMEOUT = 60.0
REBOOT_LOOK = 0.05  # s; between two looks, for there is no event to wait for


def choose_hypervisor(
    wanted: str, run_dir: Path, namespace: str, allow: Allowances | None = None
) -> Hypervisor:
    """Xen where there is one, else embedded; `wanted` other than "auto" is a demand. `allow`: what the user allows
    of a Xen guest in spite of its danger, None: nothing.
    """
    if wanted == "auto":
        wanted = "xen" if is_dom0() else "embedded"
    if wanted == "xen":
        from checkpointd.hypervisor.xen.hypervisor import XenHypervisor

        return XenHypervisor(run_dir, allow or Allowances(disk=False, output=False, untested=False))
    from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor

    return EmbeddedHypervisor(namespace, run_dir)


def is_dom0() -> bool:
    try:
        return "control_d" in XEN_CAPABILITIES.read_text(encoding="ascii")
    except OSError:
        return False


# -------------------------------------------------------------------- what both roles need


def _say(*words: str) -> None:
    """Tell systemd, if it listens."""
    systemd.notify(*words)


@contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop`, in a thread of its own: what it takes a lock for, the main thread may hold."""

    def handler(number: int, frame: object) -> None:
        threading.Thread(target=stop, name="stop", daemon=True).start()

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _serve_health(
    stack: ExitStack,
    options: CommonOptions,
    ident: str,
    address: tuple[str, int],
    *,
    role: str,
    domid: int | None,
    registry: CollectorRegistry,
    ready: Callable[[], list[str]],
    status: Callable[[], dict[str, Any]],
) -> None:
    url = None
    if not options.no_metrics:
        server = HealthServer(*address, registry=registry, live=list, ready=ready, status=status)
        url = stack.enter_context(server).url
        log.info("metrics and status at %s", url)
    stack.enter_context(Registration(options.run_dir, role, ident, domid=domid, http=url))


# -------------------------------------------------------------------- primary


class _Epochs:
    """Epoch numbers, reserved in blocks on stable storage before they are used (invariant 4)."""

    def __init__(self, terms: TermStore, uuid: str) -> None:
        self._terms = terms
        self._uuid = uuid
        block = terms.reserve_epochs(uuid)
        self.first, self._end = block.start, block.stop

    def reserve(self, epoch: int) -> None:
        while epoch >= self._end:
            self._end = self._terms.reserve_epochs(self._uuid).stop


def run_primary(
    options: PrimaryOptions, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Protect a domain until it ends, or protection does; returns the exit code. A reboot is followed."""
    with ExitStack() as stack:
        # Not at the end of each engine: a reboot is followed, and systemd would kill us soon after this word.
        stack.callback(systemd.notify, systemd.STOPPING)
        writer = stack.enter_context(logs.started(options.log_level, options.log_format))
        native.self_test()
        allow = Allowances(
            disk=options.unsafe_disk,
            output=options.unsafe_output or options.to is not None,  # a recording holds no output
            untested=options.unsafe_untested_xen,
        )
        hypervisor = choose_hypervisor(
            options.hypervisor, options.run_dir, options.namespace, allow
        )
        info = hypervisor.find(domid=options.domid, uuid=options.uuid)
        if options.to is not None:
            ending = _record(options, options.to, hypervisor, info, writer, on_progress)
            log.log(logging.ERROR if ending.exit_code else logging.INFO, "%s", ending.text)
            _settle(hypervisor, info, ending)
            return ending.exit_code
        terms = TermStore(options.state_dir / "terms" / "primary" / info.uuid)
        stack.callback(terms.close)
        contexts = Contexts.make()
        stack.callback(contexts.close)
        while True:
            ending = _protect(options, hypervisor, info, terms, contexts, writer, on_progress)
            log.log(logging.ERROR if ending.exit_code else logging.INFO, "%s", ending.text)
            stopped = _settle(hypervisor, info, ending)
            if ending.guest is not EndReason.REBOOT or stopped:
                return ending.exit_code
            info = _after_reboot(hypervisor, info)
            log.info("the guest has rebooted: protecting it as domain %d", info.domid)


def _settle(hypervisor: Hypervisor, info: DomainInfo, ending: Ending) -> bool:
    """The toolstack's part of the guest's end. True: we were asked to stop meanwhile, which must not cut it short."""
    stopped = threading.Event()
    with _stopping(stopped.set):
        hypervisor.settle(info, ending.guest)
    if stopped.is_set():
        log.warning("stopped, as asked: domain %d (%s) is not protected", info.domid, info.name)
    return stopped.is_set()


def _after_reboot(
    hypervisor: Hypervisor, old: DomainInfo, timeout: float = REBOOT_TIMEOUT
) -> DomainInfo:
    """The domain that the guest is now. The old one may be seen for a moment yet, then for a while there is none."""
    deadline = time.monotonic() + timeout
    while True:
        for found in hypervisor.domains():
            if found.uuid == old.uuid and found.domid != old.domid:
                return found
        if time.monotonic() >= deadline:
            raise NoSuchDomainError(
                f"domain {old.domid} ({old.name}) said that it reboots, but no new domain with its UUID {old.uuid} "
                f"appeared within {timeout:g} s"
            )
        time.sleep(REBOOT_LOOK)


def _protect(
    options: PrimaryOptions,
    hypervisor: Hypervisor,
    info: DomainInfo,
    terms: TermStore,
    contexts: Contexts,
    writer: logs.Writer,
    on_progress: Callable[[int, int], None] | None,
) -> Ending:
    from checkpointd.daemon.metrics import PrimaryMetrics
    from checkpointd.primary.protection import State
    from checkpointd.primary.service import PrimaryService
    from checkpointd.wire.initiator import BulkLink, ControlLink

    keys, endpoint = initiator_keys(options)
    with ExitStack() as stack:
        domain: Domain = hypervisor.attach(info.domid)
        stack.callback(domain.close)
        record = _term_of(terms, options.state_dir, info)
        epochs = _Epochs(terms, info.uuid)
        metrics = PrimaryMetrics(info.name, list(State))
        metrics.follow_logs(lambda: writer.lost)
        service = PrimaryService(
            options,
            domain,
            term=record.term,
            first_epoch=epochs.first,
            reserve=epochs.reserve,
            control=lambda deliver, fatal: ControlLink(
                contexts.control,
                endpoint,
                keys,
                heartbeat_s=options.heartbeat / 1e9,
                deliver=deliver,
                on_error=lambda error: metrics.alarm(),  # logged by the link, which goes on
                on_fatal=fatal,
                on_rtt=metrics.heartbeat_rtt,
            ),
            bulk=BulkLink(contexts.bulk, endpoint, keys),
            watch=ProcessWatch,
            metrics=metrics,
            introduce=lambda session: domain.tell_of_loss(
                Contact(session, record.term, endpoint, keys)
            ),
        )
        return _run_engine(stack, options, info, service, metrics, on_progress)


def _record(
    options: PrimaryOptions,
    path: Path,
    hypervisor: Hypervisor,
    info: DomainInfo,
    writer: logs.Writer,
    on_progress: Callable[[int, int], None] | None,
) -> Ending:
    """`--to`: no secondary, no term. A reboot ends it, for a stream is of one domain."""
    from checkpointd.daemon.metrics import PrimaryMetrics
    from checkpointd.primary.recording import Recording, RecordingFile, State

    with ExitStack() as stack:
        domain: Domain = hypervisor.attach(info.domid)
        stack.callback(domain.close)
        file = RecordingFile(path)
        stack.callback(file.close)
        metrics = PrimaryMetrics(info.name, list(State))
        metrics.follow_logs(lambda: writer.lost)
        recording = Recording(options, domain, file, metrics)
        return _run_engine(stack, options, info, recording, metrics, on_progress)


def _run_engine(
    stack: ExitStack,
    options: PrimaryOptions,
    info: DomainInfo,
    engine: PrimaryService | Recording,
    metrics: PrimaryMetrics,
    on_progress: Callable[[int, int], None] | None,
) -> Ending:
    """Until it ends, with all that a daemon has around it."""
    engine.on_progress = on_progress
    engine.on_state = lambda state: _say(systemd.status(state))
    port = options.metrics.port
    _serve_health(
        stack,
        options,
        str(info.domid),
        (options.metrics.host, port if port is not None else _auto_port(info.domid)),
        role="primary",
        domid=info.domid,
        registry=metrics.registry,
        ready=engine.not_ready,
        status=engine.status,
    )
    stack.enter_context(_stopping(engine.stop))
    systemd.notify(systemd.READY, systemd.status("connecting"))
    return engine.run()


def _term_of(terms: TermStore, state_dir: Path, info: DomainInfo) -> TermRecord:
    """The term to protect `info` in, on stable storage. A guest that came here by an activation lives in the term of
    that activation, which this machine's standby recorded. Only Xen is one hypervisor a machine, so that the guest
    activated here and the one protected here are the same; an embedded secondary has its own namespace beside ours.
    """
    own = terms.load(info.uuid)
    term, next_epoch = max(own.term, 1), own.next_epoch
    if info.hypervisor == "xen":
        activated = read_record(state_dir / "terms" / "secondary", info.uuid)
        if activated.role is Role.SECONDARY_ACTIVE:
            term, next_epoch = max(term, activated.term), max(next_epoch, activated.next_epoch)
    record = TermRecord(info.uuid, term, Role.PRIMARY, next_epoch)
    if record != own:
        terms.store(record)
    return record


def _auto_port(domid: int) -> int:
    from checkpointd.daemon.config import PRIMARY_METRICS_BASE

    return PRIMARY_METRICS_BASE + domid


def initiator_keys(options: PrimaryOptions) -> tuple[Any, Endpoint]:
    address = options.secondary
    directory = options.state_dir / "keys"
    if is_loopback(address.host):
        own, peer = loopback_pair(directory)
        public = peer.own().public
    else:
        own = KeyStore(directory / "primary")
        trusted = own.trusted()
        if address.host not in trusted and len(trusted) != 1:
            raise KeyFileError(
                f"which key does the secondary at {address.host} have? Run there "
                "`checkpointd keys show --role secondary`, and "
                f"here `checkpointd keys trust --role primary {address.host} KEY`"
            )
        public = trusted.get(address.host) or next(iter(trusted.values()))
    return own.own(), Endpoint(address.host, public, address.control_port, address.bulk_port)


# -------------------------------------------------------------------- secondary


def run_secondary(options: SecondaryOptions) -> int:
    """Stand by for any number of domains until SIGTERM or SIGINT; returns the exit code."""
    from checkpointd.daemon.metrics import SecondaryMetrics
    from checkpointd.secondary.service import SecondaryService
    from checkpointd.secondary.standby import State

    with ExitStack() as stack:
        writer = stack.enter_context(logs.started(options.log_level, options.log_format))
        native.self_test()
        raise_file_limit()
        allow = Allowances(disk=False, output=False, untested=options.unsafe_untested_xen)
        hypervisor = choose_hypervisor(
            options.hypervisor, options.run_dir, options.namespace, allow
        )
        terms = TermStore(options.state_dir / "terms" / "secondary")
        stack.callback(terms.close)
        contexts = Contexts.make()
        stack.callback(contexts.close)
        metrics = SecondaryMetrics(list(State))
        metrics.follow_logs(lambda: writer.lost)
        service = SecondaryService(
            options,
            hypervisor,
            keys=_acceptor_keys(options),
            contexts=contexts,
            terms=terms,
            metrics=metrics,
        )
        _serve_health(
            stack,
            options,
            str(options.control_port),
            (options.metrics.host, options.metrics.port or 0),
            role="secondary",
            domid=None,
            registry=metrics.registry,
            ready=service.not_ready,
            status=service.status,
        )
        stack.enter_context(_stopping(service.stop))
        service.on_ready = lambda: _say(systemd.READY)
        service.on_state = lambda uuid, state: _say(systemd.status(f"{uuid} {state}"))
        try:
            service.run()
        finally:
            systemd.notify(systemd.STOPPING)
        return 0


def _acceptor_keys(options: SecondaryOptions) -> KeyStore:
    directory = options.state_dir / "keys"
    return (
        loopback_pair(directory)[1]
        if is_loopback(options.listen)
        else KeyStore(directory / "secondary")
    )
