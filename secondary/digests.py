"""The answer to DIGESTS_WANTED: what each page of the replica is, one frame after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from checkpointd.wire.acceptor import Sent
from checkpointd.wire.frames import FLAG, Header, Kind, seal

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.wire.frames import Digester

# Pages to a frame: 1 MiB of digests, as large as a frame of pages. A multiple of 64.
PAGES_A_FRAME = 65536


class DigestAnswer:
    """Keeps one frame at a time in memory, whatever the guest's size: the next one is made when the
    link has taken the one before.
    """

    def __init__(
        self,
        session: int,
        term: int,
        nr_pfns: int,
        key: Digester,
        make: MakeDigests,
        send: Callable[[Header, bytes], Sent],
    ) -> None:
        self._session = session
        self._term = term
        self._nr_pfns = nr_pfns
        self._key = key
        self._make = make
        self._send = send
        self._first = 0  # pfn of the frame that is being made, or waits
        self._waiting: tuple[Header, bytes] | None = None
        self._over = False
        self._next()

    def cancel(self) -> None:
        """The session is over, or the digests are asked for again."""
        self._over = True

    def tick(self) -> None:
        """The link may take frames again."""
        if self._waiting and not self._over:
            self._offer(*self._waiting)

    def _next(self) -> None:
        count = min(PAGES_A_FRAME, self._nr_pfns - self._first)
        self._make(self._first, count, self._made)

    def _made(self, digests: bytes) -> None:
        if self._over:
            return
        payload = self._first.to_bytes(8, "little") + digests
        last = self._first + PAGES_A_FRAME >= self._nr_pfns
        header = Header(
            Kind.DIGESTS,
            self._session,
            self._term,
            sequence=self._first // PAGES_A_FRAME,
            flags=FLAG if last else 0,
        )
        self._offer(seal(header, payload, self._key), payload)

    def _offer(self, header: Header, payload: bytes) -> None:
        self._waiting = None
        match self._send(header, payload):
            case Sent.FULL:
                self._waiting = (header, payload)
            case Sent.GONE:
                self._over = True  # the primary will ask again by its next connection
            case Sent.YES:
                self._over = bool(header.flags)
                if not self._over:
                    self._first += PAGES_A_FRAME
                    self._next()


class MakeDigests(Protocol):
    def __call__(self, first: int, count: int, then: Callable[[bytes], None], /) -> None:
        """Have `then` called, on the acceptor's thread, with the digests of `count` pages from `first`."""
        ...
