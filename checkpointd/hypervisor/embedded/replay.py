"""The oracle: computes a guest's RAM and context again from its input logs, with no network and none of the
code that protects it. What it computes is what a replica of the same step must be, bit for bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from checkpointd.errors import StateError
from checkpointd.hypervisor.embedded import inputlog
from checkpointd.hypervisor.embedded.lib import check, ffi, lib
from checkpointd.hypervisor.port import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Any


@dataclass(frozen=True, slots=True)
class Difference:
    """How an image differs from the oracle; pfns ascending."""

    missing: list[int]  # in the oracle's memory, not in the image
    extra: list[int]  # in the image, ballooned out in the oracle
    changed: list[int]  # in both, with other content

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.changed)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("too many", self.extra), ("different", self.changed))
        parts = [f"{len(pfns)} pages {what} (first: pfn {pfns[0]})" for what, pfns in kinds if pfns]
        return ", ".join(parts) or "equal"


class Memory:
    """A guest's whole state at one step. A context manager; close() frees the memory."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self.nr_pfns: int = machine.nr_pfns

    @property
    def step(self) -> int:
        return int(lib.guest_step_number(self._machine))

    @property
    def populated(self) -> bytes:
        """Bit p (little endian u64 words) for each pfn with memory behind it."""
        return bytes(ffi.buffer(self._machine.populated, (self.nr_pfns + 63) // 64 * 8))

    @property
    def context(self) -> bytes:
        """The tail records of an epoch that ends at this step."""
        buffer = ffi.new("uint8_t[]", lib.CONTEXT_MAX)
        size = check(lib.guest_context(self._machine, buffer, lib.CONTEXT_MAX), "context")
        return bytes(ffi.buffer(buffer, size))

    def page(self, pfn: int) -> bytes | None:
        """The 4096 octets behind `pfn`, None for a hole."""
        address = lib.machine_page(self._machine, pfn)
        return None if address == ffi.NULL else bytes(ffi.buffer(address, PAGE_SIZE))

    def diff(self, image: object, populated: bytes | None = None) -> Difference:
        """Compare with an image: a buffer with pfn p at octet p * PAGE_SIZE, at least nr_pfns pages long.

        `populated` is the image's bitmap; without it, only contents are compared, and a page ballooned out
        must be all zero in the image.
        """
        view = memoryview(image).cast("B")  # type: ignore[arg-type]  # any buffer; typing.Buffer is 3.12
        if len(view) < self.nr_pfns * PAGE_SIZE:
            raise StateError(
                f"an image of {len(view)} octets is too short for {self.nr_pfns} pages"
            )
        bits = ffi.new("uint64_t[]", (self.nr_pfns + 63) // 64)
        lib.machine_compare(self._machine, ffi.from_buffer("uint8_t[]", view), bits)
        changed, mine = _bits(bytes(ffi.buffer(bits))), set(_bits(self.populated))
        if populated is not None:
            theirs = set(_bits(populated))
            changed = [pfn for pfn in changed if pfn in theirs]
            return Difference(sorted(mine - theirs), sorted(theirs - mine), changed)
        zero = bytes(PAGE_SIZE)
        holes = (pfn for pfn in range(self.nr_pfns) if pfn not in mine)
        extra = [p for p in holes if view[p * PAGE_SIZE : (p + 1) * PAGE_SIZE] != zero]
        return Difference([], extra, changed)

    def write(self, path: Path) -> None:
        """Write a raw image, holes as zeros."""
        with path.open("wb") as file:
            for pfn in range(self.nr_pfns):
                page = self.page(pfn)
                if page is not None and any(page):
                    file.seek(pfn * PAGE_SIZE)
                    file.write(page)
            file.truncate(self.nr_pfns * PAGE_SIZE)

    def close(self) -> None:
        if self._machine is not None:
            lib.machine_free(self._machine)
        self._machine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def _bits(bitmap: bytes) -> list[int]:
    return [
        index * 8 + bit
        for index, octet in enumerate(bitmap)
        if octet
        for bit in range(8)
        if octet >> bit & 1
    ]


def replay(paths: Sequence[Path], until: int | None = None) -> Memory:
    """Compute the guest of these logs (the first host's first) as of step `until`.

    Without `until`: as of the last entry. StateError if the logs do not belong together, are damaged, or end
    before `until` (a program that runs by itself, dirty, has no end).
    """
    logs = [inputlog.read(path) for path in paths]
    if not logs or logs[0].base_step != 0:
        raise StateError("the first log must be that of the fresh guest (base step 0)")
    for log in logs[1:]:
        if (log.uuid, log.nr_pfns, log.program) != (logs[0].uuid, logs[0].nr_pfns, logs[0].program):
            raise StateError(f"{log.path} is the log of another guest than {logs[0].path}")
    memory = _boot(logs[0])
    try:
        for log, following in zip(logs, [*logs[1:], None], strict=True):
            end = until
            if following is not None and (until is None or following.base_step < until):
                end = following.base_step
            _run(memory, log, end)
    except BaseException:
        memory.close()
        raise
    return memory


def _boot(log: inputlog.InputLog) -> Memory:
    fd = os.memfd_create("checkpointd-replay", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, log.nr_pfns * PAGE_SIZE)
        machine = lib.machine_new(fd, log.nr_pfns, ffi.NULL, 1)
    finally:
        os.close(fd)
    if machine == ffi.NULL:
        raise StateError(f"{log.path}: no memory for a guest of {log.nr_pfns} pages")
    memory = Memory(machine)
    if lib.guest_boot(machine, log.program.encode(), bytes.fromhex(log.uuid.replace("-", ""))) != 0:
        memory.close()
        raise StateError(f"{log.path}: this version does not know the program {log.program!r}")
    return memory


def _run(memory: Memory, log: inputlog.InputLog, until: int | None) -> None:
    """Go on from where `memory` stands to `until`, or to the log's last entry."""
    machine = memory._machine  # noqa: SLF001 - one module, one thing
    result = ffi.new("struct step_result *")
    for entry in log.entries():
        if until is not None and entry.step > until:
            break
        if entry.step <= memory.step:
            raise StateError(f"{log.path}: step {entry.step} comes after step {memory.step}")
        _tick(memory, entry.step - 1, log)
        check(
            lib.guest_step(machine, entry.kind, entry.data, len(entry.data), result),
            f"{log.path}: step {entry.step}",
        )
    if until is not None:
        _tick(memory, until, log)


def _tick(memory: Memory, until: int, log: inputlog.InputLog) -> None:
    """Steps without input, up to `until`; only a program that runs by itself has them."""
    if memory.step < until and lib.guest_ticks(memory._machine, until - memory.step) != 0:  # noqa: SLF001
        raise StateError(f"{log.path}: no input for step {memory.step + 1}; asked for step {until}")
