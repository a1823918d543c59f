"""The Xen adapter's suspend, dirty log and records on fake libraries: whose suspend it is, whose log, and what Xen's
own reader of the stream expects.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest
from fake_hypervisor import SECOND
from fake_pause import CLEAN, FINAL, PEEK, Guest, compile_fake_pause
from fake_xen import ANSWERS_ONLY, IGNORES, STOPS, STOPS_UNANSWERED

if TYPE_CHECKING:
    from collections.abc import Iterator

POWEROFF, REBOOT, SUSPEND, CRASH = 0, 1, 2, 3  # shutdown reasons
SHORT = 1  # ns: a timeout that has passed at the first look


@pytest.fixture(scope="session")
def fake_pause(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_fake_pause(tmp_path_factory.mktemp("fake-pause"))


@pytest.fixture
def guest(fake_pause: Any) -> Iterator[Guest]:
    made = Guest(fake_pause)
    yield made
    made.lib.fake_detach()


# -------------------------------------------------------------------- suspend and resume


def test_epochs_come_and_go(guest: Guest) -> None:
    for epoch in range(1, 6):
        assert guest.suspend() == 0
        assert guest.suspend() == 0  # it stands already, and it is ours
        assert guest.close_output() == (0, epoch)
        assert guest.resume() == guest.resume() == 0
        assert guest.facts.resumes == guest.facts.told == epoch
    assert not guest.foreign


def test_only_a_suspended_guest_has_a_context_and_closes_output(guest: Guest) -> None:
    assert guest.context() == -errno.EINVAL
    assert guest.close_output()[0] == -errno.EINVAL
    assert guest.harvest(FINAL)[0] == -errno.EINVAL


def test_a_request_that_is_not_taken_is_withdrawn(guest: Guest) -> None:
    guest.facts.manner = IGNORES
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    assert guest.node == b""
    assert guest.resume() == 0
    assert guest.facts.resumes == 0
    guest.facts.manner = STOPS
    assert guest.suspend() == guest.resume() == 0  # and nobody else is suspected
    assert not guest.foreign


def test_a_write_in_between_does_not_lose_the_withdrawal(guest: Guest) -> None:
    guest.facts.manner = IGNORES
    guest.facts.broken_in = True
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    assert guest.node == b""


@pytest.mark.parametrize("when", ["before-resume", "before-suspend", "never"])
def test_a_guest_that_stops_late_is_still_ours(guest: Guest, when: str) -> None:
    guest.facts.manner = ANSWERS_ONLY
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    assert guest.late
    if when == "before-resume":
        guest.lib.fake_stop(SUSPEND)
    assert guest.resume() == 0
    assert guest.facts.resumes == (when == "before-resume")
    if when == "before-suspend":
        guest.lib.fake_stop(SUSPEND)
    guest.facts.manner = STOPS
    assert guest.suspend() == guest.resume() == 0
    assert not guest.late
    assert not guest.foreign


@pytest.mark.parametrize("reason", [POWEROFF, REBOOT, CRASH])
def test_an_end_is_no_suspend(guest: Guest, reason: int) -> None:
    guest.lib.fake_stop(reason)
    assert guest.suspend() == -errno.ESHUTDOWN


def test_a_domain_that_vanishes_suspended_is_not_resumed(guest: Guest) -> None:
    assert guest.suspend() == 0
    guest.facts.gone = True
    guest.facts.flags = 0  # Xen refuses to resume it
    assert guest.resume() == guest.suspend() == -errno.ESHUTDOWN


def test_a_suspend_by_somebody_else_is_left_alone(guest: Guest) -> None:
    guest.ask(b"suspend")
    guest.lib.fake_stop(SUSPEND)
    assert guest.suspend() == -errno.EBUSY
    assert guest.resume() == -errno.ESHUTDOWN
    assert guest.foreign
    assert guest.facts.resumes == 0


def test_the_log_of_a_guest_that_stopped_for_somebody_else_is_left_to_him(guest: Guest) -> None:
    assert guest.begin_log() == 0
    guest.lib.fake_dirty(3)
    guest.ask(b"suspend")
    guest.lib.fake_stop(SUSPEND)
    assert guest.harvest(CLEAN) == (-errno.EAGAIN, set())
    assert guest.foreign
    assert guest.resume() == -errno.ESHUTDOWN


@pytest.mark.parametrize("word", [b"poweroff", b"suspend"])
def test_what_others_asked_before_is_not_overwritten(guest: Guest, word: bytes) -> None:
    guest.facts.manner = IGNORES
    guest.ask(word)
    assert guest.suspend() == -errno.EBUSY
    assert guest.node == word
    assert guest.resume() == 0


def test_one_who_asks_while_ours_is_under_way_has_the_guest(guest: Guest) -> None:
    """xl save writes between our request and the guest's answer: the guest answers both, and xl reads its memory."""
    assert guest.suspend() == guest.resume() == 0
    guest.facts.interposed = b"suspend"
    assert guest.suspend() == 0
    assert guest.resume() == -errno.ESHUTDOWN
    assert guest.foreign
    assert guest.facts.resumes == 1


def test_what_is_on_its_way_yet_is_waited_for(guest: Guest) -> None:
    """Our request and xl's have come to us, and the guest's answer to both not yet: it is not the answer to ours."""
    guest.facts.interposed = b"suspend"
    guest.facts.prompt = 2
    assert guest.suspend() == 0
    assert guest.resume() == -errno.ESHUTDOWN
    assert guest.foreign
    assert guest.facts.resumes == 0


def test_the_pause_does_not_wait_for_xenstored(guest: Guest) -> None:
    """Another thread asks it meanwhile who else has."""
    for _ in range(5):
        assert guest.suspend() == guest.resume() == 0
    assert guest.facts.waited == 0


def test_a_guest_that_stops_for_somebody_else_is_not_taken_for_ours(guest: Guest) -> None:
    """It has answered xl, and stops; our request comes in between, and must not be obeyed later."""
    guest.ask(b"suspend")
    guest.ask(b"")  # the guest's answer
    guest.facts.manner = STOPS_UNANSWERED
    assert guest.suspend() == 0
    assert guest.resume() == -errno.ESHUTDOWN
    assert guest.foreign
    assert guest.node == b""


def test_one_who_asks_in_the_pause_has_the_guest(guest: Guest) -> None:
    assert guest.suspend() == 0
    guest.ask(b"suspend")
    assert guest.resume() == -errno.ESHUTDOWN
    assert guest.foreign
    assert guest.facts.resumes == 0
    assert guest.node == b""  # else he would wait for the guest's answer


def test_a_poweroff_asked_in_the_pause_is_the_guests_to_answer(guest: Guest) -> None:
    assert guest.suspend() == 0
    guest.ask(b"poweroff")
    assert guest.resume() == 0
    assert not guest.foreign
    assert guest.node == b"poweroff"


@pytest.mark.parametrize("word", [b"poweroff", b"reboot"])
def test_a_guest_that_is_powering_off_goes_on_suspending_for_us(guest: Guest, word: bytes) -> None:
    """It has answered xl, and takes its time: each of our suspends is ours to undo, else it never gets there."""
    assert guest.suspend() == guest.resume() == 0
    guest.ask(word)
    guest.ask(b"")  # the guest's answer
    assert guest.suspend() == guest.resume() == 0
    assert guest.suspend() == guest.resume() == 0
    assert not guest.foreign
    assert guest.facts.resumes == 3


def test_a_guest_that_stops_late_for_an_older_request_of_ours_is_ours(guest: Guest) -> None:
    guest.facts.manner = ANSWERS_ONLY
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    guest.facts.manner = STOPS_UNANSWERED  # asked once more, it stops for the first request
    assert guest.suspend() == guest.resume() == 0
    assert not guest.foreign
    assert not guest.late
    assert guest.node == b""  # nor does it stop again
    assert guest.facts.resumes == 1


def test_one_who_asks_a_late_guest_has_it(guest: Guest) -> None:
    guest.facts.manner = ANSWERS_ONLY
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    guest.facts.manner = STOPS_UNANSWERED
    assert guest.suspend() == 0
    guest.ask(b"suspend")
    assert guest.resume() == -errno.ESHUTDOWN
    assert guest.foreign


@pytest.mark.parametrize("when", ["before-suspend", "in-suspend"])
def test_a_guest_that_stops_late_for_a_dead_engine_is_ours(guest: Guest, when: str) -> None:
    guest.inherit()
    if when == "before-suspend":
        guest.lib.fake_stop(SUSPEND)
    else:
        guest.facts.manner = STOPS_UNANSWERED
    assert guest.suspend() == guest.resume() == 0
    assert not guest.foreign
    assert not guest.late
    assert guest.facts.resumes == 1
    guest.lib.fake_stop(SUSPEND)  # by somebody else: nothing of the dead one's is out any more
    assert guest.suspend() == -errno.EBUSY


# -------------------------------------------------------------------- what those know who find us dead


def test_a_request_is_known_to_be_out_until_the_guest_has_been_resumed(guest: Guest) -> None:
    assert guest.asked == 0
    assert guest.suspend(10 * SECOND) == 0
    assert guest.asked == 10 * SECOND
    assert guest.resume() == 0
    assert guest.asked == 0


def test_a_request_that_was_withdrawn_is_not_out_and_one_that_was_taken_is(guest: Guest) -> None:
    guest.facts.manner = IGNORES
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    assert guest.asked == 0
    guest.facts.manner = ANSWERS_ONLY
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    assert guest.asked == SHORT
    guest.facts.manner = IGNORES
    assert guest.suspend(SHORT) == -errno.ETIMEDOUT
    assert guest.asked == SHORT, "that of before is"


def test_of_a_guest_that_is_somebody_elses_nothing_is_out(guest: Guest) -> None:
    guest.facts.interposed = b"suspend"
    assert guest.suspend() == 0
    assert guest.resume() == -errno.ESHUTDOWN
    assert guest.asked == 0


@pytest.mark.parametrize("word", [b"poweroff", b"suspend"])
def test_what_was_not_asked_is_not_out(guest: Guest, word: bytes) -> None:
    guest.facts.manner = IGNORES
    guest.ask(word)
    assert guest.suspend() == -errno.EBUSY
    assert guest.asked == 0
    guest.lib.fake_stop(SUSPEND)
    assert guest.suspend() == -errno.EBUSY
    assert guest.asked == 0


# -------------------------------------------------------------------- the dirty log


def test_the_canary_is_all_that_an_idle_guest_dirties(guest: Guest) -> None:
    assert guest.begin_log() == 0
    seen = [guest.harvest() for _ in range(6)]
    assert {status for status, _ in seen} == {0}
    assert [len(pages) for _, pages in seen] == [1] * 6
    assert set.union(*(pages for _, pages in seen)) == {0, 256, 512, 768}


def test_the_canary_sits_where_the_guest_does_not_write(guest: Guest) -> None:
    assert guest.begin_log() == 0
    guest.harvest()
    for _ in range(5):
        for pfn in (0, 512, 768):
            guest.lib.fake_dirty(pfn)
        guest.harvest()
    assert guest.harvest() == (0, {256})


@pytest.mark.parametrize("theft", ["clean", "restart", "off"])
def test_a_log_in_other_hands_is_noticed(guest: Guest, theft: str) -> None:
    assert guest.begin_log() == 0
    assert guest.harvest()[0] == 0
    if theft == "off":
        guest.facts.log_on = False
    else:
        guest.lib.fake_clean()  # a new beginning is all clean, too
    assert guest.harvest()[0] < 0
    assert guest.thefts == 1


def test_a_page_that_was_given_back_is_no_theft(guest: Guest) -> None:
    assert guest.begin_log() == 0
    guest.lib.fake_take(0)  # the first canary's: gone, hence clean
    guest.lib.fake_clean()
    assert guest.harvest()[0] == 0
    guest.lib.fake_request()  # the next one's: gone and back before the harvest
    guest.lib.fake_clean()
    assert guest.harvest()[0] == 0
    assert guest.thefts == 0
    guest.lib.fake_clean()
    assert guest.harvest()[0] == -errno.ESTALE


def test_a_pfn_that_has_no_memory_holds_no_canary(guest: Guest) -> None:
    """Xen marks nothing there; and up to 4.19.4 and 4.20.2 not even the page that comes in later."""
    assert guest.begin_log() == 0
    guest.lib.fake_take(256)  # the next one's
    assert guest.harvest() == (0, {0})
    assert guest.lib.fake_give(256, 1)
    assert guest.harvest() == (0, {512})
    assert guest.thefts == 0


def test_harvest_adds_to_what_is_there_and_peek_keeps_the_log(guest: Guest) -> None:
    assert guest.harvest()[0] == -errno.EINVAL  # it is off
    assert guest.thefts == 0
    assert guest.begin_log() == 0
    assert guest.begin_log() == -errno.EINVAL
    guest.lib.fake_dirty(999)
    assert guest.harvest(PEEK) == guest.harvest(PEEK) == (0, {0, 999})
    assert guest.harvest(CLEAN) == (0, {0, 999})
    assert 999 not in guest.harvest(CLEAN)[1]


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.EBUSY])
def test_an_interrupted_harvest_has_lost_nothing(guest: Guest, error: int) -> None:
    assert guest.begin_log() == 0
    guest.lib.fake_dirty(5)
    guest.facts.fail_log = error
    assert guest.harvest() == (-errno.EAGAIN, set())
    assert guest.harvest() == (0, {0, 5})


def test_a_harvest_that_may_have_lost_pages_says_so(guest: Guest) -> None:
    assert guest.begin_log() == 0
    guest.facts.fail_log = errno.ENOMEM
    assert guest.harvest()[0] == -errno.ENOMEM
    guest.facts.short_log = 64
    assert guest.harvest()[0] == -errno.EPROTO
    guest.facts.fail_mark = errno.EPERM
    assert guest.harvest()[0] == -errno.EPERM
    assert guest.harvest(nr_pfns=64)[0] == -errno.EINVAL
    assert guest.thefts == 0


# -------------------------------------------------------------------- records


def records(data: bytes) -> list[tuple[int, bytes]]:
    """The records of a libxc stream: type and body, padding checked."""
    found = []
    while data:
        kind, length = struct.unpack_from("<II", data)
        body, rest = data[8 : 8 + length], data[8 + length :]
        assert len(body) == length
        assert rest[: -length % 8] == bytes(-length % 8)
        found.append((kind, body))
        data = rest[-length % 8 :]
    return found


def test_the_tail_of_an_epoch(guest: Guest) -> None:
    assert guest.suspend() == 0
    tail = guest.context()
    assert isinstance(tail, bytes)
    (tsc, context, params) = records(tail)
    assert tsc == (0x08, struct.pack("<IIQII", 1, 2400000, 0x1122334455667788, 3, 0))
    assert context == (0x09, b"\xc7" * 1003)  # as long as Xen said this time
    assert params == (0x0A, struct.pack("<IIQQQQ", 2, 0, 1, 0xFEFFC, 17, 0xFEFFF))
    # Xen is asked for no more than it said it needs (1008): all of that has to fit.
    assert [guest.context(room) for room in (8, 40, 1047, len(tail) - 1)] == [-errno.ENOSPC] * 4
    assert guest.context(len(tail)) == tail


def test_what_begins_the_stream(guest: Guest) -> None:
    start = guest.static_records()
    assert isinstance(start, bytes)
    assert start[:24] == struct.pack(">QIIHHI", (1 << 64) - 1, 0x58454E46, 3, 0, 0, 0)
    assert start[24:40] == struct.pack("<IHHII", 2, 12, 0, 4, 17)
    assert records(start[40:]) == [
        (0x11, struct.pack("<6I", 1, 0xFFFFFFFF, 2, 3, 4, 5)),
        (0x12, struct.pack("<IIQ", 0xCE, 0, 1 << 31)),
        (0x10, b""),
    ]
    assert guest.static_records(len(start) - 1) == -errno.ENOSPC
