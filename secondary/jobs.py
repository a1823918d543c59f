"""A thread that does one job after another and hands each result to the acceptor's thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


class Jobs:
    """What a job raises ends the daemon: it is raised again on the acceptor's thread, never lost."""

    def __init__(self, name: str, post: Callable[[Callable[[], None]], None]) -> None:
        """`post` has a call made on the acceptor's thread."""
        self._post = post
        self._thread = ThreadPoolExecutor(1, name)

    def do(self, work: Callable[[], Result], then: Callable[[Result], None]) -> None:
        """`work` on the thread, after the jobs before it; then its result to `then` on the acceptor's."""

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - the thread's boundary: handed on, never lost
                self._fail(error)
            else:
                self._post(lambda: then(result))

        self._thread.submit(run)

    def close(self, last: Callable[[], None] | None = None) -> None:
        """Wait for all jobs, then for `last`, which raises here what it raises."""
        if last is not None:
            self._thread.submit(last).result()
        self._thread.shutdown(wait=True)

    def _fail(self, error: Exception) -> None:
        def fail() -> None:
            raise error

        self._post(fail)


def nothing(_: object) -> None:
    """For a job whose result nobody waits for."""
