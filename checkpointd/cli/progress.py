"""A progress bar on a terminal, drawn by its own thread: a terminal that blocks stops nobody."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

DRAW_EVERY = 0.2  # s; as often as an eye follows
WIDTH = 30  # characters of bar
CLOSE_TIMEOUT = 0.5  # s; what a blocked terminal may cost at the end


@contextmanager
def shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives what is told how much of how much is done; it shows that if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with Progress(what) as progress:
        yield progress.update


class Progress:
    """``first copy [#######       ]  23%`` until update() says all is done, or the context ends."""

    def __init__(self, what: str, descriptor: int = 2) -> None:
        self._what = what
        self._descriptor = descriptor
        self._share = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def update(self, done: int, total: int) -> None:
        """From any thread, as often as one likes; costs nothing."""
        self._share = min(1.0, done / total) if total else 1.0
        if done >= total:
            self._ended.set()

    def _draw(self) -> None:
        while not self._ended.wait(DRAW_EVERY):
            self._show()
        if self._share:  # else there never was anything to show
            self._show()
            os.write(self._descriptor, b"\n")

    def _show(self) -> None:
        if self._share:
            bar = ("#" * int(self._share * WIDTH)).ljust(WIDTH)
            os.write(self._descriptor, f"\r{self._what} [{bar}] {self._share:4.0%}".encode())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(CLOSE_TIMEOUT)
