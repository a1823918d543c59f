"""The kv client and its checker, with a store that can be made to misbehave instead of a guest."""

from __future__ import annotations

import pytest

from checkpointd.hypervisor.embedded.kv import Answer, Checker, KvClient, SilenceError


class Network:
    """Carries requests to `answers`, in turn: a str is the answer, None is silence. Waiting moves the clock."""

    def __init__(self, *answers: str | None) -> None:
        self.now = 0.0
        self.sent: list[str] = []
        self._answers = list(answers)
        self._arrived: list[str] = []

    def clock(self) -> float:
        return self.now

    def send(self, data: bytes) -> None:
        self.sent.append(data.decode())
        if self._answers and (answer := self._answers.pop(0)) is not None:
            self._arrived.append(answer)

    def receive(self, timeout: float) -> bytes | None:
        if self._arrived:
            return self._arrived.pop(0).encode()
        self.now += timeout
        return None

    def client(self) -> KvClient:
        return KvClient(self, "me", retry=0.5, patience=2.0, clock=self.clock)


def test_a_request_and_its_answer() -> None:
    network = Network(
        "me 1 10 ok 3 some words here", "me 2 11 ok 0 ", "me 3 12 ok", "me 4 13 err no key"
    )
    client = network.client()
    assert client.set("k", "some words here") == Answer(10, "", 3, "some words here")
    assert client.get("j") == Answer(11, "", 0, "")
    assert client.request("ping") == Answer(12, "", 0, "")
    assert client.get("") == Answer(13, "no key", 0, "")
    assert network.sent[:2] == ["me 1 set k some words here", "me 2 get j"]
    assert client.retries == 0


def test_a_request_is_repeated_with_its_number_until_it_is_answered() -> None:
    network = Network(None, None, "me 1 10 ok 1 1")
    client = network.client()
    assert client.incr("n").value == "1"
    assert network.sent == ["me 1 incr n"] * 3
    assert client.retries == 2
    assert network.now == 1.0


def test_answers_to_others_and_to_earlier_requests_are_passed_over() -> None:
    network = Network("me 1 10 ok 1 1", "me 1 10 ok 1 1", "you 2 11 ok 2 2", "me 2 12 ok 2 2")
    client = network.client()
    client.incr("n")
    assert client.incr("n").step == 12


def test_silence_is_told() -> None:
    network = Network()
    with pytest.raises(SilenceError, match="incr n"):
        network.client().incr("n")
    assert network.now == 2.0
    assert len(network.sent) == 4


def checked(*events: tuple[str, str, str, Answer | None]) -> list[str]:
    checker = Checker()
    for verb, key, value, answer in events:
        if answer is None:
            checker.silence(verb, key, value)
        else:
            checker.answer(verb, key, value, answer)
    return checker.violations


def test_an_honest_store_is_not_accused() -> None:
    assert not checked(
        ("set", "k", "a", Answer(1, "", 1, "a")),
        ("get", "k", "", Answer(2, "", 1, "a")),
        ("set", "k", "b", None),  # lost on the way there
        ("get", "k", "", Answer(3, "", 1, "a")),
        ("set", "k", "c", None),  # its answer lost on the way back
        ("get", "k", "", Answer(5, "", 2, "c")),
        ("incr", "n", "", None),
        ("incr", "n", "", None),
        ("incr", "n", "", Answer(7, "", 2, "2")),  # one of the two was executed
        ("set", "k", "d", Answer(8, "full", 0, "")),
    )


@pytest.mark.parametrize(
    ("what", "answer", "verb", "value"),
    [
        ("vanished", Answer(9, "", 1, "a"), "get", ""),
        ("vanished", Answer(9, "", 2, "c"), "set", "c"),
        ("twice", Answer(9, "", 4, "c"), "set", "c"),
        ("twice", Answer(9, "", 3, "b"), "get", ""),
        ("not what was written", Answer(9, "", 2, "x"), "get", ""),
        ("not what was written", Answer(9, "", 3, "x"), "set", "c"),
        ("back from step 5 to 4", Answer(4, "", 2, "b"), "get", ""),
        ("back from step 5 to 5", Answer(5, "", 2, "b"), "get", ""),
    ],
)
def test_each_violation_is_found(what: str, answer: Answer, verb: str, value: str) -> None:
    before = (("set", "k", "a", Answer(1, "", 1, "a")), ("set", "k", "b", Answer(5, "", 2, "b")))
    (violation,) = checked(*before, (verb, "k", value, answer))
    assert what in violation


def test_a_counter_that_went_back_is_found() -> None:
    (violation,) = checked(
        ("incr", "n", "", Answer(1, "", 1, "1")),
        ("incr", "n", "", Answer(2, "", 2, "2")),
        ("incr", "n", "", Answer(3, "", 3, "2")),
    )
    assert "not what was written" in violation
