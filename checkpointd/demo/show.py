"""The demo: protect a guest, talk to it, kill its host in mid-epoch, go on elsewhere, prove it."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from checkpointd.daemon.units import format_duration
from checkpointd.errors import CheckpointdError
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.hypervisor.embedded.kv import Load, UdpTransport

from .proof import Verdict, prove_guest
from .rig import Daemon, Rig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointd.hypervisor.embedded.kv import LoadReport

DOMID = 4
# Clients that each wait for an answer before they ask again: an answer takes an epoch, so this many writes an epoch.
CLIENTS = 12
# The epoch, counted by its parts, in whose middle the host dies: all its pages are on the wire, its end is not.
FATAL_PART = 80
ROW_EVERY = 0.5  # s
AFTERWARDS = 3.0  # s of service on the other side before the proof


class DemoError(CheckpointdError):
    """The demo did not come to its end; the message says where it stopped."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the demo measured. `ok` only if all was proved."""

    ok: bool
    seed: int
    interval_ns: int
    memory_bytes: int
    acked_epoch: int  # the last that the dead primary knew to be acknowledged
    activated_epoch: int
    pause_p50_ns: int | None
    pause_p99_ns: int | None
    sent_bytes: int
    failover_ms: int  # from the kill to the guest running again
    longest_wait_ms: int  # of any client for an answer, the failover in it
    answered: int
    unanswered: int
    violations: list[str]
    proved_step: int
    compared_pages: int
    memory_difference: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    directory: Path, *, interval: int, memory: str, seed: int, say: Callable[[str], None]
) -> Figures:
    """Play it in `directory`; `interval` in ns, `memory` as `guest --memory` takes it. Raises RigError, DemoError."""
    with Rig(directory) as rig:
        say(f"a guest, {memory} of memory with a key-value store; its host is a process of its own")
        guest = rig.guest(DOMID, "--memory", memory, "--listen", f"127.0.0.1:{rig.udp_port()}")
        rig.guest_is_up(guest)
        info = EmbeddedHypervisor("primary", rig.run_dir).find(domid=DOMID)
        say("a secondary and a primary, which talk over encrypted TCP on loopback")
        secondary = rig.secondary().ready()
        primary = rig.primary(
            DOMID,
            "--interval",
            format_duration(interval),
            faults=f"ship.end@{FATAL_PART}=kill-host+kill",
        )
        primary.state("protected")
        say(
            f"protected: an epoch every {format_duration(interval)}; what it sends leaves once the secondary has "
            f"that epoch\n{CLIENTS} clients (--seed {seed}) write to it at udp://{info.config['address']}\n"
        )
        transports = [UdpTransport(str(info.config["address"])) for _ in range(CLIENTS)]
        loads = [Load(transport, seed=seed + n) for n, transport in enumerate(transports)]
        for load in loads:
            load.start()
        try:
            last = _watch(rig, primary, say)
            killed = time.monotonic()
            say(
                "\nin the middle of an epoch, its pages sent and its end not: SIGKILL to the guest's host "
                f"(pid {guest.pid}) and to the primary (pid {primary.pid})"
            )
            _check_killed(guest, primary)
            secondary.state("active")
            failover = time.monotonic() - killed
            standby = rig.status("secondary")["domains"][0]
            say(
                "the secondary heard nothing, found the host gone, stored that it runs the guest from now on (term "
                f"{standby['term']}),\nand runs it from epoch {standby['committed_epoch']}, the last whole one: "
                f"{failover * 1000:.0f} ms after the kill. Its answers are not held there: it is unprotected"
            )
            time.sleep(AFTERWARDS)  # the clients go on; nothing is waited for
        finally:
            reports = [load.stop() for load in loads]
            for transport in transports:
                transport.close()
        verdict = prove_guest(rig.run_dir, DOMID)
        return _judge(
            say, last, standby, reports, verdict, seed, interval, info.ram_pages, failover
        )


def _watch(rig: Rig, primary: Daemon, say: Callable[[str], None]) -> dict[str, Any]:
    """Rows of figures until the primary dies; its last status."""
    say(
        "pause: the guest stands still for an epoch, median and 99 of 100; dirty: pages of the last epoch; "
        "sent: in all;\nlag: epochs taken and not acknowledged\n"
    )
    say(
        f"{'time':>6} {'state':<10} {'epoch':>7} {'pause':>9} {'p99':>9} {'dirty':>6} {'sent':>10} {'lag':>4}"
    )
    began, last = time.monotonic(), rig.status("primary")
    while not primary.ended(ROW_EVERY):
        last = rig.status("primary") or last
        row = (
            f"{time.monotonic() - began:5.1f}s",
            f"{last['state']:<10}",
            f"{last['epoch']:>7}",
            _us(last["pause_p50_ns"]),
            _us(last["pause_p99_ns"]),
            f"{last['dirty_pages']:>6}",
            f"{last['sent_bytes'] / 1e6:>7.1f} MB",
            f"{last['in_flight']:>4}",
        )
        say(" ".join(row))
    return last


def _us(nanoseconds: int | None) -> str:
    return f"{(nanoseconds or 0) / 1000:6.0f} µs"


def _check_killed(*daemons: Daemon) -> None:
    for daemon in daemons:
        if daemon.wait() != -signal.SIGKILL:
            raise DemoError(f"{daemon.name} was to be killed, but ended by itself\n{daemon.tail()}")


def _judge(
    say: Callable[[str], None],
    last: dict[str, Any],
    standby: dict[str, Any],
    reports: list[LoadReport],
    verdict: Verdict,
    seed: int,
    interval: int,
    ram_pages: int,
    failover: float,
) -> Figures:
    violations = [text for report in reports for text in report.violations]
    answered = sum(report.answered for report in reports)
    silent = sum(report.silent for report in reports)
    longest = max(report.longest_wait for report in reports)
    # The status was read up to a row's time before the kill, so epochs may have been acked since, and none fewer.
    epochs_fit = last["acked_epoch"] <= standby["committed_epoch"]
    ok = verdict.equal and not violations and epochs_fit and answered > 0
    say(
        f"\nmemory   all {verdict.pages} pages of the guest, after {verdict.step} steps: "
        + (
            "equal, bit for bit, to a replay of its input log from the start"
            if verdict.equal
            else verdict.difference
        )
    )
    say(
        f"clients  {answered} requests answered, {silent} never; longest wait, with the failover in it, "
        f"{longest * 1000:.0f} ms;\n         "
        + (
            f"{len(violations)} VIOLATIONS: {violations[0]}"
            if violations
            else "no answered write vanished, no counter went back"
            if answered
            else "no client got an answer"
        )
    )
    if not epochs_fit:
        say(
            f"epochs   epoch {last['acked_epoch']} was acknowledged, and the guest runs from epoch "
            f"{standby['committed_epoch']}"
        )
    say(
        "\nNothing was lost."
        if ok
        else f"\nFAILED. The same clients again: --seed {seed} (and --keep, for the logs)"
    )
    return Figures(
        ok=ok,
        seed=seed,
        interval_ns=interval,
        memory_bytes=ram_pages * 4096,
        acked_epoch=last["acked_epoch"],
        activated_epoch=standby["committed_epoch"],
        pause_p50_ns=last["pause_p50_ns"],
        pause_p99_ns=last["pause_p99_ns"],
        sent_bytes=last["sent_bytes"],
        failover_ms=round(failover * 1000),
        longest_wait_ms=round(longest * 1000),
        answered=answered,
        unanswered=silent,
        violations=violations,
        proved_step=verdict.step,
        compared_pages=verdict.pages,
        memory_difference=verdict.difference,
    )
