"""Logging that never makes the daemon wait: whoever logs puts a record into a bounded queue, and
one thread writes it to stderr. A blocked stderr (a stopped terminal, a full pipe) fills the queue;
what no longer fits is counted, and said as soon as there is room.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUE_LIMIT = (
    10_000  # records; at 200 octets a record some 2 MB, and minutes of a busy daemon's talk
)
CLOSE_TIMEOUT = 2.0  # s; an exit waits no longer than this for a stderr that nobody reads

# Everything that could end a line or steer a terminal: a record is one line, whatever a peer put
# into it.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_CONTROLS[ord("\n")] = "\\n"
_CONTROLS[ord("\t")] = "\\t"


def _utc(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.000Z WARNING checkpointd.primary: text``; tracebacks in lines below."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().translate(_CONTROLS)
        line = f"{_utc(record)} {record.levelname:<7} {record.name}: {text}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, thread, message, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class Writer(QueueHandler):
    """The handler and its thread. `descriptor` is written to by os.write: no lock of Python's is
    held meanwhile, so that an exit with a writer stuck in it is an exit still.
    """

    def __init__(
        self, formatter: logging.Formatter, descriptor: int = 2, limit: int = QUEUE_LIMIT
    ) -> None:
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(limit)
        super().__init__(self._queue)
        self._lines = formatter
        self._descriptor = descriptor
        self._closing = threading.Event()
        self.lost = 0  # records, since the start
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """In the caller's thread: turn the record into text, since what it points to may change."""
        record.msg = self._lines.format(record)
        record.args = record.exc_info = record.exc_text = record.stack_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.lost += 1  # under the handler's lock

    def _write_all(self) -> None:
        told = 0
        while (record := self._queue.get()) is not None:
            try:
                self._write(record.msg)
                if (lost := self.lost) > told:
                    self._write(f"checkpointd: {lost - told} log records lost: stderr was blocked")
                    told = lost
            except OSError:
                self.lost += 1  # nobody is left to tell
            if self._closing.is_set() and self._queue.empty():
                return

    def _write(self, line: str) -> None:
        data = (line + "\n").encode(errors="backslashreplace")
        while data:
            data = data[os.write(self._descriptor, data) :]

    def close(self) -> None:
        """Write what is queued, within CLOSE_TIMEOUT, and end the thread. Idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            with suppress(queue.Full):  # then it is awake, or stuck
                self._queue.put_nowait(None)
            self._thread.join(CLOSE_TIMEOUT)
        super().close()


@contextmanager
def started(level: str, style: str, descriptor: int = 2) -> Iterator[Writer]:
    """Log all of checkpointd at `level` (config's names) as `style` text or json, until the context
    ends.
    """
    writer = Writer(JsonFormatter() if style == "json" else TextFormatter(), descriptor)
    logger = logging.getLogger("checkpointd")
    before = logger.level, logger.propagate
    logger.addHandler(writer)
    logger.setLevel(level.upper())
    logger.propagate = False
    try:
        yield writer
    finally:
        logger.removeHandler(writer)
        logger.level, logger.propagate = before
        writer.close()
