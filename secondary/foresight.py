"""What a part will need made ready while its frames still arrive, on the replica's thread.

One frame is given out at a time, and nothing else holds one: what the assembler throws away is gone, however long that
thread is busy with something else (invariant 6).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.frames import Octets

    from .epochs import Arrived
    from .jobs import Jobs


class Foresight:
    """Of one session; all but `work` is called on the acceptor's thread."""

    def __init__(
        self,
        jobs: Jobs,
        work: Callable[[int, Octets | Arrived], None],
        done: Callable[[Octets | Arrived], None],
    ) -> None:
        """`work` is done for each frame, of an epoch, on the thread of `jobs`; then it is `done`."""
        self._jobs = jobs
        self._work = work
        self._done = done
        self._waiting: deque[tuple[int, Octets | Arrived]] = deque()
        self._busy = False

    def frame(self, epoch: int, content: Octets | Arrived) -> None:
        """A frame of pages is kept."""
        self._waiting.append((epoch, content))
        self._next()

    def over(self) -> None:
        """The part is whole, and all of it is looked at at once; or it was thrown away."""
        self._waiting.clear()

    def _next(self) -> None:
        if self._busy or not self._waiting:
            return
        self._busy = True
        epoch, content = self._waiting.popleft()

        def then(_: None) -> None:
            self._busy = False
            self._done(content)
            self._next()

        self._jobs.do(lambda: self._work(epoch, content), then)
