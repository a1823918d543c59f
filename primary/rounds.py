"""When copying a guest that runs has done what it can, so that the guest is to be stopped. Pure."""

from __future__ import annotations


class LiveRounds:
    """Those of one epoch. Each leaves what its arena did not take, and what the guest has written meanwhile."""

    def __init__(self, arena_pages: int, most_pages: int) -> None:
        """`most_pages`: what all of them together may stage."""
        self.staged = 0  # pages
        self._most = most_pages
        # Left for what the guest writes until it is stopped.
        self._wanted = arena_pages // 2
        # Where another round leaves no less, because the guest writes about as fast as it is copied.
        self._bearable = arena_pages - arena_pages // 8
        self._left: int | None = None  # pages, by the last round

    @property
    def used_up(self) -> bool:
        """The guest dirties memory faster than it can be copied."""
        return self.staged >= self._most

    def enough(self, staged: int, left: int) -> bool:
        """A round has staged so many pages, and so many are dirty now: is the guest to be stopped?"""
        self.staged += staged
        gains = self._left is None or left < self._left
        self._left = left
        return left <= (self._wanted if gains else self._bearable)
