"""The feed of xl: whole epochs, whatever comes between."""

from __future__ import annotations

import random
import select
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from xl_guest import CLAIM, INFO, NR_PFNS, PATIENCE, PATIENT, STATIC, Guest, Pages, tail, until

from checkpointd.secondary.restorers.xl_feed import Feed
from checkpointd.stream.records import RecordType

if TYPE_CHECKING:
    from collections.abc import Callable



class Recorder:
    """In the place of an XlReceive: keeps what it is fed, applies it at each seal, and lets something happen between
    any two records.
    """

    identity = None  # it is no process

    def __init__(self, happen: Callable[[], None]) -> None:
        self.happen = happen
        self.memory: Pages = {}
        self.seals: list[tuple[bytes, Pages]] = []
        self.octets = b""

    def start(self) -> None: ...
    def hold(self) -> None:
        self.octets = b""  # the headers

    def feed(self, data: bytes) -> None:
        self.octets += bytes(data)
        self.happen()

    def seal(self, context: bytes) -> None:
        octets, self.octets = self.octets, b""
        assert octets.endswith(context)
        at = 0
        while at < len(octets) - len(context):
            kind, length, count = struct.unpack_from("<III", octets, at)
            assert kind == RecordType.PAGE_DATA
            words = struct.unpack_from(f"<{count}Q", octets, at + 16)
            page = at + 16 + 8 * count
            for word in words:
                if word >> 60 == 0:
                    self.memory[word] = octets[page : page + 4096]
                    page += 4096
            at += 8 + length + -length % 8
            assert page <= at
        self.seals.append((context, dict(self.memory)))

    def wait_applied(self, limit: float) -> None: ...
    def abort(self) -> None: ...

    def wait(self, wake: int) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), "never woken"


@pytest.mark.parametrize("seed", range(6))
def test_each_sealed_epoch_is_one_committed_epoch_though_commits_go_on(
    guest: Guest, seed: int
) -> None:
    chance = random.Random(seed)
    left = 12  # commits that happen in the middle of a feed

    def happen() -> None:
        nonlocal left
        if left and chance.random() < 0.3:
            left -= 1
            guest.run(chance.choice((1, 40, 300)), live=chance.choice((0, 20)))

    guest.run(NR_PFNS)
    recorder = Recorder(happen)
    feed = Feed(lambda stop: recorder, CLAIM, INFO, STATIC, guest.replica, PATIENT)  # type: ignore[arg-type, return-value]  # the recorder
    try:
        for _ in range(4):
            feed.committed()
            until(lambda: feed.epoch == guest.epoch or feed.error, "not fed")
        feed._last = True
        feed.committed()
        feed._thread.join(PATIENCE)
        assert feed.error is None
    finally:
        feed.close()
    assert recorder.seals
    for context, memory in recorder.seals:
        epochs = [epoch for epoch in guest.history if tail(epoch) == context]
        (epoch,) = epochs
        expected = guest.history[epoch]
        assert {pfn: memory.get(pfn) for pfn in expected} == expected, f"epoch {epoch}"


def test_a_guest_that_changes_faster_than_xl_takes_it_in_is_given_up(guest: Guest) -> None:
    """Else xl, which holds an epoch until it is whole, would grow without bound."""

    def happen() -> None:
        if recorder.seals:
            guest.run(5)

    guest.run(NR_PFNS)
    recorder = Recorder(happen)
    small = replace(INFO, ram_pages=20)
    feed = Feed(lambda stop: recorder, CLAIM, small, STATIC, guest.replica, PATIENT)  # type: ignore[arg-type, return-value]  # the recorder
    try:
        until(lambda: recorder.seals, "not fed")
        guest.run(5)
        feed.committed()
        until(lambda: not feed.alive, "it goes on")
        assert "changes faster than xl takes it in" in str(feed.error)
        assert len(recorder.seals) == 1
    finally:
        feed.close()
