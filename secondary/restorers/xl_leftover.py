"""What an earlier life of this process left of incoming domains: told from others', destroyed, or finished.

Xen keeps a domain whose builder's feeder has died: paused, for one pause of it is ours (xl_process.py). Two notes say
what it is. The *incoming* note, in a folder that does not outlive the host's boot, says that a domain of this UUID was
being taken in, and by which process; a replica, so whoever takes the guest in anew may destroy it. The *activation*
note (secondary/activations.py), on stable storage, says how far an activation had come; where it says that the domain
has the whole last acked epoch, the domain is finished and let go.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from checkpointd import faults
from checkpointd.authority.processes import (
    HostIdentity,
    ProcessWatch,
    boot_id,
    identify,
    start_time,
)
from checkpointd.errors import HypervisorError
from checkpointd.secondary.activations import Phase, lost

from . import NothingWholeError
from .xl_process import INCOMING, hangs

if TYPE_CHECKING:
    from pathlib import Path

    from checkpointd.secondary.activations import Activation, Activations

    from .xl_process import Domains, Found, Limits

log = logging.getLogger(__name__)


class IncomingNotes:
    """Which domains are being taken in, and by whom."""

    def __init__(self, directory: Path) -> None:
        """`directory` does not outlive the host's boot."""
        self._directory = directory

    def write(self, uuid: str, builder: HostIdentity | None = None) -> None:
        """`builder`: the xl that takes it in, once it was started."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(uuid)
        temporary = path.with_suffix(".new")
        note = {"uuid": uuid, "by": asdict(identify()), "builder": builder and asdict(builder)}
        temporary.write_text(json.dumps(note), encoding="ascii")
        temporary.replace(path)

    def remove(self, uuid: str) -> None:
        self._path(uuid).unlink(missing_ok=True)

    def was_ours(self, uuid: str) -> bool:
        """Whether a note says so, of this boot, by this process or one that is gone."""
        return self._load(uuid) is not None

    def builder(self, uuid: str) -> HostIdentity | None:
        """The xl of such a note; it may be gone as well."""
        note = self._load(uuid)
        return note[1] if note else None

    def _load(self, uuid: str) -> tuple[HostIdentity, HostIdentity | None] | None:
        try:
            note = json.loads(self._path(uuid).read_text(encoding="ascii"))
            by, builder = HostIdentity(**note["by"]), note["builder"]
            found = by, HostIdentity(**builder) if builder else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        ours = by == identify() or start_time(by.pid) != by.start_time
        return found if by.boot_id == boot_id() and ours else None

    def _path(self, uuid: str) -> Path:
        return self._directory / f"incoming-{uuid}.json"


class Claim:
    """On the UUID of one guest that is to be taken in, so that its domain is the only one here that has it."""

    def __init__(self, domains: Domains, notes: IncomingNotes, uuid: str, limits: Limits) -> None:
        self._domains = domains
        self._notes = notes
        self._uuid = uuid
        self._limits = limits
        self.made = False  # the note is of a domain that is ours to make

    def make_way(self) -> None:
        """Before xl is started. Kill the xl that an earlier process started, which may make its domain only now;
        destroy what the note and its being paused show to be no running guest; then note that the next one is ours.

        Raises HypervisorError if one is here by anybody else.
        """
        found = self._checked()
        if builder := self._notes.builder(self._uuid):
            end_builder(builder, 0, self._limits)
            found = self._checked()
        if found is not None:
            log.warning(
                "%s: destroying domain %d (%s), left by an earlier process",
                self._uuid,
                found.domid,
                found.name,
            )
            self._domains.destroy(found.domid, self._limits.destroy)
        self._notes.write(self._uuid)
        self.made = True

    def _checked(self) -> Found | None:
        found = self._domains.find(self._uuid)
        if found is None or (found.paused and self._notes.was_ours(self._uuid)):
            return found
        raise HypervisorError(
            f"domain {found.domid} ({found.name}) with UUID {self._uuid} lives here, and is none that was "
            f"being taken in: if it is not needed, `xl destroy {found.domid}`"
        )

    def started(self, builder: HostIdentity | None) -> None:
        """Once xl runs, and before the first octet is written to it: without any it makes no domain."""
        self._notes.write(self._uuid, builder)


def end_builder(builder: HostIdentity, patience: float, limits: Limits) -> None:
    """Until an xl that an earlier process started is gone; killed after `patience` seconds. Raises HypervisorError if
    it is there yet.
    """
    watch = ProcessWatch(builder)
    try:
        if watch.gone(patience) is not False:  # None: of another boot, which it did not outlive
            return
        log.error("xl (pid %d) of an earlier process is there yet: killed", builder.pid)
        with suppress(ProcessLookupError):
            os.killpg(builder.pid, signal.SIGKILL)  # it is the leader of its own group
        if not watch.gone(limits.kill):
            raise HypervisorError(hangs(builder.pid, limits))
    finally:
        watch.close()


class Leftover:
    """One domain of an activation that an earlier life began; its term is ours, and the old guest was stopped.

    Whole epochs (invariant 2): it is let go only if it is certainly the whole last acked epoch. That is: the note
    says SEALED, which is written once xl has applied that epoch, or later; the domain is that of the note, in the
    same boot; and xl has finished it, which its name tells, for xl gives it its own as the last but one thing, and is
    gone. Anything else stays as it is: paused, and told.

    One runner (invariant 4): a domain that may have been let go is never built a second time. If it is not here it has
    ended since, or lives elsewhere. The incoming note goes before it is let go, so that a full disk, which keeps the
    activation note from saying FINISHED, hides nothing.
    """

    def __init__(
        self, domains: Domains, notes: IncomingNotes, activations: Activations, limits: Limits
    ) -> None:
        self._domains = domains
        self._notes = notes
        self._activations = activations
        self._limits = limits

    def resume(self, left: Activation) -> int:
        """Let the guest go on; gives its domid. Raises HypervisorError: what is here, and what to do. May be called
        again.
        """
        same_boot = left.boot_id == boot_id()
        builder = self._notes.builder(left.uuid)
        if builder and same_boot and left.phase is not Phase.FINISHED:
            # Whatever phase the note is late by: what xl has not made by its end, it does not make any more.
            self._end(builder)
        found = self._domains.find(left.uuid)
        if found is None:
            if left.phase is Phase.FINISHED or (
                left.phase is Phase.SEALED and not self._notes.was_ours(left.uuid)
            ):
                raise HypervisorError(_was_let_go(left, self._activations.path(left.uuid)))
            raise NothingWholeError(lost(left))
        if not found.paused:
            self._notes.remove(left.uuid)
            log.info("%s: runs here as domain %d", left.uuid, found.domid)
            return found.domid
        if not (same_boot and _is_whole(left, found)):
            raise NothingWholeError(_uncertain(left, found))
        if not (left.paused and left.phase is Phase.FINISHED):
            self._let_go(left, found)
        return found.domid

    def _end(self, builder: HostIdentity) -> None:
        try:
            end_builder(builder, self._limits.exit, self._limits)
        except HypervisorError as error:
            log.error("%s", error)  # a dead xl that hangs in the kernel changes nothing more

    def _let_go(self, left: Activation, found: Found) -> None:
        log.warning(
            "%s: an earlier process died while it activated epoch %d (%s): domain %d has all of it, and is let go",
            left.uuid,
            left.epoch,
            left.phase,
            found.domid,
        )
        if left.phase is Phase.SEALED:
            log.warning(
                "%s: memory that the guest had given up since it was first copied stays taken here",
                left.uuid,
            )
        self._activations.advance(left.uuid, Phase.FINISHED)
        faults.point("xl.before-release")
        self._notes.remove(left.uuid)
        faults.point("xl.unnoted")
        if not left.paused:
            self._domains.unpause(found.domid)
            faults.point("xl.after-release")
            after = self._domains.find(left.uuid)
            if after is not None and after.paused:
                raise HypervisorError(
                    f"domain {found.domid} ({found.name}) is let go by us, and paused by somebody else yet: "
                    f"`xl unpause {found.domid}`"
                )


def _is_whole(left: Activation, found: Found) -> bool:
    if found.domid != left.domid:
        return False
    finished = left.phase is Phase.SEALED and not found.name.endswith(INCOMING)
    return finished or left.phase is Phase.FINISHED


def _was_let_go(left: Activation, note: Path) -> str:
    return (
        f"an earlier process finished domain {left.domid} of {left.name}, and it is not here any more: it has run, and "
        "has ended or was moved since, so that nothing is built anew. If it is to run, start it on this machine (seen "
        f"within 10 s); if it runs elsewhere, or is not to, remove {note}, and start this secondary anew"
    )


def _uncertain(left: Activation, found: Found) -> str:
    return (
        f"{left.old_guest}, and nobody runs {left.name}: the process died that activated epoch {left.epoch}, and "
        f"domain {found.domid} ({found.name}), paused, is what xl had taken in by then: that epoch or an earlier one, "
        f"or part of one if its name ends in {INCOMING}; nothing starts it by itself. If it is good enough, "
        f"`xl unpause {found.domid}`; else `xl destroy {found.domid}`, and start the guest anew on this machine"
    )
