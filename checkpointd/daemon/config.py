"""The options of both roles: one table each, read by checkpointd.daemon.settings.

Durations are integer nanoseconds, sizes integer octets. Bounds keep a slip of the pen (``5s`` for
``5ms``) from becoming an outage; they are no promise that every value between them is wise.
"""
# setting() makes a dataclasses.field, which ruff cannot see:
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from checkpointd.daemon import paths
from checkpointd.daemon.settings import (
    Endpoint,
    Listen,
    address,
    choice,
    command,
    directory,
    duration,
    duration_or_auto,
    endpoint,
    integer,
    name_of,
    percentage,
    setting,
    size,
    switch,
    text_value,
    uuid_value,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTROL_PORT = 10946
BULK_PORT = 10947
SECONDARY_METRICS_PORT = 10949
PRIMARY_METRICS_BASE = 11000  # + domid: a port that stays, so that a scrape's instance label stays
LAST_DOMID = 0x7FEF  # DOMID_FIRST_RESERVED - 1 (xen/include/public/xen.h)

# A peer is lost when so many heartbeats in a row stay out: one alone is the scheduler's hiccup.
HEARTBEATS_MISSED = 3

_NAMESPACE = text_value(
    "NAME",
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}",
    "a name of at most 32 letters, digits, '.', '_' or '-'",
)
_HERE = "127.0.0.1"  # where a secondary is that nobody named
_HOST = text_value("HOST", r"[^\s\[\]/]{1,253}", "a host name or address")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """What both daemons take."""

    hypervisor: str = setting(
        choice("auto", "embedded", "xen"), "auto", "auto: Xen where there is one, else embedded"
    )
    unsafe_untested_xen: bool = setting(
        switch(), "no", "run on a version of Xen that no test of this release has run on"
    )
    no_metrics: bool = setting(switch(), "no", "serve no metrics, health or status by HTTP")
    state_dir: Path = setting(
        directory(), paths.state_dir, "keys, and who may run each guest: what must survive a reboot"
    )
    run_dir: Path = setting(directory(), paths.run_dir, "sockets and the list of running daemons")
    log_level: str = setting(
        choice("debug", "info", "warning", "error"), "info", "how much is said on stderr"
    )
    log_format: str = setting(choice("text", "json"), "text", "lines for people or for programs")
    config: Path | None = setting(
        directory(), "", "TOML file with these options in [primary] and [secondary]"
    )

    @property
    def unsafe(self) -> list[str]:
        """The unsafe options in force; status shows them as long as the daemon lives."""
        names = (name for name in self.__dataclass_fields__ if name.startswith("unsafe_"))
        return [f"--{name_of(name)}" for name in names if getattr(self, name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryOptions(CommonOptions):
    """The engine's options: one process protects one domain."""

    role: ClassVar[str] = "primary"

    domid: int | None = setting(
        integer(0, LAST_DOMID, "DOMID"), "", "the guest, by its domain id here"
    )
    uuid: str | None = setting(uuid_value(), "", "the guest, by its UUID")
    namespace: str = setting(
        _NAMESPACE,
        "primary",
        "where embedded guests are looked for: what `checkpointd guest --namespace` says",
    )
    secondary: Endpoint = setting(
        endpoint(CONTROL_PORT, BULK_PORT), _HERE, "the secondary that keeps the replica"
    )
    to: Path | None = setting(
        directory(),
        "",
        "record epochs to this new file instead, for `checkpointd restore`: NO PROTECTION, nobody goes on with the "
        "guest, and its output is left as it is",
    )
    interval: int | None = setting(
        duration_or_auto("5ms", "10s"),
        "100ms",
        "from the start of one epoch to the start of the next; auto: so that one of the two that follow is kept",
    )
    pause_share: float | None = setting(
        percentage(0.1, 50), "", "with --interval auto: the guest stands still for at most so much of the time"
    )
    added_latency: int | None = setting(
        duration("5ms", "10s"),
        "",
        "with --interval auto: what the guest sends waits for at most so long, on average, until it leaves",
    )
    heartbeat: int = setting(
        duration("5ms", "10s"), "50ms", "how often this side says that it lives"
    )
    ack_timeout: int = setting(
        duration("100ms", "1h"),
        "10s",
        "an epoch not acknowledged within it is an alarm, and the secondary counts as lost",
    )
    standby_timeout: int = setting(
        duration("100ms", "1h"), "1s", "silence of the secondary after which it counts as lost"
    )
    standby_loss: str = setting(
        choice("hold", "run"),
        "hold",
        "when the secondary is lost: hold the guest's output until one is back, or let the guest run "
        "on unprotected once the old replica is sure never to be activated",
    )
    suspend_timeout: int = setting(
        duration("10ms", "10m"), "5s", "how long the guest may take to stop for an epoch"
    )
    give_up_after: int = setting(
        duration("1s", "24h"), "60s", "without progress for so long, protection is given up, loudly"
    )
    on_crash: str = setting(
        choice("report"), "report", "a guest that crashes is reported, not activated elsewhere"
    )
    arena: int = setting(
        size("1MiB", "64GiB"), "32MiB", "buffer for the pages of one epoch, allocated at start"
    )
    arenas: int = setting(
        integer(2, 16), "2", "how many such buffers: one is filled while others are sent"
    )
    mapping_budget: int = setting(
        size("2MiB", "1TiB"), "1GiB", "guest memory kept mapped between epochs"
    )
    audit_pages: int = setting(
        integer(0, 4096),
        "16",
        "clean pages compared with the replica in each epoch: finds dirt that was missed",
    )
    max_live_rounds: int = setting(
        integer(1, 10_000),
        "30",
        "how many times over the guest's memory is copied while it runs, before protection of a "
        "guest that dirties it faster than that is given up",
    )
    reduce: str = setting(
        choice("auto", "always", "off"),
        "auto",
        "send pages as what has changed in them, and compressed; auto: where that takes less time than the link would",
    )
    delta_history: int = setting(
        size("1MiB", "1TiB"),
        "64MiB",
        "memory for pages as the secondary has them, against which changes are found: taken as it is used",
    )
    zero_pages: bool = setting(switch(), "yes", "look for pages of zeros, and do not send them")
    unsafe_disk: bool = setting(
        switch(),
        "no",
        "protect a guest with writable disks, which are not replicated: after a failover they DO NOT FIT its memory",
    )
    unsafe_output: bool = setting(
        switch(),
        "no",
        "protect a Xen guest whose network output is not held: a failover TAKES BACK what others have seen",
    )
    metrics: Listen = setting(
        address(auto=True),
        "127.0.0.1:auto",
        f"where /metrics, /livez, /readyz and /status are; auto is {PRIMARY_METRICS_BASE} + domid",
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.domid is None and self.uuid is None:
            yield ("domid",), "which guest? give its domid (or --uuid)"
        if self.domid is not None and self.uuid is not None:
            yield ("domid", "uuid"), "give one of the two"
        if self.standby_timeout < HEARTBEATS_MISSED * self.heartbeat:
            yield (
                ("standby_timeout", "heartbeat"),
                f"one late heartbeat is no loss: wait for at least {HEARTBEATS_MISSED}",
            )
        targets = (self.pause_share is not None) + (self.added_latency is not None)
        if self.interval is None and targets != 1:
            yield (
                ("interval", "pause_share", "added_latency"),
                "auto needs to know what to keep: give one of the two others",
            )
        if self.interval is not None and targets:
            yield ("interval", "pause_share", "added_latency"), "targets go with --interval auto only"
        if self.to is not None and self.added_latency is not None:
            yield ("to", "added_latency"), "a recording acks nothing, and holds nothing: give --pause-share"
        if self.interval is not None and self.ack_timeout < self.interval:
            yield ("ack_timeout", "interval"), "the timeout must be at least one interval"
        if self.to is not None and self.secondary.host != _HERE:
            yield ("to", "secondary"), "epochs go to a file or to a secondary, not to both"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondaryOptions(CommonOptions):
    """The standby's options: one process keeps the replicas of any number of domains."""

    role: ClassVar[str] = "secondary"

    listen: str = setting(_HOST, "127.0.0.1", "address to listen on for primaries")
    control_port: int = setting(
        integer(1, 65535, "PORT"), str(CONTROL_PORT), "TCP port of heartbeats and answers"
    )
    bulk_port: int = setting(integer(1, 65535, "PORT"), str(BULK_PORT), "TCP port of pages")
    namespace: str = setting(_NAMESPACE, "secondary", "where embedded guests are activated")
    silence: int = setting(
        duration("100ms", "1h"), "1s", "silence of the primary after which its guest is activated"
    )
    engine_restart: int = setting(
        duration("0s", "1h"),
        "10s",
        "how long to wait for a new engine when the guest's host lives and only its engine is gone",
    )
    fence_timeout: int = setting(
        duration("100ms", "10m"),
        "5s",
        "how long stopping the old guest may take; if it fails nothing is activated",
    )
    fence_command: tuple[str, ...] | None = setting(
        command(),
        "",
        "command that stops the guest of another machine for sure, say by switching that machine off; its "
        "environment says which (CHECKPOINTD_FENCE_HOST, _UUID, ...), and exit code 0 is taken as proof",
    )
    unsafe_no_fencing: bool = setting(
        switch(), "no", "activate without proof that the old guest is stopped: BOTH MAY RUN"
    )
    activate_paused: bool = setting(switch(), "no", "leave an activated guest paused")
    image: str = setting(
        choice("memory", "disk", "none"),
        "memory",
        "where replicas are kept; none, with what a Xen toolstack has taken in alone, is refused: nobody can tell that "
        "xl has applied an epoch whole",
    )
    image_dir: Path | None = setting(directory(), "", "where on disk, with --image disk")
    keep_images: Path | None = setting(
        directory(), "", "also write committed images there, as files for `checkpointd stream`"
    )
    epoch_memory: int = setting(
        size("4MiB", "1TiB"), "512MiB", "memory for epochs that are arriving, all domains together"
    )
    metrics: Listen = setting(
        address(auto=False),
        f"127.0.0.1:{SECONDARY_METRICS_PORT}",
        "where /metrics, /livez, /readyz and /status are",
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.control_port == self.bulk_port:
            yield ("control_port", "bulk_port"), "the two ports must differ"
        if self.image == "none":
            yield (
                ("image",),
                "not without an image: an epoch would count as acked only once xl has applied it, and xl applies the "
                "state of the vcpus at the failover alone (docs/xen.md); take memory or disk",
            )
        if (self.image == "disk") != (self.image_dir is not None):
            yield ("image", "image_dir"), "--image disk and --image-dir DIR go together"
