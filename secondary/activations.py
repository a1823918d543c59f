"""How far an activation has come, on stable storage: for the next life of a secondary that dies in it.

One small file for each guest that is being activated, `<uuid>.json`. It is there from before the old guest is fenced
until the new one runs, so one that a daemon finds at its start is of a life that died in between: the old guest may be
stopped by then, and no primary comes back by itself to say so.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from checkpointd.authority.durable import make_directory, put, remove
from checkpointd.authority.processes import boot_id
from checkpointd.authority.terms import Role
from checkpointd.errors import StateError

if TYPE_CHECKING:
    from pathlib import Path

    from checkpointd.authority.terms import TermRecord

log = logging.getLogger(__name__)

_SUFFIX = ".json"
PROOF_KEPT = 500  # characters of it: a command may say much
NOTE_LIMIT = (
    8192  # octets; a note has some 500, and at most 6 for each character of name (256) and proof
)


class Phase(StrEnum):
    FENCING = "fencing"  # the fence is ordered: whether the old guest is stopped is not known
    FEEDING = "feeding"  # that is proved; the domain gets what it lacks of the last acked epoch
    SEALED = "sealed"  # the domain has all of that epoch; who builds it is finishing it
    FINISHED = "finished"  # built and looked at: it is let go next


@dataclass(frozen=True, slots=True)
class Activation:
    uuid: str
    name: str
    address: str  # where the primary of the old guest was
    term: int  # in which the guest is to run here
    epoch: int  # the last one that was acked
    phase: Phase
    boot_id: str  # of this machine: a domain does not outlive its boot
    proof: str = ""  # why the old guest counts as stopped, from FEEDING on; with --unsafe-no-fencing that it does not
    domid: int | None = None  # from SEALED on
    paused: bool = False  # it is to be left paused (--activate-paused); from SEALED on

    def is_of(self, record: TermRecord) -> bool:
        """Whether its term is ours, on stable storage: then nobody else may run the guest."""
        return record.role is Role.SECONDARY_ACTIVE and record.term == self.term

    def is_ahead_of(self, record: TermRecord) -> bool:
        """Whether its term was never stored: a fence was ordered, and no more is sure."""
        return record.term < self.term

    @property
    def old_guest(self) -> str:
        """What became of it, for people."""
        return f"the old guest at {self.address} counts as stopped ({self.proof})"

    def what_is_lost(self) -> str:
        """For people: why this side has nothing to run, and what to do. Of one whose term was never stored."""
        fenced = (
            f"an earlier process died while the old guest at {self.address} was being stopped; whether it is stopped "
            "is not known"
            if self.phase is Phase.FENCING
            else f"an earlier process died before it could take the guest over; {self.old_guest}"
        )
        return (
            f"{fenced}. Epoch {self.epoch}, with which it was to go on here, is lost with that process, and nothing "
            f"is started. Look at {self.address}: if the guest is there no more, start it anew; once its primary is "
            "back, it is protected again and this is over. (On a Xen host `xl list` may show here, paused, what xl "
            "had taken in of it by then.)"
        )


class Activations:
    """Of all guests of one secondary. Each method is for one thread at a time a guest.

    A note is ordered before what it announces: FENCING is on the disk before anybody is fenced, else nobody is. Of
    the later phases each is written after what it says has come true, and before what makes it false: a note that is
    a phase late, since a disk is full, only makes the next life more careful, and so stops no activation.
    """

    def __init__(self, directory: Path) -> None:
        """Make the directory if need be. Raises StateError."""
        self._directory = directory
        try:
            make_directory(directory)
        except OSError as error:
            raise StateError(
                f"{directory} cannot be made ({error.strerror}): make it writable, or choose another --state-dir"
            ) from error

    def path(self, uuid: str) -> Path:
        return self._directory / f"{uuid}{_SUFFIX}"

    def left(self) -> list[Activation]:
        """What earlier lives did not finish. Raises StateError for a note that cannot be read."""
        names = sorted(os.listdir(self._directory))
        return [
            found
            for name in names
            if name.endswith(_SUFFIX) and (found := self.load(name.removesuffix(_SUFFIX)))
        ]

    def load(self, uuid: str) -> Activation | None:
        """Raises StateError for a note that cannot be read."""
        path = self.path(uuid)
        try:
            with path.open("rb") as file:
                return _parse(file.read(NOTE_LIMIT), uuid)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{path} cannot be read ({error!r}), so it is not known how far an activation of this guest came: see "
                "that the guest runs on one machine only, then remove the file"
            ) from error

    def begin(self, activation: Activation) -> None:
        """Before the fence. Raises StateError if it cannot be written: then nobody is to be fenced."""
        path = self.path(activation.uuid)
        try:
            self._put(activation)
        except OSError as error:
            raise StateError(
                f"{path} cannot be written ({error.strerror}), nor could the new term: free space or make it writable"
            ) from error

    def advance(self, uuid: str, phase: Phase, **more: Any) -> None:
        """The activation has come to `phase`, and what else is known of it by then. Never fails."""
        try:
            old = self.load(uuid)
            if old is not None and old != (new := replace(old, phase=phase, **more)):
                self._put(new)
        except (OSError, StateError) as error:
            log.error("%s: not noted that the activation is %s: %s", uuid, phase, error)

    def forget(self, uuid: str) -> None:
        """The guest runs here, or will never be activated from what was here. Never fails."""
        try:
            if self.path(uuid).exists():
                remove(self._directory, self.path(uuid).name)
        except OSError as error:
            log.error(
                "%s: remove %s, or the next start takes an activation for unfinished: %s",
                uuid,
                self.path(uuid),
                error.strerror,
            )

    def _put(self, activation: Activation) -> None:
        data = json.dumps(asdict(activation)).encode()
        put(self._directory, self.path(activation.uuid).name, data)


def _parse(data: bytes, uuid: str) -> Activation:
    """Raises ValueError, KeyError, TypeError."""
    document = json.loads(data)
    # Of another version it may lack what has a default, and have what is not known here.
    given = {
        field.name: document[field.name] for field in fields(Activation) if field.name in document
    }
    found = Activation(**{**given, "phase": Phase(document["phase"])})
    if found.uuid != uuid:
        raise ValueError(f"it is of {found.uuid}")
    return found


def lost(activation: Activation) -> str:
    """For people: why nothing of an activation whose term is ours is left to run, and what to do."""
    why = "with the process that died"
    if activation.boot_id != boot_id():
        why = "with the memory of this machine, which was started anew since"
    return (
        f"epoch {activation.epoch} is lost {why}, and {activation.old_guest}: nobody runs {activation.name}, and "
        "nothing is left to start. Start it anew on this machine (seen within 10 s); or, to start it elsewhere, see "
        "`unfinished activation` in docs/operating.md"
    )
