"""Activation through libxl: a warm `xl migrate-receive -r` follows the committed epochs, beside the image.

The image is what acks stand on; the warm domain only makes an activation quick. So nothing here ever
holds up a commit: a feeder thread reads the image while it changes, as a live migration reads a guest, and
the death or the hang of xl is an alarm, a new xl some time later, and at an activation a domain that is
built anew from the image.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from checkpointd import faults
from checkpointd.errors import CheckpointdError, StateError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.secondary.activations import Phase
from checkpointd.secondary.replica import State

from .xl_feed import APPLY_RATE, MOST_ROUNDS, Feed
from .xl_leftover import Claim, IncomingNotes, Leftover
from .xl_process import LAST_WORDS, Limits, XlReceive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointd.hypervisor.port import DomainInfo
    from checkpointd.secondary.activations import Activation, Activations
    from checkpointd.secondary.replica import Replica

    from .xl_process import Domains

log = logging.getLogger(__name__)

# s; xl that fails is started again so much later: a first feed costs as much as a live migration.
RESTART = 30.0
# Feeds in a row of which xl applied no epoch: one may be a passing want of memory, a second one 30 s later is a state
# that lasts, such as a Xen that refuses the guest's CPU policy, and then an activation would fail as well.
BARREN = 2


# s; that a toolstack's command which is beyond its limit is given to be dead (hypervisor/xen/incoming.py: KILL).
AFTER_DESTROY = 1.0


def longest_begin(limits: Limits) -> float:
    """s; from nothing, or from an earlier process's xl and domain in the way, to one that takes pages."""
    return limits.kill + limits.destroy + AFTER_DESTROY + limits.banner + limits.domain


def longest_feed(limits: Limits, octets: int, rounds: int) -> float:
    """s; for pages of `rounds` times the `octets` of the guest's memory."""
    return limits.stall + rounds * octets / APPLY_RATE


def longest_start(limits: Limits, octets: int) -> float:
    """s; from the order to activate a guest with `octets` of memory until it runs or an error is said, whatever xl
    does: the warm domain, which had hardly begun, is lost at its last moment, and so is the one built anew.

    docs/xen.md states it. Writing --keep-images comes on top.
    """
    undo = limits.kill + 2 * LAST_WORDS + limits.destroy + AFTER_DESTROY
    one = longest_begin(limits) + limits.exit + undo
    return 2 * one + longest_feed(limits, octets, MOST_ROUNDS) + longest_feed(limits, octets, 1)


class XlRestorer:
    """Never two of one guest: no domain is built while one of its UUID is here, but for one that an earlier
    life of ours left behind paused, as its note says; that one is destroyed. The note is on disk before
    xl is started, and away before the guest is let go.

    An activation is noted, too, on stable storage: SEALED once xl has applied the last acked epoch and before its
    input is ended, FINISHED once the domain was looked at and before it is let go; FEEDING again, before a domain of
    which more was said is destroyed.
    """

    def __init__(
        self,
        domains: Domains,
        notes: Path,
        activations: Activations,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`notes`: a folder that does not outlive the host's boot."""
        self._domains = domains
        self._notes = IncomingNotes(notes)
        self._activations = activations
        self._limits = limits or Limits()
        self._clock = clock
        self._info: DomainInfo | None = None
        self._static = b""
        self._feed: Feed | None = None
        self._not_before = 0.0  # a new xl, on self._clock
        self._barren = 0  # feeds in a row that ended, and of which xl had applied nothing
        self._last_error = ""  # of the last one that ended
        self.alarm = ""  # why there is nothing warm

    def begin(self, info: DomainInfo, static_records: bytes) -> None:
        if (info, static_records) != (self._info, self._static):
            self.discard()
            self._barren = 0  # what xl made of another description says nothing of this one
        self._info, self._static = info, static_records

    def prepare(self, info: DomainInfo, replica: Replica) -> None:
        self.committed(replica)

    def committed(self, replica: Replica) -> None:
        """Wake the feeder; start one where there is none, no sooner than RESTART after one that failed."""
        feed = self._feed
        if feed is not None and not feed.alive:
            self._gone(feed)
        if self._feed is not None:
            self._feed.committed()
        elif self._clock() >= self._not_before:
            self._feed = self._begin_feed(replica)

    def start(self, info: DomainInfo, replica: Replica, *, paused: bool) -> DomainInfo:
        """From the warm domain; if that fails, from one that is built from the image at once. It takes no longer than
        longest_start().
        """
        if replica.state is not State.WHOLE:
            raise StateError(
                f"the replica is {replica.state}, not one whole epoch: it is not started"
            )
        self._activations.advance(info.uuid, Phase.FEEDING, domid=None)
        octets = max(info.ram_pages, replica.populated.count()) * PAGE_SIZE
        warm = self._feed
        if warm is not None:
            limit = longest_feed(self._limits, octets, MOST_ROUNDS)
            if warm.applied is None:
                limit += longest_begin(self._limits)
            try:
                return self._finish(warm, info, limit, paused=paused)
            except (CheckpointdError, OSError) as error:
                log.error("%s: the warm domain is lost, building anew: %s", info.uuid, error)
                self._begin_again()
        limit = longest_begin(self._limits) + longest_feed(self._limits, octets, 1)
        self._feed = self._begin_feed(replica)
        try:
            return self._finish(self._feed, info, limit, paused=paused)
        except BaseException:
            self._begin_again()
            raise

    def resume(self, left: Activation) -> int:
        return Leftover(self._domains, self._notes, self._activations, self._limits).resume(left)

    def status(self) -> dict[str, object]:
        feed = self._feed
        return {
            "sent_epoch": feed.epoch if feed else None,
            "applied_epoch": feed.applied if feed else None,
            "sent_octets": feed.sent if feed else 0,
            "alarm": self.alarm or None,
            "trouble": self.trouble() or None,
        }

    def trouble(self) -> str:
        feed = self._feed
        if feed is not None and feed.applied is not None:
            return ""
        failed = feed is not None and not feed.alive and feed.error is not None
        barren = self._barren + int(failed)
        if barren < BARREN:
            return ""
        why = feed.error if feed is not None and failed else self._last_error
        return (
            f"xl has taken in no epoch in {barren} tries, so an activation is likely to fail; acks stand on the image, "
            f"and it is tried again every {RESTART:g} s: {why}"
        )

    def discard(self) -> None:
        feed, self._feed = self._feed, None
        if feed is None:
            return
        feed.close()
        uuid = feed.receive.uuid
        try:
            feed.receive.abort()
            if feed.claimed and self._domains.find(uuid) is None:
                self._notes.remove(uuid)
        except (CheckpointdError, OSError) as error:
            self._alarm(f"an incoming domain is left behind: {error}")

    def _begin_again(self) -> None:
        """Of an activation: its domain is lost."""
        if self._info is not None:
            self._activations.advance(self._info.uuid, Phase.FEEDING, domid=None)
        self.discard()

    def _begin_feed(self, replica: Replica) -> Feed:
        assert self._info is not None, "a session has begun"
        uuid = self._info.uuid
        self.alarm = ""
        return Feed(
            lambda stop: XlReceive(self._domains, uuid, interrupt=stop, limits=self._limits),
            Claim(self._domains, self._notes, uuid, self._limits),
            self._info,
            self._static,
            replica,
            self._limits,
        )

    def _finish(self, feed: Feed, info: DomainInfo, limit: float, *, paused: bool) -> DomainInfo:
        """`limit` (s): for xl to take in what it lacks."""
        feed.catch_up(limit)
        self._activations.advance(info.uuid, Phase.SEALED, domid=feed.receive.domid, paused=paused)
        faults.point("xl.sealed")
        domid = feed.finish()
        faults.point("xl.finished")
        self._activations.advance(info.uuid, Phase.FINISHED)
        faults.point("xl.before-release")
        self._notes.remove(info.uuid)
        faults.point("xl.unnoted")
        if not paused:
            feed.receive.release()
        self._feed = None  # the guest's own from here on: nothing may destroy it
        feed.close()
        faults.point("xl.after-release")
        return replace(info, domid=domid)

    def _gone(self, feed: Feed) -> None:
        """The feeder has ended by itself. Its note stays: the next one destroys what may be left."""
        self._feed = None
        self._barren = self._barren + 1 if feed.applied is None else 0
        self._last_error = str(feed.error)
        self._alarm(f"no warm domain, so an activation would take longer: {feed.error}")
        feed.close()

    def _alarm(self, text: str) -> None:
        self._not_before = self._clock() + RESTART
        if text != self.alarm:
            log.error("%s: %s", self._info.uuid if self._info else "", text)
        self.alarm = text
