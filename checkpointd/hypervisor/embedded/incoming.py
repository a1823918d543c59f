"""A guest built from a replica: a process that waits beside the image until it is told to run it.

The process is spawned early, so that activation finds it ready: it has its interpreter, the image and a socket to
its creator, and nothing else. Until start() it owns no place, no address and no log; when its creator dies or
discards it, it goes without a trace. After start() it is a host like any other and outlives its creator.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd.errors import CheckpointdError, DomainBusyError, HypervisorError
from checkpointd.hypervisor.embedded import fresh, protocol
from checkpointd.hypervisor.embedded.host import BIND_TIMEOUT, Build, Host
from checkpointd.hypervisor.embedded.place import Place, parse_info
from checkpointd.hypervisor.embedded.records import Context
from checkpointd.hypervisor.port import PAGE_SIZE, DomainInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

# Seconds for the started process to answer: it waits up to BIND_TIMEOUT for the address, after the start of an
# interpreter that has not been waiting long.
START_TIMEOUT = BIND_TIMEOUT + 10.0
DISCARD_TIMEOUT = 5.0  # seconds; it has nothing to do but exit


class EmbeddedIncoming:
    """The creator's end. See Incoming in hypervisor/port.py."""

    def __init__(self, info: DomainInfo, memory_fd: int, namespace: Path) -> None:
        size = os.fstat(memory_fd).st_size
        if size < info.nr_pfns * PAGE_SIZE:
            raise HypervisorError(
                f"the image of {info.name} has {size} octets, too short for {info.nr_pfns} pages"
            )
        self._nr_pfns = info.nr_pfns
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = {
            "info": asdict(info), "namespace": str(namespace), "memory": memory_fd, "socket": theirs.fileno(),
        }  # fmt: skip
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "checkpointd.hypervisor.embedded.incoming", json.dumps(order)],
                pass_fds=(memory_fd, theirs.fileno()),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # what ends our terminal or unit must not end the guest
            )  # fmt: skip
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def start(self, context: bytes, populated: bytes, *, paused: bool = False) -> DomainInfo:
        """If it raises, what was prepared is discarded."""
        try:
            if len(populated) != (self._nr_pfns + 63) // 64 * 8:
                raise HypervisorError(
                    f"a populated bitmap of {len(populated)} octets does not fit the guest"
                )
            answer = self._order_start(context, populated, paused)
        except BaseException:
            self.discard()
            raise
        self._socket.close()
        # It goes on without us; while we live we are its parent, and somebody must take note of its end.
        threading.Thread(target=self._process.wait, name="guest-reaper", daemon=True).start()
        return parse_info(answer["info"])

    def _order_start(self, context: bytes, populated: bytes, paused: bool) -> protocol.Message:
        """Both in a memfd: the bitmap of a large guest does not fit a message."""
        blob = os.memfd_create("checkpointd-start", os.MFD_CLOEXEC)
        try:
            with os.fdopen(blob, "wb", closefd=False) as file:
                file.write(context + populated)
            self._socket.settimeout(START_TIMEOUT)
            sizes = {"context": len(context), "populated": len(populated)}
            request = {"op": "start", **sizes, "paused": paused}
            return protocol.call(self._socket, request, (blob,))[0]
        finally:
            os.close(blob)

    def discard(self) -> None:
        """Idempotent; nothing of a started guest is touched."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        try:
            self._process.wait(DISCARD_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _check_memory(info: DomainInfo, context: Context, memory_fd: int, populated: bytes) -> None:
    """The context and the RAM must be of one and the same step, or the replica is no epoch of this guest."""
    if (context.uuid, context.nr_pfns, context.program) != (
        info.uuid,
        info.nr_pfns,
        info.config["program"],
    ):
        raise HypervisorError(f"the context is of another guest ({context}) than {info.uuid}")
    if not populated[0] & 1:
        raise HypervisorError("the replica has no first page: it is no embedded guest's")
    with mmap.mmap(memory_fd, PAGE_SIZE, access=mmap.ACCESS_READ) as page:
        magic, step = page[:8], int.from_bytes(page[8:16], "little")
    if magic != b"CKGUEST1" or step != context.step:
        raise HypervisorError(
            f"the replica is torn: its context is of step {context.step}, its memory of step {step}; "
            "it must not be run"
        )


def _claim(namespace: Path, domid: int) -> Place:
    """The guest's own domid if it is free here, else the next that is."""
    with suppress(DomainBusyError):
        return Place.claim(namespace, domid)
    return Place.claim_next(namespace, domid + 1)


def _build(
    info: DomainInfo, namespace: Path, memory_fd: int, context: Context, populated: bytes
) -> Host:
    place = _claim(namespace, info.domid)
    try:
        # Nobody reads our output any more: what we have to say goes beside the guest.
        with (place.directory / "host.log").open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        return Host(place, Build(info, memory_fd, populated, context.step), BIND_TIMEOUT)
    except BaseException:
        place.close()
        raise


def main(argv: Sequence[str]) -> int:
    """Entry point of the waiting process: its one argument is the order of EmbeddedIncoming as JSON."""
    order = json.loads(argv[0])
    memory_fd, namespace = order["memory"], Path(order["namespace"])
    os.set_inheritable(memory_fd, False)
    channel = socket.socket(fileno=order["socket"])
    channel.set_inheritable(False)
    info = parse_info(order["info"])
    received = protocol.receive(channel)
    if received is None:
        return 0  # our creator died, or thought better of it
    request, (blob,) = received
    with os.fdopen(blob, "rb") as file:
        file.seek(0)
        tail, populated = file.read(request["context"]), file.read(request["populated"])
    try:
        context = Context.parse(tail)
        _check_memory(info, context, memory_fd, populated)
        host = _build(info, namespace, memory_fd, context, populated)
    except CheckpointdError as error:
        protocol.send(channel, protocol.failure(error))
        return error.exit_code
    guest = fresh.FreshGuest(
        namespace=str(namespace),
        program=context.program,
        memory=info.nr_pfns * PAGE_SIZE,
        output_limit=int(info.config["output_limit"]),
        paused=bool(request["paused"]),
    )

    def started() -> None:
        with suppress(OSError):  # our creator is gone; the guest has started all the same
            protocol.send(channel, {"info": asdict(replace(host.info, ram_pages=host.ram_pages))})
        channel.close()
        os.close(memory_fd)

    fresh.run_host(host, guest, started)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
