"""The oracle: a guest's memory, computed again from its input log."""

from __future__ import annotations

import random
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from embedded_sides import capture, client_of
from hosts import wait_exit, wait_step

from checkpointd import faults
from checkpointd.errors import StateError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.replay import replay

if TYPE_CHECKING:
    from embedded_sides import Side

    from checkpointd.hypervisor.embedded.kv import UdpTransport


def test_replay_computes_a_kv_guests_memory(primary: Side, transports: list[UdpTransport]) -> None:
    info = primary.guest(pages=2048)
    client = client_of(info, transports)
    rng = random.Random(11)
    for turn in range(150):
        verb = rng.choice(["set", "incr", "get", "ping", "nonsense"])
        key = f"{'n' if verb == 'incr' else 's'}{rng.randrange(40)}"
        client.request(verb, key, *([f"value {turn}"] if verb == "set" else []))
    transports[0].send(b"\0\xff garbage")
    out = rng.sample(range(2048), 300)
    moved = toolstack.balloon_out(info, out)
    assert 0 < moved < 300  # it keeps what its store lives in
    assert toolstack.balloon_in(info, out[:100]) > 0
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        image = capture(domain)
    client.set("after", "the image")
    with replay([primary.log(info)], image.step) as memory:
        assert memory.context == image.context
        assert not memory.diff(image.memory, image.populated)
        damaged = bytearray(image.memory)
        damaged[0] ^= 1
        assert memory.diff(damaged, image.populated).changed == [0]
        fewer = bytes([image.populated[0] & ~2]) + image.populated[1:]
        assert memory.diff(image.memory, fewer).missing == [1]
    with replay([primary.log(info)]) as memory:
        assert memory.step == image.step + 1
        assert memory.diff(image.memory, image.populated).changed  # one step on is another memory
    with pytest.raises(StateError, match=f"no input for step {image.step + 2}"):
        replay([primary.log(info)], image.step + 2)


def test_replay_computes_a_dirty_guests_memory(primary: Side) -> None:
    info = primary.guest("dirty:500@100")
    wait_step(info, 1000)
    pfns = random.Random(3).sample(range(1, 1024), 400)
    assert toolstack.balloon_out(info, pfns) == 400
    wait_step(info, toolstack.look(info).step + 500)
    assert toolstack.balloon_in(info, pfns[:200]) == 200
    wait_step(info, toolstack.look(info).step + 500)
    domain = primary.hypervisor.attach(info.domid)
    with closing(domain):
        image = capture(domain)
        later = capture(domain)
    for state in (image, later):
        with replay([primary.log(info)], state.step) as memory:
            assert memory.context == state.context
            assert not memory.diff(state.memory, state.populated)


def test_input_is_in_the_log_before_the_guest_sees_it(
    primary: Side, transports: list[UdpTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.ENVIRONMENT, "host.input-logged@3=kill")
    info = primary.guest()
    monkeypatch.delenv(faults.ENVIRONMENT)
    client = client_of(info, transports)
    for _ in range(2):
        client.incr("n")
    transports[0].send(b"c 3 incr n")
    wait_exit(info.host.pid)
    path = primary.log(info)
    with replay([path]) as memory:
        assert memory.step == 3
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # as if it had died while writing
    with replay([path]) as memory:
        assert memory.step == 2
    path.write_bytes(whole[:-80] + b"?" + whole[-79:])
    with pytest.raises(StateError, match="damaged"):
        replay([path])
