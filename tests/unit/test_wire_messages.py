"""The control messages: round trips, and that no payload whatever brings anything but a FrameError."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.hypervisor.port import DomainInfo, EndReason, HostIdentity
from checkpointd.wire.frames import CONTROL_PAYLOAD_MAX, Channel, FrameError, Header, Kind, pack
from checkpointd.wire.messages import (
    EVERYTHING,
    Ack,
    Check,
    Checked,
    Committed,
    Echo,
    End,
    EngineLost,
    EngineLostHeard,
    FullCopyWanted,
    Heartbeat,
    Hello,
    LeftGuest,
    Message,
    Missing,
    Query,
    Refused,
    Retire,
    Retired,
    Welcome,
    decode,
    encode,
)

SESSION, TERM = 0xFEDCBA9876543210, 3
HOST = HostIdentity("0b9f3a2e-boot", 4711, 123456, "/run/checkpointd/4.sock")
INFO = DomainInfo(
    uuid="12345678-1234-4234-8234-123456789abc",
    domid=4,
    name="web server",
    nr_pfns=65536,
    ram_pages=65000,
    hypervisor="embedded",
    host=HOST,
    config={"mac": "00:16:3e:00:00:01", "port": 7000, "auto": True},
)
HELLO = Hello(
    SESSION, TERM, INFO, 100_000_000, bytes(range(32)), b"static" * 50, first_epoch=1, resume=False
)
WELCOME = Welcome(SESSION, TERM, 7, None, True, 1 << 30, HOST)

CHECKED = Checked(
    "0.1.0", "xen", "4.17", 1 << 30, 1 << 34, "disk", 1 << 40, 1 << 29, "0183fbff:80202001", "",
    guest_here=False, starts_at_boot=True, clock_ns=1_700_000_000_000_000_000,
)  # fmt: skip

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
text = st.text(st.characters(min_codepoint=33).filter(str.isprintable), max_size=64)
i63 = st.integers(0, 2**63 - 1)


def pairs(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    ordered = sorted(numbers)
    return tuple((4 * n, 4 * n + 2) for n in ordered)


messages = st.one_of(
    st.builds(Heartbeat, u64, u64, u64, u64, u32),
    st.builds(Query, u64, u32),
    st.builds(Retire, text),
    st.builds(End, st.sampled_from(EndReason)),
    st.builds(
        Welcome,
        st.just(SESSION),
        st.just(TERM),
        i63,
        st.none() | i63,
        st.booleans(),
        st.integers(1, 2**63 - 1),
        st.builds(HostIdentity, text, st.integers(1, 2**31 - 1), i63, text),
    ),
    st.builds(Refused, st.just(SESSION), st.just(TERM), st.sampled_from(["term", "memory"]), text),
    st.builds(Echo, u64, u64, st.none() | u64),
    st.builds(Ack, u64, u32, st.booleans()),
    st.builds(
        Missing,
        u64,
        u32,
        st.lists(st.integers(0, 2**29), min_size=1, max_size=20, unique=True).map(pairs),
    ),
    st.builds(Committed, u64, u64, u32),
    st.builds(FullCopyWanted, text),
    st.builds(Retired, st.just(SESSION)),
    st.builds(EngineLost, st.uuids().map(str), st.sampled_from(LeftGuest), text),
    st.builds(EngineLostHeard, st.just(SESSION)),
    st.builds(Check, st.uuids().map(str), text, st.uuids().map(str)),
    st.builds(
        Checked,
        text, st.just("xen"), text, i63, i63, st.just("memory"), i63, i63, text, text,
        st.booleans(), st.booleans(), i63,
    ),
    st.builds(
        Hello,
        st.just(SESSION),
        st.just(TERM),
        st.builds(
            DomainInfo,
            st.uuids().map(str),
            st.integers(0, 32751),
            text,
            st.integers(2**20, 2**36),
            st.integers(0, 2**20),
            st.sampled_from(["embedded", "xen"]),
            st.just(HOST),
            st.dictionaries(
                text.filter(bool), text | st.booleans() | st.integers(-(2**63), 2**63 - 1)
            ),
        ),
        st.integers(1, 2**63 - 1),
        st.binary(min_size=32, max_size=32),
        st.binary(max_size=256),
        st.integers(1, 2**63 - 1),
        st.booleans(),
    ),
)


def channel(parts: list[bytes]) -> Channel:
    return Channel(parts[0][6] >> 6)


@given(messages)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    parts = encode(message, session=SESSION, term=TERM)
    header, decoded = decode(parts, channel(parts))
    assert decoded == message
    assert (header.session, header.term) == (SESSION, TERM)


def test_fixed_payloads_are_those_of_the_specification() -> None:
    _, beat = encode(Heartbeat(1, 2, 9, 3, 4), session=1, term=0)
    assert beat.hex() == "0100000000000000020000000000000003000000000000000400000000000000"
    _, echo = encode(Echo(1, 2, None), session=1, term=0)
    assert echo.hex() == "01000000000000000200000000000000"
    _, committed = encode(Committed(9, 5, 6), session=1, term=0)
    assert committed.hex() == "05000000000000000600000000000000"


def test_free_text_loses_what_cannot_travel() -> None:
    lost = EngineLost(INFO.uuid, LeftGuest.STOPPED, "no\nmemory")
    parts = encode(lost, session=1, term=0)
    assert decode(parts, channel(parts))[1] == replace(lost, detail="no memory")
    checked = replace(CHECKED, fence="the command " + 300 * "x" + "\n")
    parts = encode(checked, session=1, term=0)
    assert decode(parts, channel(parts))[1] == replace(checked, fence=checked.fence[:256])
    for make in (Retire, FullCopyWanted):
        parts = encode(make("disk\nfull\x1b[31m" + 2000 * "x"), session=1, term=0)
        _, message = decode(parts, channel(parts))
        assert isinstance(message, (Retire, FullCopyWanted))
        assert message.reason.startswith("disk full [31mxxx")
        assert len(message.reason) == 1024


def test_a_hello_does_not_show_its_secret() -> None:
    assert "digest_seed" not in repr(HELLO)
    assert str(bytes(range(4)))[2:-1] not in repr(HELLO)


def test_the_config_may_be_any_mapping() -> None:
    hello = replace(HELLO, info=replace(INFO, config=MappingProxyType({"a": 1})))
    parts = encode(hello, session=SESSION, term=TERM)
    assert decode(parts, Channel.CONTROL_TO_SECONDARY)[1] == hello


def test_a_message_is_not_sent_under_another_session_than_its_own() -> None:
    with pytest.raises(FrameError, match="session and term"):
        encode(HELLO, session=SESSION + 1, term=TERM)
    with pytest.raises(FrameError, match="session and term"):
        encode(WELCOME, session=SESSION, term=TERM + 1)


@pytest.mark.parametrize(
    ("field", "hello"),
    [
        ("HELLO.digest_seed", replace(HELLO, digest_seed=b"short")),
        ("HELLO.static_records", replace(HELLO, static_records=bytes((128 << 10) + 1))),
        ("HELLO.interval_ns", replace(HELLO, interval_ns=0)),
        ("HELLO.first_epoch", replace(HELLO, first_epoch=0)),
        ("HELLO.info.uuid", replace(HELLO, info=replace(INFO, uuid=uuid.UUID(INFO.uuid).hex))),
        ("HELLO.info.uuid", replace(HELLO, info=replace(INFO, uuid="me"))),
        ("HELLO.info.ram_pages", replace(HELLO, info=replace(INFO, ram_pages=65537))),
        ("HELLO.info.nr_pfns", replace(HELLO, info=replace(INFO, nr_pfns=1 << 37))),
        ("HELLO.info.name", replace(HELLO, info=replace(INFO, name="two\nlines"))),
        ("HELLO.info.name", replace(HELLO, info=replace(INFO, name="\ud800"))),
        ("HELLO.info.host.pid", replace(HELLO, info=replace(INFO, host=replace(HOST, pid=-1)))),
        ("HELLO.info.config.big", replace(HELLO, info=replace(INFO, config={"big": 1 << 64}))),
        (
            "HELLO.info.config",
            replace(HELLO, info=replace(INFO, config={str(n): n for n in range(65)})),
        ),
    ],
)
def test_a_hello_out_of_bounds_is_refused_where_it_was_made(field: str, hello: Hello) -> None:
    with pytest.raises(FrameError) as caught:
        encode(hello, session=SESSION, term=TERM)
    assert caught.value.field == field


def receive(kind: Kind, payload: bytes) -> Message:
    header = Header(kind, SESSION, TERM, length=len(payload))
    return decode([pack(header), payload], kind.channel)[1]


def fault(kind: Kind, payload: bytes) -> str:
    with pytest.raises(FrameError) as caught:
        receive(kind, payload)
    return caught.value.field


@pytest.mark.parametrize(
    ("what", "payload"),
    [
        ("not JSON", b"{]"),
        ("not UTF-8", b'{"reason":"\xff"}'),
        ("byte order mark", b"\xef\xbb\xbf{}"),
        ("a list", b"[1,2]"),
        ("a number", b"12"),
        ("deep lists", b"[" * 100_000),
        ("deep objects", b'{"a":' * 50_000),
        ("a huge integer", b'{"reason":' + b"9" * 200_000 + b"}"),
        ("a float", b'{"reason":1e999}'),
        ("not a number", b'{"reason":NaN}'),
        ("a field twice", b'{"reason":"a","reason":"b"}'),
    ],
)
@pytest.mark.parametrize("kind", [Kind.RETIRE, Kind.HELLO, Kind.WELCOME, Kind.MISSING])
def test_json_garbage_names_the_message(what: str, payload: bytes, kind: Kind) -> None:
    assert fault(kind, payload) == kind.name, what


@pytest.mark.parametrize(
    ("field", "payload"),
    [
        ("RETIRE.reason", b"{}"),
        ("RETIRE.reason", b'{"reason":1}'),
        ("RETIRE.reason", b'{"reason":null}'),
        ("RETIRE.reason", b'{"reason":"\\ud800"}'),
        ("RETIRE.reason", b'{"reason":"a\\nb"}'),
        ("RETIRE.reason", b'{"reason":"' + b"x" * 1025 + b'"}'),
        ("RETIRE.more", b'{"reason":"a","more":1}'),
    ],
)
def test_a_wrong_reason_is_named(field: str, payload: bytes) -> None:
    assert fault(Kind.RETIRE, payload) == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("uuid", {"uuid": "me"}),
        ("uuid", {"uuid": uuid.UUID(INFO.uuid).hex}),
        ("guest", {"guest": "gone"}),  # an End says that
        ("guest", {"guest": None}),
        ("detail", {"detail": "x" * 1025}),
        ("detail", {"detail": "two\nlines"}),
        ("more", {"more": 1}),
    ],
)
def test_a_wrong_word_of_a_lost_engine_is_named(field: str, change: dict[str, object]) -> None:
    good = {"uuid": INFO.uuid, "guest": "running", "detail": ""}
    assert fault(Kind.ENGINE_LOST, json.dumps({**good, **change}).encode()) == f"ENGINE_LOST.{field}"


@pytest.mark.parametrize(
    "ranges",
    [
        "[]", "1", '["a"]', "[[1]]", "[[1,2,3]]", "[[2,1]]", "[[-1,1]]", "[[0,4294967296]]",
        "[[0,1],[2,3]]", "[[0,5],[3,9]]", "[[true,2]]", "[[0,null]]",
        str([[4 * n, 4 * n] for n in range(4097)]),
    ],
)  # fmt: skip
def test_wrong_ranges_are_named(ranges: str) -> None:
    assert fault(Kind.MISSING, b'{"ranges":' + ranges.encode() + b"}") == "MISSING.ranges"


def test_everything_is_missing() -> None:
    parts = encode(Missing(1, 0, EVERYTHING), session=1, term=0)
    assert parts[1] == b'{"ranges":[[0,4294967295]]}'


def test_fixed_payloads_are_checked() -> None:
    assert fault(Kind.HEARTBEAT, bytes(28) + b"\x01\0\0\0") == "reserved"
    assert fault(Kind.COMMITTED, bytes(12) + b"\x01\0\0\0") == "reserved"
    assert fault(Kind.END, b'{"reason":"boredom"}') == "END.reason"
    assert fault(Kind.REFUSED, b'{"code":"NO WAY","text":""}') == "REFUSED.code"
    echo = Header(Kind.ECHO, 1, 1, epoch=5, length=16)
    with pytest.raises(FrameError, match="epoch"):
        decode([pack(echo), bytes(16)], Channel.CONTROL_TO_PRIMARY)


def test_the_largest_payload_is_bounded() -> None:
    assert fault(Kind.RETIRE, b" " * (CONTROL_PAYLOAD_MAX + 1)) == "length"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
json_kinds = st.sampled_from(
    [
        Kind.HELLO, Kind.RETIRE, Kind.END, Kind.ENGINE_LOST, Kind.WELCOME, Kind.REFUSED, Kind.MISSING,
        Kind.CHECK, Kind.CHECKED,
    ]
)  # fmt: skip
GOOD: dict[Kind, Message] = {
    Kind.HELLO: HELLO,
    Kind.RETIRE: Retire("why"),
    Kind.END: End(EndReason.POWEROFF),
    Kind.ENGINE_LOST: EngineLost(INFO.uuid, LeftGuest.RUNNING, "killed by signal 9"),
    Kind.WELCOME: WELCOME,
    Kind.REFUSED: Refused(SESSION, TERM, "busy", "text"),
    Kind.MISSING: Missing(0, 0, ((0, 3), (9, 9))),
    Kind.CHECK: Check(INFO.uuid, INFO.name, INFO.host.boot_id),
    Kind.CHECKED: CHECKED,
}


@given(json_kinds, st.data())
@settings(max_examples=300)
def test_a_value_put_anywhere_is_taken_or_named(kind: Kind, data: st.DataObject) -> None:
    """Any field of a good message, at any depth, replaced by anything, removed, or one more put
    beside it.
    """
    document = json.loads(encode(GOOD[kind], session=SESSION, term=TERM)[1])
    place = document
    while True:
        field = data.draw(st.sampled_from([*place, "new"]))
        inner = place.get(field)
        if not isinstance(inner, dict) or not inner or data.draw(st.booleans()):
            break
        place = inner
    if data.draw(st.booleans()):
        place[field] = data.draw(json_values)
    else:
        place.pop(field, None)
    payload = json.dumps(document).encode()
    named = ""
    try:
        message = receive(kind, payload)
    except FrameError as error:
        named = error.field
    if named:
        assert named.split(".")[0] == kind.name
    else:
        parts = encode(message, session=SESSION, term=TERM)
        assert decode(parts, kind.channel)[1] == message


@given(json_kinds, st.binary(min_size=2, max_size=200))
def test_octets_that_are_no_message_are_a_frame_error(kind: Kind, payload: bytes) -> None:
    with pytest.raises(FrameError):
        receive(kind, payload)
