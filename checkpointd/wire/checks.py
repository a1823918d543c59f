"""CHECK and CHECKED: what a preflight asks a secondary, and what the secondary says of itself
(docs/wire-protocol.md, section 3).

Pure. They belong to no domain's session: a preflight opens none, and the secondary keeps nothing of
it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

from checkpointd.wire import fields

if TYPE_CHECKING:
    from checkpointd.wire.fields import Fields

UNSAFE: Final = (
    "UNSAFE"  # begins Checked.fence where nothing is stopped and the guest activated all the same
)
NAME_MAX: Final = 256
WORD_MAX: Final = 64
FEATURES_MAX: Final = 4096  # a word of 32 bits takes 9 characters; Xen 4.20 has 19 of them


@dataclass(frozen=True, slots=True)
class Check:
    """Could you stand by for this guest?"""

    uuid: str
    name: str
    boot_id: str  # which boot of which machine asks, and has the guest


@dataclass(frozen=True, slots=True)
class Checked:
    """What the secondary has and is. Sizes in octets."""

    release: str  # of checkpointd
    hypervisor: str  # "xen" or "embedded"
    xen: str  # its version, "4.17"; empty: no Xen
    memory_free: int  # that the daemon could take: dom0's
    guest_memory_free: int  # that a guest could take: Xen's own
    image: str  # --image: memory, disk or none
    disk_free: int  # where images are, with --image disk
    epoch_memory: int  # --epoch-memory
    cpu_features: (
        str  # what a guest here can have at most: words as Xen numbers them, "0183fbff:..."
    )
    fence: str  # how the old guest is stopped; empty: in no way
    guest_here: bool  # a domain of that UUID lives here
    starts_at_boot: bool  # and one of that UUID or name is started when this host boots
    clock_ns: int  # its wall clock


def encode_check(check: Check) -> bytes:
    name = fields.one_line(check.name, NAME_MAX)
    return fields.dumps({"uuid": check.uuid, "name": name, "boot_id": check.boot_id})


def decode_check(document: Fields) -> Check:
    check = Check(
        document.text("uuid", 36, 36),
        document.text("name", NAME_MAX),
        document.text("boot_id", WORD_MAX),
    )
    document.done()
    return check


def encode_checked(checked: Checked) -> bytes:
    return fields.dumps(asdict(as_sent(checked)))


def as_sent(checked: Checked) -> Checked:
    """What the peer will read: an operator's own words lose what cannot travel."""
    return replace(checked, fence=fields.one_line(checked.fence, NAME_MAX))


def decode_checked(document: Fields) -> Checked:
    checked = Checked(
        release=document.text("release", WORD_MAX),
        hypervisor=document.text("hypervisor", 32, 1),
        xen=document.text("xen", WORD_MAX),
        memory_free=document.integer("memory_free"),
        guest_memory_free=document.integer("guest_memory_free"),
        image=document.text("image", 32, 1),
        disk_free=document.integer("disk_free"),
        epoch_memory=document.integer("epoch_memory"),
        cpu_features=document.text("cpu_features", FEATURES_MAX),
        fence=document.text("fence", NAME_MAX),
        guest_here=document.boolean("guest_here"),
        starts_at_boot=document.boolean("starts_at_boot"),
        clock_ns=document.integer("clock_ns"),
    )
    document.done()
    return checked
