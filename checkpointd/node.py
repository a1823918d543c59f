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
from checkpointd.authority.terms import Role, TermStore
from checkpointd.daemon import logs, systemd
from checkpointd.daemon.health import HealthServer
from checkpointd.daemon.roster import Registration
from checkpointd.errors import HypervisorError, KeyFileError, NoSuchDomainError
from checkpointd.hypervisor.port import EndReason
from checkpointd.wire.keys import KeyStore, loopback_pair
from checkpointd.wire.sockets import Contexts, Endpoint, is_loopback, raise_file_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry

    from checkpointd.daemon.config import CommonOptions, PrimaryOptions, SecondaryOptions
    from checkpointd.hypervisor.port import Domain, DomainInfo, Hypervisor
    from checkpointd.primary.service import Ending

log = logging.getLogger(__name__)

# A dom0 says so here (Linux, drivers/xen/xenfs); elsewhere the file is missing or lacks the word.
XEN_CAPABILITIES = Path("/proc/xen/capabilities")
# s; from the end of the old domain to the beginning of the new one: a toolstack, or a new interpreter, has to build it.
REBOOT_TIMEOUT = 60.0
REBOOT_LOOK = 0.05  # s; between two looks, for there is no event to wait for


def choose_hypervisor(wanted: str, run_dir: Path, namespace: str) -> Hypervisor:
    """Xen where there is one, else embedded; `wanted` other than "auto" is a demand."""
    if wanted == "auto":
        wanted = "xen" if _is_dom0() else "embedded"
    if wanted == "xen":
        raise HypervisorError(
            "this release protects guests of the embedded hypervisor only, Xen's are to follow: "
            "use --hypervisor embedded"
        )
    from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor

    return EmbeddedHypervisor(namespace, run_dir)


def _is_dom0() -> bool:
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
        writer = stack.enter_context(logs.started(options.log_level, options.log_format))
        native.self_test()
        hypervisor = choose_hypervisor(options.hypervisor, options.run_dir, options.namespace)
        info = hypervisor.find(domid=options.domid, uuid=options.uuid)
        terms = TermStore(options.state_dir / "terms" / "primary" / info.uuid)
        stack.callback(terms.close)
        contexts = Contexts.make()
        stack.callback(contexts.close)
        while True:
            ending = _protect(options, hypervisor, info, terms, contexts, writer, on_progress)
            log.log(logging.ERROR if ending.exit_code else logging.INFO, "%s", ending.text)
            if ending.guest is not EndReason.REBOOT:
                return ending.exit_code
            info = _after_reboot(hypervisor, info)
            log.info("the guest has rebooted: protecting it as domain %d", info.domid)


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

    keys, endpoint = _initiator_keys(options)
    with ExitStack() as stack:
        domain: Domain = hypervisor.attach(info.domid)
        stack.callback(domain.close)
        record = terms.load(info.uuid)
        if record.term == 0:
            terms.store(type(record)(info.uuid, 1, Role.PRIMARY, record.next_epoch))
            record = terms.load(info.uuid)
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
        )
        service.on_progress = on_progress
        service.on_state = lambda state: _say(systemd.status(state))
        port = options.metrics.port
        _serve_health(
            stack,
            options,
            str(info.domid),
            (options.metrics.host, port if port is not None else _auto_port(info.domid)),
            role="primary",
            domid=info.domid,
            registry=metrics.registry,
            ready=service.not_ready,
            status=service.status,
        )
        stack.enter_context(_stopping(service.stop))
        systemd.notify(systemd.READY, systemd.status("connecting"))
        try:
            return service.run()
        finally:
            systemd.notify(systemd.STOPPING)


def _auto_port(domid: int) -> int:
    from checkpointd.daemon.config import PRIMARY_METRICS_BASE

    return PRIMARY_METRICS_BASE + domid


def _initiator_keys(options: PrimaryOptions) -> tuple[Any, Endpoint]:
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
        hypervisor = choose_hypervisor(options.hypervisor, options.run_dir, options.namespace)
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
