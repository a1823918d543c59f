"""A daemon's HTTP: /metrics for Prometheus, /livez and /readyz for supervisors, /status for all.

Plain GET and HEAD, one request a connection, nothing to authenticate: it listens on loopback unless
told otherwise, changes nothing, and shows no secret. Clients that are slow, many or hostile are
bounded: so many connections at once (the oldest gives way), so much time each, a short request.
"""

from __future__ import annotations

import http.server
import io
import json
import logging
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from checkpointd import __version__
from checkpointd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

log = logging.getLogger(__name__)

CONNECTIONS = 16  # at once; Prometheus, a supervisor and a few people need less
REQUEST_TIME = 5.0  # s from accept to close; an answer takes milliseconds
SWEEP = 0.1  # s between two looks for connections that took too long; also what close() waits
HEAD_LIMIT = 8192  # octets of request line and header fields


class HealthServer:
    """Serves from its own threads, from start() to close().

    `live` and `ready` give the reasons why not (empty: all well), `status` what /status shows as
    JSON. They are called in threads of this server, and may be called at any time.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        live: Callable[[], list[str]],
        ready: Callable[[], list[str]],
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.registry, self.live, self.ready, self.status = registry, live, ready, status
        try:
            self._server = _Server(self, host, port)
        except OSError as error:
            raise UsageError(
                f"--metrics {host}:{port}: cannot listen there: {error.strerror}; "
                "choose another address, or --no-metrics"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(SWEEP,), name="http", daemon=True
        )

    @property
    def url(self) -> str:
        """http://HOST:PORT, with the port it got if it asked for any."""
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else host
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end every connection."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body for a GET of `path`."""
        match path:
            case "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self.registry)
            case "/livez":
                return _verdict(self.live())
            case "/readyz":
                return _verdict(self.ready())
            case "/status":
                document = {**self.status(), "not_live": self.live(), "not_ready": self.ready()}
                return HTTPStatus.OK, "application/json", json.dumps(document).encode() + b"\n"
            case _:
                return _text(HTTPStatus.NOT_FOUND, "there are /metrics, /livez, /readyz, /status")


def _text(code: HTTPStatus, text: str) -> tuple[HTTPStatus, str, bytes]:
    return code, "text/plain; charset=utf-8", text.encode() + b"\n"


def _verdict(reasons: list[str]) -> tuple[HTTPStatus, str, bytes]:
    if reasons:
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, "\n".join(reasons))
    return _text(HTTPStatus.OK, "ok")


class _Server(http.server.ThreadingHTTPServer):
    """Bounds what clients may take: at most CONNECTIONS are open, and at most as many more are ending.

    A new one takes the place of the oldest, and is served once no more than that are still ending.
    """

    daemon_threads = True
    allow_reuse_address = True  # a restart finds its port again
    request_queue_size = 128  # a burst waits in the kernel, not for its next SYN

    def __init__(self, health: HealthServer, host: str, port: int) -> None:
        self.health = health
        self._since: dict[socket.socket, float] = {}  # the open ones, the oldest first
        self._ending: set[socket.socket] = set()  # hung up on, their threads not ended yet
        self._changed = threading.Condition()
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        super().__init__(address, _Handler)  # type: ignore[arg-type] # IPv6 has more

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            if len(self._since) >= CONNECTIONS:
                self._evict(next(iter(self._since)))
            self._since[request] = time.monotonic()
            # Threads that were hung up on end at once, but for a machine that is too busy to let them.
            room = self._changed.wait_for(lambda: len(self._ending) <= CONNECTIONS, REQUEST_TIME)
        if room:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Between requests: end connections that took too long."""
        limit = time.monotonic() - REQUEST_TIME
        with self._changed:
            for late in [connection for connection, since in self._since.items() if since < limit]:
                self._evict(late)

    def shutdown_request(self, request: Any) -> None:
        with self._changed:
            self._since.pop(request, None)
            self._ending.discard(request)
            self._changed.notify()
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._changed:
            for connection in list(self._since):
                self._evict(connection)

    def _evict(self, connection: socket.socket) -> None:
        """Wake the thread that reads from it or writes to it; that thread then closes it. Under `_changed`."""
        del self._since[connection]
        self._ending.add(connection)
        with suppress(OSError):  # it has hung up itself
            connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
        log.debug("HTTP request from %s failed", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version = f"checkpointd/{__version__}"
    sys_version = ""
    timeout = REQUEST_TIME

    def handle(self) -> None:
        """Take in a bounded head first: the base class would allow for megabytes of fields."""
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self.connection.recv(HEAD_LIMIT - len(head))
            if not piece:  # hung up, or too long
                return
            head += piece
        self.rfile.close()
        self.rfile = io.BytesIO(head)
        self.close_connection = True
        self.handle_one_request()

    def do_GET(self) -> None:
        try:
            code, kind, body = self.server.health.answer(urlsplit(self.path).path)
        except Exception:
            log.exception("HTTP %s failed", self.path)
            code, kind, body = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "failed; see the log")
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - http.server looks for this name

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        log.debug(format, *args)
