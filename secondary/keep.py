"""--keep-images: committed replicas as plain files of Xen's own stream, for `checkpointd stream`.

Written after the first commit, before a replica is dropped or the daemon ends, and before an
activation, which it delays by the time it takes to write the guest's memory.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from checkpointd.stream.files import replacing
from checkpointd.stream.writer import write_image

from .replica import State

if TYPE_CHECKING:
    from pathlib import Path

    from .replica import Replica


class ImageKeeper:
    """Keeps one file for each guest, <uuid>.<epoch>.xen, and a link <uuid>.latest that names it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[str, Path] = {}  # by UUID; in this life

    def keep(self, uuid: str, static_records: bytes, replica: Replica) -> Path | None:
        """Write the committed epoch, if there is one. Raises OSError, StreamError, UsageError."""
        if replica.state is not State.WHOLE:
            return None
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{uuid}.{replica.epoch}.xen"
        old = self._written.get(uuid)
        if old == path:
            return path
        with replacing(str(path)) as file:
            write_image(file, static_records, replica.pages(), replica.context)
        link = self._directory / f"{uuid}.latest"
        new_link = self._directory / f"{uuid}.latest.new"
        new_link.unlink(missing_ok=True)
        new_link.symlink_to(path.name)
        os.replace(new_link, link)
        self._written[uuid] = path
        if old is not None:
            with suppress(FileNotFoundError):  # somebody took it away, as he may
                old.unlink()
        return path
