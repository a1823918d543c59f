"""Fuzz target for the stream reader and verifier, and the sample streams that it and the tests use.

    python tests/fuzz/fuzz_stream.py [ITERATIONS [SEED]]     seeded mutations, no dependency
    python tests/fuzz/fuzz_stream.py --atheris [LIBFUZZER OPTIONS]

Whatever the octets are, only StreamError may come out, the slices they come in must not matter, and
a stream that the verifier accepts must survive decoding and encoding unchanged.
"""

from __future__ import annotations

import importlib
import random
import sys
from typing import TYPE_CHECKING

from checkpointd.errors import StreamError
from checkpointd.stream import bodies
from checkpointd.stream.libxl import Emulator, LibxlHeader, LibxlType, XlHeader, pack_xenstore
from checkpointd.stream.reader import BrokenStreamError, Event, Reader, Record
from checkpointd.stream.records import Layer, RecordType
from checkpointd.stream.verify import verify
from checkpointd.stream.writer import encode, headers, record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Parts = list[tuple[str, bytes]]  # a stream cut into headers and records, each with its name

HVM, PV = 2, 1
XTAB = 0xF << 60


def libxc(kind: RecordType, body: bytes = b"") -> tuple[str, bytes]:
    return kind.name, record(kind, body)


def libxl(kind: LibxlType, body: bytes = b"") -> tuple[str, bytes]:
    return f"libxl {kind.name}", record(kind, body)


def page(number: int) -> bytes:
    return number.to_bytes(4, "little") * 1024


def pages(*words: int, seed: int = 1) -> tuple[str, bytes]:
    data = b"".join(page(seed * 1000 + word % 1000) for word in words if word < 0xD << 60)
    return libxc(RecordType.PAGE_DATA, bodies.page_data_head(words) + data)


def hvm_start(version: int = 3) -> Parts:
    both = headers(HVM, version=version)
    parts = [("image header", both[:24]), ("domain header", both[24:])]
    if version == 3:
        cpuid = bodies.CpuidPolicy(((0, 0, 13, 1, 2, 3), (1, 0, 4, 5, 6, 7)))
        msrs = bodies.MsrPolicy(((0xCE, 0, 1 << 31),))
        parts += [
            libxc(RecordType.X86_CPUID_POLICY, cpuid.pack()),
            libxc(RecordType.X86_MSR_POLICY, msrs.pack()),
            libxc(RecordType.STATIC_DATA_END),
        ]
    return parts


def hvm_epoch(number: int = 1) -> Parts:
    params = bodies.HvmParams(((1, 0xFEFFC), (17, 0xFEFFD)))
    return [
        pages(0, 1, XTAB | 2, seed=number),
        libxc(RecordType.X86_TSC_INFO, bodies.TscInfo(1, 2_000_000, number, 0).pack()),
        libxc(RecordType.HVM_CONTEXT, b"registers of epoch %d" % number),
        libxc(RecordType.HVM_PARAMS, params.pack()),
    ]


def pv_start(version: int = 3, width: int = 8) -> Parts:
    both = headers(PV, version=version)
    frames = bodies.P2mFrames(0, 600, (7, 8) if width == 8 else (7,))
    static = [libxc(RecordType.X86_PV_INFO, bodies.PvInfo(width, 4 if width == 8 else 3).pack())]
    if version == 3:
        cpuid = bodies.CpuidPolicy(((0, 0, 13, 1, 2, 3),))
        static += [
            libxc(RecordType.X86_CPUID_POLICY, cpuid.pack()),
            libxc(RecordType.STATIC_DATA_END),
        ]
    return [
        ("image header", both[:24]),
        ("domain header", both[24:]),
        *static,
        libxc(RecordType.X86_PV_P2M_FRAMES, frames.pack()),
    ]


def pv_epoch(number: int = 1, width: int = 8) -> Parts:
    context = bytes(5168 if width == 8 else 2800)
    return [
        pages(7, 0x1 << 60 | 8, 0xC << 60 | 9, seed=number),
        libxc(RecordType.X86_TSC_INFO, bodies.TscInfo(0, 2_000_000, number, 0).pack()),
        libxc(RecordType.SHARED_INFO, page(number)),
        libxc(RecordType.X86_PV_VCPU_BASIC, bodies.Vcpu(0, context).pack()),
        libxc(RecordType.X86_PV_VCPU_EXTENDED, bodies.Vcpu(0, bytes(128)).pack()),
        libxc(RecordType.X86_PV_VCPU_XSAVE, bodies.Vcpu(0, bytes(36)).pack()),
        libxc(RecordType.X86_PV_VCPU_MSRS, bodies.Vcpu(0, bytes(32)).pack()),
    ]


END = libxc(RecordType.END)
CHECKPOINT = libxc(RecordType.CHECKPOINT)
LIBXL_START: Parts = [("libxl header", LibxlHeader().pack()), libxl(LibxlType.LIBXC_CONTEXT)]
LIBXL_END = libxl(LibxlType.END)
CHECKPOINT_END = libxl(LibxlType.CHECKPOINT_END)
COLO_NEW = libxl(LibxlType.CHECKPOINT_STATE, bytes(4))
XENSTORE = libxl(
    LibxlType.EMULATOR_XENSTORE_DATA,
    Emulator(2, 0, pack_xenstore([("physmap/0/start_addr", "0xf0000000")])).pack(),
)
EMULATOR = libxl(LibxlType.EMULATOR_CONTEXT, Emulator(2, 0, b"device model").pack())
XL_HEADER = ("xl header", XlHeader.with_config('{"c_info": {"name": "sample"}}').pack())


def remus(epochs: int) -> Parts:
    parts: Parts = []
    for number in range(1, epochs + 1):
        parts += [*hvm_epoch(number), CHECKPOINT, XENSTORE, EMULATOR, CHECKPOINT_END]
    return parts


def samples() -> dict[str, Parts]:
    """Faultless streams of every shape, some 20 KiB each."""
    hvm_remus = [part for n in (1, 2, 3) for part in (*hvm_epoch(n), CHECKPOINT)]
    pv_remus = [part for n in (1, 2) for part in (*pv_epoch(n), CHECKPOINT)]
    libxl_remus = [*LIBXL_START, *hvm_start(), *remus(2)]
    return {
        "hvm": [*hvm_start(), *hvm_epoch(), END],
        "hvm v2": [*hvm_start(2), *hvm_epoch(), END],
        "pv": [*pv_start(), *pv_epoch(), END],
        "pv v2": [*pv_start(2, 4), *pv_epoch(1, 4), END],
        "hvm remus": [*hvm_start(), *hvm_remus],
        "hvm remus closed": [*hvm_start(), *hvm_remus, END],
        "pv remus": [*pv_start(), *pv_remus],
        "libxl": [*LIBXL_START, *hvm_start(), *hvm_epoch(), END, EMULATOR, LIBXL_END],
        "libxl pv": [*LIBXL_START, *pv_start(), *pv_epoch(), END, LIBXL_END],
        "libxl xenstore": [
            *(*LIBXL_START, *hvm_start(), *hvm_epoch(), END),
            *(XENSTORE, EMULATOR, LIBXL_END),
        ],
        "libxl remus": libxl_remus,
        "libxl remus closed": [*libxl_remus, END, LIBXL_END],
        "libxl colo": [*libxl_remus, COLO_NEW, *remus(1)],
        "xl": [XL_HEADER, *LIBXL_START, *hvm_start(2), *hvm_epoch(), END, EMULATOR, LIBXL_END],
    }


def join(parts: Iterable[tuple[str, bytes]]) -> bytes:
    return b"".join(octets for _, octets in parts)


# -- the target ------------------------------------------------------------------------------------


def read(chunks: Iterable[bytes]) -> tuple[list[Event], str | None]:
    """All events, and what ended them if it was a fault."""
    reader = Reader()
    events: list[Event] = []
    try:
        for chunk in chunks:
            events.extend(reader.feed(chunk))
        reader.finish()
    except BrokenStreamError as error:
        return events, str(error)
    return events, None


def slices(data: bytes, rng: random.Random) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = rng.choice((1, 7, 8, 9, 64, 4096, len(data)))
        yield data[at : at + size]
        at += size


def check(data: bytes, rng: random.Random) -> None:
    """Raise AssertionError, or whatever else should not come out, if `data` upsets our code."""
    whole = read([data])
    assert whole == read(slices(data, rng)), "the slices matter"
    for event in whole[0]:
        content = event.content
        if isinstance(content, Record) and content.layer is Layer.LIBXC:
            try:
                bodies.decode(content.type, content.body)
            except StreamError:
                continue
    report = verify([data])
    assert report == verify(slices(data, rng)), "the slices matter to the verifier"
    assert report.octets == len(data) or whole[1] is not None
    if report.ok:
        encoded = b"".join(bytes(part) for event in whole[0] for part in encode(event.content))
        assert encoded == data, "accepted, but not the same after decoding and encoding"


# -- mutations -------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 4, 5, 8, 0xE, 0x10, 0x7F, 1024, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(parts: Parts, others: list[Parts], rng: random.Random) -> bytes:
    """A stream with one to four things wrong, or nothing, if they cancel out."""
    parts = list(parts)
    for _ in range(rng.randint(0, 2)):  # whole records
        here, there = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(5):
            case 0 if len(parts) > 1:
                del parts[here]
            case 1:
                parts.insert(there, parts[here])
            case 2:
                parts[here], parts[there] = parts[there], parts[here]
            case 3:
                parts.insert(there, rng.choice(rng.choice(others)))
            case _:
                del parts[here + 1 :]
    starts = [0]
    for _, octets in parts:
        starts.append(starts[-1] + len(octets))
    data = bytearray(join(parts))
    for _ in range(rng.randint(0, 2)):  # octets, most of them near the beginning of a record
        at = min(rng.choice(starts) + rng.randrange(32), len(data) - 1)
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                at &= ~3
                data[at : at + 4] = rng.choice(NUMBERS).to_bytes(4, "little")
            case 2:
                del data[at : at + rng.choice((1, 8, 4096))]
            case _:
                data[at:at] = rng.randbytes(rng.choice((1, 8, 24)))
        data = data or bytearray(1)
    if not rng.randrange(8):
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def run(iterations: int, seed: int) -> None:
    corpus = list(samples().values())
    for number in range(iterations):
        rng = random.Random(f"{seed}/{number}")
        data = mutate(rng.choice(corpus), corpus, rng)
        try:
            check(data, rng)
        except BaseException as error:
            error.add_note(f"seed {seed}, iteration {number}, {len(data)} octets")
            raise


def main() -> None:
    if "--atheris" in sys.argv:
        atheris = importlib.import_module("atheris")  # not a dependency; who fuzzes has it
        sys.argv.remove("--atheris")
        atheris.instrument_all()
        atheris.Setup(sys.argv, lambda data: check(data, random.Random(len(data))))
        atheris.Fuzz()
    numbers = [int(text) for text in sys.argv[1:]] + [10_000, 1][len(sys.argv) - 1 :]
    run(*numbers[:2])
    sys.stdout.write(f"{numbers[0]} iterations from seed {numbers[1]}: nothing found\n")


if __name__ == "__main__":
    main()
