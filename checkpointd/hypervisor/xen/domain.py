"""The engine's end of a Xen guest. See Domain in hypervisor/port.py."""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from checkpointd import faults
from checkpointd.authority.processes import identify
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.port import DomainInfo, EndReason
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen.devices import Allowances, changed, devices_of, refuse_or_list
from checkpointd.hypervisor.xen.facts import end_of
from checkpointd.hypervisor.xen.handle import WatcherHandle
from checkpointd.hypervisor.xen.lib import Store, check, ffi, lib
from checkpointd.output.xen import XenOutput

if TYPE_CHECKING:
    from pathlib import Path

    from checkpointd.hypervisor.port import Contact
    from checkpointd.hypervisor.xen.devices import Device
    from checkpointd.wire.messages import End, Retire

log = logging.getLogger(__name__)

# Octets; the static records are both CPU policies, some 2 KiB. More than Xen's own tools would take.
STATIC_ROOM: Final = 1 << 20
PAUSED_LOOK: Final = (
    0.5  # s; between two looks whether a paused domain goes on, of which nobody tells
)
# A fault point without a passage: while it is armed, the guest's changes of its memory map are answered and not heard.
DEAF: Final = "xen.invalidate"


class XenDomain:
    """Invariant 5 by this order: the watcher runs and the state is on disk before anything that could stop the guest,
    and they go only once nothing of the kind is left. So whenever this process dies, somebody knows what to undo.

    Calls here may come from any thread, one at a time; the native table is the epoch loop's.
    """

    def __init__(
        self,
        info: DomainInfo,
        libs: Any,
        run_dir: Path,
        lock: states.DomainLock,
        allow: Allowances,
        *,
        late: float = 0.0,
    ) -> None:
        """Takes over `lock`. `late`: s; a dead engine has asked the guest to stop within so long, and it may do so yet:
        it is ours to resume then. Raises HypervisorError; nothing is left behind then.
        """
        self._info = info
        self._libs = libs
        self._run_dir = run_dir
        self._lock = lock
        self._allow = allow
        self._output = XenOutput()
        self._ended: EndReason | None = None
        self._last_word: Retire | End | None = None  # for the watcher to say
        self._trouble: str | None = None
        self._log_on = False
        self._closed = False
        self._late = late
        self._domain: Any = None  # struct xen_domain *, None once closed
        self._asked: states.Asked | None = None
        self._asked_ns: Any = None  # its memory, as the native half has it
        self._state = states.EngineState(info.uuid, info.domid, identify())
        self._state_lock = threading.Lock()  # the watcher's thread writes the state, too
        self._watcher = WatcherHandle(
            info.domid, info.uuid, run_dir, untested=allow.untested, on_start=self._watched_by
        )
        self._store = Store(libs)
        self._note = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable: ask ended()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._onlooker = threading.Thread(
            target=self._look_on, name=f"domain-{info.domid}", daemon=True
        )
        try:
            self._devices = devices_of(self._store, info.domid)
            self.unsafe = refuse_or_list(self._devices, allow)
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        domid = self._info.domid
        self._store.watch("@releaseDomain", "released")
        self._store.watch(f"/libxl/{domid}/device", "devices")
        # What both ends of a disk agree on stands there only once they have connected.
        self._store.watch(f"/local/domain/{domid}/device", "devices")
        domain = ffi.new("struct xen_domain **")
        check(lib.xen_domain_new(self._libs, domid, domain), f"cannot attach to domain {domid}")
        self._domain = domain[0]
        now = int(lib.xen_domain_nr_pfns(self._domain))
        if now != self._info.nr_pfns:
            raise HypervisorError(
                f"the memory map of domain {domid} has {now} pages now and had {self._info.nr_pfns} when it was looked "
                "at: it was being created, or has just grown; begin again"
            )
        self._write_state()
        self._asked = states.Asked(self._run_dir, domid, self._late)
        self._asked_ns = ffi.from_buffer(self._asked.memory)
        lib.xen_domain_keep(self._domain, ffi.cast("uint64_t *", self._asked_ns))
        if self._late:  # it may have stopped just now, and the first epoch is far away
            check(lib.xen_resume_ours(self._domain), f"domain {domid} cannot be resumed")
        self._watcher.start()
        server = ffi.new("uint16_t *")
        deaf = any(rule.point == DEAF for rule in faults.armed())
        check(
            lib.xen_p2m_begin(self._domain, deaf, server),
            f"domain {domid} cannot be asked for changes of its memory map",
        )
        self._write_state(ioreq_server=int(server[0]))
        check(
            lib.xen_p2m_watch(self._domain),
            f"domain {domid} cannot be watched for changes of its memory map",
        )
        self._onlooker.start()

    def _watched_by(self, pid: int) -> None:
        self._write_state(watcher_pid=pid)

    def _write_state(self, **news: Any) -> None:
        with self._state_lock:
            self._state = replace(self._state, **news)
            states.store(self._run_dir, self._state)

    # ------------------------------------------------------------ the port

    @property
    def info(self) -> DomainInfo:
        return self._info

    @property
    def table(self) -> int:
        return int(ffi.cast("uintptr_t", lib.xen_domain_table(self._attached())))

    @property
    def output(self) -> XenOutput:
        return self._output

    def tell_of_loss(self, contact: Contact) -> None:
        self._watcher.update(contact)

    def leave_word(self, word: Retire | End) -> None:
        self._last_word = word

    def static_records(self) -> bytes:
        version = str(self._info.config["xen"]).split(".")
        buffer = ffi.new("uint8_t[]", STATIC_ROOM)
        size = check(
            lib.xen_static_records(
                self._attached(), int(version[0]), int(version[1]), buffer, STATIC_ROOM
            ),
            f"the CPU policy of domain {self._info.domid} cannot be had",
        )
        return bytes(ffi.buffer(buffer, size))

    def enable_log(self) -> None:
        """HypervisorError if it is on already: what a dead engine of ours began was ended before this one attached."""
        rc = lib.xen_log_begin(self._attached())
        if rc == -errno.EINVAL:
            raise HypervisorError(
                f"the dirty log of domain {self._info.domid} is in use, by this engine or by a save or a migration. If "
                f"none is under way, one has died: `checkpointd release --domid {self._info.domid} --force` ends it"
            )
        check(rc, f"the dirty log of domain {self._info.domid} cannot begin")
        self._log_on = True

    @property
    def trouble(self) -> str | None:
        """Why this guest, which lives, cannot be protected any longer: one sentence; None: it can."""
        return self._trouble

    def ended(self) -> EndReason | None:
        """MOVED as soon as somebody else suspends the guest, or has its dirty log, and as long as he may."""
        if self._ended is None and self._domain is not None:
            self._ended = self._find_end()
            if self._ended is not None:
                os.eventfd_write(self._note, 1)
        return self._ended

    def fileno(self) -> int:
        return self._note

    def pause(self) -> None:
        self._attached()
        check(
            lib.xen_pause(self._libs, self._info.domid),
            f"domain {self._info.domid} cannot be paused",
        )

    def unpause(self) -> None:
        self._attached()
        check(
            lib.xen_unpause(self._libs, self._info.domid),
            f"domain {self._info.domid} cannot be unpaused",
        )

    def close(self) -> None:
        """Detach. What cannot be undone is left to the watcher, which does it once this process has ended."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._stop, 1)
        if self._onlooker.ident is not None:
            self._onlooker.join()
        # Where no epoch is taken nobody has looked, and the log of an `xl migrate` is not ours to end.
        unread = int(lib.xen_log_check(self._domain)) if self._domain is not None else 0
        try:
            self.ended()  # what is known now stays known
        except HypervisorError as error:
            log.error("%s", error)
        domain, self._domain = self._domain, None
        left = self._undo(domain, unread) if domain is not None else []
        for what in left:
            log.error("detaching from domain %d: %s", self._info.domid, what)
        if not left:
            states.remove(self._run_dir, self._info.domid)
            self._watcher.bye(self._last_word)
        lib.xen_domain_free(domain if domain is not None else ffi.NULL)
        if self._asked is not None:
            ffi.release(self._asked_ns)
            self._asked.close()
        self._store.close()
        self._lock.close()
        os.close(self._note)
        os.close(self._stop)

    # ------------------------------------------------------------ what is behind it

    def _attached(self) -> Any:
        if self._domain is None:
            raise HypervisorError("the domain is closed")
        return self._domain

    @staticmethod
    def _signs_of(domain: Any) -> Any:
        signs = ffi.new("struct xen_signs *")
        lib.xen_domain_signs(domain, signs)
        return signs

    def _find_end(self) -> EndReason | None:
        info = ffi.new("struct xen_dominfo *")
        rc = lib.xen_domain_state(self._libs, self._info.domid, info)
        if rc == -errno.ESRCH:
            return EndReason.DESTROYED
        check(rc, f"Xen does not describe domain {self._info.domid}")
        reason = end_of(info.flags)
        signs = self._signs_of(self._attached())
        if reason is None and (signs.foreign or signs.thefts):
            return EndReason.MOVED
        if signs.grown and self._trouble is None:
            self._fail(
                f"the memory map of domain {self._info.domid} has grown beyond the {self._info.nr_pfns} pages that it "
                "had when protection began: begin protection anew"
            )
        return reason

    def _look_on(self) -> None:
        """On a thread of its own: a domain that reboots is there for a moment only with its reason."""
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(self._store.fileno(), select.POLLIN)
        try:
            again = False
            while self._stop not in dict(poll.poll(PAUSED_LOOK * 1000 if again else None)):
                fired = {token for _, token in self._store.fired()}
                if self.ended() is not None:
                    return
                if again or "devices" in fired:
                    again = self._look_at_devices()
        except HypervisorError as error:
            self._fail(str(error))

    def _look_at_devices(self) -> bool:
        """True: look again, for the domain is paused. So is one that xl destroys, whose devices it takes away first.
        While it is paused no epoch is taken.
        """
        trouble = self._trouble_with(devices_of(self._store, self._info.domid))
        if not trouble:
            return False
        info = ffi.new("struct xen_dominfo *")
        rc = lib.xen_domain_state(self._libs, self._info.domid, info)
        if rc < 0 or info.flags & (lib.XEN_STATE_PAUSED | lib.XEN_STATE_DYING):
            return True
        self._fail(trouble)
        return False

    def _trouble_with(self, devices: tuple[Device, ...]) -> str:
        try:
            self.unsafe = refuse_or_list(devices, self._allow)
        except HypervisorError as error:
            return str(error)
        news = changed(self._devices, devices)
        if not news:
            return ""
        return (
            f"the devices of domain {self._info.domid} have changed ({'; '.join(news)}), and the other side would "
            "build it with those of before: begin protection anew"
        )

    def _fail(self, why: str) -> None:
        self._trouble = why
        os.eventfd_write(self._note, 1)

    def _undo(self, domain: Any, unread: int) -> list[str]:
        """Leave the guest as it was found; what failed, as text. Each step is tried whatever came before. Of a guest
        that somebody else suspends only the ioreq server is ours. `unread`: why nobody knows whose the dirty log is.
        """
        results = [("its memory map", self._end_p2m(domain))]
        if self._ended in (
            None,
            EndReason.MOVED,
        ):  # the log of a guest that moves may be gone, and its suspend be ours
            resumed = int(lib.xen_resume_ours(domain))
            signs = self._signs_of(domain)
            if not signs.foreign:
                results.append(("resuming it", resumed))
                if signs.late:
                    results.append(("a suspend that is under way", -errno.EINPROGRESS))
                if self._ended is None and self._log_on:
                    rc = unread or int(lib.xen_log_off(self._libs, self._info.domid))
                    results.append(("its dirty log", rc))
        gone = (-errno.ESRCH, -errno.ESHUTDOWN)  # it ends meanwhile
        return [f"{what}: {os.strerror(-rc)}" for what, rc in results if rc < 0 and rc not in gone]

    def _end_p2m(self, domain: Any) -> int:
        """Once more if it fails, from the start: then a vcpu waits for an answer, and the watcher is slower."""
        rc = int(lib.xen_p2m_end(domain))
        server = self._state.ioreq_server
        if rc < 0 and server is not None:
            rc = int(lib.xen_ioreq_destroy(self._libs, self._info.domid, server))
        return 0 if rc == -errno.ENOENT else rc
