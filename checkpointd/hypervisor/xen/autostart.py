"""Guests that a host starts by itself when it boots: after a failover such a guest would run twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

AUTOSTART: Final = Path("/etc/xen/auto")  # configurations that the service xendomains starts


def starts_at_boot(uuid: str, name: str, directory: Path = AUTOSTART) -> Path | None:
    """The configuration by which this host starts such a guest when it boots; None: it does not."""
    uuid_line = re.compile(
        rf"""^\s*uuid\s*=\s*["']{re.escape(uuid)}["']""", re.MULTILINE | re.IGNORECASE
    )
    name_line = re.compile(rf"""^\s*name\s*=\s*["']{re.escape(name)}["']""", re.MULTILINE)
    try:
        paths = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError:
        return None  # nothing is started from a directory that is not there
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # nor from what root cannot read
        if uuid_line.search(text) or (name and name_line.search(text)):
            return path
    return None
