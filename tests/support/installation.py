"""One protected kv guest with clients, of which single processes can be stopped at a point and killed."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from processes import PATIENCE, NotSeenError, command, end, state_of, until, with_environment
from witnesses import Clients, read_lives, surviving, unexplained

from checkpointd.demo.proof import Verdict, input_logs, prove_guest, prove_image
from checkpointd.demo.rig import Daemon, Rig
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from checkpointd.hypervisor.port import DomainInfo

DOMID = 4
MEMORY = "4MiB"
INTERVAL = "20ms"  # many epochs a second, so that the n-th passage of a point comes soon
SILENCE = (
    1.0  # s; twenty heartbeats are missed, on a machine that others use too, before a standby acts
)
NEVER = "1h"  # an engine restart that is not to be given up within a test
CLIENTS = 3
GRACE = 10.0  # s; for processes that were killed, or whose creator was, to be gone
ACTING = ("fencing", "activating", "active")  # states of a secondary that takes over


@dataclass(frozen=True, slots=True)
class Takeover:
    """What a secondary says of its activation."""

    epoch: int  # the committed one that it activated
    acked: int | None  # the last that it had acknowledged in that session


class Installation:
    """A guest and its clients; secondary and primary as they are started. close() ends all of it."""

    def __init__(self, directory: Path, *, seed: int, engine_restart: str = NEVER) -> None:
        self.rig = Rig(directory)
        self._engine_restart = engine_restart
        self._keep = directory / "keep"
        self._address = f"127.0.0.1:{self.rig.udp_port()}"
        self.clients = Clients(self._address, CLIENTS, seed)
        self.guest: Daemon | None = None
        self.secondary: Daemon | None = None
        self.primary: Daemon | None = None
        self.info: DomainInfo | None = None

    # ------------------------------------------------------------ processes

    def start_guest(self, faults: str = "") -> Daemon:
        self.guest = self.rig.guest(
            DOMID, "--memory", MEMORY, "--listen", self._address, faults=faults
        )
        self.rig.guest_is_up(self.guest)
        self.info = self.hypervisor("primary").find(domid=DOMID)
        return self.guest

    def start_secondary(self, *arguments: str, faults: str = "") -> Daemon:
        self.secondary = self.rig.secondary(
            *("--silence", f"{SILENCE * 1000:.0f}ms", "--engine-restart", self._engine_restart),
            *("--keep-images", str(self._keep), *arguments),
            faults=faults,
        ).ready()
        return self.secondary

    def start_primary(self, *arguments: str, domid: int = DOMID, faults: str = "") -> Daemon:
        self.primary = self.rig.primary(domid, "--interval", INTERVAL, *arguments, faults=faults)
        return self.primary

    def named(self, name: str) -> Daemon:
        """The process that plays this part now: host, primary or secondary."""
        daemon = {"host": self.guest, "primary": self.primary, "secondary": self.secondary}[name]
        assert daemon is not None, f"no {name} was started"
        return daemon

    def waiting_host(self) -> int:
        """The process that is to become, or became, the host of the activated guest; 0 if there is none."""
        for pid in with_environment(f"CHECKPOINTD_RUN_DIR={self.rig.run_dir}"):
            if "checkpointd.hypervisor.embedded.incoming" in command(pid):
                return pid
        return 0

    def waiting_host_stopped(self) -> int:
        """Wait until that process has stopped itself; it is no child of ours, so only looking tells."""
        until(lambda: state_of(self.waiting_host()) == "T", "a stop of the guest's new host")
        return self.waiting_host()

    # ------------------------------------------------------------ what can be seen

    def hypervisor(self, namespace: str) -> EmbeddedHypervisor:
        return EmbeddedHypervisor(namespace, self.rig.run_dir)

    def hosts(self) -> list[tuple[str, DomainInfo]]:
        """Each living host, of either side."""
        return [
            (namespace, info)
            for namespace in ("primary", "secondary")
            for info in self.hypervisor(namespace).domains()
        ]

    def look(self, namespace: str = "primary") -> toolstack.GuestView:
        return toolstack.look(self.hypervisor(namespace).domains()[0])

    def standby(self) -> dict[str, Any]:
        """What the secondary says of the domain; {} if it knows none."""
        domains = self.rig.status("secondary").get("domains", [])
        return dict(domains[0]) if domains else {}

    def image(self, epoch: int) -> Path:
        assert self.info is not None
        return self._keep / f"{self.info.uuid}.{epoch}.xen"

    def logs(self) -> list[Path]:
        """The input logs that the guest's history consists of, as far as they exist."""
        return [path for path in input_logs(self.rig.run_dir, DOMID) if path.exists()]

    # ------------------------------------------------------------ proofs, empty if all is well

    def prove_replica(self, epoch: int) -> list[str]:
        """The kept image of that epoch is the guest, bit for bit, as it stood when the epoch was taken."""
        return _wrong("replica", prove_image(self.image(epoch), self.logs()[:1]))

    def prove_guest(self, namespace: str) -> list[str]:
        """The guest's memory is what its inputs make it. Leaves it paused."""
        return _wrong("guest", prove_guest(self.rig.run_dir, DOMID, namespace=namespace))

    def prove_answers(self) -> list[str]:
        return unexplained(self.clients.seen, surviving(read_lives(self.logs())))

    def close(self) -> list[str]:
        """End everything; the command lines of processes that had not gone by themselves after GRACE."""
        self.clients.close()
        self.rig.close()
        mark = f"CHECKPOINTD_RUN_DIR={self.rig.run_dir}"
        with suppress(NotSeenError):
            until(lambda: not with_environment(mark), "the end of all", GRACE)
        strays = {pid: command(pid) for pid in with_environment(mark)}
        for pid in strays:
            end(pid)
        return list(strays.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def said(daemon: Daemon, *states: str, since: int = 0) -> bool:
    """Whether the daemon has said, until now, that it was in one of these states."""
    daemon.catch_up()
    return any(word.split()[-1].removeprefix("STATUS=") in states for word in daemon.said[since:])


def outcome(installation: Installation) -> Takeover | None:
    """Wait until the secondary has taken over, or has said that it has nothing to activate (None)."""
    secondary = installation.named("secondary")

    def settled() -> bool:
        standby = installation.standby()
        return standby.get("state") == "active" or (
            standby.get("state") == "syncing"
            and standby["reason"].startswith("the primary is silent")
        )

    try:
        until(settled, "the secondary's decision")
    except NotSeenError as error:
        raise NotSeenError(f"{error}: {installation.standby()}\n{secondary.tail()}") from None
    standby = installation.standby()
    if standby["state"] != "active":
        return None
    return Takeover(int(standby["committed_epoch"]), standby["acked_epoch"])


def _wrong(what: str, verdict: Verdict) -> list[str]:
    return [] if verdict.equal else [f"{what} at step {verdict.step}: {verdict.difference}"]


def wait_ended(daemon: Daemon, code: int) -> list[str]:
    """The daemon ends by itself, with this exit code."""
    found = daemon.wait(PATIENCE)
    return (
        [] if found == code else [f"{daemon.name} ended with {found}, not {code}\n{daemon.tail()}"]
    )


def resume(pid: int) -> None:
    """Let a stopped process go on."""
    end(pid, signal.SIGCONT)
