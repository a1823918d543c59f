"""What dom0's toolstack, xl, knows of a domain and Xen does not."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from checkpointd.errors import HypervisorError, NoSuchDomainError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

# s; `xl list -l` takes a tenth of one. It waits for the lock of the domain's configuration, which others hold as
# briefly; whoever holds it for longer hangs.
TIMEOUT: Final = 20.0
# s; xl lists a domain's configuration only once the domain is complete, disks and networks with it. A second or so;
# xl allows each device 40 s. A domain that just rebooted is met in that state.
CREATION: Final = 60.0
CREATION_LOOK: Final = 0.5  # s between two looks; each starts a process


@dataclass(frozen=True, slots=True)
class Configuration:
    """A domain's configuration, as `xl list -l` gives it under "config"."""

    text: str  # JSON
    kind: str  # "pvh", "hvm" or "pv"
    vnuma_nodes: int
    nested: bool

    @classmethod
    def of(cls, text: str) -> Configuration:
        """Of that JSON. Raises what is wrong with it: ValueError, TypeError, KeyError, AttributeError."""
        config = json.loads(text)
        build = config.get("b_info", {})
        return cls(
            text,
            str(config["c_info"]["type"]),
            len(build.get("vnuma_nodes", ())),
            build.get("nested_hvm") in (True, "True"),  # libxl's defbool: a text, or not there
        )

    @classmethod
    def parse(cls, listing: str, domid: int) -> Configuration | None:
        """Of the domain `domid` in the output of `xl list -l`; None if it is not listed. Raises HypervisorError."""
        try:
            for entry in json.loads(listing):
                if entry["domid"] == domid:
                    return cls.of(json.dumps(entry["config"], separators=(",", ":")))
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HypervisorError(
                f"xl's description of domain {domid} is not understood ({error!r}): "
                f"see what `xl list -l {domid}` says"
            ) from error


def configuration(
    domid: int,
    *,
    xl: str = "xl",
    timeout: float = TIMEOUT,
    patience: float = CREATION,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Configuration:
    """Ask xl; `timeout`: s, of each question. A domain that is being created is waited for, `patience` s.

    Raises NoSuchDomainError, or HypervisorError with what xl said.
    """
    deadline = clock() + patience
    waits = False
    while (found := Configuration.parse(_listing(domid, xl, timeout), domid)) is None:
        if clock() >= deadline:
            raise HypervisorError(
                f"xl does not know the configuration of domain {domid}: it is still being created after "
                f"{patience:g} s, or was not created by xl. See what `xl list -l {domid}` says"
            )
        if not waits:
            log.info("domain %d is being created: waiting for its configuration", domid)
            waits = True
        sleep(CREATION_LOOK)
    return found


def _listing(domid: int, xl: str, timeout: float) -> str:
    command = (xl, "list", "-l", str(domid))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise HypervisorError(
            f"cannot run xl ({error.strerror}): install it (Debian: xen-utils), and put it on the PATH"
        ) from error
    except subprocess.TimeoutExpired:
        raise HypervisorError(
            f"`{' '.join(command)}` has not answered within {timeout:g} s: look who holds /var/lock/xl "
            "or the domain's configuration"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        if "does not exist" in said or "invalid domain identifier" in said:
            raise NoSuchDomainError(f"there is no domain {domid}: {said}")
        raise HypervisorError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout
