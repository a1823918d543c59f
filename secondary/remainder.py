"""What an image on disk lacks to be an epoch, beside it while an activation is under way: for the next life.

An image file outlives the process (--image disk); which pages of it count, the rest of the epoch and the guest's
description do not. With them a life that finds an activation unfinished builds the guest anew. Not beyond this boot:
nothing of the file has to be on the disk by then.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from checkpointd.authority.processes import HostIdentity, boot_id
from checkpointd.hypervisor.port import DomainInfo

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Remainder:
    info: DomainInfo
    static_records: bytes
    epoch: int
    context: bytes
    populated: bytes  # a bitmap, as native.Bitmap has it


def write(path: Path, remainder: Remainder) -> None:
    """Raises OSError."""
    fields = {
        "boot_id": boot_id(),
        "info": asdict(remainder.info),
        "static_records": _text(remainder.static_records),
        "epoch": remainder.epoch,
        "context": _text(remainder.context),
        "populated": _text(remainder.populated),
    }
    temporary = path.with_suffix(path.suffix + ".new")
    with os.fdopen(
        os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w"
    ) as file:
        json.dump(fields, file)
    temporary.replace(path)


def read(path: Path) -> Remainder | None:
    """None: there is none of this boot, or none that can be read."""
    try:
        fields = json.loads(path.read_text(encoding="ascii"))
        if fields["boot_id"] != boot_id():
            return None
        info = fields["info"]
        return Remainder(
            DomainInfo(**{**info, "host": HostIdentity(**info["host"])}),
            _octets(fields["static_records"]),
            int(fields["epoch"]),
            _octets(fields["context"]),
            _octets(fields["populated"]),
        )
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return None


def _text(octets: bytes) -> str:
    return base64.b64encode(zlib.compress(octets)).decode("ascii")


def _octets(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text, validate=True))
