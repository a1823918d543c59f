"""A client of the guest program `kv`, and the checker that catches a protected guest at breaking its word.

A violation is an answered write that vanished, or a counter that went back: what output commit (invariant 1)
promises can never happen, whichever hosts die. Silence is no violation; it is counted as loss.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from checkpointd.errors import CheckpointdError

if TYPE_CHECKING:
    from collections.abc import Callable

RETRY = 0.1  # seconds; an answer is held for an epoch, so a shorter wait only repeats itself
PATIENCE = 10.0  # seconds until a request counts as lost; a failover takes about two


class SilenceError(CheckpointdError):
    """The guest did not answer within the client's patience, however often it was asked."""


class Transport(Protocol):
    def send(self, data: bytes) -> None: ...

    def receive(self, timeout: float) -> bytes | None:
        """The next datagram; None if none came within `timeout` seconds."""
        ...


class UdpTransport:
    """Not connected to the guest's address, since a connected socket would report its host's death as an error
    and not as the silence that it is.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        info = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(info[0], socket.SOCK_DGRAM)
        self._to = info[4]

    def send(self, data: bytes) -> None:
        self._socket.sendto(data, self._to)

    def receive(self, timeout: float) -> bytes | None:
        self._socket.settimeout(max(timeout, 0.001))  # 0 would mean "do not wait"
        try:
            data, sender = self._socket.recvfrom(2048)
        except TimeoutError:
            return None
        return data if sender[:2] == self._to[:2] else None

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True, slots=True)
class Answer:
    step: int  # of the guest, that executed the request; grows from request to request
    error: str  # empty: it was done
    version: int  # writes to the key so far
    value: str


class KvClient:
    """One client: one request at a time, retried until it is answered."""

    def __init__(
        self,
        transport: Transport,
        name: str,
        *,
        retry: float = RETRY,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` must be this client's alone, at this guest, for ever: up to 63 printable characters."""
        self._transport, self._name = transport, name
        self._retry, self._patience, self._clock = retry, patience, clock
        self._seq = 0
        self.retries = 0

    def set(self, key: str, value: str) -> Answer:
        return self.request("set", key, value)

    def get(self, key: str) -> Answer:
        return self.request("get", key)

    def incr(self, key: str) -> Answer:
        return self.request("incr", key)

    def request(self, *words: str) -> Answer:
        """Raises SilenceError; whether the request was executed is then unknown."""
        self._seq += 1
        wanted = [self._name, str(self._seq)]
        data = " ".join([*wanted, *words]).encode()
        deadline = self._clock() + self._patience
        while (now := self._clock()) < deadline:
            self._transport.send(data)
            until = min(deadline, now + self._retry)
            while (left := until - self._clock()) > 0:
                received = self._transport.receive(left)
                fields = (
                    [] if received is None else received.decode("ascii", "replace").split(" ", 5)
                )
                if fields[:2] == wanted and len(fields) > 3:
                    return _answer(fields)
            self.retries += 1
        raise SilenceError(
            f"no answer to {' '.join(words)!r} within {self._patience:g} s: is the guest running?"
        )


def _answer(fields: list[str]) -> Answer:
    if fields[3] != "ok":
        return Answer(int(fields[2]), " ".join(fields[4:]) or "refused", 0, "")
    version, value = [*fields[4:], "0", ""][:2] if len(fields) < 6 else fields[4:6]
    return Answer(int(fields[2]), "", int(version), value)


@dataclass(slots=True)
class _Known:
    """Of one key: the last answer about it, and the writes since that were not answered and may have happened."""

    version: int = 0
    value: str = ""
    unanswered: list[str] = field(default_factory=list)  # values set; "+" for an increment


class Checker:
    """Watches the requests and answers of one client whose keys nobody else writes.

    The rule: versions count writes, so an answer's version must lie between what is known to have happened and
    that plus what may have. Less: an answered write vanished. More: a write was executed twice.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.answered = 0
        self.silent = 0
        self._step = 0
        self._keys: dict[str, _Known] = {}

    @property
    def keys(self) -> list[str]:
        return list(self._keys)

    def silence(self, verb: str, key: str, value: str = "") -> None:
        self.silent += 1
        if verb != "get":
            self._keys.setdefault(key, _Known()).unanswered.append("+" if verb == "incr" else value)

    def answer(self, verb: str, key: str, value: str, answer: Answer) -> None:
        self.answered += 1
        if answer.step <= self._step:
            self.violations.append(f"the guest went back from step {self._step} to {answer.step}")
        self._step = max(self._step, answer.step)
        if answer.error:
            return
        known = self._keys.setdefault(key, _Known())
        wrote = verb != "get"
        least = known.version + wrote
        what = f"{verb} {key}: version {answer.version}, value {answer.value!r}"
        after = f"after version {known.version}, value {known.value!r}"
        if answer.version < least:
            self.violations.append(f"{what} {after}: an answered write vanished")
        elif answer.version > least + len(known.unanswered):
            self.violations.append(f"{what} {after}: a write was executed twice")
        elif not self._plausible(verb, value, answer, known):
            self.violations.append(f"{what} {after}: not what was written")
        # The guest ignores what an earlier request of ours still has on its way.
        self._keys[key] = _Known(answer.version, answer.value)

    @staticmethod
    def _plausible(verb: str, value: str, answer: Answer, known: _Known) -> bool:
        if verb == "set":
            return answer.value == value
        if verb == "get" and answer.version == known.version:
            return answer.value == known.value
        if verb == "incr" or "+" in known.unanswered:
            return int(answer.value) == int(known.value or 0) + answer.version - known.version
        return answer.value in known.unanswered


@dataclass(frozen=True, slots=True)
class LoadReport:
    answered: int
    silent: int
    retries: int
    longest_wait: float  # seconds from a request to its answer
    violations: tuple[str, ...]


class Load(threading.Thread):
    """One client in a thread, that writes, counts and reads at random (seeded) until stop()."""

    def __init__(
        self,
        transport: Transport,
        *,
        seed: int,
        pause: float = 0.0,
        keys: int = 16,
        patience: float = PATIENCE,
    ) -> None:
        """`pause`: seconds between an answer and the next request. Closing the transport is the caller's."""
        super().__init__(name=f"kv-load-{seed}", daemon=True)
        self._random = random.Random(seed)  # noqa: S311 - a load, no secret
        # The name must be new to the guest, also to one that an earlier run has talked to.
        self._name = f"load{seed}-{random.SystemRandom().getrandbits(48):012x}"
        self._client = KvClient(transport, self._name, patience=patience)
        self._checker = Checker()
        self._pause, self._keys = pause, keys
        self._stopping = threading.Event()
        self._longest = 0.0

    def run(self) -> None:
        turn = 0
        while not self._stopping.is_set():
            turn += 1
            number = self._random.randrange(self._keys)
            verb = self._random.choice(("set", "set", "incr", "incr", "get"))
            # A key is either set or counted, never both.
            kind = "c" if verb == "incr" or (verb == "get" and number % 2) else "v"
            self._do(verb, f"{self._name}.{kind}{number}", f"{turn}" if verb == "set" else "")
            if self._pause:
                self._stopping.wait(self._pause)

    def _do(self, verb: str, key: str, value: str) -> None:
        began = time.monotonic()
        try:
            answer = self._client.request(*(word for word in (verb, key, value) if word))
        except SilenceError:
            self._checker.silence(verb, key, value)
            return
        self._longest = max(self._longest, time.monotonic() - began)
        self._checker.answer(verb, key, value, answer)

    def stop(self) -> LoadReport:
        """End the load, read every key once more, and say what was seen."""
        self._stopping.set()
        self.join()
        for key in self._checker.keys:
            self._do("get", key, "")
        checker = self._checker
        return LoadReport(
            checker.answered,
            checker.silent,
            self._client.retries,
            self._longest,
            tuple(checker.violations),
        )
