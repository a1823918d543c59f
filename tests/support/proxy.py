"""A TCP proxy that a test can cut: what a network does to a connection."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress

CHUNK = 1 << 16  # octets forwarded at a time


class Proxy:
    """Forwards 127.0.0.1:`port` to `target` on a thread of its own. While it is cut it ends what it has and takes
    nothing.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._other: dict[socket.socket, socket.socket] = {}
        self._cut = threading.Event()
        self._done = threading.Event()  # the thread has seen the last change
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}")
        self._thread.start()

    def cut(self) -> None:
        """When this returns every connection has ended."""
        self._cut.set()
        self._poke()

    def mend(self) -> None:
        self._cut.clear()
        self._poke()

    def close(self) -> None:
        self._closing = True
        self._waker.send(b"x")
        self._thread.join()
        for each in (self._listener, self._wake, self._waker):
            each.close()
        self._selector.close()

    def _poke(self) -> None:
        self._done.clear()
        self._waker.send(b"x")
        assert self._done.wait(10), "the proxy's thread is stuck"

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake:
                    self._wake.recv(CHUNK)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._other:
                    assert isinstance(key.fileobj, socket.socket)
                    self._forward(key.fileobj)
            if self._cut.is_set():
                self._end_all()
            self._done.set()
        self._end_all()

    def _accept(self) -> None:
        ours, _ = self._listener.accept()
        if self._cut.is_set():
            ours.close()
            return
        try:
            theirs = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            ours.close()
            return
        for one, other in ((ours, theirs), (theirs, ours)):
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, one: socket.socket) -> None:
        try:
            data = one.recv(CHUNK)
            if data:
                self._other[one].sendall(data)
                return
        except OSError:
            pass
        self._end(one)

    def _end(self, one: socket.socket) -> None:
        other = self._other.pop(one, None)
        if other is not None:
            del self._other[other]
            for each in (one, other):
                self._selector.unregister(each)
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def _end_all(self) -> None:
        for one in list(self._other):
            self._end(one)
