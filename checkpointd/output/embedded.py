"""The output buffer of an embedded guest. See OutputBuffer in output/port.py.

The packets are with the guest's host (hypervisor/embedded/csrc/nic.c); the words that say what may leave are in
memory shared with it, so a release is a store and a wake-up.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.embedded.lib import ffi, lib
from checkpointd.output.port import OutputStats

if TYPE_CHECKING:
    from collections.abc import Callable


class EmbeddedOutput:
    """Any thread may call it, until the domain that it belongs to is closed."""

    def __init__(self, client: Any, open_: Callable[[], object]) -> None:
        self._client = client
        self._open = open_

    @property
    def depth(self) -> int:
        return sys.maxsize  # each packet carries the number of its epoch

    def release(self, closed: int) -> None:
        lib.client_release(self._attached(), closed)

    def open(self) -> None:
        self._attached()
        self._open()

    def stats(self) -> OutputStats:
        stats = ffi.new("struct control_stats *")
        lib.control_read_stats(lib.client_control(self._attached()), stats)
        return OutputStats(
            held_packets=stats.held_packets,
            held_bytes=stats.held_bytes,
            limit_bytes=stats.limit_bytes,
            dropped_packets=stats.dropped_packets,
            released_packets=stats.released_packets,
            shut=bool(stats.shut),
        )

    def detach(self) -> None:
        """Its domain is closed; the packets stay as they are."""
        self._client = None

    def _attached(self) -> Any:
        if self._client is None:
            raise HypervisorError("the output buffer is detached: its domain was closed")
        return self._client
