"""Frames that came reduced made pages again, before their part is acked (docs/wire-protocol.md, section 6).

By then the image is the epoch before, whole: a domain's jobs run in order. So what a page's changes are laid over is
what the primary's history says, or the primary is wrong about it, which the digest of what it staged shows. The primary
then sends the part once more, as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd import native
from checkpointd.errors import CheckpointdError
from checkpointd.wire.frames import FrameError
from checkpointd.wire.reduced import Codec

if TYPE_CHECKING:
    from checkpointd.wire.frames import Digester, Octets
    from checkpointd.wire.reduced import Reduced

    from .epochs import Arrived

Pages = tuple[int, native.Bitmap]  # address of pfn 0, and which pages are there


class NotHeldError(CheckpointdError):
    """What came reduced does not fit what is held: it has to come as it is."""


class Expander:
    """Used by one replica's thread."""

    def __init__(self) -> None:
        self._codec = Codec()

    def expand(
        self, arrived: Arrived, key: Digester, nr_pfns: int, image: Pages, overlay: Pages | None
    ) -> Octets:
        """The record that it stands for, made once. Raises NotHeldError."""
        if arrived.record is None:
            arrived.record = self._record(arrived.reduced, key, nr_pfns, image, overlay)
        return arrived.record

    def _record(
        self, reduced: Reduced, key: Digester, nr_pfns: int, image: Pages, overlay: Pages | None
    ) -> Octets:
        try:
            body = self._codec.body(reduced)
        except FrameError as error:
            raise NotHeldError(str(error)) from error
        record: Octets
        if reduced.changes:
            record = bytearray(reduced.length)
            fault = native.expand(body, record, nr_pfns, image, overlay)
        else:
            record = body
            fault = native.check_record(record, nr_pfns)
        if fault is not None:
            raise NotHeldError(f"a reduced frame: {fault}")
        if key.digest(record) != reduced.digest:
            raise NotHeldError("pages of a reduced frame differ from what the primary staged")
        return record
