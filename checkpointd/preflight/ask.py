"""Asking a secondary by CHECK and CHECKED (docs/wire-protocol.md, section 4): one question, in no guest's session."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from checkpointd.errors import WireError
from checkpointd.preflight.facts import Peer
from checkpointd.wire.frames import Channel, FrameError, split
from checkpointd.wire.initiator import TROUBLE
from checkpointd.wire.messages import Check, Checked, decode_payload, encode
from checkpointd.wire.sockets import bulk_dealer, control_dealer

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.keys import KeyPair
    from checkpointd.wire.sockets import Context, Contexts, Endpoint, Socket

# s for a handshake and for the answer: both take two round trips, and a secondary answers between two turns of work.
TIMEOUT: Final = 2.0

_FAILURES: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_CONNECT_RETRIED
)


def ask(
    contexts: Contexts, endpoint: Endpoint, keys: KeyPair, check: Check, timeout: float = TIMEOUT
) -> Peer:
    """What the secondary answers, and whether its bulk port can be reached. WireError: it does not answer.

    `timeout` in seconds, for each of three steps.
    """
    with ExitStack() as stack:
        control = control_dealer(contexts.control, endpoint, keys)
        stack.callback(control.close)
        _handshake(control, contexts.control, endpoint, timeout)
        session = 1 + secrets.randbelow((1 << 64) - 1)
        sent_at = time.time_ns()
        control.send_multipart(encode(check, session=session, term=0))
        checked = _answer(control, session, endpoint, timeout)
        middle = (sent_at + time.time_ns()) // 2  # the answer was made about then
        bulk_trouble = ""
        bulk = bulk_dealer(contexts.bulk, endpoint, keys)
        stack.callback(bulk.close)
        try:
            _handshake(bulk, contexts.bulk, endpoint, timeout)
        except WireError as error:
            bulk_trouble = str(error)
    return Peer(checked, checked.clock_ns - middle, bulk_trouble)


def _handshake(socket: Socket, context: Context, endpoint: Endpoint, timeout: float) -> None:
    """Wait until the other side has accepted our key; WireError with why not."""
    address = f"inproc://preflight-{secrets.token_hex(8)}"
    monitor = socket.get_monitor_socket(_FAILURES | zmq.EVENT_HANDSHAKE_SUCCEEDED, address)
    trouble = TROUBLE[zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL]
    try:
        left = _countdown(timeout)
        while monitor.poll(round(left() * 1000)):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            trouble = TROUBLE[event]
            if event != zmq.EVENT_CONNECT_RETRIED:
                break  # libzmq may try again; a key that is denied stays so for this once
    finally:
        socket.disable_monitor()
        monitor.close()
    raise WireError(trouble.format(endpoint))


def _answer(socket: Socket, session: int, endpoint: Endpoint, timeout: float) -> Checked:
    left = _countdown(timeout)
    while socket.poll(round(left() * 1000)):
        try:
            header, payload = split(socket.recv_multipart(), Channel.CONTROL_TO_PRIMARY)
            if header.session != session:
                continue
            message = decode_payload(header, payload)
        except FrameError as error:
            raise WireError(
                f"{endpoint} answers in words that this side does not know ({error}): run one release on both sides"
            ) from error
        if isinstance(message, Checked):
            return message
    raise WireError(
        f"{endpoint} accepts this side's key and does not answer within {timeout:g} s: is it stuck, or of "
        "another release?"
    )


def _countdown(timeout: float) -> Callable[[], float]:
    """Seconds that are left of `timeout`, from now on."""
    deadline = time.monotonic() + timeout
    return lambda: max(0.0, deadline - time.monotonic())
