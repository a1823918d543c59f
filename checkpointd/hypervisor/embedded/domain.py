"""The engine's end of an embedded guest. See Domain in hypervisor/port.py."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd import faults
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.embedded import protocol, records
from checkpointd.hypervisor.embedded.host import REASONS
from checkpointd.hypervisor.embedded.lib import ENGINE_POINTS, arm, ffi, lib
from checkpointd.hypervisor.embedded.place import parse_info
from checkpointd.hypervisor.port import Contact, DomainInfo, EndReason
from checkpointd.output.embedded import EmbeddedOutput

if TYPE_CHECKING:
    from checkpointd.wire.messages import End, Retire


class EmbeddedDomain:
    """Attached as long as its connection is open. Calls here may come from any thread, one at a time; the
    native table is the epoch loop's.
    """

    def __init__(self, info: DomainInfo) -> None:
        """Raises DomainBusyError, HostLostError or HypervisorError."""
        self._lock = threading.Lock()  # one order at a time on the connection
        try:
            self._connection = protocol.connect(Path(info.host.control))
        except OSError as error:
            raise HypervisorError(
                f"the host of domain {info.domid} (pid {info.host.pid}) does not answer: {error}"
            ) from error
        try:
            answer, descriptors = protocol.call(self._connection, {"op": "attach"})
            self._info = parse_info(answer["info"])
            self._client: Any = self._connect(descriptors)  # None once closed
        except BaseException:
            self._connection.close()
            raise
        self._ended: EndReason | None = None
        self._output = EmbeddedOutput(self._client, lambda: self._call({"op": "output-open"}))
        try:
            self._arm_faults()
        except BaseException:
            self.close()
            raise

    def _connect(self, descriptors: list[int]) -> Any:
        client = lib.client_new(*descriptors)
        if client == ffi.NULL:
            reason = os.strerror(ffi.errno)
            for fd in descriptors:
                os.close(fd)
            raise HypervisorError(f"cannot attach to domain {self._info.domid}: {reason}")
        return client

    def _arm_faults(self) -> None:
        host = self._info.host.pid
        faults.register_target("host", host)
        arm(
            ENGINE_POINTS,
            {"kill": os.getpid(), "stop": os.getpid(), "kill-host": host, "fail": 0},
            lambda rule: int(lib.client_add_fault(self._client, rule)),
        )

    def _call(self, request: protocol.Message) -> protocol.Message:
        with self._lock:
            return protocol.call(self._connection, request)[0]

    @property
    def info(self) -> DomainInfo:
        return self._info

    @property
    def table(self) -> int:
        if self._client is None:
            raise HypervisorError("the domain is closed")
        return int(ffi.cast("uintptr_t", lib.client_table(self._client)))

    @property
    def output(self) -> EmbeddedOutput:
        return self._output

    @property
    def trouble(self) -> None:
        return None

    @property
    def unsafe(self) -> list[str]:
        return []

    def tell_of_loss(self, contact: Contact) -> None:
        """The guest's host tells whoever probes it that no engine is attached."""

    def leave_word(self, word: Retire | End) -> None:
        """Nobody is beside the host to say it."""

    def static_records(self) -> bytes:
        return records.static_records()

    def enable_log(self) -> None:
        """HypervisorError if it is on already, as on Xen."""
        self._call({"op": "enable-log"})

    def ended(self) -> EndReason | None:
        if self._ended is None and self._client is not None:
            # The host writes its reason before it hangs up, so this order of looking never misses one.
            hung_up = lib.client_hung_up(self._client)
            stats = ffi.new("struct control_stats *")
            lib.control_read_stats(lib.client_control(self._client), stats)
            self._ended = REASONS.get(stats.ended, EndReason.HOST_LOST if hung_up else None)
        return self._ended

    def fileno(self) -> int:
        """Of the connection: between orders it becomes readable only by the host's hanging up."""
        return self._connection.fileno()

    def pause(self) -> None:
        self._call({"op": "pause"})

    def unpause(self) -> None:
        self._call({"op": "unpause"})

    def close(self) -> None:
        """Detach. The host has dropped everything of ours when this returns, unless it is gone itself."""
        if self._connection.fileno() < 0:
            return
        self.ended()  # what is known now stays known; our own detaching would look like a hang-up
        client, self._client = self._client, None
        with suppress(HypervisorError):
            self._call({"op": "detach"})
        self._connection.close()
        self._output.detach()
        lib.client_free(client)
