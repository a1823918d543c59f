"""The framing around a libxc stream: libxl's records, and xl's file header.

Sources: Xen, docs/specs/libxl-migration-stream.pandoc, revision 2, and xl.h for the file header,
which has no spec. A libxl stream is a header, then records framed like libxc's own; the record
LIBXC_CONTEXT is followed by a whole libxc stream. Under Remus the two layers take turns: see
reader.py.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Self

from checkpointd.errors import StreamError

if TYPE_CHECKING:
    from checkpointd.stream.records import Octets

LIBXL_IDENT = b"LibxlFmt"
LIBXL_VERSION = 2
LIBXL_OPTION_BE = 1  # bit 0: big endian; no receiver takes it
LIBXL_OPTION_LEGACY = 2  # bit 1: made by the converter of older streams


class LibxlType(IntEnum):
    """Types of libxl records. Its reader refuses every other type, marked optional or not."""

    END = 0
    LIBXC_CONTEXT = 1  # empty; the libxc stream follows
    EMULATOR_XENSTORE_DATA = 2
    EMULATOR_CONTEXT = 3
    CHECKPOINT_END = 4  # commits the epoch
    CHECKPOINT_STATE = 5  # COLO


class EmulatorId(IntEnum):
    UNKNOWN = 0  # converted streams
    QEMU_TRADITIONAL = 1
    QEMU_UPSTREAM = 2


class ColoState(IntEnum):
    """Ids of CHECKPOINT_STATE; all but NEW go from secondary to primary, on the back channel."""

    NEW = 0
    SVM_SUSPENDED = 1
    SVM_READY = 2
    SVM_RESUMED = 3


def libxl_type_name(record_type: int) -> str:
    try:
        return LibxlType(record_type).name
    except ValueError:
        return f"unknown {record_type:#x}"


@dataclass(frozen=True, slots=True)
class LibxlHeader:
    """16 octets, always big endian."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(">8sII")

    version: int = LIBXL_VERSION
    options: int = 0

    def pack(self) -> bytes:
        return self.FORMAT.pack(LIBXL_IDENT, self.version, self.options)

    @classmethod
    def unpack(cls, data: Octets) -> Self:
        ident, version, options = cls.FORMAT.unpack(data)
        if ident != LIBXL_IDENT:
            raise StreamError("a libxl header begins with 'LibxlFmt'")
        return cls(version, options)


@dataclass(frozen=True, slots=True)
class Emulator:
    """EMULATOR_XENSTORE_DATA and EMULATOR_CONTEXT: data of one device model."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")

    emulator_id: int
    index: int
    data: bytes

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.emulator_id, self.index) + self.data

    @classmethod
    def unpack(cls, body: Octets) -> Self:
        if len(body) < cls.FORMAT.size:
            raise StreamError(f"an emulator record has at least 8 octets, not {len(body)}")
        emulator_id, index = cls.FORMAT.unpack_from(body)
        return cls(emulator_id, index, bytes(body[cls.FORMAT.size :]))


def pack_xenstore(pairs: list[tuple[str, str]]) -> bytes:
    """The data of EMULATOR_XENSTORE_DATA: `key NUL value NUL ...`, keys relative to the device
    model's.
    """
    return b"".join(part.encode() + b"\0" for pair in pairs for part in pair)


# -- xl's file header -----------------------------------------------------------------------------

XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"  # 32 octets
XL_BYTEORDER = 0x01020304  # in the writer's byte order
XL_BYTEORDER_FOREIGN = 0x04030201
XL_FLAG_JSON = 1  # mandatory flag: the configuration is JSON
XL_FLAG_STREAM_V2 = 2  # mandatory flag: a libxl stream follows, not one older than v2
# Octets of configuration. Real ones have some KiB; parsing JSON may cost 20 times its size.
XL_CONFIG_MAX = 1 << 20
XL_FLAGS_KNOWN = XL_FLAG_JSON | XL_FLAG_STREAM_V2


@dataclass(frozen=True, slots=True)
class XlHeader:
    """48 octets and the configuration: what `xl save` and `xl migrate` put before the libxl
    stream.
    """

    # byteorder, mandatory flags, optional flags, octets of optional data
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIII")

    mandatory_flags: int
    optional_flags: int
    optional_data: bytes  # u32 length, then the configuration, its NUL counted

    def pack(self) -> bytes:
        numbers = (XL_BYTEORDER, self.mandatory_flags, self.optional_flags)
        return XL_MAGIC + self.FORMAT.pack(*numbers, len(self.optional_data)) + self.optional_data

    @classmethod
    def with_config(cls, config: str) -> Self:
        """The header of today's xl; `config` is the domain's configuration as JSON."""
        text = config.encode() + b"\0"
        return cls(XL_FLAGS_KNOWN, 0, struct.pack("<I", len(text)) + text)

    def config(self) -> object:
        """The configuration parsed. Raises StreamError if there is none, or it is not JSON."""
        if len(self.optional_data) < 4:
            raise StreamError("the xl header carries no configuration")
        (length,) = struct.unpack_from("<I", self.optional_data)
        text = self.optional_data[4:]
        if length != len(text):
            raise StreamError(f"the configuration announces {length} octets, has {len(text)}")
        if not text.endswith(b"\0"):
            raise StreamError("the configuration does not end with a NUL")
        try:
            parsed: object = json.loads(text[:-1])
        except (ValueError, RecursionError) as error:
            raise StreamError(f"the configuration is no JSON: {error}") from None
        return parsed
