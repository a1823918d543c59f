"""The shipping thread: frames out on the bulk link, off the pause.

It owns the bulk link. Frames go out without copying, straight from the arena; an arena's part is reported shipped only
once ZeroMQ has let go of every frame, so nothing can be overwritten that is still to be sent.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from checkpointd import faults
from checkpointd.errors import CheckpointdError
from checkpointd.wire.frames import DIGEST_BYTES, Header, Kind, pack_part_end

from .protection import Ship, Shipped, ShipFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.initiator import BulkLink

    from .epoch import Frame

log = logging.getLogger(__name__)

# s; how long one frame may wait for room before the part is reported as cut short. The control link notices a
# dead peer long before; this bounds a peer that lives and does not read.
SEND_TIMEOUT = 5.0
# s; how often a waiting send looks whether it has been abandoned.
SLICE = 0.05
# s; for the digests of all pages, which the secondary computes at memory speed and sends as a few MiB.
DIGESTS_TIMEOUT = 30.0


@dataclass(slots=True)
class _Job:
    ship: Ship
    frames: list[Frame]


@dataclass(slots=True)
class _Fetch:
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
        session: int,
        term: int,
        report: Callable[[Shipped | ShipFailed | Known], None],
        fatal: Callable[[BaseException], None],
        count_sent: Callable[[int], None],
    ) -> None:
        self._link = link
        self._session = session
        self._term = term
        self._report = report
        self._fatal = fatal
        self._count_sent = count_sent
        self._jobs: queue.SimpleQueue[_Job | _Fetch | _Abandon | None] = queue.SimpleQueue()
        self._abandoning = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ship(self, ship: Ship, frames: list[Frame]) -> None:
        self._jobs.put(_Job(ship, frames))

    def fetch_known(self, nr_pfns: int) -> None:
        self._jobs.put(_Fetch(nr_pfns))

    def abandon(self, timeout: float) -> bool:
        """Stop what is under way and make ZeroMQ let go of every frame; True once that is so."""
        order = _Abandon()
        self._abandoning.set()
        self._jobs.put(order)
        return order.done.wait(timeout)

    def close(self) -> None:
        self._abandoning.set()
        self._jobs.put(None)
        self._thread.join()

    # ------------------------------------------------------------ on the thread

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                if isinstance(job, _Abandon):
                    self._link.abandon()
                    self._abandoning.clear()
                    job.done.set()
                elif not self._abandoning.is_set():
                    self._perform(job)
        except BaseException as error:  # noqa: BLE001 - the daemon must not go on without its shipper
            self._fatal(error)
        finally:
            self._link.close()

    def _perform(self, job: _Job | _Fetch) -> None:
        try:
            if isinstance(job, _Fetch):
                self._report(Known(self._fetch(job.nr_pfns)))
            else:
                self._ship(job)
                self._report(Shipped(job.ship.epoch, job.ship.part))
        except _AbandonedError:
            pass
        except CheckpointdError as error:
            if isinstance(job, _Fetch):
                log.warning("no page digests from the secondary (%s): copying every page", error)
                self._report(Known(None))
            else:
                self._report(ShipFailed(job.ship.epoch, job.ship.part, str(error)))

    def _ship(self, job: _Job) -> None:
        ship = job.ship
        for sequence, frame in enumerate(job.frames):
            if ship.ranges is None or any(first <= sequence <= last for first, last in ship.ranges):
                faults.point("ship.frame")
                self._send(self._header(ship, frame.kind, sequence, frame.digest, frame.payload), frame.payload)
        octets = sum(len(frame.payload) for frame in job.frames)
        faults.point("ship.end")
        end = pack_part_end(len(job.frames), octets, final=ship.final)
        self._send(self._header(ship, Kind.PART_END, len(job.frames), bytes(DIGEST_BYTES), end), end)
        waited = 0.0
        while not self._link.wait_released(SLICE):
            waited += SLICE
            self._check_abandoned()
            if waited >= SEND_TIMEOUT:
                # Only a new socket makes ZeroMQ let go; what it had not sent, the secondary will miss and say so.
                self._link.abandon()
                break
        faults.point("ship.shipped")

    def _header(self, ship: Ship, kind: Kind, sequence: int, digest: bytes, payload: bytes | memoryview) -> Header:
        return Header(
            kind=kind,
            session=self._session,
            term=self._term,
            epoch=ship.epoch,
            part=ship.part,
            sequence=sequence,
            length=len(payload),
            digest=digest,
        )

    def _send(self, header: Header, payload: bytes | memoryview) -> None:
        waited = 0.0
        while not self._link.send(header, payload, timeout_s=SLICE):
            waited += SLICE
            self._check_abandoned()
            if waited >= SEND_TIMEOUT:
                self._link.abandon()
                raise CheckpointdError(f"the secondary has taken no frame for {SEND_TIMEOUT:.0f} s")
        self._count_sent(len(payload))

    def _check_abandoned(self) -> None:
        if self._abandoning.is_set():
            raise _AbandonedError

    def _fetch(self, nr_pfns: int) -> bytearray | None:
        wanted = Header(kind=Kind.DIGESTS_WANTED, session=self._session, term=self._term)
        self._send(wanted, b"")
        digests = bytearray(nr_pfns * DIGEST_BYTES)
        waited = 0.0
        while waited < DIGESTS_TIMEOUT:
            received = self._link.receive(SLICE)
            self._check_abandoned()
            if received is None:
                waited += SLICE
                continue
            header, payload = received
            if header.kind is not Kind.DIGESTS or header.session != self._session:
                continue
            (first,) = struct.unpack_from("<Q", payload)
            body = payload[8:]
            at = first * DIGEST_BYTES
            if len(body) % DIGEST_BYTES or at + len(body) > len(digests):
                raise CheckpointdError("the secondary's page digests do not fit this guest")
            digests[at : at + len(body)] = body
            if header.flags & 1:
                return digests
        raise CheckpointdError(f"they did not come within {DIGESTS_TIMEOUT:.0f} s")
