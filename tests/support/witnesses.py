"""Clients of a kv guest that remember every answer, and the check that one history explains them all."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd.hypervisor.embedded import inputlog
from checkpointd.hypervisor.embedded.kv import Load, SilenceError, UdpTransport

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# s between an answer and the next request: some hundred requests a second, which dirty a few pages
# an epoch and keep the input logs short enough to be replayed in a moment.
PAUSE = 0.003
KEYS = 4  # a client's keys are all read once more at its end, one request each


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer that left the guest: to which request, executed in which step."""

    request: bytes  # "ID SEQ"
    step: int


class Witness:
    """A kv transport that notes each answer. Once hung up it is silent at once, without patience."""

    def __init__(self, address: str) -> None:
        self._udp = UdpTransport(address)
        self._news = threading.Condition()
        self._hung_up = False
        self.seen: list[Seen] = []

    def send(self, data: bytes) -> None:
        if self._hung_up:
            raise SilenceError("hung up")
        self._udp.send(data)

    def receive(self, timeout: float) -> bytes | None:
        data = self._udp.receive(timeout)
        if data is not None:
            client, sequence, step, *_ = data.split(b" ", 3)
            with self._news:
                self.seen.append(Seen(client + b" " + sequence, int(step)))
                self._news.notify_all()
        return data

    def hang_up(self) -> None:
        self._hung_up = True

    def answered_since(self, count: int, timeout: float) -> bool:
        """Whether more than `count` answers have come, by the end of `timeout` seconds."""
        with self._news:
            return self._news.wait_for(lambda: len(self.seen) > count, timeout)

    def close(self) -> None:
        self._udp.close()


class Clients:
    """Load from several clients at once, from start() until finish() or give_up()."""

    def __init__(self, address: str, number: int, seed: int) -> None:
        self._witnesses = [Witness(address) for _ in range(number)]
        self._loads = [
            Load(witness, seed=seed + n, pause=PAUSE, keys=KEYS)
            for n, witness in enumerate(self._witnesses)
        ]
        self._running = False

    def start(self) -> None:
        self._running = True
        for load in self._loads:
            load.start()

    @property
    def seen(self) -> list[Seen]:
        """Every answer that any of them got."""
        return [seen for witness in self._witnesses for seen in list(witness.seen)]

    def all_answered(self, timeout: float) -> bool:
        """Whether each of them gets a further answer within `timeout` seconds."""
        counts = [len(witness.seen) for witness in self._witnesses]
        deadline = time.monotonic() + timeout
        return all(
            witness.answered_since(count, max(0.0, deadline - time.monotonic()))
            for witness, count in zip(self._witnesses, counts, strict=True)
        )

    def silent(self, seconds: float) -> bool:
        """Whether none of them gets any answer for so long, though all keep asking."""
        until = time.monotonic() + seconds
        return not any(
            witness.answered_since(count, max(0.0, until - time.monotonic()))
            for witness, count in [(witness, len(witness.seen)) for witness in self._witnesses]
        )

    def finish(self) -> list[str]:
        """End the load; each client reads all it has written once more. The violations seen."""
        self._running = False
        return [text for load in self._loads for text in load.stop().violations]

    def give_up(self) -> list[str]:
        """End the load of a guest that answers no more. The violations seen."""
        for witness in self._witnesses:
            witness.hang_up()
        return self.finish()

    def close(self) -> None:
        if self._running:
            self.give_up()
        for witness in self._witnesses:
            witness.close()


def surviving(lives: Iterable[tuple[int, Mapping[int, bytes]]]) -> dict[int, bytes]:
    """What each step consumed in the history that counts, of a guest that lived on one host after another:
    (the step it was activated at, what it was given at which step) for each, the first host's first.
    """
    history: dict[int, bytes] = {}
    for base_step, given in lives:
        history = {step: data for step, data in history.items() if step <= base_step}
        history |= given
    return history


def read_lives(paths: Iterable[Path]) -> list[tuple[int, dict[int, bytes]]]:
    """The input logs of a guest's hosts, as surviving() takes them."""
    logs = [inputlog.read(path) for path in paths]
    return [(log.base_step, {entry.step: entry.data for entry in log.entries()}) for log in logs]


def unexplained(seen: Iterable[Seen], history: Mapping[int, bytes]) -> list[str]:
    """The answers that this history does not contain.

    Output commit and "one runner" in one: an answer of an epoch that was lost, and an answer of a second guest, each
    tell of a step that in the surviving history consumed something else.
    """
    return [
        f"step {answer.step} answered {answer.request.decode()}, but it consumed "
        f"{history.get(answer.step, b'nothing').decode(errors='replace')[:40]!r}"
        for answer in seen
        if not history.get(answer.step, b"").startswith(answer.request + b" ")
    ]
