"""`primary --to FILE`: epochs go into a file instead of to a standby.

A recording is no protection: nobody goes on with the guest, so its output is left as it is, and status says so. It is
for looking at, for measuring, and for coming back to: `checkpointd restore FILE` starts the last whole epoch.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from checkpointd import faults
from checkpointd.errors import HostLostError, StateError, UsageError
from checkpointd.hypervisor.port import EndReason

from .capture import Capture, GuestEndedError, Limits
from .figures import Pauses
from .pacing import Pacer
from .policy import pace_of
from .service import Ending
from .watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointd.daemon.config import PrimaryOptions
    from checkpointd.daemon.metrics import PrimaryMetrics
    from checkpointd.hypervisor.port import Domain
    from checkpointd.native import Outcome
    from checkpointd.stream.records import Octets

LOOK_EVERY = 0.05  # s; between two looks at the guest's end and at frames that it gave back

_ENDS = {EndReason.CRASH: 1, EndReason.HOST_LOST: HostLostError.exit_code}  # else 0


class State(StrEnum):
    COPYING = "copying"  # the first copy
    RECORDING = "recording"


class RecordingFile:
    """Grows at its end only. Closing it, after an error too, cuts off what is no whole epoch, and removes a file that
    holds none.
    """

    def __init__(self, path: Path) -> None:
        """Raises UsageError if it exists or cannot be made: a recording is never written over."""
        self.path = path
        self.octets = 0
        self._whole = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)  # a guest's memory is nobody else's to read
        except FileExistsError as error:
            raise UsageError(f"{path} exists already: remove it, or record into another") from error
        except OSError as error:
            raise UsageError(f"{path}: cannot be made: {error.strerror}") from error
        self._sync_name()

    def write(self, octets: Octets) -> None:
        view = memoryview(octets).cast("B")
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError as error:
                raise self._failed(error) from error
            view = view[written:]
            self.octets += written

    def sync(self) -> None:
        """Everything written is on stable storage."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def keep(self) -> None:
        """What has been written is whole epochs."""
        self._whole = self.octets

    def close(self) -> None:
        with suppress(OSError):  # restore finds the last whole epoch in any case
            os.ftruncate(self._fd, self._whole)
        os.close(self._fd)
        if not self._whole:
            self.path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> StateError:
        return StateError(
            f"{self.path}: cannot be written: {error.strerror}; it ends with its last whole epoch; "
            "the guest runs on"
        )

    def _sync_name(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class Recording:
    """Records one attached domain until run() returns.

    Whole epochs (invariant 2), after a power failure too, when of what was written and not synced any part may be
    missing. So an epoch goes in this order: its pages and tail; fdatasync; CHECKPOINT and CHECKPOINT_END; fdatasync.
    Where the file has the end of an epoch it has all of it, and an epoch is counted once it is safe.
    """

    def __init__(
        self,
        options: PrimaryOptions,
        domain: Domain,
        file: RecordingFile,
        metrics: PrimaryMetrics,
    ) -> None:
        self._options = options
        self._domain = domain
        self._file = file
        self._metrics = metrics
        self._capture = Capture(
            domain,
            self._write,
            Limits(
                options.arena,
                options.mapping_budget,
                options.suspend_timeout,
                options.max_live_rounds,
                options.zero_pages,
            ),
            progress=self._copied_pages,
            seen=self._seen,
        )
        self._stop = threading.Event()
        self._state = State.COPYING
        self._epochs = 0
        self._progress = 0
        self._copied = 0
        self._dirty = 0
        self._pauses = Pauses()
        self._pacer = Pacer(pace_of(options), time.monotonic_ns())
        self.on_progress: Callable[[int, int], None] | None = None  # (pages copied, pages of RAM)
        self.on_state: Callable[[str], object] | None = None

    # ------------------------------------------------------------ from other threads

    def stop(self) -> None:
        """run() returns soon, with the epochs that are whole by then."""
        self._stop.set()

    def status(self) -> dict[str, Any]:
        """A snapshot for people and programs; safe from any thread."""
        info = self._domain.info
        return {
            "role": "primary",
            "uuid": info.uuid,
            "domid": info.domid,
            "domain": info.name,
            "hypervisor": info.hypervisor,
            "state": str(self._state),
            "reason": f"not protected: epochs go to {self._file.path}",
            "epoch": self._epochs + 1,
            "recorded_epochs": self._epochs,
            "recorded_bytes": self._file.octets,
            "interval_ns": self._pacer.interval.ns,
            **self._pauses.status(),
            "dirty_pages": self._dirty,
            "copied_pages": self._copied,
            "ram_pages": info.ram_pages,
            "unsafe": [
                *self._options.unsafe,
                *self._domain.unsafe,
                *(f"faults armed: {rule.point}" for rule in faults.armed()),
            ],
        }

    def not_ready(self) -> list[str]:
        """Never ready: whoever asks wants to know whether the guest is protected."""
        return [f"{self._state}, not protected"]

    # ------------------------------------------------------------ the loop

    def run(self) -> Ending:
        """Raises StateError if the file cannot be written, HypervisorError, ProtectionLostError."""
        options = self._options
        limit = (options.suspend_timeout + options.give_up_after) / 1e9
        watchdog = Watchdog(limit, lambda: self._progress)
        watchdog.start()
        try:
            self._capture.begin()
            self._enter(State.RECORDING)
            while True:
                self._pacer.due(time.monotonic_ns())
                self._epoch()
                self._pacer.started(time.monotonic_ns())
                self._wait_until(self._pacer.next_start)
        except _StoppedError:
            return Ending(0, f"recording ended, as asked: {self._what()}", None)
        except GuestEndedError as error:
            reason = self._domain.ended()
            return Ending(_ENDS.get(reason, 0) if reason else 0, f"{error}: {self._what()}", reason)
        finally:
            watchdog.stop()
            self._capture.close()

    def _epoch(self) -> None:
        outcome = self._capture.take()
        began = time.monotonic_ns()
        self._pauses.add(outcome.pause_ns)
        self._pacer.interval.paused(outcome.pause_ns, 0)  # what does not fit is no matter here
        self._dirty = outcome.dirty
        self._capture.write_tail()
        self._file.sync()
        faults.point("record.before-seal")
        self._capture.seal()
        self._file.sync()
        self._file.keep()
        self._epochs += 1
        self._progress += 1
        self._metrics.shipped(time.monotonic_ns() - began)

    def _wait_until(self, start: int) -> None:
        while (left := start - time.monotonic_ns()) > 0:
            self._stop.wait(min(LOOK_EVERY, left / 1e9))
            self._check_stop()
            self._capture.look_after()
            self._progress += 1
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _write(self, octets: Octets) -> None:
        self._file.write(octets)
        length = memoryview(octets).nbytes
        self._metrics.sent_bytes(length, length)
        self._progress += 1  # each piece has the watchdog's limit for itself

    def _seen(self, outcome: Outcome) -> None:
        self._progress += 1
        if outcome.pause_ns or outcome.suspend_ns:
            self._metrics.paused(outcome)
        else:
            self._metrics.live_round(outcome)
            self._check_stop()

    def _copied_pages(self, done: int, total: int) -> None:
        self._copied = done
        if self.on_progress:
            self.on_progress(done, total)

    def _enter(self, state: State) -> None:
        self._state = state
        self._metrics.state(str(state))
        if self.on_state:
            self.on_state(str(state))

    def _what(self) -> str:
        return f"{self._epochs} whole epochs in {self._file.path}" if self._epochs else "no epoch"


class _StoppedError(Exception):
    """Asked to stop."""
