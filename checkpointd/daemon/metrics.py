"""What a daemon tells Prometheus. One registry a daemon; every series is there from the start.

Names: prefix checkpointd_, base units, _total for counters; the label `domain` is the guest's name.
Epoch numbers and pfns are never labels. At ten epochs a second and a scrape every 15 s only
counters and histograms tell the truth; a gauge shows one moment of a hundred and fifty.
"""

# StandbyMetrics is the other half of SecondaryMetrics and reads its fields:
# ruff: noqa: SLF001

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
)

from checkpointd import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from checkpointd.native import MappingStats, Outcome
    from checkpointd.output.port import OutputStats

NS = 1e9  # nanoseconds in a second

# Seconds. The parts of a pause take tens of microseconds, a whole one 0.5 ms to 1 s; steps of 2 to
# 2.5 keep the error of a quantile below that, and prometheus_client's own buckets begin only at 5
# ms.
SECONDS = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4),
    *(5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5),
)
PAGES = tuple(4.0**power for power in range(11))  # 1 page to 4 GiB of them

PHASES = ("suspend", "harvest", "stage", "context", "audit", "output", "resume")
EPOCH_RESULTS = ("acked", "failed", "too-large", "abandoned")
FAILOVER_REASONS = ("silence", "engine-lost", "asked")
FENCE_RESULTS = ("fenced", "failed")
MAPPING_EVENTS = ("hits", "misses", "evicted", "invalidated")
PAGE_KINDS = ("data", "zero", "gone", "known")

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)


class _Follow:
    """A counter that follows a total kept elsewhere. A total that fell began anew."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._seen = 0

    def set(self, total: int) -> None:
        self._counter.inc(total - self._seen if total >= self._seen else total)
        self._seen = total


class _Base:
    """The registry, and what both roles have in it."""

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, descriptors, CPU of this process
        info = Info("checkpointd_build", "Version of this daemon.", registry=self.registry)
        info.info({"version": __version__, "role": role})
        self._logs_lost = Gauge(
            "checkpointd_log_records_lost",
            "Log records lost since the start because stderr was blocked.",
            registry=self.registry,
        )

    def follow_logs(self, lost: Callable[[], int]) -> None:
        """`lost` tells how many records were lost so far; it is called at each scrape."""
        self._logs_lost.set_function(lost)

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(
            f"checkpointd_{name}_seconds", text, labels, buckets=SECONDS, registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"checkpointd_{name}_total", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"checkpointd_{name}", text, labels, registry=self.registry)

    def _state(self, states: Sequence[str]) -> Enum:
        return Enum(
            "checkpointd_state",
            "State of the domain's protection.",
            ["domain"],
            states=list(states),
            registry=self.registry,
        )


def _each(metric: MetricT, domain: str, values: Sequence[str]) -> dict[str, MetricT]:
    """A child of `metric` for every value of its second label, made at once so that none is
    missing.
    """
    return {value: metric.labels(domain, value) for value in values}


class PrimaryMetrics(_Base):
    """One domain's engine. Methods may be called from any thread; none is called in the pause."""

    def __init__(self, domain: str, states: Sequence[str]) -> None:
        super().__init__("primary")
        of, d = ("domain",), domain
        self._phases = {
            phase: self._seconds(f"epoch_{phase}", f"Part of an epoch: {phase}.", *of).labels(d)
            for phase in PHASES
        }
        self._pause = self._seconds(
            "epoch_pause", "From the guest stopped to the guest running.", *of
        ).labels(d)
        self._ship = self._seconds("epoch_ship", "Sending an epoch's frames.", *of).labels(d)
        self._ack = self._seconds("epoch_ack", "From an epoch staged to its ack.", *of).labels(d)
        self._commit = self._seconds(
            "epoch_commit", "Committing an epoch, as the secondary reports it.", *of
        ).labels(d)
        self._heartbeat_rtt = self._seconds(
            "heartbeat_rtt", "Round trip of a heartbeat.", *of
        ).labels(d)
        self._dirty = Histogram(
            "checkpointd_epoch_dirty_pages",
            "Dirty pages found in an epoch.",
            of,
            buckets=PAGES,
            registry=self.registry,
        ).labels(d)
        self._dirty_total = self._counter("dirty_pages", "Dirty pages found.", *of).labels(d)
        self._pages = _each(
            self._counter(
                "staged_pages",
                "Pages staged, by what is sent of them: data, only that it is zero or gone, "
                "or nothing since the secondary has it (known).",
                "domain",
                "kind",
            ),
            d,
            PAGE_KINDS,
        )
        self._sent = self._counter("sent_bytes", "Octets of epochs sent.", *of).labels(d)
        self._unreduced = self._counter(
            "unreduced_bytes", "Octets that those sent stand for: before they were reduced.", *of
        ).labels(d)
        self._rounds = self._counter("live_rounds", "Copies with the guest running.", *of).labels(d)
        self._epochs = _each(
            self._counter("epochs", "Epochs, by how they ended.", "domain", "result"),
            d,
            EPOCH_RESULTS,
        )
        self._mappings = {
            event: _Follow(counter)
            for event, counter in _each(
                self._counter("mappings", "Uses of the mapping cache.", "domain", "event"),
                d,
                MAPPING_EVENTS,
            ).items()
        }
        self._mapped = self._gauge("mapped_bytes", "Guest memory kept mapped.", *of).labels(d)
        self._held_packets = self._gauge(
            "output_held_packets", "Packets held until their epoch is acked.", *of
        ).labels(d)
        self._held_bytes = self._gauge("output_held_bytes", "Octets of them.", *of).labels(d)
        self._held_limit = self._gauge("output_limit_bytes", "Octets that fit.", *of).labels(d)
        self._shut = self._gauge("output_shut", "1: output is held until acked.", *of).labels(d)
        self._dropped = _Follow(
            self._counter("output_dropped_packets", "Packets over the limit.", *of).labels(d)
        )
        self._released = _Follow(
            self._counter("output_released_packets", "Packets let out.", *of).labels(d)
        )
        self._lag = self._gauge("lag_epochs", "Epochs staged and not committed.", *of).labels(d)
        self._committed = self._gauge(
            "last_committed_timestamp_seconds", "When the last epoch was committed.", *of
        ).labels(d)
        self._peer = self._gauge("peer_connected", "1: the secondary is heard.", *of).labels(d)
        self._alarms = self._counter("alarms", "Alarms raised; the log says which.", *of).labels(d)
        self._states = self._state(states).labels(d)

    def paused(self, outcome: Outcome) -> None:
        """An epoch's pause is over, well or not."""
        times = {phase: getattr(outcome, f"{phase}_ns") for phase in PHASES}
        for phase, nanoseconds in times.items():
            if nanoseconds:  # 0: it was not reached
                self._phases[phase].observe(nanoseconds / NS)
        if outcome.pause_ns:
            self._pause.observe(outcome.pause_ns / NS)
            self._dirty.observe(outcome.dirty)
        if outcome.status > 0:  # the dirty set does not fit an arena
            self._epochs["too-large"].inc()
        self._staged(outcome)

    def live_round(self, outcome: Outcome) -> None:
        self._rounds.inc()
        self._staged(outcome)

    def _staged(self, outcome: Outcome) -> None:
        self._dirty_total.inc(outcome.dirty)
        self._pages["data"].inc(outcome.pages)
        self._pages["zero"].inc(outcome.zeros)
        self._pages["gone"].inc(outcome.gone)
        self._pages["known"].inc(outcome.known)

    def failed(self) -> None:
        """A pause or live round failed; its pages stay dirty."""
        self._epochs["failed"].inc()

    def abandoned(self) -> None:
        """A staged epoch will never be acked: its session is gone."""
        self._epochs["abandoned"].inc()

    def sent_bytes(self, staged: int, octets: int) -> None:
        """`octets` went out for the `staged` ones."""
        self._unreduced.inc(staged)
        self._sent.inc(octets)

    def shipped(self, nanoseconds: int) -> None:
        self._ship.observe(nanoseconds / NS)

    def acked(self, epoch: int, nanoseconds: int) -> None:
        """`nanoseconds` from staged to acked. An epoch's number is no label: there is no end of
        them.
        """
        self._epochs["acked"].inc()
        self._ack.observe(nanoseconds / NS)

    def committed(self, epoch: int, nanoseconds: int) -> None:
        """As the secondary reports it."""
        self._commit.observe(nanoseconds / NS)
        self._committed.set(time.time())

    def lag(self, epochs: int) -> None:
        self._lag.set(epochs)

    def state(self, state: str) -> None:
        self._states.state(state)

    def alarm(self) -> None:
        self._alarms.inc()

    def peer_connected(self, connected: bool) -> None:
        self._peer.set(connected)

    def heartbeat_rtt(self, nanoseconds: int) -> None:
        self._heartbeat_rtt.observe(nanoseconds / NS)

    def mappings(self, stats: MappingStats) -> None:
        for event, counter in self._mappings.items():
            counter.set(getattr(stats, event))
        self._mapped.set(stats.mapped_bytes)

    def output(self, stats: OutputStats) -> None:
        self._held_packets.set(stats.held_packets)
        self._held_bytes.set(stats.held_bytes)
        self._held_limit.set(stats.limit_bytes)
        self._shut.set(stats.shut)
        self._dropped.set(stats.dropped_packets)
        self._released.set(stats.released_packets)


class SecondaryMetrics(_Base):
    """The standby of any number of domains; domain() gives what belongs to one."""

    def __init__(self, states: Sequence[str]) -> None:
        super().__init__("secondary")
        of = ("domain",)
        self._strangers = _Follow(
            self._counter("strangers_denied", "Connections without a key we trust.")
        )
        self._bad_frames = self._counter("bad_frames", "Frames that broke the protocol.")
        self._epoch_memory = self._gauge("epoch_memory_bytes", "Octets of epochs arriving.")
        self._received = self._counter("received_bytes", "Octets of epochs received.", *of)
        self._epochs = self._counter("epochs", "Epochs, by how they ended.", "domain", "result")
        self._commit = self._seconds("epoch_commit", "Committing an epoch.", *of)
        self._lag = self._gauge("lag_epochs", "Epochs acked and not committed.", *of)
        self._committed = self._gauge(
            "last_committed_timestamp_seconds", "When the last epoch was committed.", *of
        )
        self._replica = self._gauge("replica_bytes", "Octets that the replica takes.", *of)
        self._audited = self._counter("audit_pages", "Pages compared after a commit.", *of)
        self._mismatches = self._counter(
            "audit_mismatches", "Pages that differed: missed dirt.", *of
        )
        self._peer = self._gauge("peer_connected", "1: the primary is heard.", *of)
        self._failovers = self._counter("failovers", "Guests activated.", "domain", "reason")
        self._fences = self._counter("fence_attempts", "Attempts to fence.", "domain", "result")
        self._not_held = self._counter(
            "reduced_parts_refused",
            "Parts whose changes did not fit what is held, and were asked for as they are.",
            *of,
        )
        self._alarms = self._counter("alarms", "Alarms raised; the log says which.", *of)
        self._states = self._state(states)

    def strangers_denied(self, total: int) -> None:
        """How many there were since the start, as the authenticator counts them."""
        self._strangers.set(total)

    def bad_frame(self) -> None:
        self._bad_frames.inc()

    def epoch_memory(self, octets: int) -> None:
        self._epoch_memory.set(octets)

    def domain(self, name: str) -> StandbyMetrics:
        """The series of one domain, all there from now on."""
        return StandbyMetrics(self, name)


class StandbyMetrics:
    """One domain's standby, as SecondaryMetrics.domain() makes it."""

    RESULTS = ("committed", "discarded")

    def __init__(self, of: SecondaryMetrics, domain: str) -> None:
        self._received = of._received.labels(domain)
        self._epochs = _each(of._epochs, domain, self.RESULTS)
        self._commit = of._commit.labels(domain)
        self._lag = of._lag.labels(domain)
        self._committed = of._committed.labels(domain)
        self._replica = of._replica.labels(domain)
        self._audited = of._audited.labels(domain)
        self._mismatches = of._mismatches.labels(domain)
        self._peer = of._peer.labels(domain)
        self._failovers = _each(of._failovers, domain, FAILOVER_REASONS)
        self._fences = _each(of._fences, domain, FENCE_RESULTS)
        self._not_held = of._not_held.labels(domain)
        self._alarms = of._alarms.labels(domain)
        self._states = of._states.labels(domain)

    def received(self, octets: int) -> None:
        self._received.inc(octets)

    def committed(self, nanoseconds: int) -> None:
        """An epoch is the replica now; its commit took so long."""
        self._epochs["committed"].inc()
        self._commit.observe(nanoseconds / NS)
        self._committed.set(time.time())

    def discarded(self) -> None:
        """An epoch that was never whole is gone."""
        self._epochs["discarded"].inc()

    def not_held(self) -> None:
        """A part that came reduced did not fit what is held."""
        self._not_held.inc()

    def lag(self, epochs: int) -> None:
        self._lag.set(epochs)

    def replica_bytes(self, octets: int) -> None:
        self._replica.set(octets)

    def audited(self, pages: int, mismatches: int) -> None:
        self._audited.inc(pages)
        self._mismatches.inc(mismatches)

    def peer_connected(self, connected: bool) -> None:
        self._peer.set(connected)

    def failover(self, reason: str) -> None:
        """`reason` is one of FAILOVER_REASONS."""
        self._failovers[reason].inc()

    def fence_attempt(self, fenced: bool) -> None:
        self._fences["fenced" if fenced else "failed"].inc()

    def alarm(self) -> None:
        self._alarms.inc()

    def state(self, state: str) -> None:
        self._states.state(state)
