"""Where an embedded guest lives on this machine: RUN/embedded/NAMESPACE/DOMID, claimed by one host at a time.

lock         held (flock) by the host as long as it lives, so a dead host's place is free at once
control      its socket (protocol.py)
domain.json  its DomainInfo
input.log    its input log; left behind for replay, and kept as input.log.old by the next host here
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from checkpointd.authority.processes import HostIdentity, boot_id, identify, start_time
from checkpointd.daemon import paths
from checkpointd.errors import DomainBusyError
from checkpointd.hypervisor.port import DomainInfo

if TYPE_CHECKING:
    from pathlib import Path

DOMID_MAX = 0x7FEF  # the highest that Xen gives to a domain (DOMID_FIRST_RESERVED - 1)


def namespace_directory(namespace: str, run_dir: Path | None = None) -> Path:
    return (run_dir or paths.run_dir()) / "embedded" / namespace


class Place:
    """A claimed directory. Closing it, or the death of its process, gives it up."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory = directory
        self.control = directory / "control"
        self.domain_json = directory / "domain.json"
        self.input_log = directory / "input.log"
        self._lock = lock

    @classmethod
    def claim(cls, namespace: Path, domid: int) -> Place:
        """DomainBusyError: a live host has it. What a dead one left is taken over."""
        paths.private(namespace)
        directory = paths.private(namespace / str(domid))
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise DomainBusyError(
                f"domain {domid} is running already in {namespace}: "
                "end it first, or take another --domid or --namespace"
            ) from error
        place = cls(directory, lock)
        place.control.unlink(missing_ok=True)
        place.domain_json.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            place.input_log.rename(directory / "input.log.old")
        return place

    @classmethod
    def claim_next(cls, namespace: Path, first: int) -> Place:
        """The first free domid from `first` on."""
        for domid in range(first, DOMID_MAX + 1):
            with suppress(DomainBusyError):
                return cls.claim(namespace, domid)
        raise DomainBusyError(
            f"no domid from {first} to {DOMID_MAX} is free in {namespace}: end a guest"
        )

    @property
    def domid(self) -> int:
        return int(self.directory.name)

    def identity(self) -> HostIdentity:
        """Of this process, as the host of the guest that lives here."""
        return identify(control=str(self.control))

    def publish(self, info: DomainInfo) -> None:
        """Let others find the guest: written whole, under another name, then renamed."""
        temporary = self.domain_json.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(info)), encoding="utf-8")
        temporary.rename(self.domain_json)

    def close(self) -> None:
        """Give the place up; the input log stays."""
        self.domain_json.unlink(missing_ok=True)
        self.control.unlink(missing_ok=True)
        os.close(self._lock)


def parse_info(fields: dict[str, object]) -> DomainInfo:
    """What asdict() made of a DomainInfo."""
    host = HostIdentity(**fields["host"])  # type: ignore[arg-type]  # checked where it was made: our own host
    return DomainInfo(**{**fields, "host": host})  # type: ignore[arg-type]  # as above


def is_alive(host: HostIdentity) -> bool:
    return host.boot_id == boot_id() and start_time(host.pid) == host.start_time


def read_domains(namespace: Path) -> list[DomainInfo]:
    """All guests with a living host, by domid."""
    found = []
    for path in namespace.glob("*/domain.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):  # it went, or was never a domain's
            info = parse_info(json.loads(path.read_text(encoding="utf-8")))
            if is_alive(info.host):
                found.append(info)
    return sorted(found, key=lambda info: info.domid)
