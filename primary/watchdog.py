"""Ends a stuck engine, so that the host lets its guest run on (invariant 5)."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from checkpointd.errors import StuckError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


class Watchdog:
    """If `progress` shows the same number for `limit` seconds the process ends at once: a stuck call into the
    hypervisor cannot be interrupted, and dying is what makes the host resume the guest with its output shut.
    """

    def __init__(
        self, limit: float, progress: Callable[[], int], end: Callable[[int], object] = os._exit
    ) -> None:
        self._limit = limit
        self._progress = progress
        self._end = end
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        seen = self._progress()
        while not self._stopped.wait(self._limit):
            now = self._progress()
            if now == seen:
                log.critical(
                    "no progress for %.0f s: ending, so that the guest is not held", self._limit
                )
                self._end(StuckError.exit_code)
            seen = now
