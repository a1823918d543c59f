"""Where things are kept: what survives a reboot, and what lives only as long as its process."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from checkpointd.errors import StateError

STATE_VARIABLE = "CHECKPOINTD_STATE_DIR"
RUN_VARIABLE = "CHECKPOINTD_RUN_DIR"


def state_dir() -> Path:
    """Of keys and terms.

    $CHECKPOINTD_STATE_DIR, else /var/lib/checkpointd for root, the XDG state directory for others.
    """
    if given := os.environ.get(STATE_VARIABLE):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/checkpointd")
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "checkpointd"


def run_dir() -> Path:
    """Of sockets and the list of daemons.

    $CHECKPOINTD_RUN_DIR, else /run/checkpointd for root and the XDG run directory for others.
    """
    if given := os.environ.get(RUN_VARIABLE):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/run/checkpointd")
    if home := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(home) / "checkpointd"
    # private() below refuses it if somebody else was here first:
    return Path("/tmp") / f"checkpointd-{os.geteuid()}"  # noqa: S108


def private(directory: Path) -> Path:
    """Make `directory` if need be and return it; StateError if others could write to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        link, found = directory.lstat(), directory.stat()  # a link's owner may turn it elsewhere
    except OSError as error:
        raise StateError(f"cannot make {directory}: {error.strerror}") from error
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if {link.st_uid, found.st_uid} != {os.geteuid()} or others_write:
        raise StateError(
            f"{directory} can be written to by others than this user: "
            "remove it, or chown and chmod 700 it, or choose another directory"
        )
    return directory
