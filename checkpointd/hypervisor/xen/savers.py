"""Who saves or migrates a domain of this host: it is his as long as he does, with its suspend and its dirty log."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
# How xl names a domain once its copy may run elsewhere; the helper has ended by then, and destroying takes a moment.
AWAY: Final = "--migratedaway"


def helper_of(domid: int, proc: Path = PROC) -> int | None:
    """The process by which libxl, in whatever toolstack, saves this domain; None: there is none.

    It is started with "--save-domain STREAM BACK-CHANNEL DOMID ..." (libxl_save_callout.c of Xen 4.17 to 4.20), and
    lives from before the dirty log begins until all memory has left.
    """
    for entry in proc.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if words[1:2] == [b"--save-domain"] and words[4:5] == [b"%d" % domid]:
            return int(entry.name)
    return None
