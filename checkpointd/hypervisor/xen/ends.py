"""The toolstack's part at a guest's end, done where nobody else does it.

The process that `xl create` leaves beside a domain, to destroy it when it powers off and to create it anew when it
reboots, ends as soon as it sees the domain suspended, and our first epoch is a suspend. (`xl save -c` has the same
effect.) Without this here protection would make an outage of a reboot.

What is done is what the domain's configuration says, and what xl would have done, but for core dumps and renaming:
such a domain is left as it is, and that is said.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid as uuids
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.port import EndReason
from checkpointd.hypervisor.xen import toolstack
from checkpointd.hypervisor.xen.lib import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from checkpointd.hypervisor.port import DomainInfo

log = logging.getLogger(__name__)

# s; xl's own process, or libvirt, acts as soon as xenstored tells it of the shutdown. It is short, for the guest is
# down meanwhile, and long enough for a dom0 that is busy.
KEEPER_LIMIT: Final = 3.0
LOOK: Final = 0.1  # s; between two looks meanwhile
# s; libxl gives up on a device's backend or script after 40 s, one after the other, and Xen frees a terabyte of guest
# in a minute. Whoever takes longer hangs.
TOOLSTACK_LIMIT: Final = 300.0


class Deed(StrEnum):
    DESTROY = "destroy"
    RESTART = "restart"
    LEAVE = "leave"


# libxl's action_on_shutdown (libxl_types.idl), as its JSON spells it.
_DEEDS: Final = {
    "destroy": Deed.DESTROY,
    "restart": Deed.RESTART,
    # Only libxl within xl keeps the memory for what the guest boots into (kexec): a guest that is up again is better
    # than none.
    "soft_reset": Deed.RESTART,
}
# libxl's, which it leaves out of the JSON. xl's own (on_reboot is "restart") are written there.
_DEFAULT: Final = "destroy"
_KEYS: Final = {
    lib.XEN_SHUTDOWN_POWEROFF: "on_poweroff",
    lib.XEN_SHUTDOWN_REBOOT: "on_reboot",
    lib.XEN_SHUTDOWN_CRASH: "on_crash",
    lib.XEN_SHUTDOWN_WATCHDOG: "on_watchdog",
    lib.XEN_SHUTDOWN_SOFT_RESET: "on_soft_reset",
}


@dataclass(frozen=True, slots=True)
class Decision:
    deed: Deed
    why: str  # what the configuration says, as "on_reboot=restart"


def decide(config: str, code: int) -> Decision:
    """What to do with a domain that shut down with Xen's reason `code`. `config`: as `xl list -l` gives it."""
    key = _KEYS.get(code)
    if key is None:
        return Decision(Deed.DESTROY, f"unknown shutdown reason {code}")  # as xl does
    action = str(json.loads(config).get(key, _DEFAULT))
    return Decision(_DEEDS.get(action, Deed.LEAVE), f"{key}={action}")


class Hands(Protocol):
    """What can be seen of a domain that has ended, and done to it. Each call raises HypervisorError if it fails."""

    def left(self, domid: int, uuid: str) -> int | None:
        """The shutdown reason of this domain if it has shut down and nobody destroys it. None: it is seen to."""
        ...

    def configuration(self, domid: int) -> str: ...

    def destroy(self, domid: int) -> None: ...

    def restart(self, domid: int, uuid: str, config: str) -> int:
        """Destroy it and create it anew by `config`; the new domid."""
        ...


def settle(
    info: DomainInfo,
    reason: EndReason | None,
    hands: Hands,
    *,
    limit: float = KEEPER_LIMIT,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """See Hypervisor.settle. `limit`: s; how long another toolstack has to do its part first."""
    who = f"domain {info.domid} ({info.name})"
    if reason is None:
        log.warning(
            "%s lives on, and nobody looks after its end: xl's own process went when an epoch suspended the guest. "
            "Protect it again; or, once it has shut down, `xl destroy %d`, and `xl create` if it is to run again",
            who,
            info.domid,
        )
    if reason not in (EndReason.POWEROFF, EndReason.REBOOT, EndReason.CRASH):
        return
    deadline = clock() + limit
    while (code := hands.left(info.domid, info.uuid)) is not None and clock() < deadline:
        sleep(LOOK)
    if code is None:
        return
    config = _configuration(info, hands)
    decision = decide(config, code)
    match decision.deed:
        case Deed.DESTROY:
            hands.destroy(info.domid)
            log.info("%s has ended: destroyed (%s), for no xl did it", who, decision.why)
        case Deed.RESTART:
            domid = hands.restart(info.domid, info.uuid, config)
            log.info(
                "%s is domain %d now (%s), for no xl did it: nor will one look after its next end, unless it is "
                "protected again",
                who,
                domid,
                decision.why,
            )
        case Deed.LEAVE:
            log.warning(
                "%s has ended and is left as it is (%s): look at it, then `xl destroy %d`, and `xl create` if it is to "
                "run again",
                who,
                decision.why,
                info.domid,
            )


def _configuration(info: DomainInfo, hands: Hands) -> str:
    """As it is now, for devices and memory may have changed; else as it was when protection began."""
    try:
        return hands.configuration(info.domid)
    except HypervisorError:
        if "xl" not in info.config:
            raise
        return str(info.config["xl"])


class EndHands:
    """The same through Xen, xl and libxl."""

    def __init__(self, libs: Any, run_dir: Path) -> None:
        self._libs = libs
        self._run_dir = run_dir

    def left(self, domid: int, uuid: str) -> int | None:
        info = ffi.new("struct xen_dominfo *")
        if lib.xen_domain_state(self._libs, domid, info) < 0:
            return None
        ours = str(uuids.UUID(bytes=bytes(ffi.buffer(info.handle)))) == uuid
        shut_down = info.flags & lib.XEN_STATE_SHUTDOWN and not info.flags & lib.XEN_STATE_DYING
        code = int(info.flags >> 16 & 0xFF)
        return code if ours and shut_down and code != lib.XEN_SHUTDOWN_SUSPEND else None

    def configuration(self, domid: int) -> str:
        return toolstack.configuration(domid, patience=0).text  # it is complete, or going

    def destroy(self, domid: int) -> None:
        run(("xl", "destroy", str(domid)))

    def restart(self, domid: int, uuid: str, config: str) -> int:
        """The configuration is on disk until the guest runs again: with the domain xl loses it."""
        path = self._run_dir / "xen" / f"{uuid}.ended.json"
        command = (sys.executable, "-P", "-m", "checkpointd.hypervisor.xen.recreate")
        try:
            path.touch(mode=0o600)  # it may name secrets of the guest
            path.write_text(config, encoding="utf-8")
            said = run((*command, "--replace", str(domid)), config)
            new = int(said)
        except (OSError, ValueError, HypervisorError) as error:
            raise HypervisorError(
                f"domain {domid} has ended and could not be started again: {error}. See what is left by `xl list`, "
                f"then `xl create` it, or, by the configuration that it had, `{' '.join(command)} < {path}`"
            ) from error
        path.unlink()
        return new


def run(
    command: Sequence[str],
    text: str = "",
    *,
    limit: float = TOOLSTACK_LIMIT,
    unit: bool | None = None,
) -> str:
    """What `command` says, given `text` on its input. HypervisorError: it failed, or took longer than `limit` s.

    `unit`: run it as a unit of its own of systemd, None: if we are one. What libxl starts for a domain has to outlive
    us, and may write where our unit must not.
    """
    if unit is None:
        unit = "INVOCATION_ID" in os.environ and shutil.which("systemd-run") is not None
    wrapped = ("systemd-run", "--quiet", "--pipe", "--wait", "--collect", *command)
    words = " ".join(command)
    try:
        done = subprocess.run(
            wrapped if unit else command,
            input=text,
            capture_output=True,
            timeout=limit,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C is for us, and not for a domain that is half built
        )
    except OSError as error:
        raise HypervisorError(f"`{words}` cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise HypervisorError(f"`{words}` has not ended within {limit:g} s") from None
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise HypervisorError(f"`{words}` failed: {said}")
    return done.stdout
