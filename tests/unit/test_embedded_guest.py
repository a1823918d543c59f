"""The guest's programs and the input log, through replay: no process, no network."""

from __future__ import annotations

import os
import random
import struct
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointd.errors import DomainBusyError, HypervisorError, StateError
from checkpointd.hypervisor.embedded import inputlog
from checkpointd.hypervisor.embedded.host import bind
from checkpointd.hypervisor.embedded.lib import ffi, lib
from checkpointd.hypervisor.embedded.place import Place
from checkpointd.hypervisor.embedded.records import Context, static_records
from checkpointd.hypervisor.embedded.replay import Memory, replay
from checkpointd.stream.verify import verify
from checkpointd.stream.writer import write_image

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

UUID = "12345678-9abc-4ef0-8123-456789abcdef"
DATAGRAM, OUT, IN = lib.STEP_DATAGRAM, lib.STEP_BALLOON_OUT, lib.STEP_BALLOON_IN


def entry(step: int, kind: int, data: bytes) -> bytes:
    """Written as the format says, by other means than the host's."""
    sender = bytes(10) + b"\xff\xff\x7f\0\0\1"
    head = struct.pack(
        "<4sHHQ16sII", b"CKIN", kind, 5000, step, sender, len(data), zlib.crc32(data)
    )
    return head + struct.pack("<II", zlib.crc32(head), 0) + data


def pfns(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def write_log(
    path: Path, entries: Iterable[bytes], *, program: str = "kv", nr_pfns: int = 64, base: int = 0
) -> Path:
    path.write_bytes(inputlog.header(UUID, base, nr_pfns, program) + b"".join(entries))
    return path


class Guest:
    """A guest without a host: each datagram is one step."""

    def __init__(self, program: str = "kv", nr_pfns: int = 64) -> None:
        fd = os.memfd_create("test-guest")
        os.truncate(fd, nr_pfns * 4096)
        self.machine = lib.machine_new(fd, nr_pfns, ffi.NULL, 1)
        os.close(fd)
        assert lib.guest_boot(self.machine, program.encode(), bytes(16)) == 0
        self.memory = Memory(self.machine)
        self.result = ffi.new("struct step_result *")

    def ask(self, data: bytes | str) -> str:
        data = data.encode() if isinstance(data, str) else data
        assert lib.guest_step(self.machine, DATAGRAM, data, len(data), self.result) == 0
        return bytes(ffi.buffer(self.result.reply, self.result.reply_bytes)).decode("latin-1")


@pytest.fixture
def guest():  # type: ignore[no-untyped-def]  # a generator of Guest
    guest = Guest()
    yield guest
    guest.memory.close()


def test_the_store(guest: Guest) -> None:
    assert guest.ask("a 1 set k hello world") == "a 1 1 ok 1 hello world"
    assert guest.ask("b 1 get k") == "b 1 2 ok 1 hello world"
    assert guest.ask("a 2 incr n") == "a 2 3 ok 1 1"
    assert guest.ask("a 3 incr n\n") == "a 3 4 ok 2 2"
    assert guest.ask("a 4 get nothing") == "a 4 5 ok 0 "
    assert guest.ask("a 5 ping") == "a 5 6 ok"
    assert guest.ask("a 6 dance") == "a 6 7 err unknown verb"
    assert guest.ask("a 7 set") == "a 7 8 err no key"


def test_a_retry_is_answered_and_not_executed_twice(guest: Guest) -> None:
    first = guest.ask("a 1 incr n")
    assert guest.ask("a 1 incr n") == first
    assert guest.ask("a 2 incr n") == "a 2 3 ok 2 2"
    assert guest.ask("a 1 incr n") == ""  # older than the last: its client has moved on
    assert guest.ask("a 3 get n") == "a 3 5 ok 2 2"


@pytest.mark.parametrize(
    "data",
    [b"", b"a", b"a 1", b"a x ping", b"a -1 ping", b"a 1  ping", b"\xff\0", b"a 1 set k " + b"v" * 161,
     b"i" * 64 + b" 1 ping", b"a 1 set " + b"k" * 64 + b" v", b"a 1 ping" + b" " * 1500, b"a 9999999999999999999 ping"],
)  # fmt: skip
def test_garbage_is_answered_as_such_and_changes_nothing_but_the_step(
    guest: Guest, data: bytes
) -> None:
    before = [guest.memory.page(pfn) for pfn in range(1, 64)]
    assert guest.ask(data).endswith("1 err bad request")
    assert [guest.memory.page(pfn) for pfn in range(1, 64)] == before


def test_a_full_store_says_so_and_keeps_what_it_has() -> None:
    guest = Guest(nr_pfns=16)  # eight pages of values
    replies = [guest.ask(f"a {seq} set key{seq} {seq}") for seq in range(1, 200)]
    kept = [seq for seq, reply in enumerate(replies, 1) if " ok " in reply]
    assert len(kept) == 7 * 16 or len(kept) == 8 * 16
    assert all(replies[seq - 1].endswith("err full") for seq in range(1, 200) if seq not in kept)
    for seq in kept:
        assert guest.ask(f"a {seq + 1000} get key{seq}").endswith(f" ok 1 {seq}")
    guest.memory.close()


def test_the_client_silent_longest_is_forgotten_first() -> None:
    guest = Guest(nr_pfns=16)  # two pages of eight clients
    for client in range(40):
        guest.ask(f"c{client} 1 incr n")
    assert guest.ask("c39 1 incr n") == "c39 1 40 ok 40 40"  # remembered
    assert guest.ask("c0 1 incr n").endswith("ok 41 41")  # long forgotten, so it is new
    guest.memory.close()


@pytest.mark.parametrize(
    ("text", "known"),
    [("kv", True), ("dirty:1", True), ("dirty:10@5", True), ("", False), ("kv2", False), ("dirty:", False),
     ("dirty:0", False), ("dirty:-1", False), ("dirty:5@", False), ("dirty:5@0", False), ("dirty:5@1x", False),
     ("dirty:5 ", False), ("dirty:" + "1" * 70, False)],
)  # fmt: skip
def test_programs(text: str, known: bool) -> None:
    assert lib.program_parse(text.encode(), ffi.new("struct program *")) is known


def test_dirty_writes_each_of_its_pages_once_a_round() -> None:
    guest = Guest("dirty:50@10", nr_pfns=128)
    for _ in range(50):
        assert lib.guest_ticks(guest.machine, 1) == 0
    written = [pfn for pfn in range(1, 128) if any(guest.memory.page(pfn) or b"")]
    assert len(written) == 50
    gaps = {b - a for a, b in pairwise(written)}
    assert max(gaps) <= 8  # scattered over all of it
    assert guest.ask("a 1 ping") == "a 1 51 ok"
    guest.memory.close()


# ---- the input log ----

steps = st.lists(
    st.one_of(
        st.tuples(
            st.just(DATAGRAM),
            st.sampled_from([b"a %d set k v", b"a %d incr n", b"b %d get k", b"\0"]),
        ),
        st.tuples(
            st.sampled_from([OUT, IN]),
            st.lists(st.integers(0, 80), max_size=9).map(lambda p: pfns(*p)),
        ),
    ),
    max_size=12,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(steps, st.data())
def test_a_log_replays_to_one_memory_wherever_it_is_cut(
    tmp_path: Path, inputs: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    entries = [
        entry(step, kind, what % step if b"%d" in what else what)
        for step, (kind, what) in enumerate(inputs, 1)
    ]
    whole = write_log(tmp_path / "whole", entries)
    cut = data.draw(st.integers(0, len(entries)))
    # The first host died with entries that were never part of an epoch; the second goes on from the cut.
    void = [entry(step, DATAGRAM, b"x 1 incr lost") for step in range(cut + 1, cut + 3)]
    first = write_log(tmp_path / "first", entries[:cut] + void)
    second = write_log(tmp_path / "second", entries[cut:], base=cut)
    torn = tmp_path / "torn"
    lost = data.draw(st.integers(1, 40))
    with replay([whole]) as expected, replay([first, second], len(entries)) as chained:
        assert expected.step == len(entries)
        image = b"".join(expected.page(pfn) or bytes(4096) for pfn in range(64))
        assert not chained.diff(image, expected.populated)
        assert chained.context == expected.context
    if entries:
        torn.write_bytes(whole.read_bytes()[:-lost])
        with replay([torn]) as memory:
            assert memory.step == len(entries) - 1


def test_damage_inside_a_log_is_found(tmp_path: Path) -> None:
    entries = [entry(step, DATAGRAM, b"a %d incr n" % step) for step in range(1, 6)]
    path = write_log(tmp_path / "log", entries)
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(50):
        at = rng.randrange(len(whole) - len(entries[-1]))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(StateError, match=r"log"):
            replay([path])


def test_logs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = write_log(tmp_path / "1", [entry(1, DATAGRAM, b"a 1 ping")])
    other = write_log(tmp_path / "2", [], program="dirty:3", base=1)
    skipping = write_log(tmp_path / "3", [entry(2, DATAGRAM, b"a 1 ping")])
    backwards = write_log(tmp_path / "4", [entry(1, DATAGRAM, b"a 1 ping")] * 2)
    nonsense = tmp_path / "5"
    nonsense.write_bytes(b"CKINPLOG")
    for logs, what in (
        ([first, other], "another guest"), ([other], "first log"), ([skipping], "no input for step 1"),
        ([backwards], "after step 1"), ([nonsense], "not an input log"), ([tmp_path / "6"], "cannot be read"),
        ([], "first log"),
    ):  # fmt: skip
        with pytest.raises(StateError, match=what):
            replay(logs)


def test_an_unknown_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not know"):
        replay([write_log(tmp_path / "log", [], program="quake")])


# ---- records, places, addresses ----


def test_the_stream_of_an_embedded_guest_verifies(tmp_path: Path) -> None:
    with replay([write_log(tmp_path / "log", [entry(1, DATAGRAM, b"a 1 incr n")])]) as memory:
        image, tail = b"".join(memory.page(pfn) or b"" for pfn in range(64)), memory.context
    with (tmp_path / "image").open("wb") as file:
        write_image(file, static_records(), [(range(64), image)], tail)
    report = verify([(tmp_path / "image").read_bytes()])
    assert report.ok, report.findings
    assert Context.parse(tail) == Context(1, 64, UUID, "kv")
    for bad in (b"", tail[:-8], tail[:40] + b"?" + tail[41:], tail + b"12345678"):
        with pytest.raises(HypervisorError):
            Context.parse(bad)


def test_a_place_is_claimed_by_one(tmp_path: Path) -> None:
    namespace = tmp_path / "embedded" / "primary"
    place = Place.claim(namespace, 4)
    with pytest.raises(DomainBusyError, match="domain 4"):
        Place.claim(namespace, 4)
    following = Place.claim_next(namespace, 4)
    assert following.domid == 5
    place.close()
    again = Place.claim_next(namespace, 4)
    assert again.domid == 4
    again.close()
    following.close()


def test_a_taken_or_senseless_address_is_told() -> None:
    with bind("127.0.0.1:0") as udp, pytest.raises(HypervisorError, match="cannot be taken"):
        bind(f"127.0.0.1:{udp.getsockname()[1]}")
    for address in ("", "nowhere", "127.0.0.1:x", "127.0.0.1:65536"):
        with pytest.raises(HypervisorError, match="HOST:PORT"):
            bind(address)
