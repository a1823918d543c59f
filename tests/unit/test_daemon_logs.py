from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from checkpointd.daemon import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 10.0  # s; far beyond anything that works


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)
        assert not thread.is_alive(), thread


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def drain(descriptor: int) -> str:
    os.set_blocking(descriptor, False)
    data = b""
    try:
        while piece := os.read(descriptor, 1 << 16):
            data += piece
    except BlockingIOError:
        pass
    return data.decode()


def until_within(deadline_passed: threading.Event, condition: object) -> None:
    """Spin, yielding, until `condition()`; the event is set by a timer to end a hang."""
    assert callable(condition)
    while not condition():
        assert not deadline_passed.is_set(), "did not come true"
        time.sleep(0)


@pytest.fixture
def deadline() -> Iterator[threading.Event]:
    passed = threading.Event()
    timer = threading.Timer(LONG, passed.set)
    timer.start()
    yield passed
    timer.cancel()
    timer.join()


def test_lines_for_people(pipe: tuple[int, int]) -> None:
    with logs.started("info", "text", pipe[1]):
        logging.getLogger("checkpointd.some.part").warning("page %d is odd", 7)
        logging.getLogger("checkpointd.some.part").debug("not said at this level")
    (line,) = drain(pipe[0]).splitlines()
    stamp, rest = line.split(" ", 1)
    assert rest == "WARNING checkpointd.some.part: page 7 is odd"
    assert len(stamp) == len("2026-01-31T12:00:00.000Z")
    assert stamp.endswith("Z")


def test_lines_for_programs(pipe: tuple[int, int]) -> None:
    with logs.started("debug", "json", pipe[1]):
        try:
            raise ValueError("a reason")
        except ValueError:
            logging.getLogger("checkpointd").exception("failed")
    record = json.loads(drain(pipe[0]))
    assert record["level"] == "error"
    assert record["message"] == "failed"
    assert "ValueError: a reason" in record["exception"]


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_peer_cannot_forge_a_line(pipe: tuple[int, int], style: str) -> None:
    with logs.started("info", style, pipe[1]):
        logging.getLogger("checkpointd").info(
            "from %s", "x\nERROR all is lost\x1b[2J\u2028\x85\udcff"
        )
    data = drain(pipe[0])
    assert len(data.splitlines()) == 1
    assert all(character.isprintable() for character in data[:-1])


def test_arguments_are_read_when_logged(pipe: tuple[int, int]) -> None:
    pages = [1]
    with logs.started("info", "text", pipe[1]):
        logging.getLogger("checkpointd").info("pages %s", pages)
        pages.append(2)
    assert "pages [1]\n" in drain(pipe[0])


def test_a_blocked_stderr_stops_nobody_and_is_counted(
    pipe: tuple[int, int], deadline: threading.Event
) -> None:
    read, write = pipe
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)  # full: whoever writes now waits
    limit = 10
    writer = logs.Writer(logs.TextFormatter(), write, limit)
    logger = logging.Logger("checkpointd.test")
    logger.addHandler(writer)
    for number in range(limit + 1):  # one record is in the thread's hands or still queued
        logger.info("record %d", number)
    while writer.lost < 3:
        logger.info("too much")
    seen = ""

    def told() -> bool:
        nonlocal seen
        seen += drain(read)
        return "records lost" in seen

    until_within(deadline, told)
    writer.close()
    seen += drain(read)
    assert "3 log records lost: stderr was blocked" in seen
    assert "record 0" in seen


def test_a_stderr_that_nobody_reads_does_not_hold_up_the_exit(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "CLOSE_TIMEOUT", 0.01)
    read, write = pipe
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    with logs.started("info", "text", write):
        logging.getLogger("checkpointd").info("stuck")
    # Back here although the record cannot be written. Now let the thread go.
    os.set_blocking(read, False)
    os.read(read, 1 << 20)


def test_a_closed_stderr_is_survived() -> None:
    read, write = os.pipe()
    os.close(read)
    with logs.started("info", "text", write) as writer:
        logging.getLogger("checkpointd").info("to nobody")
    os.close(write)
    assert writer.lost == 1


def test_what_was_before_is_restored(pipe: tuple[int, int]) -> None:
    logger = logging.getLogger("checkpointd")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with logs.started("error", "text", pipe[1]):
        assert not logger.propagate
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
