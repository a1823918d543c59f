"""Undoes what a dead engine has left of its work on a Xen domain, so that the guest runs on (invariant 5).

Xen does not notice that an engine has died: a guest that it had suspended stays so, one that it has asked to suspend
will, and one whose ioreq server nobody answers any more stops at its next change of the p2m. None of what is done
here opens the guest's output: that is held elsewhere.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from checkpointd.errors import CheckpointdError, DomainBusyError, HypervisorError
from checkpointd.hypervisor.xen import savers
from checkpointd.hypervisor.xen import state as states

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointd.hypervisor.port import EndReason

log = logging.getLogger(__name__)

# s; at the least, a guest that has taken a request to suspend is looked at for so long whether it obeys. It takes a
# moment, or as long as it is busy: whoever asked said how long he would wait, and that counts where it is longer.
LATE_SUSPEND: Final = 5.0
LATE_LOOK: Final = 0.1  # s; between two looks meanwhile
KILL_TIMEOUT: Final = (
    5.0  # s; a process that was killed is gone by then, unless its kernel is in trouble
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A domain at one moment."""

    uuid: str
    suspended: bool
    paused: bool  # by an operator or a toolstack, not by a suspend
    ended: EndReason | None


class Hands(Protocol):
    """What can be done to a domain without being attached to it. Each call raises HypervisorError if it fails."""

    def look(self, domid: int) -> Seen | None:
        """None: there is no such domain."""
        ...

    def destroy_ioreq_server(self, domid: int, server: int) -> bool:
        """False: it was gone already."""
        ...

    def withdraw_suspend(self, domid: int) -> bool:
        """Take back a request to suspend that the guest has not taken yet; False: there was none."""
        ...

    def resume(self, domid: int) -> None: ...

    def tell_store(self, domid: int) -> None:
        """Tell xenstored that the domain runs: of one that it takes for shut down it reports no further suspend."""
        ...

    def stop_log(self, domid: int) -> bool:
        """End the dirty log; False: there was none."""
        ...

    def pause(self, domid: int) -> None: ...

    def saved_by_others(self, domid: int) -> str:
        """Who saves or migrates it, and is none of ours: its suspend and its log are his. Empty: nobody is seen to."""
        ...

    def others_ask(self, domid: int) -> bool:
        """Has somebody else asked it to suspend since withdraw_suspend(), or else since the first look?"""
        ...


class UndoHands:
    """The same on Xen. Opens the libraries and a connection to xenstored."""

    def __init__(self, *, untested: bool = False) -> None:
        from checkpointd.hypervisor.xen import facts
        from checkpointd.hypervisor.xen import lib as xen

        self._xen = xen
        self._end_of = facts.end_of
        self._watched: int | None = None  # the domain whose control/shutdown is watched
        self._others = False
        self._libs: Any = xen.open_libs(untested=untested)
        self._store = xen.Store(self._libs)

    def look(self, domid: int) -> Seen | None:
        import errno
        import uuid

        lib, info = self._xen.lib, self._xen.ffi.new("struct xen_dominfo *")
        rc = lib.xen_domain_state(self._libs, domid, info)
        if rc == -errno.ESRCH:
            return None
        self._xen.check(rc, f"Xen does not describe domain {domid}")
        return Seen(
            str(uuid.UUID(bytes=bytes(info.handle))),
            bool(lib.xen_is_suspended(info)),
            bool(info.flags & lib.XEN_STATE_PAUSED),
            self._end_of(info.flags),
        )

    def destroy_ioreq_server(self, domid: int, server: int) -> bool:
        import errno

        rc = self._xen.lib.xen_ioreq_destroy(self._libs, domid, server)
        if rc == -errno.ENOENT:
            return False
        self._xen.check(rc, f"ioreq server {server} of domain {domid} cannot be destroyed")
        return True

    def withdraw_suspend(self, domid: int) -> bool:
        self._watch(domid)
        path = _node(domid)
        while True:  # until nobody came in between
            with self._store.transaction() as transaction:
                asked = self._store.read(path, transaction.number) == "suspend"
                if asked:
                    self._store.write(path, "", transaction.number)
            if transaction.done:
                break
        self._written(domid)  # by us, and for us
        self._others = False
        return asked

    def resume(self, domid: int) -> None:
        rc = self._xen.lib.xen_resume(self._libs, self._store.handle, domid)
        self._xen.check(rc, f"domain {domid} cannot be resumed")

    def tell_store(self, domid: int) -> None:
        if not self._libs.xs_resume_domain(self._store.handle, domid):
            raise HypervisorError(f"xenstored does not hear that domain {domid} runs")

    def stop_log(self, domid: int) -> bool:
        import errno

        rc = self._xen.lib.xen_log_off(self._libs, domid)
        if rc in (-errno.EINVAL, -errno.ENOSYS):
            return False
        self._xen.check(rc, f"the dirty log of domain {domid} cannot be ended")
        return True

    def pause(self, domid: int) -> None:
        rc = self._xen.lib.xen_pause(self._libs, domid)
        self._xen.check(rc, f"domain {domid} cannot be paused")

    def saved_by_others(self, domid: int) -> str:
        helper = savers.helper_of(domid)
        if helper is not None:
            return f"a save or a migration by others (process {helper})"
        name = self._store.read(f"/local/domain/{domid}/name") or ""
        return "`xl migrate`, whose copy may run" if name.endswith(savers.AWAY) else ""

    def others_ask(self, domid: int) -> bool:
        if self._watch(domid):
            self._written(domid)
        word, writes = self._written(domid)
        # Two writes are a request and the guest's answer to it. What it was nobody has seen: it may have been this.
        self._others |= word == "suspend" or writes >= 2
        return self._others

    def _watch(self, domid: int) -> bool:
        """False: it is watched already."""
        if self._watched == domid:
            return False
        if self._watched is not None:
            self._store.unwatch(_node(self._watched), "asked")
        self._store.watch(_node(domid), "asked")
        self._watched = domid
        self._others = False
        return True

    def _written(self, domid: int) -> tuple[str, int]:
        """What the node says, and how often it was written to since the last call. xenstored tells in order: all that
        it did before it answered is here by then.
        """
        word = self._store.read(_node(domid)) or ""
        return word, len(self._store.fired())

    def close(self) -> None:
        self._store.close()


def _node(domid: int) -> str:
    return f"/local/domain/{domid}/control/shutdown"


@dataclass(frozen=True, slots=True)
class Undone:
    done: list[str]  # for a person
    late: float = 0.0  # s; for so long the guest may yet suspend for the dead engine: look for that. 0: it will not


def undo(run_dir: Path, state: states.EngineState, hands: Hands, *, force: bool = False) -> Undone:
    """Undo the work of the engine that left `state`, and remove that.

    The caller holds the domain's lock. Each step is tried even if one before it fails; then the state stays, and the
    first HypervisorError is raised: call again. Idempotent. A suspend or a log of somebody else is left alone; `force`:
    the guest is to run even if nobody can tell whose its suspend is.
    """
    domid = state.domid
    seen = hands.look(domid)
    if seen is None or seen.uuid != state.uuid or seen.ended:
        states.remove(run_dir, domid)
        return Undone([])
    done: list[str] = []
    faults: list[HypervisorError] = []
    late = 0.0

    def step(what: str, do: Callable[[], bool]) -> bool:
        did = False
        try:
            did = do()
        except HypervisorError as error:
            faults.append(error)
        if did:
            done.append(what)
        return did

    # First what would block the guest that runs, then what makes it run.
    server = state.ioreq_server
    if server is not None:
        step(f"destroyed ioreq server {server}", lambda: hands.destroy_ioreq_server(domid, server))
    asked = states.asked(run_dir, domid)
    saver = hands.saved_by_others(domid)
    if saver:
        step(f"left the rest to {saver}", lambda: _leave_to(saver, run_dir, state, asked, hands))
    else:
        if asked != 0.0 and state.contested and not force and _is_suspended(domid, hands):
            done.append(
                "left it suspended, for nobody can tell whether somebody else's save is over: if it is, "
                f"`checkpointd release --domid {domid} --force` lets it run on"
            )
        elif asked != 0.0 or force:  # else a suspend is somebody else's
            step("withdrew the request to suspend", lambda: hands.withdraw_suspend(domid))
            obeyed = step("resumed the guest", lambda: resume_if_suspended(domid, hands))
            late = 0.0 if obeyed else lateness(asked)  # also of one that took an earlier request
        step("ended the dirty log", lambda: hands.stop_log(domid))
    if faults:
        raise faults[0]
    states.remove(run_dir, domid)
    return Undone(done, late)


def lateness(asked: float | None) -> float:
    """For how many s a guest may suspend late of which states.asked() said this when its engine was dead."""
    return 0.0 if asked == 0.0 else max(asked or 0.0, LATE_SUSPEND)


def _leave_to(
    saver: str, run_dir: Path, state: states.EngineState, asked: float | None, hands: Hands
) -> bool:
    """Whoever saves a guest waits for its answer to his own request to suspend, which one that stands still for us does
    not give: it is given in its name, and the guest is his. Before he has asked it can only be waited for.
    """
    suspended = _is_suspended(state.domid, hands)
    if asked == 0.0 or (suspended and hands.withdraw_suspend(state.domid)):
        return True
    if not state.contested:
        states.store(run_dir, replace(state, contested=True))
    raise HypervisorError(
        f"there is {saver}, while a suspend for the dead engine may be under way, too: it has to go on first"
    )


def _is_suspended(domid: int, hands: Hands) -> bool:
    seen = hands.look(domid)
    return seen is not None and seen.suspended


def resume_if_suspended(domid: int, hands: Hands) -> bool:
    """Also ends what a resume has begun that was interrupted before xenstored knew of it."""
    if not _is_suspended(domid, hands):
        hands.tell_store(domid)
        return False
    hands.resume(domid)
    return True


def release(
    run_dir: Path,
    domid: int,
    hands: Hands,
    *,
    force: bool = False,
    patience: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Let a guest go on whose engine is dead; what was done, empty if there was nothing to do.

    `force`: end an engine that lives first, and resume the guest though nothing says that it was suspended by one of
    ours. `patience`: s; how long at most to wait for a guest that may suspend late. Raises DomainBusyError,
    HypervisorError.
    """
    done = []
    state = states.load(run_dir, domid)
    if state is not None and state.engine_lives:
        pid = state.engine.pid
        if not force:
            raise DomainBusyError(
                f"engine {pid} protects domain {domid}, and nothing is left to release: stop it, or give --force, "
                "which kills it first"
            )
        _kill(pid, state.engine.start_time)
        done.append(f"killed engine {pid}")
    with states.DomainLock(run_dir, domid):
        state = states.load(run_dir, domid)  # its watcher may have been here
        if state is None and force:
            state = _as_if(domid, hands)
        if state is None:
            return done
        undone = undo(run_dir, state, hands, force=force)
    done += undone.done
    late = min(undone.late, patience)
    if late > LATE_SUSPEND:
        log.warning("waiting for %g s at most: the guest has taken a request to suspend", late)

    def look() -> list[str] | None:
        return look_for_late(run_dir, state, hands)

    return done + await_late(look, late, clock, sleep)


def _as_if(domid: int, hands: Hands) -> states.EngineState | None:
    """The state that an engine would have left; None: there is no such domain."""
    from checkpointd.authority.processes import identify

    seen = hands.look(domid)
    return None if seen is None else states.EngineState(seen.uuid, domid, identify())


def await_late(
    look: Callable[[], list[str] | None],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Until `look` has something done; what that was."""
    deadline = clock() + seconds
    while clock() < deadline:
        done = look()
        if done is not None:
            return done
        sleep(LATE_LOOK)
    return []


def look_for_late(run_dir: Path, state: states.EngineState, hands: Hands) -> list[str] | None:
    """One look at a guest that may yet suspend for a dead engine. None: look on; else it is over, and what was done."""
    try:
        with states.DomainLock(run_dir, state.domid, timeout=0):
            return resume_late(state, hands)
    except DomainBusyError:
        return []  # a new engine has it, and knows


def resume_late(state: states.EngineState, hands: Hands) -> list[str] | None:
    """The same for who holds the domain's lock."""
    seen = hands.look(state.domid)
    if seen is None or seen.uuid != state.uuid or seen.ended:
        return []
    # Asked after the look: who was obeyed had asked before.
    if hands.others_ask(state.domid):
        return ["left its next suspend to somebody else, who has asked for it"]
    if not seen.suspended:
        return None
    saver = hands.saved_by_others(state.domid)
    if saver:
        return [f"left it suspended to {saver}"]
    hands.resume(state.domid)
    return ["resumed the guest, which had suspended late"]


def _kill(pid: int, started: int) -> None:
    """End this process, and no other that has its number since."""
    import select

    from checkpointd.authority.processes import start_time

    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_time(pid) != started:
            return
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(KILL_TIMEOUT * 1000):
            raise CheckpointdError(
                f"process {pid} was killed and has not ended within {KILL_TIMEOUT:g} s: look at the kernel log"
            )
    except ProcessLookupError:
        pass  # it ended meanwhile
    finally:
        os.close(pidfd)
