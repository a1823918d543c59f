"""Orders to an embedded host: one JSON object a message on its SOCK_SEQPACKET socket, answered by one.

A request has "op"; an answer has "error" (and "kind", the class of error) or the results. Descriptors travel
beside an answer or a request (SCM_RIGHTS).
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import TYPE_CHECKING, Any

from checkpointd import errors
from checkpointd.errors import HostLostError, HypervisorError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Message = dict[str, Any]

MESSAGE_MAX = 128 << 10  # octets; the kernel's default send buffer holds 208 KiB
DESCRIPTORS_MAX = 6  # attach hands over the most
# Seconds. A host answers within milliseconds; one that does not is stopped or starved, and a person should know.
TIMEOUT = 5.0

# What an answer's "kind" may name; anything else is raised as HypervisorError.
_KINDS = {kind.__name__: kind for kind in (errors.DomainBusyError, errors.NoSuchDomainError)}


def _short(directory: int, name: str) -> str:
    """A path to `name` that is never too long: a Unix socket's has at most 107 octets."""
    return f"/proc/self/fd/{directory}/{name}"


def listen(path: Path) -> socket.socket:
    directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(_short(directory, path.name))
        listener.listen()
    finally:
        os.close(directory)
    return listener


def connect(path: Path, timeout: float = TIMEOUT) -> socket.socket:
    """Raises OSError: no such socket, nobody listens, or no answer within `timeout` seconds."""
    directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout)
        connection.connect(_short(directory, path.name))
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(directory)
    return connection


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    rights = (
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        if descriptors
        else []
    )
    connection.sendmsg([json.dumps(message).encode()], rights, socket.MSG_NOSIGNAL)


def receive(connection: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors, the caller's to close; None once the other side has closed."""
    space = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)
    data, ancillary, _, _ = connection.recvmsg(MESSAGE_MAX, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) // 4 * 4])
    if not data:
        return None
    return json.loads(data), list(descriptors)


def failure(error: Exception) -> Message:
    return {"error": str(error), "kind": type(error).__name__}


def call(
    connection: socket.socket, request: Message, descriptors: Sequence[int] = ()
) -> tuple[Message, list[int]]:
    """Send a request and wait for its answer, as long as the socket's timeout says.

    Raises HostLostError if the host is gone, HypervisorError if it refuses or does not answer.
    """
    try:
        send(connection, request, descriptors)
        answer = receive(connection)
    except TimeoutError:
        raise HypervisorError(
            f"the guest's host did not answer {request['op']!r} in time: "
            "look whether its process is stopped or starved"
        ) from None
    except OSError as error:
        raise HostLostError(f"the guest's host is gone ({error.strerror})") from error
    if answer is None:
        raise HostLostError("the guest's host is gone (it closed its control socket)")
    message, received = answer
    if "error" in message:
        raise _KINDS.get(message.get("kind", ""), HypervisorError)(message["error"])
    return message, received
