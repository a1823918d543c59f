"""Waking a thread that waits in a ZeroMQ poll."""

from __future__ import annotations

import contextlib
import os
import threading


class Wake:
    """An eventfd: set() from any thread makes `fd` readable until clear(). After close() set() does
    nothing.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # A late set() must not write to whatever file gets this number next.
        self._lock = threading.Lock()

    def set(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1
