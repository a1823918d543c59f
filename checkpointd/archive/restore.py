"""`checkpointd restore`: the last whole epoch of a recording, which may be cut anywhere, runs again."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from checkpointd import native
from checkpointd.archive.signals import ending_orderly
from checkpointd.errors import HypervisorError, NoSuchDomainError, StreamError, UsageError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.stream import scan
from checkpointd.stream.libxl import XlHeader
from checkpointd.stream.reader import Reader
from checkpointd.stream.rebuild import checked, rebuild
from checkpointd.stream.remus import SEAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointd.secondary.restorers.xl_process import Domains

PIECE = 1 << 20  # octets of one read


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """What `checkpointd restore` was asked."""

    source: Path
    paused: bool = False
    namespace: str = "primary"
    run_dir: Path = Path()
    unsafe_untested_xen: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    domid: int
    name: str
    epochs: int  # in the file; the last of them runs. 0: it was an image
    left_over: int  # octets behind it, of an epoch that never was whole


def run_restore(wanted: Restore, progress: Callable[[int, int], None]) -> Restored:
    """Start the last whole epoch of a file. Raises UsageError, StreamError, HypervisorError."""
    native.self_test()
    path = wanted.source
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened: {error.strerror}") from error
    with file, ending_orderly():
        try:
            found = scan.survey(file)
            config = _configuration(file)
        except StreamError as error:
            raise StreamError(f"{path}: {error}") from error
        ours = config.get("checkpointd")
        if found.plain and not ours:
            raise UsageError(f"{path} is one image, not a recording: `xl restore {path}` starts it")
        if not found.epochs and not found.plain:
            raise StreamError(
                f"{path} holds no whole epoch: its recording, or its copy, ended within the first one "
                f"({found.octets} octets), so there is nothing that a guest could be started from"
            )
        end = found.octets if found.plain else found.end
        if ours:
            domid, name = _restore_embedded(wanted, file, end, ours)
            progress(end, end)
        else:
            domid, name = _restore_xen(wanted, file, config, progress)
    return Restored(domid, name, found.epochs, found.octets - end)


def _configuration(file: BinaryIO) -> dict[str, Any]:
    """Of the xl header. Raises StreamError."""
    reader = Reader()
    file.seek(0)
    while piece := file.read(PIECE):
        for event in reader.feed(piece):
            if isinstance(event.content, XlHeader):
                config = event.content.config()
                if isinstance(config, dict):
                    return config
            raise StreamError("there is no configuration before the stream, to build a domain from")
    raise StreamError("it is cut off within its configuration")


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    for at in range(start, end, PIECE):
        yield file.read(min(PIECE, end - at))


def _restore_embedded(
    wanted: Restore,
    file: BinaryIO,
    end: int,
    config: Any,
) -> tuple[int, str]:
    from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
    from checkpointd.hypervisor.embedded.place import parse_info

    try:
        info = parse_info(config)
        size = info.nr_pfns * PAGE_SIZE
    except (TypeError, KeyError, ValueError) as error:
        raise StreamError(f"{wanted.source}: its configuration is no guest's: {error}") from error
    hypervisor = EmbeddedHypervisor(wanted.namespace, wanted.run_dir)
    _refuse_second(hypervisor, info.uuid)
    memory = os.memfd_create(f"checkpointd-{info.uuid}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, size)
        with mmap.mmap(memory, size) as image:
            try:
                built = rebuild(_pieces(file, 0, end), native.address_of(image), info.nr_pfns)
            except StreamError as error:
                raise StreamError(f"{wanted.source}: {error}") from error
        incoming = hypervisor.prepare(info, memory)
        started = incoming.start(built.context, built.populated, paused=wanted.paused)
    finally:
        os.close(memory)
    return started.domid, started.name


def _refuse_second(hypervisor: Any, uuid: str) -> None:
    try:
        found = hypervisor.find(uuid=uuid)
    except NoSuchDomainError:
        return
    raise HypervisorError(
        f"domain {found.domid} ({found.name}) with UUID {uuid} lives here: two of them cannot"
    )


def _restore_xen(
    wanted: Restore,
    file: BinaryIO,
    config: dict[str, Any],
    progress: Callable[[int, int], None],
) -> tuple[int, str]:
    from checkpointd.hypervisor.xen import incoming, lib

    domains = incoming.Domains(lib.open_libs(untested=wanted.unsafe_untested_xen))
    try:
        return through_xl(wanted, file, config, domains, progress)
    finally:
        domains.close()


def through_xl(
    wanted: Restore,
    file: BinaryIO,
    config: dict[str, Any],
    domains: Domains,
    progress: Callable[[int, int], None],
) -> tuple[int, str]:
    """By xl's own receiver, which applies each epoch at its end. Gives domid and name."""
    from checkpointd.secondary.restorers.xl_process import XlReceive

    try:
        uuid = str(config["c_info"]["uuid"])
    except (TypeError, KeyError) as error:
        raise StreamError(f"{wanted.source}: its configuration names no UUID") from error
    ends = list(scan.whole_epochs(file))
    _check(wanted, file, ends)
    receiver = XlReceive(domains, uuid)
    try:
        receiver.start()
        begin = 0
        for end in ends:
            for piece in _pieces(file, begin, end - len(SEAL)):
                receiver.feed(piece)
            if not begin:
                receiver.hold()
            receiver.seal(b"")
            progress(begin := end, ends[-1])
        domid = receiver.finish()
        if not wanted.paused:
            receiver.release()
        found = domains.find(uuid)
    except BaseException:
        receiver.abort()
        raise
    return domid, found.name if found else ""


def _check(wanted: Restore, file: BinaryIO, ends: list[int]) -> None:
    """Before anything is begun: a receiver that fails in an epoch leaves no domain, or half a one."""
    try:
        for _ in checked(_pieces(file, 0, ends[-1])):
            pass
    except StreamError as error:
        raise StreamError(f"{wanted.source}: {error}") from error
    for end in ends:
        file.seek(end - len(SEAL))
        if file.read(len(SEAL)) != SEAL:
            raise StreamError(
                f"{wanted.source}: octet {end}: the epoch brings the state of a device model, or is not framed by "
                "libxl: no recording of ours, and not restored by us"
            )
