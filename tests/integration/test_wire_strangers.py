"""Strangers and broken peers, while a good session goes on."""

from __future__ import annotations

import logging
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import zmq
from wire_rig import (
    HELLO,
    LIMIT_S,
    MIB,
    SESSION,
    TERM,
    Rig,
    descriptors,
    eventually,
    resident_bytes,
    wire_rig,
)

from checkpointd.wire.frames import CONTROL_PAYLOAD_MAX, VERSION, Header, Kind, pack
from checkpointd.wire.keys import KeyPair, KeyStore
from checkpointd.wire.messages import encode
from checkpointd.wire.sockets import Endpoint, bulk_dealer, control_dealer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with wire_rig(tmp_path) as rig:
        yield rig


class Watch:
    """A good session whose heartbeats must go on while something happens."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.link = rig.link()
        self.link.hello(HELLO)
        eventually(rig.secondary.beats, "the good session")
        self.allowed = {rig.primary_keys.own().public}

    def goes_on(self) -> None:
        before = len(self.rig.secondary.beats())
        eventually(lambda: len(self.rig.secondary.beats()) >= before + 3, "its heartbeats")
        assert self.link.connected
        assert len(self.rig.secondary.hellos()) == 1  # the connection never broke
        assert {peer.key for peer, _, _ in self.rig.secondary.control} == self.allowed
        assert not self.rig.fatal
        assert not self.rig.secondary.fatal


def test_strangers_get_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(rig)
    ports = (rig.endpoint.control_port, rig.endpoint.bulk_port)
    authenticator = rig.secondary.acceptor.authenticator
    accepted = authenticator.accepted

    with caplog.at_level(logging.WARNING):
        # One who knows the secondary's public key, but is not on the list.
        wrong = rig.link(keys=KeyPair(*zmq.curve_keypair()))
        wrong.hello(HELLO)
        eventually(lambda: authenticator.denied >= 1, "the denial")
        eventually(lambda: "keys trust" in wrong.trouble, "a word of what to do")
    assert sum("denied a connection" in record.getMessage() for record in caplog.records) == 1

    # One who has an allowed key, but takes another for the secondary's.
    elsewhere = Endpoint("127.0.0.1", zmq.curve_keypair()[0], *ports)
    fooled = rig.link(elsewhere)
    fooled.hello(HELLO)
    eventually(lambda: "handshake" in fooled.trouble, "a word of what is wrong")

    # No CURVE at all, and one who says ZMTP and then junk, and one who says junk at once.
    for port in ports:
        plain = rig.peers.control.socket(zmq.DEALER)
        rig.stack.callback(plain.close, linger=0)
        monitor = rig.monitor(
            plain,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_DISCONNECTED,
        )
        plain.connect(f"tcp://127.0.0.1:{port}")
        plain.send_multipart(encode(HELLO, session=SESSION, term=TERM))
        assert monitor.poll(int(LIMIT_S * 1000))
        for junk in (
            b"GET / HTTP/1.1\r\n\r\n" * 100,
            b"\xff" + bytes(8) + b"\x7f" + b"\xee" * 9000,
        ):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.settimeout(LIMIT_S)
                connection.sendall(junk)
                got = 0
                with suppress(ConnectionResetError):
                    while data := connection.recv(4096):
                        got += len(data)
                assert got <= 64  # the greeting at most
    watch.goes_on()
    assert rig.secondary.errors == []
    assert not rig.secondary.bulk
    assert authenticator.accepted == accepted


@pytest.mark.slow
def test_a_flood_of_half_open_connections_costs_descriptors_for_two_seconds(rig: Rig) -> None:
    watch = Watch(rig)
    files, memory = descriptors(), resident_bytes()
    opened: list[socket.socket] = []
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15 + 32)
    # A frame that a stranger announces: below the limit (never completed) and above it.
    below = b"\x06" + (CONTROL_PAYLOAD_MAX - 100).to_bytes(8, "big")
    above = b"\x06" + (1 << 40).to_bytes(8, "big")
    try:
        for number in range(300):
            for port in (rig.endpoint.control_port, rig.endpoint.bulk_port):
                end = socket.create_connection(("127.0.0.1", port))
                opened.append(end)
                end.sendall((b"", greeting, greeting + below, greeting + above)[number % 4])
        watch.goes_on()
        assert resident_bytes() - memory < 64 * MIB
        # The secondary closes its ends after HANDSHAKE_MS; ours are left.
        eventually(lambda: descriptors() <= files + len(opened), "the strangers' end")
        watch.goes_on()
        assert rig.secondary.errors == []
        assert rig.secondary.acceptor.authenticator.denied == 0
    finally:
        for end in opened:
            end.close()
    assert resident_bytes() - memory < 64 * MIB


def test_without_an_authenticator_nobody_is_let_in(rig: Rig) -> None:
    rig.secondary.acceptor.authenticator.close()
    link = rig.link()
    link.hello(HELLO)
    eventually(lambda: "handshake" in link.trouble or "denies" in link.trouble, "the refusal")
    assert not rig.secondary.control


def test_a_broken_list_lets_nobody_in_and_says_so(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    trusted = rig.secondary_keys.directory / "trusted"
    (trusted / "bad.key").write_text("nonsense")
    with caplog.at_level(logging.ERROR):
        link = rig.link()
        link.hello(HELLO)
        eventually(lambda: "denies" in link.trouble, "the refusal")
    assert "bad.key" in caplog.text
    (trusted / "bad.key").unlink()
    eventually(rig.secondary.beats, "heartbeats once the list is whole")


def test_a_peer_is_let_in_as_soon_as_it_is_trusted(rig: Rig, tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "new").own()
    link = rig.link(keys=keys)
    link.hello(HELLO)
    eventually(lambda: "denies" in link.trouble, "the denial")
    rig.secondary_keys.trust("new", keys.public)
    eventually(rig.secondary.beats, "heartbeats")
    assert link.trouble == ""


HEAD = pack(Header(Kind.QUERY, SESSION, TERM, epoch=1))
BROKEN = {
    "nothing": [b""],
    "short header": [HEAD[:63]],
    "long header": [HEAD + b"x"],
    "three parts": [HEAD, b"x", b"y"],
    "thousand parts": [HEAD] * 1000,
    "magic": [b"XXXX" + HEAD[4:]],
    "version": [HEAD[:4] + struct.pack("<H", VERSION + 1) + HEAD[6:]],
    "kind": [HEAD[:6] + b"\x3f\x00" + HEAD[8:]],
    "other side's kind": [pack(Header(Kind.ACK, SESSION, TERM))],
    "other socket's kind": [pack(Header(Kind.DIGESTS_WANTED, SESSION, TERM))],
    "session 0": [HEAD[:16] + bytes(8) + HEAD[24:]],
    "length": [HEAD, b"unannounced"],
    "deep JSON": [pack(Header(Kind.RETIRE, SESSION, TERM, length=200_000)), b"[" * 200_000],
    "no JSON": [pack(Header(Kind.HELLO, SESSION, TERM, length=4)), b"\xff\xfe\xfd\xfc"],
    "huge number": [
        pack(Header(Kind.END, SESSION, TERM, length=100_011)),
        b'{"reason":' + b"9" * 100_000 + b"}",
    ],
}


def test_a_broken_peer_ends_nobody_elses_session(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(rig)
    keys = KeyStore(tmp_path / "broken").own()
    rig.secondary_keys.trust("broken", keys.public)
    bare = rig.raw(control_dealer, rig.peers.control, keys)
    bare.setsockopt(zmq.SNDTIMEO, int(LIMIT_S * 1000))
    with caplog.at_level(logging.WARNING):
        for parts in BROKEN.values():
            bare.send_multipart(parts)
        eventually(lambda: len(rig.secondary.errors) == len(BROKEN), "all faults")
    assert [
        record.getMessage() for record in caplog.records if "malformed" in record.getMessage()
    ] == [
        f"{rig.secondary.errors[0][0]}: malformed message: header has 0 octets, not 64; its session ends"
    ]
    assert {peer.key for peer, _ in rig.secondary.errors} == {keys.public}
    assert rig.secondary.acceptor.bad_frames[keys.public] == len(BROKEN)
    assert bare.poll(0) == 0  # nothing was answered
    watch.goes_on()

    # The same peer may begin anew on the same connection.
    bare.send_multipart(encode(HELLO, session=SESSION, term=TERM))
    assert bare.poll(int(LIMIT_S * 1000))


@pytest.mark.parametrize("which", ["control", "bulk"])
def test_an_oversized_message_ends_its_connection_only(
    rig: Rig, tmp_path: Path, which: str
) -> None:
    watch = Watch(rig)
    keys = KeyStore(tmp_path / "big").own()
    rig.secondary_keys.trust("big", keys.public)
    if which == "control":
        bare, size = rig.raw(control_dealer, rig.peers.control, keys), CONTROL_PAYLOAD_MAX + MIB
    else:
        bare, size = rig.raw(bulk_dealer, rig.peers.bulk, keys), 8 * MIB
    bare.setsockopt(zmq.SNDTIMEO, int(LIMIT_S * 1000))
    monitor = rig.monitor(bare, zmq.EVENT_DISCONNECTED)
    bare.send(bytes(size))
    assert monitor.poll(int(LIMIT_S * 1000))
    watch.goes_on()
    assert rig.secondary.errors == []
    assert not rig.secondary.bulk
