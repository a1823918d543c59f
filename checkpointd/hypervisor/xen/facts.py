"""What Xen says of a domain, in the words of the port. Pure: from the two numbers that Xen gives."""

from __future__ import annotations

from typing import Final

from checkpointd.hypervisor.port import EndReason
from checkpointd.hypervisor.xen.lib import lib

_REASONS: Final = {
    lib.XEN_SHUTDOWN_POWEROFF: EndReason.POWEROFF,
    lib.XEN_SHUTDOWN_REBOOT: EndReason.REBOOT,
    lib.XEN_SHUTDOWN_CRASH: EndReason.CRASH,
    lib.XEN_SHUTDOWN_WATCHDOG: EndReason.CRASH,
    # The toolstack rebuilds the domain around the same memory, with another p2m: as good as a new one.
    lib.XEN_SHUTDOWN_SOFT_RESET: EndReason.REBOOT,
}


def end_of(flags: int) -> EndReason | None:
    """Why a domain with these flags (`struct xen_dominfo`) is no more; None: it lives, suspended or not."""
    if flags & lib.XEN_STATE_SHUTDOWN:
        code = flags >> 16 & 0xFF
        if code in _REASONS:
            return _REASONS[code]
        if code != lib.XEN_SHUTDOWN_SUSPEND:
            return EndReason.CRASH  # a reason of the guest's own making
    return EndReason.DESTROYED if flags & lib.XEN_STATE_DYING else None
