"""A fake of `xl migrate-receive -r` for tests without Xen, and of the hypervisor beneath it.

install() puts a program named xl into a folder for PATH. It reads its input in the order and the portions in which
libxc and libxl do, so that what is left in the pipe means the same, and does what they do wherever the
input ends: before the first whole epoch it fails and leaves no domain; within CHECKPOINT and CHECKPOINT_END it spins
(here: sleeps) for ever; anywhere else it finishes the domain, renames it and takes away one pause. Facts:
Xen 4.17 and 4.20, xg_sr_restore.c, libxl_stream_read.c, xl_migrate.c; tests/xen/inside/test_xl_restorer.py runs the
same scenarios with the real one.

Orders are files in the folder `orders`: `die-at-epoch`, `stop-at-epoch` (number), `mute`, `no-domain`, `fail` (text),
`no-finish`, `gate` (a FIFO: each epoch is applied when an octet comes through), `drip` (so slow that it would take
minutes, and never still), `no-destroy` (of the toolstack: `xl destroy` fails).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointd.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAGE = 4096
XTAB, BROKEN = 0xF, 0xD
PAGE_DATA, CHECKPOINT, CHECKPOINT_END = 1, 0xE, 4


@dataclass(frozen=True, slots=True)
class Found:
    domid: int
    name: str
    paused: bool


class FakeDomains:
    """The domains of a host that exists in a folder: what xl_process.Domains asks for, and what tests look at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "orders").mkdir(exist_ok=True)
        (folder / "domains").mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def get(self, uuid: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.folder / "domains" / uuid).read_text())
        except FileNotFoundError:
            return None
        return found

    def put(self, uuid: str, **change: object) -> None:
        """Make the domain, or change it."""
        with self.locked():
            path = self.folder / "domains" / uuid
            new = path.with_suffix(".new")
            new.write_text(json.dumps((self.get(uuid) or {}) | change))
            new.replace(path)

    def add_pauses(self, uuid: str, by: int) -> None:
        domain = self.get(uuid)
        assert domain is not None, f"no domain {uuid}"
        assert domain["pauses"] + by >= 0, "unpaused more often than paused"
        self.put(uuid, pauses=domain["pauses"] + by)

    def pages(self, uuid: str) -> dict[int, bytes]:
        """The memory of a finished domain."""
        data = (self.folder / f"{uuid}.memory").read_bytes()
        size = 8 + PAGE
        return {
            int.from_bytes(data[at : at + 8], "little"): data[at + 8 : at + size]
            for at in range(0, len(data), size)
        }

    def order(self, name: str, text: str = "") -> None:
        (self.folder / "orders" / name).write_text(text)

    # ------------------------------------------------------------ what the restorer asks for

    def find(self, uuid: str) -> Found | None:
        domain = self.get(uuid)
        if domain is None:
            return None
        return Found(domain["domid"], domain["name"], domain["pauses"] > 0)

    def pause(self, domid: int) -> None:
        self.add_pauses(self._uuid(domid), 1)

    def unpause(self, domid: int) -> None:
        uuid = self._uuid(domid)
        domain = self.get(uuid)
        if domain is not None and domain["pauses"] == 0:
            raise HypervisorError(f"domain {domid}: Invalid argument")  # as Xen says of one that runs
        self.add_pauses(uuid, -1)

    def drop_pages(self, domid: int, pfns: Sequence[int]) -> None:
        """Of a finished domain."""
        uuid = self._uuid(domid)
        left = self.pages(uuid)
        for pfn in pfns:
            del left[pfn]
        write_memory(self.folder / f"{uuid}.memory", left)

    def destroy(self, domid: int, timeout: float) -> None:
        if (self.folder / "orders" / "no-destroy").exists():
            raise HypervisorError(f"`xl destroy {domid}` has not ended within {timeout:g} s")
        (self.folder / "domains" / self._uuid(domid)).unlink()

    def _uuid(self, domid: int) -> str:
        for path in (self.folder / "domains").iterdir():
            if json.loads(path.read_text())["domid"] == domid:
                return path.name
        raise AssertionError(f"no domain {domid}")


def install(folder: Path) -> FakeDomains:
    """A host in `folder`, whose programs are in `folder`/bin."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "xl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} "$@"\n')
    program.chmod(0o755)
    return FakeDomains(folder)


def write_memory(path: Path, memory: dict[int, bytes]) -> None:
    with path.open("wb") as file:
        for pfn, page in memory.items():
            file.write(pfn.to_bytes(8, "little") + page)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more, which is no reason to end
        os.write(2, text.encode())


class _EndedError(Exception):
    """End of input."""


class _Receiver:
    def __init__(self, domains: FakeDomains) -> None:
        self.domains = domains
        self.orders = domains.folder / "orders"
        self.uuid = ""
        self.name = ""
        self.memory: dict[int, bytes] = {}
        self.context = 0
        self.epochs = 0  # applied

    def read(self, octets: int) -> bytes:
        data = b""
        drips = self.ordered("drip") is not None
        while len(data) < octets:
            some = os.read(0, octets - len(data) if not drips else 1)
            if drips:
                time.sleep(0.02)  # of another process's time
            if not some:
                raise _EndedError
            data += some
        return data

    def ordered(self, name: str) -> str | None:
        path = self.orders / name
        return path.read_text() if path.exists() else None

    def run(self) -> int:
        if self.ordered("mute") is not None:
            time.sleep(3600)
        os.write(1, b"xl migration receiver ready, send binary domain data.\n")
        _say("migration target: Ready to receive domain.\n")
        if (text := self.ordered("fail")) is not None:
            _say(text + "\n")
            return 1
        try:
            self.begin()
        except _EndedError:
            return 1
        buffered: list[bytes] = []
        in_seal = False
        try:
            while True:
                kind, length = struct.unpack("<II", self.read(8))
                body = self.read(length + -length % 8)[:length]
                if kind == PAGE_DATA and self.epochs == 0:
                    self.apply(body)
                elif kind == PAGE_DATA:
                    buffered.append(body)
                elif kind == CHECKPOINT:
                    in_seal = True
                    assert struct.unpack("<II", self.read(8)) == (CHECKPOINT_END, 0), (
                        "no CHECKPOINT_END"
                    )
                    in_seal = False
                    self.checkpoint(buffered)
                    buffered = []
        except _EndedError:
            if in_seal:
                time.sleep(3600)
            return self.finish()

    def begin(self) -> None:
        header = self.read(48)
        assert header.startswith(b"Xen saved domain, xl format"), header
        length = int.from_bytes(header[44:48], "little")
        config = json.loads(self.read(length)[4:-1])
        self.uuid, self.name = config["c_info"]["uuid"], config["c_info"]["name"]
        if self.ordered("no-domain") is not None:
            time.sleep(3600)
        domid = 1 + max((d["domid"] for d in self.others()), default=0)
        self.domains.put(
            self.uuid,
            domid=domid,
            name=f"{self.name}--incoming",
            pauses=1,
            epochs=0,
            xl=os.getpid(),
        )
        assert self.read(16).startswith(b"LibxlFmt")
        assert struct.unpack("<II", self.read(8)) == (1, 0), "no LIBXC_CONTEXT"
        assert self.read(40).startswith(b"\xff" * 8), "no image header"

    def others(self) -> Iterator[dict[str, Any]]:
        for path in (self.domains.folder / "domains").iterdir():
            yield json.loads(path.read_text())

    def checkpoint(self, buffered: list[bytes]) -> None:
        if self.epochs:
            if self.ordered("gate") is not None:
                with (self.orders / "gate-open").open("rb") as gate:
                    gate.read(1)
            for body in buffered:
                self.apply(body)
        self.epochs += 1
        dies = self.ordered("die-at-epoch") == str(self.epochs)
        stops = self.ordered("stop-at-epoch") == str(self.epochs)
        self.domains.put(self.uuid, epochs=self.epochs)  # from here on orders may change
        if dies:
            _say("xc: error: something broke: Internal error\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if stops:
            os.kill(os.getpid(), signal.SIGSTOP)

    def apply(self, body: bytes) -> None:
        (count,) = struct.unpack_from("<I", body)
        at = 8 + 8 * count
        for (word,) in struct.iter_unpack("<Q", body[8:at]):
            if word >> 60 not in (XTAB, BROKEN):
                self.memory[word & ((1 << 52) - 1)] = body[at : at + PAGE]
                at += PAGE
        assert at == len(body), "PAGE_DATA of another length"

    def finish(self) -> int:
        if self.epochs == 0:
            (self.domains.folder / "domains" / self.uuid).unlink()
            _say("migration target: Domain creation failed (code -3).\n")
            return 1
        if self.ordered("no-finish") is not None:
            time.sleep(3600)
        write_memory(self.domains.folder / f"{self.uuid}.memory", self.memory)
        domain = self.domains.get(self.uuid)
        assert domain is not None
        _say(f"migration target: Remus Failover for domain {domain['domid']}\n")
        self.domains.put(self.uuid, name=self.name, pauses=domain["pauses"] - 1)
        return 0


if __name__ == "__main__":
    assert sys.argv[2:] == ["migrate-receive", "-r"], sys.argv
    sys.exit(_Receiver(FakeDomains(Path(sys.argv[1]))).run())
