"""The warm domain's feed: one xl, and the thread that brings it from epoch to epoch, from the image while it changes.

As a live migration reads a guest: what changes behind the reader is read again, and an epoch is sealed only at a
moment when nothing has.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from checkpointd import faults, native
from checkpointd.errors import CheckpointdError, HypervisorError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.secondary.replica import State
from checkpointd.stream.records import TYPE_SHIFT, PageType
from checkpointd.stream.remus import RemusStream

from .xl_config import with_room
from .xl_process import InterruptedFeedError, Limits, XlReceive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.secondary.replica import Replica
    from checkpointd.stream.records import Octets

    from .xl_leftover import Claim

log = logging.getLogger(__name__)

CHUNK_PAGES = 256  # one record: 1 MiB of pages, which is all the memory that a feed takes here
# Times the guest's memory that one epoch may grow to while commits go on beside it. xl holds an epoch in
# memory until it is whole, so a feed that never catches up has to end.
MOST_ROUNDS = 2
# Octets/s at which any Xen host applies an epoch; QEMU's software emulation of one does 300 MB/s.
APPLY_RATE = 50_000_000


class Feed:
    """One xl and the thread that feeds it, from the first page to the end of its input.

    Whole epochs (invariant 2): an epoch is sealed only at a moment when no commit is under way and no page
    has changed since it was read; then what was sent is the replica's committed epoch.
    """

    def __init__(
        self,
        make_receive: Callable[[int], XlReceive],
        claim: Claim,
        info: DomainInfo,
        static_records: bytes,
        replica: Replica,
        limits: Limits,
    ) -> None:
        """`make_receive` gets the descriptor that will interrupt it."""
        self.epoch: int | None = None  # the last one that was sealed
        self.applied: int | None = None  # the last one that xl has applied
        self.sent = 0  # octets of pages, in all
        # Why it has ended; read after the thread.
        self.error: CheckpointdError | OSError | None = None
        self._claim = claim
        self._info = info
        self._static = static_records
        self._replica = replica
        self._limits = limits
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._last = False  # this epoch is the last: catch_up() waits for it
        self._parts: list[Octets] = []
        self._there = native.Bitmap(replica.nr_pfns)  # pages that xl has made
        self.receive = make_receive(self._stop)
        self._thread = threading.Thread(target=self._run, name=f"xl-feed-{info.uuid[:8]}")
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def claimed(self) -> bool:
        """Nothing of another's was in the way."""
        return self._claim.made

    def committed(self) -> None:
        """There is a new epoch."""
        os.eventfd_write(self._wake, 1)

    def catch_up(self, limit: float) -> None:
        """Until xl has applied the replica's epoch, and waits for what it will not get; `limit` in seconds. The caller
        sees to it that no commit comes meanwhile. Raises HypervisorError.
        """
        self._last = True
        self.committed()
        self._thread.join(limit)
        if self._thread.is_alive():
            raise HypervisorError(
                f"xl has not taken in epoch {self._replica.epoch} within {limit:.1f} s"
            )
        if self.error is not None:
            raise HypervisorError(str(self.error)) from self.error
        if self.applied != self._replica.epoch:
            raise HypervisorError(f"xl has epoch {self.applied} and not {self._replica.epoch}")

    def finish(self) -> int:
        """After catch_up(): let xl finish the domain; gives its domid. Raises HypervisorError."""
        domid = self.receive.finish()
        gone = native.Bitmap.from_bytes(
            self._replica.nr_pfns, _without(bytes(self._there), bytes(self._replica.populated))
        )
        try:
            for pfns in _chunks(gone, CHUNK_PAGES):
                self.receive.drop_pages(pfns)
        except HypervisorError as error:
            log.warning("the guest has memory here that it had given up: %s", error)
        return domid

    def close(self) -> None:
        """End the thread, whatever it is doing, and let go of the image. xl is left as it is."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        with self._replica.lock:
            self._replica.changed = None
        for descriptor in (self._stop, self._wake):
            os.close(descriptor)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        """What takes the toolstack its time is done here, so that no commit waits for it."""
        try:
            self._claim.make_way()
            self._feed()
        except InterruptedFeedError:
            pass
        except (CheckpointdError, OSError) as error:
            self.error = error
            try:
                self.receive.abort()
            except (CheckpointdError, OSError) as left:
                self.error = HypervisorError(f"{error}; and its domain is left behind: {left}")

    def _feed(self) -> None:
        with self._replica.lock:
            behind = native.Bitmap.from_bytes(self._replica.nr_pfns, bytes(self._replica.populated))
            self._replica.changed = native.Bitmap(self._replica.nr_pfns)
        self.receive.start()
        self._claim.started(self.receive.identity)
        stream = RemusStream(self._parts.append)
        stream.begin(with_room(str(self._info.config["xl"]), behind.count()), self._static)
        self._flush()
        self.receive.hold()
        while True:
            octets = self._epoch(stream, behind)
            self.receive.wait_applied(self._limits.stall + octets / APPLY_RATE)
            self.applied = self.epoch
            while self.epoch == self._replica.epoch and not self._last:
                self.receive.wait(self._wake)
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if self.epoch == self._replica.epoch:
                return
            behind = self._changed()

    def _epoch(self, stream: RemusStream, behind: native.Bitmap) -> int:
        """Send one committed epoch: the pages `behind`, and what changes meanwhile. Gives octets of pages."""
        replica = self._replica
        most = MOST_ROUNDS * self._info.ram_pages * PAGE_SIZE
        octets = 0
        while True:
            for pages in _chunks(behind, CHUNK_PAGES):
                octets += self._pages(stream, pages)
            with replica.lock:
                assert replica.changed is not None, "set by this thread"
                if not replica.changed and replica.state is State.WHOLE:
                    context, epoch = replica.context, replica.epoch
                    break
                behind, replica.changed = replica.changed, native.Bitmap(replica.nr_pfns)
            if self.epoch is not None and octets > most:
                raise HypervisorError(
                    "the guest changes faster than xl takes it in: an epoch would need "
                    f"{octets >> 20} MiB there"
                )
        stream.tail(context)
        self._flush()
        faults.point("xl.before-seal")
        stream.end_epoch()
        self._parts.clear()  # the seal, which the receiver writes in its own way
        self.receive.seal(context)
        self.epoch = epoch
        faults.point("xl.after-seal")
        return octets

    def _pages(self, stream: RemusStream, pages: list[int]) -> int:
        here = [pfn for pfn in pages if pfn in self._replica.populated]
        if here:
            stream.pages(self._replica.page_data(here))
            for pfn in here:
                self._there.add(pfn)
        if len(here) < len(pages):
            gone = set(pages).difference(here)
            stream.gone(_words(PageType.XTAB << TYPE_SHIFT | pfn for pfn in sorted(gone)))
        self._flush()
        self.sent += len(here) * PAGE_SIZE
        faults.point("xl.pages")
        return len(here) * PAGE_SIZE

    def _changed(self) -> native.Bitmap:
        with self._replica.lock:
            behind = self._replica.changed
            assert behind is not None, "set by this thread"
            self._replica.changed = native.Bitmap(self._replica.nr_pfns)
            return behind

    def _flush(self) -> None:
        for part in self._parts:
            self.receive.feed(part)
        self._parts.clear()


def _without(bits: bytes, others: bytes) -> bytes:
    """The bits that are not among the others."""
    left = int.from_bytes(bits, "little") & ~int.from_bytes(others, "little")
    return left.to_bytes(len(bits), "little")


def _words(words: Iterable[int]) -> bytes:
    return b"".join(word.to_bytes(8, "little") for word in words)


def _chunks(pfns: Iterable[int], size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for pfn in pfns:
        chunk.append(pfn)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
