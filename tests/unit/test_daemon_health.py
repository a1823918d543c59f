from __future__ import annotations

import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from checkpointd.daemon import health
from checkpointd.daemon.health import HealthServer
from checkpointd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 10.0  # s; far beyond anything that works


class Daemon:
    """What a daemon tells the server; tests change it."""

    def __init__(self) -> None:
        self.dead: list[str] = []
        self.unready: list[str] = []
        self.document: Any = {"role": "primary"}
        self.registry = CollectorRegistry()
        Counter("checkpointd_test", "A test.", registry=self.registry).inc(7)

    def status(self) -> Any:
        if isinstance(self.document, Exception):
            raise self.document
        return self.document

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> HealthServer:
        return HealthServer(
            host,
            port,
            registry=self.registry,
            live=lambda: self.dead,
            ready=lambda: self.unready,
            status=self.status,
        )


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def server(daemon: Daemon) -> Iterator[HealthServer]:
    before = set(threading.enumerate())
    with daemon.serve() as serving:
        yield serving
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)
        assert not thread.is_alive(), thread


def get(server: HealthServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    request = urllib.request.Request(server.url + path, method=method)
    try:
        with urllib.request.urlopen(request, timeout=LONG) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def connect(server: HealthServer) -> socket.socket:
    port = int(server.url.rsplit(":", 1)[1])
    return socket.create_connection(("127.0.0.1", port), timeout=LONG)


def answer_to(server: HealthServer, data: bytes) -> bytes:
    """All that the server says until it hangs up."""
    with connect(server) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass  # it hung up before it had read all
        return answer


def test_metrics_are_what_prometheus_reads(server: HealthServer) -> None:
    code, kind, body = get(server, "/metrics")
    assert code == 200
    assert kind.startswith("text/plain; version=")
    assert "checkpointd_test_total 7.0" in body


def test_a_healthy_daemon(server: HealthServer) -> None:
    assert get(server, "/livez")[::2] == (200, "ok\n")
    assert get(server, "/readyz?verbose=1")[::2] == (200, "ok\n")


def test_the_body_says_why_not(server: HealthServer, daemon: Daemon) -> None:
    daemon.unready = ["standby lost", "output held"]
    assert get(server, "/readyz")[::2] == (503, "standby lost\noutput held\n")
    assert get(server, "/livez")[0] == 200
    daemon.dead = ["no progress for 61 s"]
    assert get(server, "/livez")[::2] == (503, "no progress for 61 s\n")


def test_status_carries_the_reasons_too(server: HealthServer, daemon: Daemon) -> None:
    daemon.unready = ["syncing"]
    code, kind, body = get(server, "/status")
    assert (code, kind) == (200, "application/json")
    assert json.loads(body) == {"role": "primary", "not_live": [], "not_ready": ["syncing"]}


def test_head_has_no_body(server: HealthServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"HEAD /livez HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Content-Length: 3\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_line", "code"),
    [
        (b"GET /etc/passwd HTTP/1.1", b"404"),
        (b"POST /status HTTP/1.1", b"501"),
        (b"GET /status HTTP/9.9", b"505"),
        (b"GET", b"400"),
        (b"\x16\x03\x01\x02\x00", b"400"),
    ],
)
def test_what_it_does_not_serve(server: HealthServer, request_line: bytes, code: bytes) -> None:
    assert code in answer_to(server, request_line + b"\r\n\r\n")
    assert get(server, "/livez")[0] == 200


def test_a_failing_daemon_is_an_error_and_not_the_end(
    server: HealthServer, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.document = RuntimeError("its secret reason")
    with caplog.at_level(logging.ERROR):
        code, _, body = get(server, "/status")
    assert (code, body) == (500, "failed; see the log\n")
    assert "its secret reason" in caplog.text
    daemon.document = {}
    assert get(server, "/status")[0] == 200


def test_an_endless_request_is_cut_off(server: HealthServer) -> None:
    endless = b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * health.HEAD_LIMIT
    assert answer_to(server, endless) == b""
    assert get(server, "/livez")[0] == 200


def test_silent_clients_give_way(server: HealthServer) -> None:
    """More connections than are allowed: the oldest end, and a scrape gets through all the same."""
    silent = [connect(server) for _ in range(3 * health.CONNECTIONS)]
    try:
        assert get(server, "/livez")[0] == 200
        silent[0].settimeout(LONG)
        assert silent[0].recv(1) == b""  # hung up
        handlers = [thread for thread in threading.enumerate() if "process_request" in thread.name]
        assert len(handlers) <= 2 * health.CONNECTIONS
    finally:
        for connection in silent:
            connection.close()


def test_a_scrape_waits_for_those_before_it_to_end(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the threads of those who gave way take their time: the next one is not turned away."""
    over, came = threading.Event(), threading.Semaphore(0)
    handle = health._Handler.handle

    def slowly(handler: health._Handler) -> None:
        handle(handler)
        assert over.wait(LONG)

    def counted(*_: object) -> bool:
        came.release()
        return True

    monkeypatch.setattr(health._Handler, "handle", slowly)
    monkeypatch.setattr(health._Server, "verify_request", counted)
    silent = [connect(server) for _ in range(2 * health.CONNECTIONS)]
    try:
        with ThreadPoolExecutor(1) as pool:
            scrape = pool.submit(get, server, "/livez")
            for _ in range(len(silent) + 1):
                assert came.acquire(timeout=LONG)
            over.set()
            assert scrape.result(LONG)[0] == 200
    finally:
        over.set()
        for connection in silent:
            connection.close()


def test_a_slow_client_is_hung_up_on(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "REQUEST_TIME", 0.05)
    monkeypatch.setattr(health, "SWEEP", 0.01)
    with daemon.serve() as serving, connect(serving) as connection:
        connection.sendall(b"GET /livez HT")  # and no more
        assert connection.recv(1) == b""


def test_closing_ends_every_connection(daemon: Daemon) -> None:
    serving = daemon.serve()
    serving.start()
    with connect(serving) as connection:
        connection.sendall(b"GET /livez")
        serving.close()
        with suppress(ConnectionResetError):  # it was not even accepted
            assert connection.recv(1) == b""


def test_a_restart_finds_its_port_again(daemon: Daemon) -> None:
    with daemon.serve() as first:
        port = int(first.url.rsplit(":", 1)[1])
        assert get(first, "/livez")[0] == 200
    with daemon.serve(port=port) as second:
        assert get(second, "/livez")[0] == 200


def test_a_taken_address_says_what_to_do(server: HealthServer, daemon: Daemon) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=f"--metrics 127.0.0.1:{port}: .*--no-metrics"):
        daemon.serve(port=port)
    with pytest.raises(UsageError, match="cannot listen there"):
        daemon.serve("no such host.invalid")


def test_ipv6(daemon: Daemon) -> None:
    try:
        serving = daemon.serve("::1")
    except UsageError:
        pytest.skip("no IPv6 on this machine")
    with serving:
        assert serving.url.startswith("http://[::1]:")
        assert get(serving, "/livez")[0] == 200
