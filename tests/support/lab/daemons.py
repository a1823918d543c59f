"""checkpointd in dom0, started as a user would by hand, and killed as no user would."""

from __future__ import annotations

import json
import secrets
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.console import Follower

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lab.machine import Machine

LOGS = "/var/log/checkpointd"
STATE = "/var/lib/checkpointd"
KEYS_KNOWN = f"{STATE}/keys/exchanged"  # the same token on two hosts that have each other's keys
READY_LIMIT = 300.0  # s; Python with all its imports takes 5 s in software emulation, and all at once far more


@dataclass(frozen=True, slots=True)
class Daemon:
    machine: Machine
    name: str
    pid: int

    @property
    def log(self) -> str:
        return f"{LOGS}/{self.name}.log"

    def alive(self) -> bool:
        # A zombie is dead.
        state = self.machine.ssh(
            f"sed 's/.*) //' /proc/{self.pid}/stat 2>/dev/null", check=False
        ).out
        return bool(state) and not state.startswith("Z")

    def kill(self, signal: str = "KILL") -> None:
        self.machine.ssh(f"kill -{signal} {self.pid}")

    def end(self, limit: float = READY_LIMIT) -> int:
        """SIGTERM, and its exit code."""
        self.machine.ssh(f"kill -TERM {self.pid}", check=False)
        return self.wait(limit)

    def wait(self, limit: float = READY_LIMIT) -> int:
        """The exit code of a daemon that ends by itself."""
        path = f"{LOGS}/{self.name}.code"
        command = f"timeout {limit:.0f} sh -c 'until [ -s {path} ]; do sleep 0.1; done'; cat {path}"
        return int(self.machine.ssh(command, timeout=limit + READY_LIMIT).out)

    def said(self) -> str:
        return self.machine.ssh(f"cat {self.log}").out

    def follow(self) -> Follower:
        return Follower(self.machine, self.log)


def start(
    machine: Machine, name: str, *words: str, environment: Mapping[str, str] | None = None
) -> Daemon:
    """`checkpointd WORDS` in the background, its stderr in LOGS/NAME.log and its exit code in NAME.code."""
    variables = "".join(
        f"{key}={shlex.quote(value)} " for key, value in (environment or {}).items()
    )
    inner = f"{variables}checkpointd {shlex.join(words)} >>{LOGS}/{name}.log 2>&1 & echo $! >{LOGS}/{name}.pid; "
    inner += f"wait $!; echo $? >{LOGS}/{name}.code"
    machine.ssh(
        f"mkdir -p {LOGS}; rm -f {LOGS}/{name}.pid {LOGS}/{name}.code;"
        f" setsid sh -c {shlex.quote(inner)} </dev/null >/dev/null 2>&1 &"
        f" until [ -s {LOGS}/{name}.pid ]; do sleep 0.05; done"
    )
    return Daemon(machine, name, int(machine.ssh(f"cat {LOGS}/{name}.pid").out))


def exchange_keys(primary: Machine, secondary: Machine) -> None:
    """Each side learns the other's public key, as checkpointd keys --help says; once for each pair of disks."""
    token = primary.ssh(f"cat {KEYS_KNOWN}", check=False).out
    if token and secondary.ssh(f"cat {KEYS_KNOWN}", check=False).out == token:
        return
    for one, its_role, other, role in (
        (primary, "primary", secondary, "secondary"),
        (secondary, "secondary", primary, "primary"),
    ):
        key = one.ssh(f"checkpointd keys show --quiet --role {its_role}").out.strip()
        other.ssh(
            f"checkpointd keys remove --role {role} {one.name} >/dev/null 2>&1;"
            f" checkpointd keys trust --role {role} {one.name} {shlex.quote(key)}"
        )
    token = secrets.token_hex()
    for host in (primary, secondary):
        host.ssh(f"printf %s {token} > {KEYS_KNOWN}")


def status(machine: Machine) -> dict[str, Any]:
    """What `checkpointd status --json` says there."""
    document: dict[str, Any] = json.loads(machine.ssh("checkpointd status --json").out)
    return document


def clear(machine: Machine) -> None:
    """No daemon, no guest, nothing that either kept but keys."""
    machine.ssh(
        f"for pid in $(cat {LOGS}/*.pid 2>/dev/null); do kill -KILL $pid 2>/dev/null; done;"
        " pkill -KILL -f '^xl migrate-receive';"
        " for id in $(xl list | awk 'NR > 1 && $2 > 0 {print $2}'); do"
        " xl unpause $id 2>/dev/null; xl destroy $id; done;"
        f" find {STATE} -mindepth 1 -maxdepth 1 ! -name keys -exec rm -rf {{}} + 2>/dev/null;"
        f" rm -rf {LOGS} /run/checkpointd /var/log/xen/console/guest-*; mkdir -p {LOGS}"
    )
