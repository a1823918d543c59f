"""The configuration that xl gets has room for the guest as it is now."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from xl_guest import CLAIM

from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.native import Bitmap
from checkpointd.secondary.restorers.xl_config import with_room
from checkpointd.secondary.restorers.xl_feed import Feed
from checkpointd.secondary.restorers.xl_process import InterruptedFeedError, Limits
from checkpointd.stream.records import DomainType, RecordType
from checkpointd.stream.writer import headers, record

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
MIB = 256  # pages
STATIC = headers(DomainType.HVM) + record(RecordType.STATIC_DATA_END)


def config(**build: object) -> str:
    return json.dumps({"c_info": {"uuid": UUID}, "b_info": build}, separators=(",", ":"))


@pytest.mark.parametrize(
    ("target", "maximum", "mib", "becomes"),
    [
        (128, 256, 200, 200),  # ballooned up
        (128, 256, 257, 256),  # with special pages: never beyond what it may have
        (128, 256, 64, 128),  # ballooned down: it may grow again
        (128, 128, 129, 128),
        (128, 256, 128, 128),
    ],
)
def test_a_guest_that_was_ballooned_up_can_be_built(
    target: int, maximum: int, mib: int, becomes: int
) -> None:
    before = config(max_memkb=maximum << 10, target_memkb=target << 10, type="pvh")
    after = with_room(before, mib * MIB)
    assert json.loads(after)["b_info"]["target_memkb"] == becomes << 10
    assert json.loads(after)["b_info"]["max_memkb"] == maximum << 10
    assert (after == before) == (becomes == target)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"b_info":{}}', '{"b_info":7}', config(target_memkb="much")]
)
def test_what_is_no_configuration_is_left_to_xl(text: str) -> None:
    assert with_room(text, 1000) == text


def test_a_feed_begins_with_it() -> None:
    """The first one as any that builds the domain anew."""
    fed: list[bytes] = []

    class Receive:
        identity = None

        def start(self) -> None: ...

        def feed(self, part: Any) -> None:
            fed.append(bytes(part))

        def hold(self) -> None:
            raise InterruptedFeedError

    populated = Bitmap(1000)
    populated.add(0, 900)
    replica: Any = SimpleNamespace(
        nr_pfns=1000, populated=populated, lock=threading.Lock(), changed=None
    )
    text = config(max_memkb=4000, target_memkb=400)
    info = DomainInfo(UUID, 4, "shop", 1000, 100, "xen", HostIdentity("b", 0, 0), {"xl": text})
    receive: Any = Receive()
    feed = Feed(lambda _: receive, CLAIM, info, STATIC, replica, Limits())
    feed._thread.join()
    feed.close()
    assert feed.error is None
    assert b'"target_memkb":3600' in b"".join(fed)
