"""Domains that xl is building here: found by UUID, held still, released, destroyed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import uuid as uuids
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.xen.lib import Store, check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

# s; from SIGKILL to the end of an xl that hangs: an instant, unless it hangs in the kernel.
KILL = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    domid: int
    name: str
    paused: bool  # by a toolstack, at least once


class Domains:
    """The hypervisor's and the toolstack's view of this host's domains. Every call raises HypervisorError."""

    def __init__(self, libs: Any) -> None:
        """`libs`: what lib.open_libs() gives."""
        self._libs = libs
        self._store = Store(libs)

    def find(self, uuid: str) -> Found | None:
        """The domain with this UUID, unless it is dying."""
        handle = uuids.UUID(uuid).bytes
        info = ffi.new("struct xen_dominfo *")
        first = 1  # dom0 is nobody's guest
        while (rc := lib.xen_domain_next(self._libs, first, info)) == 0:
            if bytes(ffi.buffer(info.handle)) == handle and not info.flags & lib.XEN_STATE_DYING:
                name = self._store.read(f"/local/domain/{info.domain}/name")
                paused = bool(info.flags & lib.XEN_STATE_PAUSED)
                return Found(info.domain, name or "", paused)
            first = info.domain + 1
        if rc != -errno.ESRCH:
            check(rc, "Xen does not list its domains")
        return None

    def pause(self, domid: int) -> None:
        """One controller pause more than there are."""
        check(lib.xen_pause(self._libs, domid), f"domain {domid} cannot be paused")

    def unpause(self, domid: int) -> None:
        """One controller pause less."""
        check(lib.xen_unpause(self._libs, domid), f"domain {domid} cannot be unpaused")

    def drop_pages(self, domid: int, pfns: Sequence[int]) -> None:
        """Take back the memory behind these pfns, which must have some: XENMEM_decrease_reservation."""
        frames = ffi.new("unsigned long[]", list(pfns))
        check(
            lib.xen_take_pages(self._libs, domid, frames, len(pfns)),
            f"{len(pfns)} pages of domain {domid} cannot be taken back",
        )

    def destroy(self, domid: int, timeout: float) -> None:
        """The domain and all that libxl has for it; `timeout` in seconds. An xl that hangs is killed, and not waited
        for: in the kernel it may hang for ever.
        """
        try:
            process = subprocess.Popen(
                ("xl", "destroy", str(domid)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a group of its own: its scripts are killed with it
            )
        except OSError as error:
            raise HypervisorError(f"cannot run xl ({error.strerror}): install xen-utils") from None
        assert process.stderr is not None, "asked for"
        try:
            _, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL)
            raise HypervisorError(
                f"`xl destroy {domid}` has not ended within {timeout:g} s: killed; try it by hand"
            ) from None
        finally:
            process.stderr.close()
        if process.returncode:
            text = said.decode(errors="replace").strip()
            raise HypervisorError(f"`xl destroy {domid}` failed: {text}")

    def close(self) -> None:
        self._store.close()
