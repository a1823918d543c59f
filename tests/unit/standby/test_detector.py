"""Silence, by a clock that the test turns."""

from __future__ import annotations

import pytest

from checkpointd.secondary.standby.detector import Detector

MS = 1_000_000
LIMIT, STUCK, TICK = 1000 * MS, 5000 * MS, 50 * MS


class Listener:
    """A detector whose thread ticks on time, until told otherwise."""

    def __init__(self) -> None:
        self.now = 7_000 * MS
        self.detector = Detector(LIMIT, STUCK, TICK, self.now)

    def run(self, ms: int, *, heartbeats: bool = False, progress: bool = False) -> int:
        """Tick on time for so long; gives the last verdict."""
        verdict = 0
        for _ in range(ms // 50):
            self.now += TICK
            if heartbeats:
                self.detector.heard(self.now)
                if progress:
                    self.detector.progressed(self.now, 1, self.now)
            verdict = self.detector.tick(self.now)
        return verdict

    def stall(self, ms: int) -> int:
        """The listening thread does nothing for so long, then ticks."""
        self.now += ms * MS
        return self.detector.tick(self.now)


@pytest.fixture
def listener() -> Listener:
    return Listener()


def test_heartbeats_keep_it_quiet(listener: Listener) -> None:
    assert listener.run(10_000, heartbeats=True) == 0


def test_silence_is_told_once_it_is_beyond_the_limit(listener: Listener) -> None:
    assert listener.run(1000) == 0
    assert listener.run(50) == LIMIT + TICK
    assert listener.run(50) == LIMIT + 2 * TICK


def test_a_word_ends_it(listener: Listener) -> None:
    listener.run(2000)
    listener.detector.heard(listener.now)
    assert listener.run(1000) == 0


def test_our_own_stall_is_not_the_peers_silence(listener: Listener) -> None:
    listener.run(900)
    assert listener.stall(60_000) == 0
    assert listener.detector.stalls == 1
    listener.detector.heard(listener.now)  # what was queued all the while
    assert listener.run(1000) == 0


def test_a_peer_that_died_while_we_stalled_is_still_found(listener: Listener) -> None:
    listener.run(900)
    listener.stall(60_000)
    assert listener.run(50) == 0
    assert listener.run(150) > LIMIT  # 900 ms before the stall count, the stall does not


def test_a_stall_at_the_very_limit_gives_no_verdict_before_the_queue_is_drained(
    listener: Listener,
) -> None:
    listener.run(1000)
    assert listener.stall(3000) == 0
    assert listener.run(50) > LIMIT


def test_stalls_one_after_another_never_add_up_to_silence(listener: Listener) -> None:
    assert not any(listener.stall(700) for _ in range(100))


def test_ticks_a_little_late_are_no_stall(listener: Listener) -> None:
    verdicts = [listener.stall(90) for _ in range(20)]
    assert listener.detector.stalls == 0
    assert verdicts[-1] == 1800 * MS


def test_alive_without_progress_is_told_once_and_is_not_silence(listener: Listener) -> None:
    listener.run(100, heartbeats=True, progress=True)
    assert listener.run(5000, heartbeats=True) == 0
    assert listener.detector.stuck_for(listener.now) == 0
    listener.run(50, heartbeats=True)
    assert listener.detector.stuck_for(listener.now) > STUCK
    assert listener.detector.stuck_for(listener.now) == 0
    listener.run(100, heartbeats=True, progress=True)
    listener.run(6000, heartbeats=True)
    assert listener.detector.stuck_for(listener.now) > STUCK


def test_a_silent_peer_is_not_called_stuck(listener: Listener) -> None:
    listener.run(100, heartbeats=True, progress=True)
    listener.run(10_000)
    assert listener.detector.stuck_for(listener.now) == 0


def test_words_that_were_queued_do_not_turn_time_back(listener: Listener) -> None:
    listener.detector.heard(listener.now + 500 * MS)
    listener.detector.heard(listener.now)
    assert listener.detector.silent_for(listener.now + 600 * MS) == 100 * MS
