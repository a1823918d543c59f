"""A guest of the lab under protection: host a has it, host b stands by."""

from __future__ import annotations

import json
import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lab import daemons
from lab.console import TICK_LIMIT, Console
from lab.places import LabError

from checkpointd.daemon.config import PRIMARY_METRICS_BASE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from lab.console import Follower
    from lab.daemons import Daemon
    from lab.guests import Guest
    from lab.machine import Machine

# s; protection of 160 MiB begins within 20 s on two idle cores. CI has two busy ones.
PROTECT_LIMIT = 900.0
# s from the loss of the primary to the guest's next tick; 5 s on two idle cores.
FAILOVER_LIMIT = 300.0
# Of the secondary's silence: in software emulation a host may stand still for seconds.
SILENCE = "5s"
# The same for the primary, which else would begin anew again and again with a secondary that is merely slow.
PATIENT = (
    "--standby-timeout", "10s", "--ack-timeout", "60s", "--suspend-timeout", "30s", "--give-up-after", "10m",
)  # fmt: skip
EPOCH_MEMORY = "256MiB"  # dom0 has 1 GiB, for the replica too
# s; a secondary that wanted to act would have: several times its silence, and a fence.
NEVER = 30.0
STATUS_EVERY = (
    3.0  # s between two looks at `status`, inside dom0: each takes a second from who is looked at
)


@dataclass(frozen=True, slots=True)
class Living:
    """A guest that runs."""

    guest: Guest
    host: Machine
    domid: int
    uuid: str
    console: Console


class Rig:
    """Ends all that it started; what it does not find again, `daemons.clear` does."""

    def __init__(self, a: Machine, b: Machine) -> None:
        self.a, self.b = a, b
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def console(self, host: Machine, name: str) -> Console:
        return self._open.enter_context(Console(host, name))

    def follow(self, daemon: Daemon) -> Follower:
        return self._open.enter_context(daemon.follow())

    def create(self, guest: Guest, *, ticks: int = 2) -> Living:
        """Runs on host a, and has checked its memory `ticks` times."""
        path = f"/root/{guest.name}.test.cfg"
        self.a.ssh(f"printf %s {shlex.quote(guest.config())} > {path} && xl create -q {path}")
        console = self.console(self.a, guest.name)
        console.wait_ticks(ticks, TICK_LIMIT)
        return self.living(self.a, guest, console)

    def living(self, host: Machine, guest: Guest, console: Console) -> Living:
        """As it lives there now: a reboot gives it another domid."""
        domid = int(host.ssh(f"xl domid {guest.name}").out)
        return Living(guest, host, domid, self.uuid(host, guest.name), console)

    def uuid(self, host: Machine, name: str) -> str:
        return host.ssh(f"xl list -v {shlex.quote(name)}").out.splitlines()[1].split()[6]

    def secondary(
        self, *words: str, environment: Mapping[str, str] | None = None, name: str = "secondary"
    ) -> Daemon:
        """On host b, with the lab's fence."""
        return daemons.start(
            self.b, name, "secondary", "--listen", self.b.address, "--silence", SILENCE, "--fence-timeout", "60s",
            "--fence-command", "lab-fence", "--epoch-memory", EPOCH_MEMORY, *words, environment=environment,
        )  # fmt: skip

    def primary(
        self, living: Living, *words: str, interval: str = "500ms", environment: Mapping[str, str] | None = None,
        name: str = "primary",
    ) -> Daemon:  # fmt: skip
        unsafe = [*(["--unsafe-output"] if living.guest.network else [])]
        return daemons.start(
            self.a, name, "primary", "--domid", str(living.domid), "--secondary", self.b.address,
            "--interval", interval, *PATIENT, *unsafe, *words, environment=environment,
        )  # fmt: skip

    def protected(
        self, living: Living, daemon: Daemon, *, epochs: int = 3, limit: float = PROTECT_LIMIT
    ) -> dict[str, Any]:
        """The primary's /status once it protects and has had epoch `epochs` acked; LabError if its daemon ends."""
        # Asked inside dom0, by one process: in software emulation a new one for each look would cost seconds.
        script = _WAIT_PROTECTED.format(
            epochs=epochs, limit=limit, every=STATUS_EVERY, pid=daemon.pid,
            port=PRIMARY_METRICS_BASE + living.domid,
        )  # fmt: skip
        result = self.a.ssh(f"python3 -c {shlex.quote(script)}", timeout=limit + 120, check=False)
        if result.code:
            raise LabError(f"not protected: {result.out}{result.err}\n{daemon.said()[-4000:]}")
        document: dict[str, Any] = json.loads(result.out)
        return document

    def runs_on_a(self, living: Living) -> None:
        """It ticks from now on, more than once: that is not merely what a buffer still held."""
        living.console.wait_ticks(3, after=time.monotonic())
        assert "s" not in self.state(self.a, living.guest.name), "suspended"

    def not_started_on_b(self, living: Living) -> None:
        """Nothing of that name ticks on host b for NEVER seconds, and what is there at the end is paused."""
        there = self.console(self.b, living.guest.name)
        try:
            there.wait(lambda _: bool(there.ticks), NEVER, "a tick")
        except LabError:
            pass
        else:
            raise AssertionError(f"it runs on host b:\n{there.text}")
        for name in (living.guest.name, f"{living.guest.name}--incoming"):
            state = self.state(self.b, name)
            assert not state or "p" in state, f"{name} on host b is {state}"

    def domain(self, host: Machine, role: str) -> dict[str, Any]:
        """What the only daemon of this role on `host` says of its only domain."""
        (daemon,) = (d for d in daemons.status(host)["daemons"] if d["role"] == role)
        (domain,) = daemon["domains"]
        return dict(domain)

    def state(self, host: Machine, name: str) -> str:
        """xl's letters, such as "-b----"; "" if there is no such domain."""
        listed = host.ssh(f"xl list {shlex.quote(name)} 2>/dev/null", check=False).out.splitlines()
        return listed[1].split()[4] if len(listed) > 1 else ""


_WAIT_PROTECTED = """
import json, os, sys, time, urllib.request
deadline = time.monotonic() + {limit}
said = None
while time.monotonic() < deadline:
    if not os.path.exists("/proc/{pid}"):
        sys.exit("the daemon has ended")
    try:
        said = json.load(urllib.request.urlopen("http://127.0.0.1:{port}/status", timeout=10))
        if said["state"] == "protected" and (said["acked_epoch"] or 0) >= {epochs}:
            print(json.dumps(said))
            sys.exit(0)
    except OSError as error:
        said = error
    time.sleep({every})
sys.exit(f"after {limit} s: {{said}}")
"""
