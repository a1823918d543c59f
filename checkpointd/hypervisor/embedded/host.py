"""The process that hosts one embedded guest: builds it, takes orders on its control socket, and ends with it.

The guest runs in threads of C (csrc/host.h); this thread only takes orders. At most one engine is attached:
when its connection closes, by its will or its death, its mappings and the dirty log go, the guest runs on, and
the output stays as shut as it was (invariant 5).
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from checkpointd import faults
from checkpointd.errors import DomainBusyError, HypervisorError
from checkpointd.hypervisor.embedded import inputlog, protocol
from checkpointd.hypervisor.embedded.lib import HOST_POINTS, arm, check, ffi, lib
from checkpointd.hypervisor.port import DomainInfo, EndReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointd.hypervisor.embedded.place import Place
    from checkpointd.hypervisor.embedded.protocol import Message

# Octets of output held while shut: at 100 ms epochs and a thousand answers a second, minutes of silence.
OUTPUT_LIMIT = 16 << 20
# Seconds that an activated guest waits for its address: the socket of a killed host goes with its process,
# which the fence has seen ended; what remains is the kernel's clean-up.
BIND_TIMEOUT = 5.0
BIND_RETRY = 0.01  # seconds; there is no event to wait for

REASONS = {
    lib.END_POWEROFF: EndReason.POWEROFF,
    lib.END_REBOOT: EndReason.REBOOT,
    lib.END_CRASH: EndReason.CRASH,
    lib.END_DESTROYED: EndReason.DESTROYED,
}


def bind(address: str, timeout: float = 0.0) -> socket.socket:
    """A UDP socket bound at "HOST:PORT"; retries for `timeout` seconds while the address is taken."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    try:
        family, kind, protocol_, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
        )[0]
        if not 0 <= int(port) <= 65535:  # getaddrinfo takes it modulo 65536
            raise ValueError(f"there is no port {port}")
    except (ValueError, OSError) as error:
        raise HypervisorError(
            f"the guest's address {address!r} is not HOST:PORT: {error}"
        ) from error
    udp = socket.socket(family, kind, protocol_)
    while True:
        try:
            udp.bind(target)
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(BIND_RETRY)
                continue
            udp.close()
            raise HypervisorError(
                f"the guest's address {address} cannot be taken ({error.strerror}): "
                "end who uses it, or give the guest another with --listen"
            ) from error
        return udp


@dataclass(frozen=True, slots=True)
class Build:
    """What a host is built from. `info.host` and `info.domid` are filled in from the place."""

    info: DomainInfo
    memory_fd: int
    populated: bytes | None = None  # None: every page
    base_step: int = 0  # 0: a fresh guest, else the step to go on from


class Host:
    """One guest, its threads and its control socket. run() ends with the guest; close() frees everything."""

    def __init__(self, place: Place, build: Build, bind_timeout: float = 0.0) -> None:
        config, nr_pfns = build.info.config, build.info.nr_pfns
        self.place = place
        self._selector = selectors.DefaultSelector()
        self._engine: socket.socket | None = None
        self._orders: deque[tuple[socket.socket, bool, list[int]]] = deque()
        self._ordered: socket.socket | None = None  # who waits for the balloon
        self._pointer: Any = None
        # The log must be there before the guest consumes anything, the address after everything that can fail.
        start = inputlog.header(build.info.uuid, build.base_step, nr_pfns, str(config["program"]))
        input_log = os.open(
            place.input_log,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC,
            0o600,
        )
        udp = None
        try:
            os.write(input_log, start)
            faults.point("host.before-bind")
            udp = bind(str(config["address"]), bind_timeout)
            populated = (
                ffi.NULL
                if build.populated is None
                else ffi.from_buffer("uint64_t[]", build.populated)
            )
            pointer = lib.host_new(
                build.memory_fd, nr_pfns, populated, UUID(build.info.uuid).int & (1 << 64) - 1,
                udp.fileno(), input_log, int(config["output_limit"]),
            )  # fmt: skip
            if pointer == ffi.NULL:
                raise HypervisorError(
                    f"no memory for a guest of {nr_pfns} pages: {os.strerror(ffi.errno)}"
                )
        except BaseException:
            os.close(input_log)
            if udp is not None:
                udp.close()
            raise
        udp.detach()  # the host's now, as the log is
        self._pointer = pointer
        self.info = replace(build.info, domid=place.domid, host=place.identity())
        arm(
            HOST_POINTS,
            {"kill": os.getpid(), "stop": os.getpid()},
            lambda rule: int(lib.host_add_fault(pointer, rule)),
        )

    def boot(self) -> None:
        """Lay out fresh RAM; HypervisorError if the program does not fit."""
        program, uuid = str(self.info.config["program"]), UUID(self.info.uuid).bytes
        check(
            lib.host_boot(self._pointer, program.encode(), uuid),
            f"the program {program!r} does not fit a guest of {self.info.nr_pfns} pages",
        )

    @property
    def step(self) -> int:
        return int(lib.host_step(self._pointer))

    @property
    def ram_pages(self) -> int:
        return int(self._stats().ram_pages)

    def start(self, *, paused: bool = False) -> None:
        """Open the control socket, run the guest, and let others find it."""
        self._listener = protocol.listen(self.place.control)
        self._watch(self._listener, self._accept)
        self._watch_fd(self._pointer.done, self._guest_said)
        check(lib.host_start(self._pointer, paused), "the guest cannot be started")
        self.place.publish(self._info())
        faults.point("host.started")

    def run(self) -> EndReason:
        """Take orders until the guest ends. SIGTERM and SIGINT destroy it."""
        with self._signals():
            while (reason := self.ended()) is None:
                if self._pointer.failure:
                    raise HypervisorError(
                        "the guest's host cannot go on (its input log cannot be written, or its memory is no "
                        f"guest's): {os.strerror(-self._pointer.failure)}"
                    )
                for key, _ in self._selector.select():
                    key.data()
        return reason

    def ended(self) -> EndReason | None:
        return REASONS.get(self._stats().ended)

    def close(self) -> None:
        """Free the guest. Of its output what may leave is sent, and what is held is lost."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        lib.host_free(self._pointer)
        self._pointer = None
        self.place.close()

    # ---- the loop ----

    def _watch(self, connection: socket.socket, ready: Callable[[], None]) -> None:
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, ready)

    def _watch_fd(self, fd: int, ready: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, ready)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the guest. Through a socket, since one that arrives just before select() would
        otherwise wait there for the next event.
        """
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._watch(ours, lambda: lib.host_end(self._pointer, lib.END_DESTROYED))
        wakeup = signal.set_wakeup_fd(theirs.fileno())
        before = [(n, signal.signal(n, lambda *_: None)) for n in (signal.SIGTERM, signal.SIGINT)]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._selector.unregister(ours)
            ours.close()
            theirs.close()

    def _accept(self) -> None:
        with suppress(OSError):  # whoever came has gone again
            connection, _ = self._listener.accept()
            self._watch(connection, lambda: self._serve(connection))

    def _serve(self, connection: socket.socket) -> None:
        try:
            message = protocol.receive(connection)
        except (OSError, ValueError):
            message = None
        if message is None:
            self._hung_up(connection)
            return
        request, descriptors = message
        for fd in descriptors:
            os.close(fd)  # no order has any
        try:
            self._obey(connection, request)
        except (HypervisorError, OSError) as error:
            # OSError: such as no descriptor left for one more engine.
            self._answer(connection, protocol.failure(error))
        except (KeyError, TypeError, ValueError) as error:
            self._answer(connection, {"error": f"not an order: {error!r}"})

    def _answer(
        self, connection: socket.socket, answer: Message, fds: tuple[int, ...] = ()
    ) -> None:
        with suppress(OSError):  # it has gone; its end of file is on the way
            protocol.send(connection, answer, fds)

    def _hung_up(self, connection: socket.socket) -> None:
        if connection is self._engine:
            self._detach()
        if connection is self._ordered:
            self._ordered = None
        self._orders = deque(order for order in self._orders if order[0] is not connection)
        self._selector.unregister(connection)
        connection.close()

    # ---- orders ----

    def _obey(self, connection: socket.socket, request: Message) -> None:
        answer: Message = {}
        match request["op"]:
            case "info":
                answer = self._view()
            case "attach":
                self._attach(connection)
                return
            case "detach":
                self._need_engine(connection)
                self._detach()
            case "enable-log":
                self._need_engine(connection)
                check(lib.host_enable_log(self._pointer), "the dirty log is on already")
            case "output-open":
                self._need_engine(connection)
                lib.host_output_open(self._pointer)
            case "pause" | "unpause" as op:
                lib.host_pause(self._pointer, op == "pause")
            case "balloon":
                pfns = [int(p) for p in request["pfns"]]
                if not all(0 <= pfn < self.info.nr_pfns for pfn in pfns):
                    raise HypervisorError(
                        f"pfns of this guest are from 0 to {self.info.nr_pfns - 1}, not all of those given"
                    )
                self._orders.append((connection, bool(request["in"]), pfns))
                self._next_order()
                return
            case "destroy":
                lib.host_end(self._pointer, lib.END_DESTROYED)
            case other:
                raise HypervisorError(
                    f"this host knows no order {other!r}: is it of another version?"
                )
        self._answer(connection, answer)

    def _attach(self, connection: socket.socket) -> None:
        if self._engine is not None:
            raise DomainBusyError(
                f"domain {self.info.domid} is protected by another engine already: end that one first"
            )
        mapper = ffi.new("int *")
        check(lib.host_attach(self._pointer, mapper), "cannot attach")
        self._engine = connection
        # Read-only from here on, whatever the engine asks for: it must not be able to write the guest.
        memory = os.open(f"/proc/self/fd/{self._memory_fd()}", os.O_RDONLY | os.O_CLOEXEC)
        host = self._pointer
        try:
            self._answer(
                connection, {"info": asdict(self._info())},
                (memory, host.control_fd, host.kick, host.note, host.nic.wake, mapper[0]),
            )  # fmt: skip
        finally:
            os.close(memory)
            os.close(mapper[0])

    def _memory_fd(self) -> int:
        return int(self._pointer.machine.fd)

    def _detach(self) -> None:
        lib.host_detach(self._pointer)
        self._engine = None

    def _need_engine(self, connection: socket.socket) -> None:
        if connection is not self._engine:
            raise HypervisorError("only the attached engine may ask for this")

    def _next_order(self) -> None:
        """Hand the next balloon order to the guest, which carries them out one at a time, as steps."""
        if self._ordered is None and self._orders:
            connection, inwards, pfns = self._orders[0]
            if lib.host_balloon(self._pointer, inwards, pfns, len(pfns)) == 0:
                self._ordered = connection
                self._orders.popleft()

    def _guest_said(self) -> None:
        lib.event_drain(self._pointer.done)
        changed = lib.host_balloon_result(self._pointer)
        if changed >= 0:
            if self._ordered is not None:
                self._answer(self._ordered, {"changed": changed})
            self._ordered = None
            self._next_order()

    # ---- views ----

    def _stats(self) -> Any:
        stats = ffi.new("struct control_stats *")
        lib.control_read_stats(self._pointer.control, stats)
        return stats

    def _info(self) -> DomainInfo:
        return replace(self.info, ram_pages=self.ram_pages)

    def _view(self) -> Message:
        stats = self._stats()
        return {
            "info": asdict(self._info()),
            "engine": self._engine is not None,
            "step": stats.step,
            "paused": bool(stats.paused),
            "shut": bool(stats.shut),
            "held": stats.held_packets,
            "dropped": stats.dropped_packets,
        }
