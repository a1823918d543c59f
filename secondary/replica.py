"""The replica of one domain: its memory image, and what else the last committed epoch holds.

Pfn p is at octet p * 4096 of the image, a memfd or a file. Used by the commit worker alone.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

from checkpointd import faults, native
from checkpointd.errors import StateError
from checkpointd.hypervisor.port import EXTENT_PAGES, PAGE_SIZE
from checkpointd.stream.bodies import page_data_head
from checkpointd.stream.records import RecordType
from checkpointd.stream.writer import record_header

from . import scrub
from .epochs import Arrived
from .expander import Expander, NotHeldError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from checkpointd.wire.frames import Digester, Octets

    from .epochs import Budget, Load

EXTENT_BYTES = EXTENT_PAGES * PAGE_SIZE
WORD = 8  # octets of a pfn word
RECORD_HEAD = 16  # octets of a PAGE_DATA record before its pfn words; the count is at octet 8


class NoRoomError(StateError):
    """The memory or disk that a part needs is not there."""


class State(StrEnum):
    COPYING = "copying"  # pages, but no committed epoch: good for digests only
    TORN = "torn"  # a commit is under way, or was cut short
    WHOLE = "whole"  # exactly one committed epoch


class _Memory:
    """Sparse memory of the guest's size, by pfn, mapped here."""

    def __init__(self, fd: int, nr_pfns: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, nr_pfns * PAGE_SIZE)
        self.address = native.address_of(self.map)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class _Overlay:
    """Live parts of the epoch in the making, kept beside a committed replica until it is whole."""

    def __init__(self, name: str, nr_pfns: int, budget: Budget) -> None:
        self._nr_pfns = nr_pfns
        self._budget = budget
        self._taken = 0  # octets reserved in the budget
        fd = os.memfd_create(f"checkpointd-live-{name}", os.MFD_CLOEXEC)
        os.ftruncate(fd, nr_pfns * PAGE_SIZE)
        self._memory = _Memory(fd, nr_pfns)
        self._pages = native.Bitmap(nr_pfns)
        self._gone: list[bytes] = []

    def take(self, load: Load) -> None:
        """Lay a live part over those before it. Raises NoRoomError; nothing is changed then."""
        most = _pages_of(load) * PAGE_SIZE + sum(len(words) for words in load.gone)
        if not self._budget.take(most):
            raise NoRoomError(
                f"the pages of epoch {load.epoch} do not fit beside the replica: "
                f"{self._budget.used} of {self._budget.limit} octets of --epoch-memory are in use"
            )
        _apply(load, self._memory.address, self._nr_pfns, self._pages)
        self._gone += [bytes(words) for words in load.gone]
        self._taken += most
        # A page that came before is counted once.
        kept = self._pages.count() * PAGE_SIZE + sum(len(words) for words in self._gone)
        self._budget.give_back(self._taken - kept)
        self._taken = kept

    @property
    def pages(self) -> tuple[int, native.Bitmap]:
        """Address of pfn 0, and which pages are there."""
        return self._memory.address, self._pages

    def merge(self, image: int, populated: native.Bitmap) -> None:
        # A page that went and came back is in the overlay, so first what went.
        for words in self._gone:
            native.drop_pages(image, self._nr_pfns, populated, words)
        native.merge(image, self._memory.address, self._nr_pfns, self._pages, populated)

    def add_to(self, changed: native.Bitmap) -> None:
        """What merge() changes."""
        changed.update(self._pages)
        for words in self._gone:
            native.mark(changed, words)

    def close(self) -> None:
        self._memory.close()
        self._budget.give_back(self._taken)
        self._taken = 0


class ImageFiles:
    """What a replica on disk is made of, there for the next life, too."""

    def __init__(self, directory: Path, uuid: str) -> None:
        self.image = directory / f"{uuid}.image"
        self.note = directory / f"{uuid}.json"  # what the image is
        self.remainder = (
            directory / f"{uuid}.remainder"
        )  # what it lacks to be an epoch (remainder.py)

    def remove(self) -> None:
        """The image first: without it the others are nothing. Idempotent. Raises OSError."""
        for path in (self.image, self.note, self.remainder):
            path.unlink(missing_ok=True)


class Replica:
    """Invariant 2: in state `whole` the image is exactly one committed epoch, bit for bit.

    Kept so: the only change of a whole image is commit(), which says "torn" before the first octet and
    "whole" after the last; live parts of an epoch go into an overlay until then. Until the first commit
    there is nothing to keep, and parts go straight into the image.

    Invariant 1, the commit's half: admit() reserves every octet that commit() will write, so
    that nothing is left that could fail.

    A second thread may follow the committed epochs from the image: it sets `changed` to an empty bitmap,
    which then gains the pages of each commit, and reads pages whenever it likes. Under `lock` no commit is
    under way; if then nothing is in `changed`, what it has read is the committed epoch, whole.
    """

    def __init__(
        self, uuid: str, nr_pfns: int, budget: Budget, *, directory: Path | None = None
    ) -> None:
        """In memory, or in `directory`. A file of an earlier life is taken up for its digests only.

        Raises NoRoomError.
        """
        self.nr_pfns = nr_pfns
        self.state = State.COPYING
        self.epoch: int | None = None
        self.context = b""
        self.lock = threading.Lock()
        self.changed: native.Bitmap | None = None
        self._uuid = uuid
        self._budget = budget
        self._expander = Expander()
        self._overlay: _Overlay | None = None
        self._live_epoch = 0  # whose live parts the overlay holds
        self._nr_extents = -(-nr_pfns // EXTENT_PAGES)
        self._reserved = native.Bitmap(self._nr_extents)  # extents with memory of their own
        self._files = None if directory is None else ImageFiles(directory, uuid)
        self._marked = ""  # what the file's note says
        fd = -1
        try:
            self.populated = native.Bitmap(nr_pfns)
            fd = self._open_file(self._files) if self._files else self._open_memory()
            self._memory = _Memory(fd, nr_pfns)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            if fd >= 0:
                os.close(fd)
            raise NoRoomError(
                f"no room for a replica of {nr_pfns * PAGE_SIZE} octets: {error}"
            ) from error

    @property
    def fd(self) -> int:
        """The image, for the hypervisor: the file is nr_pfns pages long."""
        return self._memory.fd

    @property
    def has_pages(self) -> bool:
        return bool(self.populated)

    @property
    def octets(self) -> int:
        """Memory or disk that the image takes."""
        return os.fstat(self.fd).st_blocks * 512

    # ------------------------------------------------------------ epochs

    def take_up(self, epoch: int, context: bytes, populated: bytes) -> None:
        """The file, as an earlier life of this boot left it, is this epoch: whole, for that life had begun to activate
        it and committed nothing any more.
        """
        self.populated = native.Bitmap.from_bytes(self.nr_pfns, populated)
        self.epoch, self.context = epoch, context
        self.state = State.WHOLE

    def expand(self, load: Load, key: Digester) -> None:
        """Make pages of what came reduced of a whole part: first of all, for admit() changes what it is laid over.
        Raises NotHeldError, and the load is worth nothing then.
        """
        self._begin_epoch(load.epoch)
        while load.reduced:
            load.pages.append(self._expand(load.reduced[-1], key))
            load.reduced.pop()

    def admit(self, load: Load) -> None:
        """Make a whole part, expanded, ready for its ack: afterwards its commit cannot fail. Raises NoRoomError.

        A live part is taken in, and its Load can be let go; a final one stays the caller's until
        commit().
        """
        self._begin_epoch(load.epoch)
        self._reserve(_words_with_memory(load))
        self._touch()
        if load.final:
            return
        if self.state is State.COPYING:
            _apply(load, self._memory.address, self.nr_pfns, self.populated)
            return
        if self._overlay is None:
            self._overlay = _Overlay(self._uuid, self.nr_pfns, self._budget)
        self._overlay.take(load)

    def foresee(self, epoch: int, content: Octets | Arrived, key: Digester) -> None:
        """A frame of pages whose part is not whole yet: what expand() and admit() will do for it is done now, as far as
        it goes. What fails will fail again then, and is told.
        """
        self._begin_epoch(epoch)
        with suppress(NoRoomError, NotHeldError):
            record = self._expand(content, key) if isinstance(content, Arrived) else content
            self._reserve([_record_words(record)])

    def commit(self, load: Load, key: scrub.PageDigester) -> tuple[int, tuple[int, ...]]:
        """The admitted final part, over its live parts, is the replica now.

        Gives the pages audited and the pfns that differ. Raises StateError, and changes nothing, if
        a part of another epoch was admitted since.
        """
        if load.epoch != self._live_epoch:
            raise StateError(
                f"epoch {load.epoch} would be mixed with parts of epoch {self._live_epoch}"
            )
        with self.lock:
            self.state = State.TORN
            if self._overlay:
                self._overlay.merge(self._memory.address, self.populated)
            faults.point("secondary.mid-commit")
            _apply(load, self._memory.address, self.nr_pfns, self.populated)
            self.context = load.context
            self.epoch = load.epoch
            self._note_changes(load)
            self.state = State.WHOLE
        self.forget_live()
        return scrub.audit(load.audit, self._memory.address, self.populated, key)

    def _begin_epoch(self, epoch: int) -> None:
        if epoch != self._live_epoch:
            self.forget_live()  # of an epoch that was given up
            self._live_epoch = epoch

    def _expand(self, arrived: Arrived, key: Digester) -> Octets:
        image = (self._memory.address, self.populated)
        overlay = self._overlay.pages if self._overlay else None
        return self._expander.expand(arrived, key, self.nr_pfns, image, overlay)

    def _note_changes(self, load: Load) -> None:
        if self.changed is None:
            return
        if self._overlay:
            self._overlay.add_to(self.changed)
        for words in (*_words_with_memory(load), *load.gone):
            native.mark(self.changed, words)

    def forget_live(self) -> None:
        """Drop the live parts of an epoch that will not be whole."""
        if self._overlay:
            self._overlay.close()
            self._overlay = None

    def give_up_epoch(self) -> None:
        """No committed epoch any more: what is here is the beginning of the copy that is under way."""
        self.state = State.COPYING
        self.epoch = None
        self.context = b""
        if self._overlay:
            self._overlay.merge(self._memory.address, self.populated)
            self.forget_live()

    def digests(self, key: scrub.PageDigester, first: int, count: int) -> bytes:
        """16 octets for each of `count` pages from pfn `first`, a multiple of 64, on; zeros for a page
        that is not here.
        """
        found = bytearray(count * native.DIGEST_SIZE)
        for start, length in self._runs(first, first + count):
            at = (start - first) * native.DIGEST_SIZE
            found[at : at + length * native.DIGEST_SIZE] = key.digest_pages(
                self._memory.address + start * PAGE_SIZE, length
            )
        return bytes(found)

    def pages(self) -> Iterator[tuple[list[int], memoryview]]:
        """The populated pages in order: pfn words and contents, at most 256 pages at a time."""
        with memoryview(self._memory.map) as image:
            for start, length in self._runs(0, self.nr_pfns):
                for at in range(start, start + length, 256):
                    end = min(at + 256, start + length)
                    with image[at * PAGE_SIZE : end * PAGE_SIZE] as contents:
                        yield list(range(at, end)), contents

    def page_data(self, pfns: Sequence[int]) -> bytes:
        """A PAGE_DATA record of these pages as they are now; beside a commit, they may be torn."""
        head = page_data_head(pfns)
        octets = len(head) + len(pfns) * PAGE_SIZE
        with memoryview(self._memory.map) as image:
            pages = [image[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE] for pfn in pfns]
            data = b"".join((record_header(RecordType.PAGE_DATA, octets), head, *pages))
            for page in pages:
                page.release()
        return data

    def close(self, *, remove: bool = False) -> None:
        """Let go of the image. A file stays for its digests unless `remove`. Idempotent."""
        if self._memory.map.closed:
            return
        self.forget_live()
        if self._files and not remove:
            self._memory.map.flush()
            self._mark("committed" if self.state is State.WHOLE else "stale")
        self._memory.close()
        if self._files and remove:
            self._files.remove()

    # ------------------------------------------------------------ memory and disk

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(first, length) of each run of populated pages in [start, end); `start` a multiple of 64."""
        window = bytes(self.populated)[start // 8 : -(-end // 64) * 8]
        first = start
        length = 0
        for bit in native.Bitmap.from_bytes(end - start, window):
            if start + bit != first + length:
                if length:
                    yield first, length
                first, length = start + bit, 0
            length += 1
        if length:
            yield first, length

    def _reserve(self, lists: Iterable[Octets]) -> None:
        """Memory for the pages of these pfn words. Raises NoRoomError."""
        missing = native.Bitmap(self._nr_extents)
        for words in lists:
            native.mark_extents(missing, self._reserved, words)
        for extent in missing:
            offset = extent * EXTENT_BYTES
            length = min(EXTENT_BYTES, self.nr_pfns * PAGE_SIZE - offset)
            try:
                os.posix_fallocate(self.fd, offset, length)
            except OSError as error:
                raise NoRoomError(
                    f"no room for {length} more octets of the replica: {error.strerror}"
                ) from error
            self._reserved.add(extent)

    def _open_memory(self) -> int:
        fd = os.memfd_create(f"checkpointd-{self._uuid}", os.MFD_CLOEXEC)
        os.ftruncate(fd, self.nr_pfns * PAGE_SIZE)
        return fd

    def _open_file(self, files: ImageFiles) -> int:
        fd = os.open(files.image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = self.nr_pfns * PAGE_SIZE
            if os.fstat(fd).st_size == size:
                # What each page holds will be asked by digest, so every page may count as here.
                self.populated.fill()
            else:
                os.ftruncate(fd, 0)
            # All of it at once, holes too: a full disk shows now, and not in a commit.
            os.posix_fallocate(fd, 0, size)
            self._reserved.fill()
        except OSError:
            os.close(fd)
            raise
        return fd

    @property
    def on_disk(self) -> bool:
        return self._files is not None

    @property
    def remainder(self) -> Path:
        """Where what the file lacks is kept while it is activated (remainder.py)."""
        assert self._files is not None
        return self._files.remainder

    @property
    def _note(self) -> Path:
        assert self._files is not None
        return self._files.note

    def _touch(self) -> None:
        """Before this life's first change: nobody shall take the file for what an earlier one left."""
        if not self._files or self._marked == "stale":
            return
        try:
            self.remainder.unlink(missing_ok=True)
            self._mark("stale")
        except OSError as error:
            raise NoRoomError(f"{self._note} cannot be written: {error.strerror}") from error

    def _mark(self, state: str) -> None:
        """Put a note beside the image file, on stable storage, saying what it is."""
        note = {"uuid": self._uuid, "nr_pfns": self.nr_pfns, "state": state, "epoch": self.epoch}
        temporary = self._note.with_suffix(".json.new")
        with temporary.open("w", encoding="ascii") as file:
            json.dump(note, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._note)
        directory = os.open(self._note.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # some file systems cannot; the note is for people
            os.fsync(directory)
        os.close(directory)
        self._marked = state


def _apply(load: Load, image: int, nr_pfns: int, populated: native.Bitmap) -> None:
    """In this order a page that is named twice ends as it was sent last by any sane sender: with data."""
    for words in load.gone:
        native.drop_pages(image, nr_pfns, populated, words)
    for words in load.zero:
        native.zero_pages(image, nr_pfns, populated, words)
    for record in load.pages:
        native.scatter(image, nr_pfns, populated, record)


def _record_words(record: Octets) -> memoryview:
    view = memoryview(record).cast("B")
    count = int.from_bytes(view[8:12], "little")
    return view[RECORD_HEAD : RECORD_HEAD + count * WORD]


def _words_with_memory(load: Load) -> Iterator[Octets]:
    """The pfn words of the pages that take memory: zero ones too, for they may be written next."""
    for record in load.pages:
        yield _record_words(record)
    yield from load.zero


def _pages_of(load: Load) -> int:
    return sum(memoryview(words).nbytes // WORD for words in _words_with_memory(load))
