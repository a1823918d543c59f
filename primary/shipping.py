"""The shipping thread: frames out on the bulk link, off the pause.

It owns the bulk link. Frames go out without copying, straight from the arena; an arena's part is reported shipped only
once ZeroMQ has let go of every frame, so nothing can be overwritten that is still to be sent.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from checkpointd import faults
from checkpointd.errors import CheckpointdError
from checkpointd.wire.frames import NO_DIGEST, Header, Kind, PartEnd, check_digest, seal
from checkpointd.wire.initiator import LinkTimeoutError
from checkpointd.wire.messages import EVERYTHING

from .events import Ship, ShipFailed, Shipped

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.native import DigestKey
    from checkpointd.wire.initiator import BulkLink

    from .epoch import Frame
    from .reducing import Reducer

log = logging.getLogger(__name__)

DIGEST_BYTES = len(NO_DIGEST)

# s; how long one frame may wait for room before the part is reported as cut short. The control link notices a
# dead peer long before; this bounds a peer that lives and does not read.
SEND_TIMEOUT = 5.0
# s; how often a waiting send looks whether it has been abandoned.
SLICE = 0.05
# s; for the digests of all pages, which the secondary computes at memory speed and sends as a few MiB.
DIGESTS_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Session:
    """What frames are marked and digested with."""

    number: int
    term: int
    key: DigestKey


@dataclass(frozen=True, slots=True)
class _Job:
    session: Session
    ship: Ship
    frames: list[Frame]


@dataclass(frozen=True, slots=True)
class _Fetch:
    session: Session
    nr_pfns: int


@dataclass(slots=True)
class _Abandon:
    done: threading.Event = field(default_factory=threading.Event)


class _AbandonedError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Known:
    """The secondary's digest of each page, 16 octets a pfn, all zero where it has none; None: given up."""

    digests: bytearray | None


class Shipper:
    """`report` is called on this thread with Shipped, ShipFailed or Known; `fatal` with what must end the daemon."""

    def __init__(
        self,
        link: BulkLink,
        report: Callable[[Shipped | ShipFailed | Known], None],
        fatal: Callable[[BaseException], None],
        count_sent: Callable[[int, int], None],
        reducer: Reducer | None = None,
    ) -> None:
        """`count_sent` gets the octets of what was staged, and of what went out for it."""
        self._link = link
        self._report = report
        self._fatal = fatal
        self._count_sent = count_sent
        self._reducer = reducer
        # Octets of payload, since the start: what went out, and what that was before it was reduced.
        self.sent_bytes = self.staged_bytes = 0
        self._jobs: queue.SimpleQueue[_Job | _Fetch | _Abandon | None] = queue.SimpleQueue()
        self._abandoning = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ship(self, session: Session, ship: Ship, frames: list[Frame]) -> None:
        self._jobs.put(_Job(session, ship, frames))

    def fetch_known(self, session: Session, nr_pfns: int) -> None:
        self._jobs.put(_Fetch(session, nr_pfns))

    def abandon(self, timeout: float) -> bool:
        """Stop what is under way and make ZeroMQ let go of every frame; True once that is so."""
        order = _Abandon()
        self._abandoning.set()
        self._jobs.put(order)
        return order.done.wait(timeout)

    def close(self) -> None:
        """End the thread. ZeroMQ has let go of every frame then, so the arenas can be freed."""
        self._abandoning.set()
        self._jobs.put(_Abandon())
        self._jobs.put(None)
        self._thread.join()

    # ------------------------------------------------------------ on the thread

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                if isinstance(job, _Abandon):
                    self._link.abandon()
                    self._distrust()
                    self._abandoning.clear()
                    job.done.set()
                elif not self._abandoning.is_set():
                    self._perform(job)
        except BaseException as error:  # noqa: BLE001 - the daemon must not go on without its shipper
            self._fatal(error)
        finally:
            self._link.close()
            if self._reducer is not None:
                self._reducer.close()

    def _distrust(self) -> None:
        """What the standby holds is not certain any more."""
        if self._reducer is not None:
            self._reducer.distrust()

    def _perform(self, job: _Job | _Fetch) -> None:
        try:
            if isinstance(job, _Fetch):
                self._report(Known(self._fetch(job)))
            else:
                self._ship(job)
                self._report(Shipped(job.ship.epoch, job.ship.part))
        except _AbandonedError:
            pass
        except CheckpointdError as error:
            # What has left may still be read in place, and what is half sent will be missed and asked for. If
            # ZeroMQ does not let go this raises, and the daemon ends: a report would free the arena.
            self._link.abandon()
            if isinstance(job, _Fetch):
                log.warning("no page digests from the secondary (%s): copying every page", error)
                self._report(Known(None))
            else:
                self._report(ShipFailed(job.ship.epoch, job.ship.part, str(error)))

    def _ship(self, job: _Job) -> None:
        ship, started = job.ship, time.monotonic_ns()
        again = ship.ranges is not None
        if again:
            self._distrust()
            if ship.ranges == EVERYTHING and self._reducer is not None:
                self._reducer.refused()
        elif self._reducer is not None:
            self._reducer.begin(final=ship.final)
        for sequence, frame in enumerate(job.frames):
            if ship.ranges is None or any(first <= sequence <= last for first, last in ship.ranges):
                self._check_abandoned()
                faults.point("ship.frame")
                self._ship_frame(job, frame, sequence, as_it_is=again)
        octets = sum(frame.payload.nbytes for frame in job.frames)
        faults.point("ship.end")
        end = PartEnd(len(job.frames), ship.final, octets).pack()
        self._send(
            seal(self._header(job, Kind.PART_END, len(job.frames)), end, job.session.key), end
        )
        if self._released() and self._reducer is not None and not again:
            self._reducer.sent(time.monotonic_ns() - started)
        faults.point("ship.shipped")

    def _released(self) -> bool:
        """Once ZeroMQ has let go of the part; False: it had to be made to."""
        waited = 0.0
        while not self._link.wait_released(SLICE):
            waited += SLICE
            self._check_abandoned()
            if waited >= SEND_TIMEOUT:
                # Only a new socket makes ZeroMQ let go; what it had not sent, the secondary will miss and say so.
                self._link.abandon()
                return False
        return True

    def _ship_frame(self, job: _Job, frame: Frame, sequence: int, *, as_it_is: bool) -> None:
        length = frame.payload.nbytes
        reduced = None
        if self._reducer is not None and not as_it_is:
            reduced = self._reducer.reduce(frame)
        if reduced is None:
            header = self._header(job, frame.kind, sequence)
            header = replace(header, length=length, digest=frame.digest)
            self._send(header, frame.payload, staged=length)
        else:
            header = self._header(job, Kind.REDUCED, sequence)
            self._send(seal(header, reduced, job.session.key), reduced, staged=length)

    @staticmethod
    def _header(job: _Job, kind: Kind, sequence: int) -> Header:
        session, ship = job.session, job.ship
        return Header(kind, session.number, session.term, ship.epoch, ship.part, sequence)

    def _send(
        self, header: Header, payload: bytes | memoryview, *, staged: int | None = None
    ) -> None:
        """`staged`: octets that the payload stands for, if it is not itself."""
        waited = 0.0
        while True:
            try:
                self._link.send(header, payload, timeout_s=SLICE)
                break
            except LinkTimeoutError as error:
                waited += SLICE
                self._check_abandoned()
                if waited >= SEND_TIMEOUT:
                    raise CheckpointdError(
                        f"no frame taken for {SEND_TIMEOUT:.0f} s: {error}"
                    ) from error
        before = header.length if staged is None else staged
        self.sent_bytes += header.length
        self.staged_bytes += before
        self._count_sent(before, header.length)

    def _check_abandoned(self) -> None:
        if self._abandoning.is_set():
            raise _AbandonedError

    def _fetch(self, job: _Fetch) -> bytearray:
        session = job.session
        self._send(Header(Kind.DIGESTS_WANTED, session.number, session.term), b"")
        digests = bytearray(job.nr_pfns * DIGEST_BYTES)
        waited = 0.0
        while waited < DIGESTS_TIMEOUT:
            received = self._link.receive(SLICE)
            self._check_abandoned()
            if received is None:
                waited += SLICE
                continue
            header, payload = received
            if (header.kind, header.session, header.term) != (
                Kind.DIGESTS,
                session.number,
                session.term,
            ):
                continue
            check_digest(header, payload, session.key)
            (first,) = struct.unpack_from("<Q", payload)
            body = payload[8:]
            at = first * DIGEST_BYTES
            if at + len(body) > len(digests):
                raise CheckpointdError("the secondary's page digests do not fit this guest")
            digests[at : at + len(body)] = body
            if header.flags:
                return digests
        raise CheckpointdError(f"they did not come within {DIGESTS_TIMEOUT:.0f} s")
