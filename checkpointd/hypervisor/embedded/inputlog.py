"""The input log: what a guest was given, and at which step, so that its RAM can be computed again.

A file is a header and entries, little endian; each entry is written whole, before the guest sees it.

header:
    off  size
      0     8  "CKINPLOG"
      8     4  version 1
     12     4  octets of the program's name, P
     16    16  uuid of the guest
     32     8  base step: the step at which the guest was activated here; 0 for a fresh guest
     40     8  nr_pfns
     48     4  CRC-32 of the header with this field 0, and of the name
     52     4  reserved, 0
     56     P  program, ASCII

entry (struct input_entry in csrc/inputlog.h):
      0     4  "CKIN"
      4     2  kind: 1 datagram, 2 balloon out, 3 balloon in (u32 pfns)
      6     2  port of the sender, 0 for a balloon order
      8     8  the step that consumes it; grows from entry to entry
     16    16  address of the sender, IPv6 or v4-mapped
     32     4  octets of data, D, at most 1 MiB
     36     4  CRC-32 of the data
     40     4  CRC-32 of octets 0 to 39
     44     4  reserved, 0
     48     D  data

A host that dies while it writes leaves a torn last entry, a short one; the guest never saw it, and reading ends
before it. Anything else that does not check is an error. Logs chain: when a guest is activated elsewhere at step B, its
new log has base step B, and entries beyond B in the earlier log are void.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from checkpointd.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAGIC = b"CKINPLOG"
VERSION = 1
_HEADER = struct.Struct("<8sII16sQQII")
_ENTRY = struct.Struct("<IHHQ16sIIII")
_ENTRY_MAGIC = 0x4E494B43
_HEAD_CRC_AT = 40  # octet of an entry
DATA_MAX = 1 << 20  # octets; a datagram has 1472 and a balloon order 16 Ki


@dataclass(frozen=True, slots=True)
class Entry:
    step: int
    kind: int
    address: bytes
    port: int
    data: bytes


@dataclass(frozen=True, slots=True)
class InputLog:
    """One file's header; the entries are read from the file each time they are asked for."""

    path: Path
    uuid: str
    base_step: int
    nr_pfns: int
    program: str

    def entries(self) -> Iterator[Entry]:
        """In the order of their steps; ends before a torn tail. StateError for anything else amiss."""
        with self.path.open("rb") as file:
            offset = file.seek(_HEADER.size + len(self.program))
            while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
                fields = _ENTRY.unpack(head)
                magic, kind, port, step, address, length, data_crc, head_crc, zero = fields
                sound = magic == _ENTRY_MAGIC and zlib.crc32(head[:_HEAD_CRC_AT]) == head_crc
                if not sound or zero:
                    raise StateError(
                        f"{self.path}: no entry at octet {offset}: the file is damaged"
                    )
                if length > DATA_MAX:
                    raise StateError(f"{self.path}: an entry of {length} octets at octet {offset}")
                data = file.read(length)
                if len(data) < length:
                    return
                if zlib.crc32(data) != data_crc:
                    raise StateError(
                        f"{self.path}: wrong data at octet {offset}: the file is damaged"
                    )
                yield Entry(step, kind, address, port, data)
                offset += _ENTRY.size + length


def header(uuid: str, base_step: int, nr_pfns: int, program: str) -> bytes:
    name = program.encode("ascii")
    fields = (MAGIC, VERSION, len(name), UUID(uuid).bytes, base_step, nr_pfns)
    crc = zlib.crc32(_HEADER.pack(*fields, 0, 0) + name)
    return _HEADER.pack(*fields, crc, 0) + name


def read(path: Path) -> InputLog:
    """Read the header; StateError if it is no input log."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or head[:8] != MAGIC:
                raise StateError(f"{path} is not an input log")
            _, version, length, uuid, base, nr_pfns, crc, reserved = _HEADER.unpack(head)
            name = file.read(length) if length <= DATA_MAX else b""
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}") from error
    zeroed = _HEADER.pack(MAGIC, version, length, uuid, base, nr_pfns, 0, reserved)
    if version != VERSION or zlib.crc32(zeroed + name) != crc:
        raise StateError(f"{path}: the header of this input log is damaged or of another version")
    return InputLog(path, str(UUID(bytes=uuid)), base, nr_pfns, name.decode("ascii"))
