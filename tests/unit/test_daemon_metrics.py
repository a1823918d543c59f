from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import generate_latest

from checkpointd.daemon.metrics import FAILOVER_REASONS, PrimaryMetrics, SecondaryMetrics
from checkpointd.output.port import OutputStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

STATES = ("connecting", "protected")


def values(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample by its name with labels, as a scrape shows them."""
    found = {}
    for line in generate_latest(registry).decode().splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def outcome(**fields: int) -> Any:
    """A native Outcome: the fields that metrics read, all 0 but those given."""
    names = "suspend harvest stage context audit output resume pause"
    empty = {f"{name}_ns": 0 for name in names.split()}
    counts = dict.fromkeys(("status", "pages", "zeros", "gone", "known", "dirty"), 0)
    return SimpleNamespace(**{**empty, **counts, **fields})


@pytest.fixture
def primary() -> PrimaryMetrics:
    return PrimaryMetrics("kv", STATES)


def test_every_series_is_there_from_the_start(primary: PrimaryMetrics) -> None:
    before = set(values(primary.registry))
    primary.paused(outcome(status=1, pause_ns=1, suspend_ns=1, dirty=3))
    primary.live_round(outcome(pages=1))
    primary.failed()
    primary.abandoned()
    primary.acked(1, 1)
    primary.committed(1, 1)
    primary.shipped(1)
    primary.alarm()
    primary.state("protected")
    primary.heartbeat_rtt(1)
    assert set(values(primary.registry)) == before


def test_every_series_of_a_standby_is_there_from_the_start() -> None:
    metrics = SecondaryMetrics(STATES)
    standby = metrics.domain("kv")
    before = set(values(metrics.registry))
    for reason in FAILOVER_REASONS:
        standby.failover(reason)
    standby.fence_attempt(True)
    standby.fence_attempt(False)
    standby.committed(5_000_000)
    standby.discarded()
    standby.audited(16, 1)
    standby.state("protected")
    metrics.strangers_denied(3)
    metrics.bad_frame()
    assert set(values(metrics.registry)) == before


def test_a_pause_in_numbers(primary: PrimaryMetrics) -> None:
    primary.paused(
        outcome(
            pause_ns=3_000_000, stage_ns=2_000_000, dirty=70, pages=60, zeros=7, gone=1, known=2
        )
    )
    found = values(primary.registry)
    assert found['checkpointd_epoch_pause_seconds_sum{domain="kv"}'] == pytest.approx(0.003)
    assert found['checkpointd_epoch_pause_seconds_bucket{domain="kv",le="0.0025"}'] == 0
    assert found['checkpointd_epoch_pause_seconds_bucket{domain="kv",le="0.005"}'] == 1
    assert found['checkpointd_epoch_stage_seconds_count{domain="kv"}'] == 1
    assert found['checkpointd_epoch_audit_seconds_count{domain="kv"}'] == 0  # did not take place
    assert found['checkpointd_dirty_pages_total{domain="kv"}'] == 70
    for kind, count in {"data": 60, "zero": 7, "gone": 1, "known": 2}.items():
        assert found[f'checkpointd_staged_pages_total{{domain="kv",kind="{kind}"}}'] == count


def test_an_epoch_too_large_is_told_apart(primary: PrimaryMetrics) -> None:
    primary.paused(outcome(status=1, pause_ns=1000))
    primary.paused(outcome(status=-110))
    found = values(primary.registry)
    assert found['checkpointd_epochs_total{domain="kv",result="too-large"}'] == 1
    assert found['checkpointd_epoch_pause_seconds_count{domain="kv"}'] == 1


def test_totals_kept_elsewhere_are_followed_also_when_they_begin_anew(
    primary: PrimaryMetrics,
) -> None:
    name = 'checkpointd_mappings_total{domain="kv",event="hits"}'
    for hits, total in ((5, 5), (9, 9), (2, 11)):  # the third engine's cache began at 0
        primary.mappings(
            SimpleNamespace(hits=hits, misses=0, evicted=0, invalidated=0, mapped_bytes=1 << 21)  # type: ignore[arg-type]  # only these are read
        )
        assert values(primary.registry)[name] == total


def test_output_is_shown(primary: PrimaryMetrics) -> None:
    primary.output(OutputStats(3, 300, 1000, 2, 40, shut=True))
    found = values(primary.registry)
    assert found['checkpointd_output_held_packets{domain="kv"}'] == 3
    assert found['checkpointd_output_dropped_packets_total{domain="kv"}'] == 2
    assert found['checkpointd_output_shut{domain="kv"}'] == 1


def test_lost_log_records_are_shown(primary: PrimaryMetrics) -> None:
    primary.follow_logs(lambda: 12)
    assert values(primary.registry)["checkpointd_log_records_lost"] == 12


def test_the_state_is_one_of_all(primary: PrimaryMetrics) -> None:
    primary.state("protected")
    found = values(primary.registry)
    assert found['checkpointd_state{checkpointd_state="protected",domain="kv"}'] == 1
    assert found['checkpointd_state{checkpointd_state="connecting",domain="kv"}'] == 0


def test_names_keep_to_the_conventions(primary: PrimaryMetrics) -> None:
    secondary = SecondaryMetrics(STATES)
    secondary.domain("kv")
    for registry in (primary.registry, secondary.registry):
        for family in registry.collect():
            if family.name.startswith("process_"):
                continue  # prometheus_client's own
            assert re.fullmatch(r"checkpointd_[a-z_]+", family.name)
            assert family.documentation.endswith("."), family.name
            units = {"histogram": ("_seconds", "_pages")}
            assert family.name.endswith(units.get(family.type, ("",))), family.name
            for sample in family.samples:
                allowed = {"domain", "kind", "result", "event", "reason", "le", "version", "role"}
                assert set(sample.labels) <= allowed | {"checkpointd_state"}


def test_the_same_name_means_the_same_on_both_sides(primary: PrimaryMetrics) -> None:
    secondary = SecondaryMetrics(STATES)
    ours = {family.name: family.type for family in primary.registry.collect()}
    for family in secondary.registry.collect():
        assert ours.get(family.name, family.type) == family.type


def test_two_daemons_in_one_process_do_not_meet() -> None:
    first, second = PrimaryMetrics("a", STATES), PrimaryMetrics("a", STATES)
    first.alarm()
    assert values(second.registry)['checkpointd_alarms_total{domain="a"}'] == 0


def test_counting_from_many_threads_loses_nothing(primary: PrimaryMetrics) -> None:
    def count() -> None:
        for _ in range(500):
            primary.sent_bytes(4, 3)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values(primary.registry)['checkpointd_sent_bytes_total{domain="kv"}'] == 6000
