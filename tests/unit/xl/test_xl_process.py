"""One `xl migrate-receive -r`, held and fed."""

from __future__ import annotations

import os
import signal
import struct
from typing import TYPE_CHECKING

import pytest
from xl_guest import CONFIG, HASTY, PATIENCE, PATIENT, STATIC, UUID, tail, until

from checkpointd.errors import HypervisorError
from checkpointd.secondary.restorers.xl_process import InterruptedFeedError, XlReceive
from checkpointd.stream.records import RecordType
from checkpointd.stream.remus import SEAL, RemusStream
from checkpointd.stream.writer import record

if TYPE_CHECKING:
    from fake_xl import FakeDomains


def begin(receive: XlReceive) -> RemusStream:
    parts: list[object] = []
    receive.start()
    stream = RemusStream(parts.append)
    stream.begin(CONFIG, STATIC)
    receive.feed(parts.pop())  # type: ignore[arg-type]  # octets
    receive.hold()
    return stream


def one_page(pfn: int) -> bytes:
    return record(RecordType.PAGE_DATA, struct.pack("<IIQ", 1, 0, pfn) + bytes(4096))


def test_what_is_left_in_the_pipe_tells_that_an_epoch_is_not_applied(xen: FakeDomains) -> None:
    receive = XlReceive(xen, UUID, limits=PATIENT)
    os.mkfifo(xen.folder / "orders" / "gate-open")
    xen.order("gate")
    try:
        begin(receive)
        for epoch in (1, 2):
            receive.feed(one_page(epoch))
            receive.feed(tail(epoch))
            receive.seal(tail(epoch))
            if epoch == 2:
                until(lambda: receive.unread == 8, "CHECKPOINT_END has not been read")
                with pytest.raises(HypervisorError, match="has not applied an epoch"):
                    receive.wait_applied(0.05)
                (xen.folder / "orders" / "gate-open").write_bytes(b"1")
            receive.wait_applied(PATIENCE)
            domain = xen.get(UUID)
            assert domain is not None
            assert domain["epochs"] == epoch
        assert receive.finish() == receive.domid
        assert set(xen.pages(UUID)) == {1, 2}
    finally:
        receive.abort()


@pytest.mark.parametrize("by", ["us", "somebody else"])
def test_a_domain_that_somebody_has_let_go_is_let_go(xen: FakeDomains, by: str) -> None:
    """Xen refuses to unpause one that runs. That is no failed activation: it would be destroyed, and built anew."""
    receive = XlReceive(xen, UUID, limits=PATIENT)
    try:
        begin(receive)
        receive.feed(one_page(1))
        receive.feed(tail(1))
        receive.seal(tail(1))
        domid = receive.finish()
        if by == "somebody else":
            xen.unpause(domid)
        receive.release()
        found = xen.find(UUID)
        assert found is not None
        assert not found.paused
        xen.pause(domid)
        xen.pause(domid)
        receive.release()
        found = xen.find(UUID)
        assert found is not None
        assert found.paused, "somebody holds it, too"
    finally:
        receive.abort()


def test_an_xl_that_reads_nothing_is_given_up_and_no_seal_is_torn(xen: FakeDomains) -> None:
    receive = XlReceive(xen, UUID, limits=HASTY)
    try:
        begin(receive)
        domain = xen.get(UUID)
        assert domain is not None
        os.kill(domain["xl"], signal.SIGSTOP)
        with pytest.raises(HypervisorError, match="read nothing for"):
            receive.feed(one_page(1) * 2000)  # more than any pipe takes
        full = receive.unread
        with pytest.raises(HypervisorError, match="read nothing for"):
            receive.seal(tail(1))
        assert receive.unread == full, "all of the seal or nothing"
    finally:
        receive.abort()
    assert xen.get(UUID) is None


def test_an_interrupted_feed_ends_at_once(xen: FakeDomains) -> None:
    interrupt = os.eventfd(0)
    receive = XlReceive(xen, UUID, interrupt=interrupt, limits=PATIENT)
    try:
        begin(receive)
        os.eventfd_write(interrupt, 1)
        with pytest.raises(InterruptedFeedError):
            receive.wait(receive._exited)
    finally:
        receive.abort()
        os.close(interrupt)


def test_a_seal_is_small_enough_to_be_written_as_a_whole() -> None:
    assert len(SEAL) + 8 <= 512, "POSIX's least PIPE_BUF"
