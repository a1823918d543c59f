"""What is done with one domain's replica, on the one thread that may touch it.

Each method runs as a job of that thread, in the order in which the driver gives them.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from checkpointd import faults
from checkpointd.errors import CheckpointdError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.native import DIGEST_SIZE, DigestKey

from . import remainder
from .remainder import Remainder
from .replica import ImageFiles, NoRoomError, Replica
from .restorers import NothingWholeError
from .standby.events import CommitDone, CommitFailed, GuestStarted, StartFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.wire.frames import Octets
    from checkpointd.wire.messages import Hello

    from .activations import Activation, Activations
    from .epochs import Arrived, Budget, Load
    from .keep import ImageKeeper
    from .restorers import Restorer

log = logging.getLogger(__name__)


class ReplicaWorker:
    def __init__(
        self,
        budget: Budget,
        restorer: Restorer,
        activations: Activations,
        uuid: str,
        *,
        image_dir: Path | None,
        keeper: ImageKeeper | None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._budget = budget
        self._restorer = restorer
        self._activations = activations
        self._uuid = uuid
        self._image_dir = image_dir
        self._keeper = keeper
        self._clock = clock
        self._info: DomainInfo | None = None
        self._session = 0
        self._key: DigestKey | None = None
        self._static = b""
        self._replica: Replica | None = None
        self.octets = 0  # that the image takes; read by the driver for display

    def begin(self, hello: Hello) -> None:
        """A session begins: its key and description hold from now on."""
        info = hello.info
        if self._info is not None and self._info != info:
            self._restorer.discard()  # what is prepared is built from the old description
        # A key of its own: the acceptor's thread digests frames by another.
        self._session = hello.session
        self._info, self._key, self._static = (
            info,
            DigestKey(hello.digest_seed),
            hello.static_records,
        )
        self._restorer.begin(info, hello.static_records)
        if self._replica is not None:
            self._replica.forget_live()
            if self._replica.nr_pfns != info.nr_pfns:
                self._forget(remove=True)

    def warm(self) -> dict[str, object]:
        """How far a restorer that follows the epochs has come; from any thread."""
        return self._restorer.status()

    def trouble(self) -> str:
        """Why an activation is likely to fail though the replica is whole; from any thread."""
        return self._restorer.trouble()

    def foresee(self, session: int, epoch: int, content: Octets | Arrived) -> None:
        """See Replica.foresee(). Not before the first part of a replica is whole: it may be that none will be."""
        if self._replica is not None and self._key is not None and session == self._session:
            self._replica.foresee(epoch, content, self._key)

    def admit(self, load: Load) -> None:
        """Expands the load and has the replica admit it. Raises NotHeldError; or NoRoomError, and then the same load
        may come again.
        """
        assert self._key is not None, "parts are of a session"
        replica = self._the_replica()
        replica.expand(load, self._key)
        self._give_back(load, load.surplus)
        load.surplus = 0
        replica.admit(load)
        if not load.final:
            self._give_back(load, load.octets)

    def _give_back(self, load: Load, octets: int) -> None:
        self._budget.give_back(octets)
        load.octets -= octets

    def commit(self, load: Load) -> CommitDone | CommitFailed:
        replica, key = self._replica, self._key
        started = self._clock()
        try:
            if replica is None or key is None:
                return CommitFailed(load.epoch, "its replica is gone")
            faults.point("secondary.before-commit")
            audited, mismatches = replica.commit(load, key)
            if not mismatches:
                self._restorer.committed(replica)
            faults.point("secondary.after-commit")
        except (CheckpointdError, OSError) as error:
            return CommitFailed(load.epoch, str(error))
        finally:
            self._budget.give_back(load.octets)
            load.octets = 0
        self.octets = replica.octets
        return CommitDone(load.epoch, audited, mismatches, self._clock() - started)

    def prepare(self) -> None:
        """After the first commit: what can be done beforehand is."""
        if self._replica is None or self._info is None:
            return
        self._keep()
        try:
            self._restorer.prepare(self._info, self._replica)
        except (CheckpointdError, OSError) as error:
            log.warning("%s: not prepared, will try at activation: %s", self._info.uuid, error)

    def digests(self, first: int, count: int) -> bytes:
        """16 octets a page; zeros where nothing is here."""
        assert self._key is not None, "digests are asked for in a session"
        try:
            return self._the_replica().digests(self._key, first, count)
        except NoRoomError as error:
            log.warning("%s", error)
            return bytes(DIGEST_SIZE * count)  # none of them: every page will be sent

    def drop(self, *, keep_pages: bool) -> None:
        """The replica is none any more."""
        if self._replica is None:
            return
        if keep_pages:
            self._restorer.discard()
            self._replica.give_up_epoch()
            return
        self._keep()
        self._restorer.discard()
        self._forget(remove=True)

    def start(self, *, paused: bool) -> GuestStarted | StartFailed:
        try:
            if self._replica is None or self._info is None:
                return StartFailed("the replica is gone", self._clock())
            self._keep_remainder()  # first: the other copy may take minutes
            self._keep()
            faults.point("secondary.before-start")
            started = self._restorer.start(self._info, self._replica, paused=paused)
            faults.point("secondary.after-start")
        except (CheckpointdError, OSError) as error:
            return StartFailed(str(error), self._clock())
        except Exception as error:
            # A mistake of ours would end the daemon, and with it the only copy of the guest.
            log.exception("the guest was not started")
            return StartFailed(repr(error), self._clock())
        self._forget(remove=True)  # it is the guest's now, by its own handle
        return GuestStarted(started.domid)

    def resume(self, *, paused: bool) -> GuestStarted | StartFailed:
        """What an earlier life began is finished, where that is certain to be right; else why not, and what to do."""
        try:
            left = self._activations.load(self._uuid)
            if left is None:
                return StartFailed(
                    f"its note is gone from {self._activations.path(self._uuid)}: if that is on purpose, start this "
                    "secondary anew",
                    self._clock(),
                )
            try:
                domid = self._restorer.resume(left)
            except NothingWholeError as error:
                if not self._take_up(left):
                    raise
                log.error("%s: building it anew from its image on disk: %s", self._uuid, error)
            else:
                self._forget_files()
                return GuestStarted(domid)
        except (CheckpointdError, OSError) as error:
            return StartFailed(str(error), self._clock())
        except Exception as error:  # as in start(): of one guest, and not to end all the others
            log.exception("the activation was not finished")
            return StartFailed(repr(error), self._clock())
        return self.start(paused=paused)

    def _forget_files(self) -> None:
        """The guest runs: an image of before that is never to be built again."""
        self._forget(remove=True)
        if self._image_dir is not None:
            ImageFiles(self._image_dir, self._uuid).remove()

    def _keep_remainder(self) -> None:
        """With it the next life, should we die in what follows, makes an epoch of the image file."""
        replica = self._replica
        if replica is None or not replica.on_disk or self._info is None or replica.epoch is None:
            return
        try:
            remainder.write(
                replica.remainder,
                Remainder(
                    self._info,
                    self._static,
                    replica.epoch,
                    replica.context,
                    bytes(replica.populated),
                ),
            )
        except OSError as error:
            log.error("%s: the image could not be taken up again: %s", self._info.uuid, error)

    def _take_up(self, left: Activation) -> bool:
        """Whether the replica is the epoch of the activation, once more or by an image that is here from then."""
        if self._replica is None and self._image_dir is not None:
            files = ImageFiles(self._image_dir, left.uuid)
            kept = remainder.read(files.remainder)
            if kept is None or kept.epoch != left.epoch or kept.info.uuid != left.uuid:
                return False
            if not files.image.exists() or files.image.stat().st_size != kept.info.nr_pfns * PAGE_SIZE:
                return False
            self._info, self._static = kept.info, kept.static_records
            self._restorer.begin(kept.info, kept.static_records)
            self._the_replica().take_up(kept.epoch, kept.context, kept.populated)
        return self._replica is not None

    def close(self) -> None:
        """The daemon ends."""
        if self._replica is not None:
            self._keep()
        self._restorer.discard()
        self._forget(remove=False)

    def _the_replica(self) -> Replica:
        if self._replica is None:
            assert self._info is not None, "a session has begun"
            self._replica = Replica(
                self._info.uuid, self._info.nr_pfns, self._budget, directory=self._image_dir
            )
        return self._replica

    def _keep(self) -> None:
        if self._keeper is None or self._replica is None or self._info is None:
            return
        try:
            self._keeper.keep(self._info.uuid, self._static, self._replica)
        except (CheckpointdError, OSError) as error:
            # A copy for people to look at: never a reason not to go on.
            log.error("%s: image not kept: %s", self._info.uuid, error)

    def _forget(self, *, remove: bool) -> None:
        if self._replica is not None:
            self._replica.close(remove=remove)
            self._replica = None
        self.octets = 0
