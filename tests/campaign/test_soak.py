"""Thousands of epochs of two guests: memory, descriptors and threads of every process stay flat."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import pytest
from report import commit, machine, write_section
from vitals import Vitals, status_of, vitals

from checkpointd.demo.rig import Daemon, Rig
from checkpointd.hypervisor.embedded.kv import Load, UdpTransport

if TYPE_CHECKING:
    from pathlib import Path

KV, DIRTY = 4, 5  # domids
INTERVAL_MS = 20
CLIENTS = 4  # of the kv guest; each waits for its answer, which takes an epoch
SEED = 20141
SAMPLE_EVERY = 0.25  # s; seen from outside, so nothing tells when to look
PATIENCE = 60.0  # s for a first copy, or for as many epochs as there are in one
# Before this share of the run queues, arenas and allocators have not reached their size yet.
WARM_UP = 0.3
# Between the middle and the end of a run; a leak of 600 octets an epoch would show in the long run.
GROWTH_MAX_KIB = 2048


class Watch:
    """Samples of some processes over a run."""

    def __init__(self, daemons: list[Daemon]) -> None:
        self.daemons = daemons
        self.samples: dict[str, list[Vitals]] = {daemon.name: [] for daemon in daemons}

    def sample(self) -> None:
        for daemon in self.daemons:
            assert daemon.process.poll() is None, f"{daemon.name} has ended\n{daemon.tail()}"
            self.samples[daemon.name].append(vitals(daemon.pid))

    def growth(self, name: str) -> Vitals:
        """From the first half of what comes after the warm-up to its second half, by medians."""
        samples = self.samples[name]
        warm = samples[int(len(samples) * WARM_UP) :]
        halves = warm[: len(warm) // 2], warm[len(warm) // 2 :]
        return Vitals(*(
            round(statistics.median(part[1]) - statistics.median(part[0]))
            for part in (
                [[getattr(sample, field) for sample in half] for half in halves]
                for field in ("rss_kib", "own_kib", "descriptors", "threads")
            )
        ))  # fmt: skip


@pytest.mark.parametrize(
    "epochs", [200, pytest.param(10_000, marks=pytest.mark.campaign)], ids=["short", "long"]
)
def test_soak(tmp_path: Path, epochs: int) -> None:
    with Rig(tmp_path) as rig:
        kv = rig.guest(KV, "--memory", "16MiB", "--listen", f"127.0.0.1:{rig.udp_port()}")
        dirty = rig.guest(
            DIRTY, "--memory", "32MiB", "--program", "dirty:300@20",
            "--listen", f"127.0.0.1:{rig.udp_port()}",
        )  # fmt: skip
        rig.guest_is_up(kv)
        rig.guest_is_up(dirty)
        secondary = rig.secondary().ready()
        primaries = [rig.primary(domid, "--interval", f"{INTERVAL_MS}ms") for domid in (KV, DIRTY)]
        for primary in primaries:
            primary.state("protected")
        address = next(word for word in kv.log.read_text().split() if word.startswith("127."))
        transports = [UdpTransport(address.rstrip(",")) for _ in range(CLIENTS)]
        loads = [Load(transport, seed=SEED + n) for n, transport in enumerate(transports)]
        for load in loads:
            load.start()
        watch = Watch([kv, dirty, secondary, *primaries])
        began = time.monotonic()
        try:
            first = [status_of(rig, primary)["acked_epoch"] for primary in primaries]
            done = [0] * len(primaries)
            while min(done) < epochs:
                waited = time.monotonic() - began
                assert waited < PATIENCE + epochs * INTERVAL_MS / 1000 * 5, f"only {done} epochs"
                time.sleep(SAMPLE_EVERY)
                watch.sample()
                statuses = [status_of(rig, primary) for primary in primaries]
                done = [
                    status["acked_epoch"] - start
                    for status, start in zip(statuses, first, strict=True)
                ]
            seconds = time.monotonic() - began
        finally:
            reports = [load.stop() for load in loads]
            for transport in transports:
                transport.close()
        assert not [text for report in reports for text in report.violations]
        answered = sum(report.answered for report in reports)
        assert answered > 0
        long = epochs >= 10_000
        if long:
            write_section("soak", _report(watch, done, seconds, answered))
        for name in watch.samples:
            growth = watch.growth(name)
            assert growth.own_kib <= GROWTH_MAX_KIB, f"{name}: {growth}"
            if long:  # by then the audit has touched each page of the replicas
                assert growth.rss_kib <= GROWTH_MAX_KIB, f"{name}: {growth}"
            assert growth.descriptors <= 0, f"{name}: {growth}"
            assert growth.threads <= 0, f"{name}: {growth}"


def _report(watch: Watch, done: list[int], seconds: float, answered: int) -> str:
    rows = []
    for name, samples in watch.samples.items():
        growth = watch.growth(name)
        start, end = samples[int(len(samples) * WARM_UP)], samples[-1]
        rows.append(
            f"| {name} | {start.rss_kib} | {end.rss_kib} | {growth.rss_kib:+d} "
            f"| {end.own_kib} | {growth.own_kib:+d} "
            f"| {start.descriptors} | {max(s.descriptors for s in samples)} | {end.descriptors} "
            f"| {start.threads} | {end.threads} |\n"
        )
    return (
        f"Commit {commit()}; {machine()}; seed {SEED}.\n\n"
        f"Two guests, kv with {CLIENTS} busy clients and `dirty:300@20`, {done[0]} and {done[1]} epochs of "
        f"{INTERVAL_MS} ms in {seconds:.0f} s; {answered} requests answered, no violation.\n"
        f"After a warm-up of {WARM_UP:.0%} of the run; growth is that of the median from the first half of "
        f"the rest to the second.\n\n"
        "| process | RSS then, KiB | at the end | growth | anonymous of it | growth "
        "| descriptors then | most | at the end | threads then | at the end |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n" + "".join(rows) + "\n"
        "Anonymous memory after each tenth of the run, KiB: a leak climbs, a queue that was once long is a step.\n\n"
        + "".join(
            f"- {name}: {', '.join(str(sample.own_kib) for sample in _tenths(samples))}\n"
            for name, samples in watch.samples.items()
        )
    )


def _tenths(samples: list[Vitals]) -> list[Vitals]:
    return [samples[len(samples) * tenth // 10 - 1] for tenth in range(1, 11)]
