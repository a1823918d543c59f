"""The four sockets, with every option set on purpose (docs/wire-protocol.md, section 1).

Nothing here is left to libzmq's defaults, which queue without bound, linger for ever and let anyone
in.
"""

from __future__ import annotations

import ipaddress
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import zmq

from checkpointd.errors import WireError
from checkpointd.wire.frames import BULK_PAYLOAD_MAX, CONTROL_PAYLOAD_MAX

if TYPE_CHECKING:
    from checkpointd.wire.keys import KeyPair

Socket: TypeAlias = "zmq.Socket[bytes]"
Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"

CONTROL_PORT: Final = 10946
BULK_PORT: Final = 10947
ZAP_DOMAIN: Final = b"checkpointd"

# CURVE wraps each frame in 33 octets (ZeroMQ RFC 26: name 8, nonce 8, box 16, flags 1), and the
# limit is on the wrapped frame; 64 leaves some room.
CURVE_OVERHEAD: Final = 64

# Times in ms. A handshake is 2 round trips and one question to our own thread: 2 s is far more than
# any honest peer needs, and bounds how long a stranger holds a descriptor.
HANDSHAKE_MS: Final = 2000
CONNECT_MS: Final = 2000  # the kernel tries for two minutes, and misses that a peer is back
RECONNECT_MS: Final = 100  # first retry; doubles up to
RECONNECT_MAX_MS: Final = 1000
# s. What the kernel does to find that the other host is gone: a probe each second once nothing has
# come for so long, and the end after so many unanswered, or after as long with data unacknowledged.
# (ms for that, as libzmq has it.)
_KEEPALIVE_CONTROL: Final = (1, 2)  # gone for 3 s; a heartbeat is due far more often
_KEEPALIVE_BULK: Final = (5, 5)  # gone for 10 s; it also bounds how long a peer may take in nothing

# Messages that may wait in one direction. Control: more than are ever open at once. Bulk: 16 frames
# of 1 MiB keep the wire busy; what is in flight is bounded in octets by BulkLink and by the epoch
# limit.
CONTROL_WAITING: Final = 64
BULK_WAITING: Final = 16

BACKLOG: Final = 256  # connections that the kernel may hold for us while the I/O thread is busy


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a secondary listens, and the key it must prove. Names are resolved to IPv4; IPv6 as a
    literal.
    """

    host: str
    key: bytes  # public key of the secondary, 40 octets of Z85
    control_port: int = CONTROL_PORT
    bulk_port: int = BULK_PORT

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{self.control_port}:{self.bulk_port}"


def is_loopback(host: str) -> bool:
    """Whether this host is this machine, by address or as `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Contexts:
    """One context, and so one I/O thread, for each connection: a heartbeat never waits for pages to
    be encrypted.
    """

    control: Context
    bulk: Context

    @classmethod
    def make(cls) -> Contexts:
        """Raises WireError if this libzmq cannot encrypt."""
        if not zmq.has("curve"):
            raise WireError("this libzmq has no CURVE encryption: install one with libsodium")
        return cls(_context(), _context())

    def close(self) -> None:
        """Ends both. Waits for sockets that are still open: close their owners first."""
        self.control.term()
        self.bulk.term()


def _context() -> Context:
    context: Context = zmq.Context(io_threads=1)
    context.set(zmq.MAX_SOCKETS, 64)  # ours, not connections; a leak then shows early
    context.set(zmq.BLOCKY, 0)  # sockets made by libraries on this context linger for 0, too
    return context


def raise_file_limit() -> int:
    """Let this process have as many descriptors as the system allows (each stranger costs one for 2
    s).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def control_dealer(context: Context, endpoint: Endpoint, keys: KeyPair) -> Socket:
    """The primary's control socket, connecting. Belongs to the calling thread."""
    return _dealer(context, endpoint, endpoint.control_port, keys, bulk=False)


def bulk_dealer(context: Context, endpoint: Endpoint, keys: KeyPair) -> Socket:
    """The primary's bulk socket, connecting. Belongs to the calling thread."""
    return _dealer(context, endpoint, endpoint.bulk_port, keys, bulk=True)


def control_router(context: Context, address: str, port: int, keys: KeyPair) -> Socket:
    """The secondary's control socket, listening. The authenticator must run already."""
    return _router(context, address, port, keys, bulk=False)


def bulk_router(context: Context, address: str, port: int, keys: KeyPair) -> Socket:
    """The secondary's bulk socket, listening. The authenticator must run already."""
    return _router(context, address, port, keys, bulk=True)


def bound_port(socket: Socket) -> int:
    """The port a router listens on, which port 0 left to the kernel."""
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def _dealer(
    context: Context, endpoint: Endpoint, port: int, keys: KeyPair, *, bulk: bool
) -> Socket:
    socket = context.socket(zmq.DEALER)
    try:
        _common(socket, endpoint.host, keys, bulk=bulk)
        socket.setsockopt(zmq.CURVE_SERVERKEY, endpoint.key)  # pinned: nobody else can answer
        # Queue only for a connection whose handshake is done: what waits for a dead peer is lost
        # anyway.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.connect(f"tcp://{_bracketed(endpoint.host)}:{port}")
    except zmq.ZMQError as error:
        socket.close()
        raise WireError(f"cannot connect to {endpoint}: {error.strerror}") from error
    return socket


def _router(context: Context, address: str, port: int, keys: KeyPair, *, bulk: bool) -> Socket:
    socket = context.socket(zmq.ROUTER)
    try:
        _common(socket, address, keys, bulk=bulk)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no authenticator, no connection: fail closed
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say EHOSTUNREACH instead of dropping unseen
        socket.setsockopt(zmq.ROUTER_HANDOVER, 0)  # nobody takes over another's route
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        socket.bind(f"tcp://{_bracketed(address)}:{port}")
    except zmq.ZMQError as error:
        socket.close()
        raise WireError(
            f"cannot listen on {_bracketed(address)}:{port}: {error.strerror}; is another secondary"
            " running? Stop it or choose another address"
        ) from error
    return socket


def _common(socket: Socket, host: str, keys: KeyPair, *, bulk: bool) -> None:
    waiting = BULK_WAITING if bulk else CONTROL_WAITING
    payload = BULK_PAYLOAD_MAX if bulk else CONTROL_PAYLOAD_MAX
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.LINGER, 0)  # closing must free staged memory now, not when the peer reads
    socket.setsockopt(zmq.SNDHWM, waiting)
    socket.setsockopt(zmq.RCVHWM, waiting)
    socket.setsockopt(zmq.MAXMSGSIZE, payload + CURVE_OVERHEAD)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    # No heartbeats of ZMTP's own. Up to 4.3.5 their timer aborts the process (assertion !_io_error)
    # when a connection ends whose input was held back by RCVHWM: a primary that dies in mid-epoch
    # would take the secondary along.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 0)
    idle, probes = _KEEPALIVE_BULK if bulk else _KEEPALIVE_CONTROL
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, idle)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, probes)
    socket.setsockopt(zmq.TCP_MAXRT, (idle + probes) * 1000)
    # Only for literals: with it libzmq resolves `localhost` to ::1, where nobody may listen.
    socket.setsockopt(zmq.IPV6, ":" in host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
