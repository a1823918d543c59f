"""The control messages and their encoding (docs/wire-protocol.md, section 3).

Pure. encode() makes exactly what decode() takes: both sides of a pair check the same bounds, so a
value that the peer would refuse is refused where it was made. Errors are FrameError and name the
field.
"""

from __future__ import annotations

import base64
import re
import struct
import uuid
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias, assert_never

from checkpointd.hypervisor.port import DomainInfo, EndReason, HostIdentity
from checkpointd.wire import checks, fields
from checkpointd.wire.checks import Check as Check
from checkpointd.wire.checks import Checked as Checked
from checkpointd.wire.frames import FLAG, U32_MAX, Channel, FrameError, Header, Kind, pack, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checkpointd.wire.frames import Octets

SEED_BYTES: Final = 32
STATIC_RECORDS_MAX: Final = 128 << 10  # octets; a PVH guest has under 4 KiB, mostly CPUID
TEXT_MAX: Final = 1024  # characters of a reason or refusal: a sentence or two
RANGES_MAX: Final = 4096  # more gaps than that: name coarser ranges
PFNS_MAX: Final = 1 << 36  # 256 TiB of guest
DOMID_MAX: Final = 0x7FEF  # the last domid of an ordinary domain; those above are Xen's own
EVERYTHING: Final = ((0, U32_MAX),)  # Missing.ranges: the whole part

_HEARTBEAT: Final = struct.Struct("<QQQII")
_ECHO: Final = struct.Struct("<QQ")
_COMMITTED: Final = struct.Struct("<QII")
_CODE: Final = re.compile(r"[a-z][a-z-]{0,31}")


@dataclass(frozen=True, slots=True)
class Hello:
    session: int
    term: int
    info: DomainInfo
    interval_ns: int
    digest_seed: bytes  # 32 octets
    static_records: bytes  # what begins the guest's stream, up to STATIC_DATA_END
    first_epoch: int
    resume: bool  # this session has been welcomed before

    # The seed is secret and the records are long: neither belongs in a log.
    def __repr__(self) -> str:
        return f"Hello({self.info.uuid}, session={self.session:#x}, term={self.term})"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    count: int
    sent_ns: int  # the primary's monotonic clock
    epoch: int
    progress: int  # grows whenever the epoch loop does something
    phase: int


@dataclass(frozen=True, slots=True)
class Query:
    """What is missing of this part?"""

    epoch: int
    part: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Throw the replica away and never activate it."""

    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """The guest ended on purpose: never activate."""

    reason: EndReason


class LeftGuest(StrEnum):
    """What an engine that was lost has left its guest as. One that has ended is told by End."""

    RUNNING = "running"  # its output is as it was: shut
    STOPPED = "stopped"  # it could not be resumed yet, or is paused


@dataclass(frozen=True, slots=True)
class EngineLost:
    """From the watcher of the primary's machine: the session's engine is gone, its host is not."""

    uuid: str  # of the guest: a secondary that has begun anew knows no session
    guest: LeftGuest
    detail: str  # for the person: how the engine was lost, and what was done


@dataclass(frozen=True, slots=True)
class Welcome:
    session: int
    term: int
    last_epoch: int  # highest acknowledged epoch of this session, 0 for none
    committed_epoch: int | None  # None: the replica is still syncing
    has_image: bool  # there are pages whose digests may be asked for
    epoch_limit_bytes: int
    secondary: HostIdentity


@dataclass(frozen=True, slots=True)
class Refused:
    session: int
    term: int  # that the secondary knows
    code: str  # term, active, busy, memory, state, ...
    text: str  # for the person: what is wrong, what to do


@dataclass(frozen=True, slots=True)
class Echo:
    count: int
    sent_ns: int  # as it came
    committed_epoch: int | None


@dataclass(frozen=True, slots=True)
class Ack:
    epoch: int
    part: int
    final: bool  # the whole epoch is acknowledged: its commit cannot fail any more


@dataclass(frozen=True, slots=True)
class Missing:
    epoch: int
    part: int
    ranges: tuple[tuple[int, int], ...]  # first and last sequence; EVERYTHING


@dataclass(frozen=True, slots=True)
class Committed:
    epoch: int
    commit_ns: int
    audited: int  # pages compared, all equal


@dataclass(frozen=True, slots=True)
class FullCopyWanted:
    """The audit found a difference: the replica is retired."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retired:
    session: int


@dataclass(frozen=True, slots=True)
class EngineLostHeard:
    """The guest was not taken over, and a new engine is waited for."""

    session: int


FromPrimary: TypeAlias = Hello | Heartbeat | Query | Retire | End | Check | EngineLost
FromSecondary: TypeAlias = (
    Welcome | Refused | Echo | Ack | Missing | Committed | FullCopyWanted | Retired | Checked
    | EngineLostHeard
)  # fmt: skip
Message: TypeAlias = FromPrimary | FromSecondary


def encode(message: Message, *, session: int, term: int) -> list[bytes]:
    """One or two parts, ready to send. A message that names its session and term must agree with
    them.
    """
    epoch = part = flags = 0
    payload = b""
    match message:
        case Hello():
            kind, payload = Kind.HELLO, _encode_hello(message)
        case Heartbeat():
            kind, epoch = Kind.HEARTBEAT, message.epoch
            payload = _packed(
                _HEARTBEAT, message.count, message.sent_ns, message.progress, message.phase, 0
            )
        case Query():
            kind, epoch, part = Kind.QUERY, message.epoch, message.part
        case Retire():
            kind, payload = Kind.RETIRE, _reason(message.reason)
        case End():
            kind, payload = Kind.END, _reason(message.reason.value)
        case EngineLost():
            detail = fields.one_line(message.detail, TEXT_MAX)
            kind, payload = Kind.ENGINE_LOST, fields.dumps({**asdict(message), "detail": detail})
        case Welcome():
            kind, payload = Kind.WELCOME, _encode_welcome(message)
        case Refused():
            kind = Kind.REFUSED
            text = fields.one_line(message.text, TEXT_MAX)
            payload = fields.dumps({"code": message.code, "text": text})
        case Echo():
            kind = Kind.ECHO
            payload = _packed(_ECHO, message.count, message.sent_ns)
            if message.committed_epoch is not None:
                epoch, flags = message.committed_epoch, FLAG
        case Ack():
            kind, epoch, part = Kind.ACK, message.epoch, message.part
            flags = FLAG if message.final else 0
        case Missing():
            kind, epoch, part = Kind.MISSING, message.epoch, message.part
            payload = fields.dumps({"ranges": message.ranges})
        case Committed():
            kind, epoch = Kind.COMMITTED, message.epoch
            payload = _packed(_COMMITTED, message.commit_ns, message.audited, 0)
        case FullCopyWanted():
            kind, payload = Kind.FULL_COPY_WANTED, _reason(message.reason)
        case Retired():
            kind = Kind.RETIRED
        case EngineLostHeard():
            kind = Kind.ENGINE_LOST_HEARD
        case Check():
            kind, payload = Kind.CHECK, checks.encode_check(message)
        case Checked():
            kind, payload = Kind.CHECKED, checks.encode_checked(message)
        case _:
            assert_never(message)
    header = Header(kind, session, term, epoch, part, flags=flags, length=len(payload))
    if decode_payload(header, payload) != _as_sent(message):
        raise FrameError(kind.name, "does not agree with the session and term it is sent under")
    return [pack(header), payload] if payload else [pack(header)]


def decode(parts: Sequence[Octets], channel: Channel) -> tuple[Header, Message]:
    """The message that came by `channel`, one of the two control channels."""
    header, payload = split(parts, channel)
    return header, decode_payload(header, payload)


def decode_payload(header: Header, payload: Octets) -> Message:
    """The second half of decode(), for a receiver that first looks at the header."""
    match header.kind:
        case Kind.HELLO:
            return _decode_hello(header, _json(header, payload))
        case Kind.HEARTBEAT:
            count, sent_ns, progress, phase, reserved = _HEARTBEAT.unpack(payload)
            _must_be_zero(reserved)
            return Heartbeat(count, sent_ns, header.epoch, progress, phase)
        case Kind.QUERY:
            return Query(header.epoch, header.part)
        case Kind.RETIRE:
            return Retire(_decode_reason(header, payload))
        case Kind.END:
            return End(_end_reason(_decode_reason(header, payload)))
        case Kind.ENGINE_LOST:
            return _decode_engine_lost(_json(header, payload))
        case Kind.WELCOME:
            return _decode_welcome(header, _json(header, payload))
        case Kind.REFUSED:
            return _decode_refused(header, _json(header, payload))
        case Kind.ECHO:
            count, sent_ns = _ECHO.unpack(payload)
            if header.epoch and not header.flags:
                raise FrameError("epoch", "is not 0, but the flag says that there is none")
            return Echo(count, sent_ns, header.epoch if header.flags else None)
        case Kind.ACK:
            return Ack(header.epoch, header.part, bool(header.flags))
        case Kind.MISSING:
            document = _json(header, payload)
            ranges = document.ranges("ranges", RANGES_MAX, U32_MAX)
            document.done()
            return Missing(header.epoch, header.part, ranges)
        case Kind.COMMITTED:
            commit_ns, audited, reserved = _COMMITTED.unpack(payload)
            _must_be_zero(reserved)
            return Committed(header.epoch, commit_ns, audited)
        case Kind.FULL_COPY_WANTED:
            return FullCopyWanted(_decode_reason(header, payload))
        case Kind.RETIRED:
            return Retired(header.session)
        case Kind.CHECK:
            return checks.decode_check(_json(header, payload))
        case Kind.CHECKED:
            return checks.decode_checked(_json(header, payload))
        case Kind.ENGINE_LOST_HEARD:
            return EngineLostHeard(header.session)
    raise FrameError("kind", f"{header.kind.name} is no control message")


def _as_sent(message: Message) -> Message:
    """What the peer will read: free text loses what cannot travel."""
    match message:
        case Retire(reason):
            return Retire(fields.one_line(reason, TEXT_MAX))
        case FullCopyWanted(reason):
            return FullCopyWanted(fields.one_line(reason, TEXT_MAX))
        case EngineLost(guest_uuid, guest, detail):
            return EngineLost(guest_uuid, guest, fields.one_line(detail, TEXT_MAX))
        case Refused(session, term, code, text):
            return Refused(session, term, code, fields.one_line(text, TEXT_MAX))
        case Check(uuid=ident, name=name, boot_id=boot):
            return Check(ident, fields.one_line(name, checks.NAME_MAX), boot)
        case Checked():
            return checks.as_sent(message)
    return message


def _packed(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise FrameError("payload", f"has a number out of bounds: {error}") from None


def _must_be_zero(reserved: int) -> None:
    if reserved:
        raise FrameError("reserved", f"is {reserved:#x}, not 0")


def _json(header: Header, payload: Octets) -> fields.Fields:
    return fields.loads(bytes(payload), header.kind.name)


def _reason(text: str) -> bytes:
    return fields.dumps({"reason": fields.one_line(text, TEXT_MAX)})


def _decode_reason(header: Header, payload: Octets) -> str:
    document = _json(header, payload)
    reason = document.text("reason", TEXT_MAX)
    document.done()
    return reason


def _end_reason(text: str) -> EndReason:
    try:
        return EndReason(text)
    except ValueError:
        raise FrameError("END.reason", f"is none of {', '.join(EndReason)}") from None


def _decode_engine_lost(document: fields.Fields) -> EngineLost:
    lost = EngineLost(
        _uuid(document),
        _left_guest(document),
        document.text("detail", TEXT_MAX),
    )
    document.done()
    return lost


def _left_guest(document: fields.Fields) -> LeftGuest:
    try:
        return LeftGuest(document.text("guest", 32))
    except ValueError:
        document.fail("guest", f"is none of {', '.join(LeftGuest)}")


def _uuid(document: fields.Fields) -> str:
    text = document.text("uuid", 36)
    try:
        if str(uuid.UUID(text)) != text:
            document.fail("uuid", "is not in canonical form")
    except ValueError:
        document.fail("uuid", "is not a UUID")
    return text


def _encode_hello(hello: Hello) -> bytes:
    info = asdict(replace(hello.info, config={}))  # asdict cannot copy every mapping
    return fields.dumps(
        {
            "info": {**info, "config": dict(hello.info.config)},
            "interval_ns": hello.interval_ns,
            "digest_seed": base64.b64encode(hello.digest_seed).decode(),
            "static_records": base64.b64encode(hello.static_records).decode(),
            "first_epoch": hello.first_epoch,
            "resume": hello.resume,
        }
    )


def _decode_hello(header: Header, document: fields.Fields) -> Hello:
    hello = Hello(
        header.session,
        header.term,
        _decode_info(document.object("info")),
        interval_ns=document.integer("interval_ns", 1),
        digest_seed=document.octets("digest_seed", SEED_BYTES, SEED_BYTES),
        static_records=document.octets("static_records", 0, STATIC_RECORDS_MAX),
        first_epoch=document.integer("first_epoch", 1),
        resume=document.boolean("resume"),
    )
    document.done()
    return hello


def _decode_info(document: fields.Fields) -> DomainInfo:
    guest_uuid = _uuid(document)
    nr_pfns = document.integer("nr_pfns", 1, PFNS_MAX)
    info = DomainInfo(
        uuid=guest_uuid,
        domid=document.integer("domid", 0, DOMID_MAX),
        name=document.text("name", 256),
        nr_pfns=nr_pfns,
        ram_pages=document.integer("ram_pages", 0, nr_pfns),
        hypervisor=document.text("hypervisor", 32, 1),
        host=_decode_identity(document.object("host")),
        config=document.settings("config", 64),
    )
    document.done()
    return info


def _decode_identity(document: fields.Fields) -> HostIdentity:
    identity = HostIdentity(
        boot_id=document.text("boot_id", 64),
        pid=document.integer("pid", 0, (1 << 31) - 1),
        start_time=document.integer("start_time"),
        control=document.text("control", 256),
    )
    document.done()
    return identity


def _encode_welcome(welcome: Welcome) -> bytes:
    return fields.dumps(
        {
            "last_epoch": welcome.last_epoch,
            "committed_epoch": welcome.committed_epoch,
            "has_image": welcome.has_image,
            "epoch_limit_bytes": welcome.epoch_limit_bytes,
            "secondary": asdict(welcome.secondary),
        }
    )


def _decode_welcome(header: Header, document: fields.Fields) -> Welcome:
    welcome = Welcome(
        header.session,
        header.term,
        last_epoch=document.integer("last_epoch"),
        committed_epoch=document.optional_integer("committed_epoch"),
        has_image=document.boolean("has_image"),
        epoch_limit_bytes=document.integer("epoch_limit_bytes", 1),
        secondary=_decode_identity(document.object("secondary")),
    )
    document.done()
    return welcome


def _decode_refused(header: Header, document: fields.Fields) -> Refused:
    code = document.text("code", 32, 1)
    if not _CODE.fullmatch(code):
        document.fail("code", "is not a lower-case word")
    refused = Refused(header.session, header.term, code, document.text("text", TEXT_MAX))
    document.done()
    return refused
