"""Strangers at every port of a standby that protects a guest, and a trusted peer that has lost its mind."""

from __future__ import annotations

import logging
import random
import socket
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from leaks import nothing_leaks
from pair import MS, Pair, eventually, pair_in
from vitals import get, metrics_of, status_of, url_of, vitals

from checkpointd.demo.rig import Daemon, Rig
from checkpointd.wire.frames import Header, Kind
from checkpointd.wire.keys import loopback_pair
from checkpointd.wire.sockets import Contexts, Endpoint, bulk_dealer, control_dealer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

SEED = 1406
HALF_OPEN = 300  # connections on each port at once
ROUNDS = 100  # of strangers that come, say something and go
QUIET_EPOCHS = 60  # that the pauses under attack are compared with
GROWTH_MAX_KIB = 16 << 10  # what a process may have more after than before: allocators keep some
TCP_TIMEOUT = 10.0  # s
# The signature of a ZMTP greeting, its version, and the name of the mechanism that we do not take.
GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x01NULL".ljust(24, b"\0") + bytes(32)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_in(tmp_path) as made:
        yield made


# -------------------------------------------------------------------- strangers


class Protected:
    """A guest under protection by processes of their own, and what can be seen of it."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.guest_is_up(
            rig.guest(
                4, "--memory", "8MiB", "--program", "dirty:200@20",
                "--listen", f"127.0.0.1:{rig.udp_port()}",
            )
        )  # fmt: skip
        self.secondary = rig.secondary().ready()
        self.primary = rig.primary(4, "--interval", "20ms")
        self.primary.state("protected")
        # By then all that a protection takes has been taken, on the other side too.
        self.quiet = self.epochs(QUIET_EPOCHS)
        self.before = {daemon.name: vitals(daemon.pid) for daemon in self.daemons}
        self.said = self.primary.catch_up()

    @property
    def daemons(self) -> tuple[Daemon, Daemon]:
        return self.primary, self.secondary

    def figures(self) -> dict[str, float]:
        return metrics_of(url_of(self.rig, self.primary))

    def epochs(self, count: int) -> float:
        """Mean pause in s over so many epochs from now on."""
        before = self.figures()
        name = "checkpointd_epoch_pause_seconds"
        eventually(
            lambda: self.figures()[f"{name}_count"] >= before[f"{name}_count"] + count, "epochs"
        )
        after = self.figures()
        return (after[f"{name}_sum"] - before[f"{name}_sum"]) / (
            after[f"{name}_count"] - before[f"{name}_count"]
        )

    def is_unharmed(self) -> None:
        """Every epoch went well, the session is the same one, and nothing was kept of what came."""
        figures = self.figures()
        for result in ("failed", "abandoned"):
            assert figures[f'checkpointd_epochs_total{{result="{result}"}}'] == 0, result
        self.primary.catch_up()
        assert self.primary.said[self.said :] == []  # it never left "protected"
        (domain,) = status_of(self.rig, self.secondary)["domains"]
        assert domain["state"] == "standby"
        assert domain["alarm"] is None
        for daemon in self.daemons:
            self._has_let_go(daemon)

    def _has_let_go(self, daemon: Daemon) -> None:
        before = self.before[daemon.name]
        eventually(
            lambda: vitals(daemon.pid).descriptors <= before.descriptors,
            f"the descriptors of {daemon.name} back at {before.descriptors}",
        )
        after = vitals(daemon.pid)
        assert after.own_kib - before.own_kib <= GROWTH_MAX_KIB, (before, after)
        assert after.threads <= before.threads, (before, after)


@pytest.fixture
def protected(tmp_path: Path) -> Iterator[Protected]:
    with nothing_leaks(), Rig(tmp_path) as rig:
        yield Protected(rig)


def visit(port: int, say: bytes) -> None:
    """Connect, say it, take what is answered until the other side has enough or has answered."""
    stranger = socket.create_connection(("127.0.0.1", port), timeout=TCP_TIMEOUT)
    with stranger, suppress(OSError):  # it may end the connection while we still speak
        stranger.sendall(say)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(4096):
            pass


def junk(generator: random.Random) -> bytes:
    """What a stranger may say: noise, a part of a greeting, a greeting of another mechanism and noise after it."""
    noise = generator.randbytes(generator.randrange(1, 4000))
    return generator.choice(
        [noise, GREETING[: generator.randrange(1, 64)], GREETING + noise, b"GET / HTTP/1.1\r\n\r\n"]
    )


def test_strangers_at_both_ports(protected: Protected) -> None:
    """Noise and half greetings from some, silence from hundreds, which hold what they got as long as they may."""
    generator = random.Random(SEED)
    ports = [protected.rig.ports[name] for name in ("control", "bulk")]
    beats = protected.figures()["checkpointd_heartbeat_rtt_seconds_count"]
    with ExitStack() as stack:
        for number in range(HALF_OPEN):
            for port in ports:
                silent = socket.create_connection(("127.0.0.1", port), timeout=TCP_TIMEOUT)
                stack.enter_context(closing(silent))
                if number % 2:
                    silent.sendall(GREETING[: number % 64])
        for _ in range(ROUNDS):
            visit(generator.choice(ports), junk(generator))
        peak = vitals(protected.secondary.pid).descriptors
        attacked = protected.epochs(QUIET_EPOCHS)
    assert protected.figures()["checkpointd_heartbeat_rtt_seconds_count"] > beats
    # Reported and not judged: on a busy machine they are what the scheduler makes of them.
    log.info(
        "pauses %.2f times those before, %d descriptors at the peak",
        attacked / protected.quiet,
        peak,
    )
    protected.is_unharmed()


def test_strangers_at_the_http_ports(protected: Protected) -> None:
    generator = random.Random(SEED + 1)
    urls = [url_of(protected.rig, daemon) for daemon in protected.daemons]
    ports = [int(url.rpartition(":")[2]) for url in urls]
    with ExitStack() as stack:
        for _ in range(HALF_OPEN):
            for port in ports:
                slow = socket.create_connection(("127.0.0.1", port), timeout=TCP_TIMEOUT)
                stack.enter_context(closing(slow))
                with suppress(OSError):  # the oldest give way to the newest
                    slow.sendall(b"GET /metrics HT")
        for _ in range(ROUNDS // 5):
            visit(generator.choice(ports), junk(generator))
        attacked = protected.epochs(QUIET_EPOCHS)
        for url in urls:
            assert "checkpointd_build_info" in get(f"{url}/metrics")
    log.info("pauses %.2f times those before", attacked / protected.quiet)
    protected.is_unharmed()


# -------------------------------------------------------------------- trusted peers


def test_a_trusted_peer_that_sends_garbage_harms_no_session(pair: Pair) -> None:
    """It has the key of the engine that protects a guest, and opens connections of its own."""
    generator = random.Random(SEED + 2)
    guest, standby = pair.guest("dirty:32@50"), pair.standby()
    engine = pair.engine(guest, standby)
    engine.wait("protected")
    own, peer = loopback_pair(pair.directory / "state" / "keys")
    endpoint = Endpoint("127.0.0.1", peer.own().public, *standby.ports)
    contexts = Contexts.make()
    acceptor = standby.service._acceptor
    try:
        for make, context in ((control_dealer, contexts.control), (bulk_dealer, contexts.bulk)):
            wanted = sum(acceptor.bad_frames.values()) + ROUNDS
            with closing(make(context, endpoint, own.own())) as mad:
                for _ in range(ROUNDS):
                    parts = [generator.randbytes(generator.randrange(200)) for _ in range(2)]
                    assert mad.poll(int(TCP_TIMEOUT * 1000), zmq.POLLOUT)
                    mad.send_multipart(parts)
                while sum(acceptor.bad_frames.values()) < wanted:
                    engine.acked_beyond(1)  # and that goes on all the while
    finally:
        contexts.close()
    engine.committed()
    assert engine.states == ["syncing", "protected"]
    assert not standby.alarm(guest)
    assert standby.replica(guest).equal


# The octet that is spoilt: the last one of a page; the count of pages; the flags of what came reduced.
SPOILT = {"digest": (Kind.PAGES, -1), "record": (Kind.PAGES, 8), "reduced": (Kind.REDUCED, 24)}


@pytest.mark.parametrize("what", SPOILT)
def test_a_session_that_sends_garbage_ends_alone(pair: Pair, what: str) -> None:
    """One engine's frame is malformed: its session is suspended, and its next hello takes it up again; the other
    guest's goes on.
    """
    standby = pair.standby(silence=30_000 * MS)
    guests = [pair.guest("dirty:32@50", domid=domid) for domid in (4, 5)]
    kind, at = SPOILT[what]
    reduce = "always" if kind is Kind.REDUCED else "off"
    mad, sane = (pair.engine(guest, standby, ack_timeout=400 * MS, reduce=reduce) for guest in guests)
    for engine in (mad, sane):
        engine.wait("protected")
        engine.committed()
    send = mad.gate.send
    spoilt: list[int] = []

    def spoil(header: Header, payload: Any = b"", *, timeout_s: float) -> Any:
        if header.kind is kind and not spoilt:
            wrong = bytearray(payload)
            wrong[at] ^= 0xFF
            spoilt.append(header.epoch)
            if what != "digest":
                header = replace(header, digest=mad.service._session.key.digest(wrong))
            return send(header, bytes(wrong), timeout_s=timeout_s)
        return send(header, payload, timeout_s=timeout_s)

    mad.gate.send = spoil  # type: ignore[method-assign]  # it has lost its mind, for one frame
    eventually(lambda: standby.alarm(guests[0]), "an alarm")
    assert "suspended" in standby.alarm(guests[0])
    (epoch,) = spoilt
    eventually(lambda: mad.acked >= epoch, "the ack of the epoch that was spoilt")
    for guest, engine in zip(guests, (mad, sane), strict=True):
        engine.wait("protected")
        engine.committed()
        assert standby.replica(guest).equal
    assert "holding" in mad.states
    assert sane.states == ["syncing", "protected"]
    assert not standby.alarm(guests[1])
