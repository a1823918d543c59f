"""Between version 2 and 3 of the libxc stream.

Version 3 added STATIC_DATA_END and the two policy records. To version 2 these are left out: the
receiver then derives the CPUID policy from the domain's configuration, as it did before Xen 4.14.
To version 3 STATIC_DATA_END is put where a receiver of version 3 infers it in a stream of version
2: behind the last static record.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from checkpointd.stream.reader import Content, Record
from checkpointd.stream.records import (
    OPTIONAL,
    V3_ONLY,
    ImageHeader,
    Layer,
    RecordType,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Converter:
    """Gets each content of a faultless stream in order and gives what to write in its place."""

    def __init__(self, version: int | None) -> None:
        self._to = version  # 2, 3, or None: as it is
        self._add_static_end = False
        self.dropped = 0  # policy records that version 2 cannot carry

    def convert(self, content: Content) -> Iterator[Content]:
        if self._to is None:
            yield content
        elif isinstance(content, ImageHeader):
            self._add_static_end = self._to == 3 and content.version == 2
            yield dataclasses.replace(content, version=self._to)
        elif isinstance(content, Record) and content.layer is Layer.LIBXC:
            yield from self._record(content)
        else:
            yield content

    def _record(self, record: Record) -> Iterator[Content]:
        if self._to == 2 and record.type in V3_ONLY:
            self.dropped += record.type != RecordType.STATIC_DATA_END
            return
        static = record.type == RecordType.X86_PV_INFO or record.type & OPTIONAL
        if self._add_static_end and not static:
            self._add_static_end = False
            yield Record(Layer.LIBXC, RecordType.STATIC_DATA_END, memoryview(b""))
        yield record
