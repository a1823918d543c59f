"""Activation through libxl: a warm `xl migrate-receive -r` follows the committed epochs, beside the image.

The image is what acks stand on; the warm domain only makes an activation quick. So nothing here ever
holds up a commit: a feeder thread reads the image while it changes, as a live migration reads a guest, and
the death or the hang of xl is an alarm, a new xl some time later, and at an activation a domain that is
built anew from the image.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from checkpointd import faults, native
from checkpointd.authority.processes import HostIdentity, boot_id, identify, start_time
from checkpointd.errors import CheckpointdError, HypervisorError, StateError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.secondary.replica import State
from checkpointd.stream.records import TYPE_SHIFT, PageType
from checkpointd.stream.remus import RemusStream

from .xl_config import with_room
from .xl_process import InterruptedFeedError, Limits, XlReceive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.secondary.replica import Replica
    from checkpointd.stream.records import Octets

    from .xl_process import Domains

log = logging.getLogger(__name__)

CHUNK_PAGES = 256  # one record: 1 MiB of pages, which is all the memory that a feed takes here
# Times the guest's memory that one epoch may grow to while commits go on beside it. xl holds an epoch in
# memory until it is whole, so a feed that never catches up has to end.
MOST_ROUNDS = 2
# s; xl that fails is started again so much later: a first feed costs as much as a live migration.
RESTART = 30.0
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
        clear: Callable[[], None],
        info: DomainInfo,
        static_records: bytes,
        replica: Replica,
        limits: Limits,
    ) -> None:
        """`make_receive` gets the descriptor that will interrupt it; `clear` makes way for a domain of this
        UUID, or raises HypervisorError.
        """
        self.epoch: int | None = None  # the last one that was sealed
        self.applied: int | None = None  # the last one that xl has applied
        self.sent = 0  # octets of pages, in all
        # Why it has ended; read after the thread.
        self.error: CheckpointdError | OSError | None = None
        self._clear = clear
        self._info = info
        self._static = static_records
        self._replica = replica
        self._limits = limits
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._last = False  # this epoch is the last: start() waits for it
        self._parts: list[Octets] = []
        self._there = native.Bitmap(replica.nr_pfns)  # pages that xl has made
        self.receive = make_receive(self._stop)
        self._thread = threading.Thread(target=self._run, name=f"xl-feed-{info.uuid[:8]}")
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def committed(self) -> None:
        """There is a new epoch."""
        os.eventfd_write(self._wake, 1)

    def finish(self) -> int:
        """Bring xl to the replica's epoch and let it finish the domain; gives its domid. The caller sees to
        it that no commit comes meanwhile. Raises HypervisorError.
        """
        self._last = True
        self.committed()
        self._thread.join()  # bounded by xl's limits
        if self.error is not None:
            raise HypervisorError(str(self.error)) from self.error
        if self.epoch != self._replica.epoch:
            raise HypervisorError(f"xl has epoch {self.epoch} and not {self._replica.epoch}")
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
            self._clear()
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
        stream = RemusStream(self._parts.append)
        stream.begin(with_room(str(self._info.config["xl"]), behind.count()), self._static)
        self._flush()
        self.receive.hold()
        while True:
            octets = self._epoch(stream, behind)
            if not self._last:
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


class XlRestorer:
    """Never two of one guest: no domain is built while one of its UUID is here, but for one that an earlier
    life of ours left behind paused, as its note says; that one is destroyed. The note is on disk before
    xl is started, and away before the guest is let go.
    """

    def __init__(
        self,
        domains: Domains,
        notes: Path,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`notes`: a folder that does not outlive the host's boot."""
        self._domains = domains
        self._notes = notes
        self._limits = limits or Limits()
        self._clock = clock
        self._info: DomainInfo | None = None
        self._static = b""
        self._feed: Feed | None = None
        self._not_before = 0.0  # a new xl, on self._clock
        self.alarm = ""  # why there is nothing warm

    def begin(self, info: DomainInfo, static_records: bytes) -> None:
        if (info, static_records) != (self._info, self._static):
            self.discard()
        self._info, self._static = info, static_records

    def prepare(self, info: DomainInfo, replica: Replica) -> None:
        self.committed(replica)

    def committed(self, replica: Replica) -> None:
        """Wake the feeder; start one where there is none, no sooner than RESTART after one that failed."""
        feed = self._feed
        if feed is not None and not feed.alive:
            self._gone(feed)
        if self._feed is not None:
            self._feed.committed()
        elif self._clock() >= self._not_before:
            self._feed = self._begin_feed(replica)

    def start(self, info: DomainInfo, replica: Replica, *, paused: bool) -> DomainInfo:
        """From the warm domain; if that fails, from one that is built from the image at once: within the
        limits of one xl, and the time that its memory takes to be copied.
        """
        if replica.state is not State.WHOLE:
            raise StateError(
                f"the replica is {replica.state}, not one whole epoch: it is not started"
            )
        warm = self._feed
        if warm is not None:
            try:
                return self._finish(warm, info, paused=paused)
            except (CheckpointdError, OSError) as error:
                log.error("%s: the warm domain is lost, building anew: %s", info.uuid, error)
                self.discard()
        self._feed = self._begin_feed(replica)
        try:
            return self._finish(self._feed, info, paused=paused)
        except BaseException:
            self.discard()
            raise

    def status(self) -> dict[str, object]:
        feed = self._feed
        return {
            "sent_epoch": feed.epoch if feed else None,
            "applied_epoch": feed.applied if feed else None,
            "sent_octets": feed.sent if feed else 0,
            "alarm": self.alarm or None,
        }

    def discard(self) -> None:
        feed, self._feed = self._feed, None
        if feed is None:
            return
        feed.close()
        try:
            feed.receive.abort()
            self._note(feed.receive.uuid).unlink(missing_ok=True)
        except (CheckpointdError, OSError) as error:
            self._alarm(f"an incoming domain is left behind: {error}")

    def _begin_feed(self, replica: Replica) -> Feed:
        assert self._info is not None, "a session has begun"
        uuid = self._info.uuid
        self.alarm = ""
        return Feed(
            lambda stop: XlReceive(self._domains, uuid, interrupt=stop, limits=self._limits),
            lambda: self._clear(uuid),
            self._info,
            self._static,
            replica,
            self._limits,
        )

    def _finish(self, feed: Feed, info: DomainInfo, *, paused: bool) -> DomainInfo:
        domid = feed.finish()
        faults.point("xl.before-release")
        self._note(info.uuid).unlink(missing_ok=True)
        if not paused:
            feed.receive.release()
        self._feed = None
        feed.close()
        return replace(info, domid=domid)

    def _gone(self, feed: Feed) -> None:
        """The feeder has ended by itself. Its note stays: the next one destroys what may be left."""
        self._feed = None
        self._alarm(f"no warm domain, so an activation would take longer: {feed.error}")
        feed.close()

    def _alarm(self, text: str) -> None:
        self._not_before = self._clock() + RESTART
        if text != self.alarm:
            log.error("%s: %s", self._info.uuid if self._info else "", text)
        self.alarm = text

    # ------------------------------------------------------------ what an earlier life left

    def _note(self, uuid: str) -> Path:
        return self._notes / f"incoming-{uuid}.json"

    def _write_note(self, uuid: str) -> None:
        self._notes.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._note(uuid)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({"uuid": uuid, **asdict(identify())}), encoding="ascii")
        temporary.replace(path)

    def _was_ours(self, uuid: str) -> bool:
        """Whether a note says so, of this boot, by this process or one that is gone."""
        try:
            note = json.loads(self._note(uuid).read_text(encoding="ascii"))
            by = HostIdentity(note["boot_id"], note["pid"], note["start_time"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return by.boot_id == boot_id() and (by == identify() or start_time(by.pid) != by.start_time)

    def _clear(self, uuid: str) -> None:
        """Destroy what our note and its being paused show to be no running guest, then note that the next
        domain of this UUID is ours. Raises HypervisorError if one is here by anybody else.
        """
        found = self._domains.find(uuid)
        if found is None:
            self._write_note(uuid)
            return
        if not (found.paused and self._was_ours(uuid)):
            raise HypervisorError(
                f"domain {found.domid} ({found.name}) with UUID {uuid} lives here, and is none that was "
                f"being taken in: if it is not needed, `xl destroy {found.domid}`"
            )
        log.warning(
            "%s: destroying domain %d (%s), left by an earlier process",
            uuid,
            found.domid,
            found.name,
        )
        self._domains.destroy(found.domid, self._limits.destroy)
        self._write_note(uuid)


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
