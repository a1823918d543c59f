"""Xen as one side's hypervisor. See Hypervisor in hypervisor/port.py."""

from __future__ import annotations

import errno
import uuid as uuids
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from checkpointd.authority.processes import HostIdentity, boot_id
from checkpointd.errors import HypervisorError, NoSuchDomainError
from checkpointd.hypervisor.port import DomainInfo
from checkpointd.hypervisor.xen import ends, savers, survey, toolstack, versions
from checkpointd.hypervisor.xen import release as releases
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen.domain import XenDomain
from checkpointd.hypervisor.xen.facts import end_of
from checkpointd.hypervisor.xen.lib import Store, check, ffi, lib, open_libs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointd.hypervisor.port import EndReason
    from checkpointd.hypervisor.xen.devices import Allowances


class XenHypervisor:
    """The domains of the Xen host whose dom0 this is."""

    def __init__(self, run_dir: Path, allow: Allowances) -> None:
        """Raises HypervisorError: no Xen here, or none that this adapter knows."""
        self._run_dir = run_dir
        self._allow = allow
        self._version = versions.running()
        self._libs = open_libs(untested=allow.untested)

    @property
    def name(self) -> str:
        return "xen"

    def domains(self) -> list[DomainInfo]:
        """All but dom0. Without what only xl knows: find() adds that."""
        store = Store(self._libs)
        try:
            return [self._describe(info, store) for info in self._list()]
        finally:
            store.close()

    def find(self, *, domid: int | None = None, uuid: str | None = None) -> DomainInfo:
        """First xl is asked, which waits until a domain is complete: before, what Xen says of it is half of it."""
        found = self._search(domid, uuid)
        known = toolstack.configuration(found.domid)
        return self._with_config(self._search(found.domid, found.uuid), known)

    def _search(self, domid: int | None, uuid: str | None) -> DomainInfo:
        domains = self.domains()
        for info in domains:
            if domid in (None, info.domid) and uuid in (None, info.uuid):
                return info
        wanted = f"UUID {uuid}" if domid is None else f"domid {domid}"
        there = ", ".join(f"{info.domid} ({info.name}, {info.uuid})" for info in domains) or "none"
        raise NoSuchDomainError(
            f"no guest with {wanted} runs on this Xen host: create it with xl. Guests here: {there}"
        )

    def attach(self, domid: int) -> XenDomain:
        if domid == 0:
            raise HypervisorError("dom0 protects others and cannot be protected itself")
        lock = states.DomainLock(self._run_dir, domid)
        try:
            late = self._release(domid)
            info = self.find(domid=domid)
            self._refuse(info, late=bool(late))
            return XenDomain(info, self._libs, self._run_dir, lock, self._allow, late=late)
        except BaseException:
            lock.close()
            raise

    def settle(self, info: DomainInfo, reason: EndReason | None) -> None:
        ends.settle(info, reason, ends.EndHands(self._libs, self._run_dir))

    def prepare(self, info: DomainInfo, memory_fd: int) -> NoReturn:
        raise HypervisorError(
            f"{info.name} is a Xen guest, and an image alone makes none: activate it through xl (--restorer xl)"
        )

    # ------------------------------------------------------------ what is behind it

    def _list(self) -> Iterator[Any]:
        """`struct xen_dominfo *` of each domain but dom0 that has not ended."""
        info = ffi.new("struct xen_dominfo *")
        first = 1
        while (rc := lib.xen_domain_next(self._libs, first, info)) == 0:
            if end_of(info.flags) is None:
                yield info
            first = info.domain + 1
        if rc != -errno.ESRCH:
            check(rc, "Xen does not list its domains")

    def _describe(self, info: Any, store: Store) -> DomainInfo:
        domid = int(info.domain)
        nr_pfns = ffi.new("uint64_t *")
        rc = lib.xen_nr_pfns(self._libs, domid, nr_pfns)
        return DomainInfo(
            uuid=str(uuids.UUID(bytes=bytes(ffi.buffer(info.handle)))),
            domid=domid,
            name=store.read(f"/local/domain/{domid}/name") or f"domain-{domid}",
            nr_pfns=int(nr_pfns[0]) if rc == 0 else 0,  # it goes just now
            ram_pages=int(info.tot_pages),
            hypervisor=self.name,
            # The machine is the host: no process of it can be watched from outside.
            host=HostIdentity(boot_id(), 0, 0),
            config={"xen": str(self._version)},
        )

    @staticmethod
    def _with_config(info: DomainInfo, known: toolstack.Configuration) -> DomainInfo:
        return replace(info, config={**info.config, "xl": known.text, "type": known.kind})

    def _release(self, domid: int) -> float:
        """Undo what a dead engine has left. The lock is ours, so it is dead. For how many s the guest may yet suspend
        for it: longer than a moment is not waited for here.
        """
        left = states.load(self._run_dir, domid)
        if left is None:
            return 0.0
        hands = releases.UndoHands(untested=self._allow.untested)
        try:
            late = releases.undo(self._run_dir, left, hands).late
            came = releases.await_late(
                lambda: releases.resume_late(left, hands), min(late, releases.LATE_SUSPEND)
            )
            return 0.0 if came else late
        finally:
            hands.close()

    def _refuse(self, info: DomainInfo, *, late: bool) -> None:
        """HypervisorError for a guest that this adapter cannot protect (xen.md in docs says why). `late`: if it is
        suspended, that is for a dead engine of ours.
        """
        config = toolstack.Configuration.of(str(info.config["xl"]))
        why = ""
        if config.kind == "pv":
            why = (
                "it is a PV guest, whose page tables name frames of this host: make it a PVH guest"
            )
        elif config.kind == "hvm":
            why = (
                "it has a device model (QEMU), whose state and writes are not captured: make it PVH"
            )
        elif config.vnuma_nodes:
            why = "it has virtual NUMA nodes, which no stream can carry: remove `vnuma` from its configuration"
        elif config.nested:
            why = "it may run a hypervisor itself, whose state is not captured: remove `nestedhvm`"
        elif survey.survey(info.domid, engine_attached=True).pod_pages:
            why = (
                "parts of its memory are populated on demand, and looking at them would do it: "
                "let memory and maxmem be equal, or wait until its balloon driver has settled"
            )
        elif saver := savers.helper_of(info.domid):
            why = f"it is being saved or migrated (process {saver}): wait for the end of that"
        elif self._is_suspended(info.domid) and not late:
            why = (
                "it is suspended, and not by an engine of ours: a save or a migration is under way, or was broken off. "
                f"If none is, `checkpointd release --domid {info.domid} --force` lets it run on"
            )
        if why:
            raise HypervisorError(f"domain {info.domid} ({info.name}) cannot be protected: {why}")

    def _is_suspended(self, domid: int) -> bool:
        state = ffi.new("struct xen_dominfo *")
        check(
            lib.xen_domain_state(self._libs, domid, state), f"Xen does not describe domain {domid}"
        )
        return bool(lib.xen_is_suspended(state))
