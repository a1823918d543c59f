"""The verifier: what it finds, where, and what it accepts."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import fuzz_stream as fuzz
import pytest

from checkpointd.stream import bodies
from checkpointd.stream.libxl import Emulator, LibxlType, XlHeader
from checkpointd.stream.records import BATCH_MAX, PAGE_SIZE, RecordType
from checkpointd.stream.rules import Severity
from checkpointd.stream.verify import FINDINGS_MAX, Report, Shape, verify
from checkpointd.stream.writer import record

if TYPE_CHECKING:
    from collections.abc import Callable

    Parts = list[tuple[str, bytes]]


SAMPLES = fuzz.samples()
R = RecordType


def judge(parts: Parts) -> Report:
    return verify([fuzz.join(parts)])


def errors(report: Report) -> list[str]:
    return [str(finding) for finding in report.findings if finding.severity is Severity.ERROR]


def notes(report: Report) -> list[str]:
    return [str(finding) for finding in report.findings if finding.severity is Severity.NOTE]


# -- what is accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_faultless(name: str) -> None:
    report = judge(SAMPLES[name])
    assert report.ok
    assert not report.findings
    assert report.octets == len(fuzz.join(SAMPLES[name]))


@pytest.mark.parametrize(
    ("name", "shape", "closed", "epochs", "formats"),
    [
        ("hvm", Shape.PLAIN, True, 0, ["libxc"]),
        ("hvm remus", Shape.CHECKPOINTED, False, 3, ["libxc"]),
        ("hvm remus closed", Shape.CHECKPOINTED, True, 3, ["libxc"]),
        ("libxl remus", Shape.CHECKPOINTED, False, 2, ["libxl", "libxc"]),
        ("libxl remus closed", Shape.CHECKPOINTED, True, 2, ["libxl", "libxc"]),
        ("xl", Shape.PLAIN, True, 0, ["xl", "libxl", "libxc"]),
    ],
)
def test_the_report_says_what_it_was(
    name: str, shape: Shape, closed: bool, epochs: int, formats: list[str]
) -> None:
    report = judge(SAMPLES[name])
    assert (report.shape, report.closed, report.whole_epochs) == (shape, closed, epochs)
    assert report.formats == formats


@pytest.mark.parametrize("name", ["hvm remus", "pv remus", "libxl remus", "libxl colo"])
def test_a_checkpointed_stream_may_stop_behind_each_whole_epoch_and_only_there(name: str) -> None:
    parts = SAMPLES[name]
    last = "libxl CHECKPOINT_END" if name.startswith("libxl") else "CHECKPOINT"
    accepted = []
    for count in range(1, len(parts) + 1):
        report = judge(parts[:count])
        if report.ok:
            accepted.append(count)
        assert report.whole_epochs == sum(label == last for label, _ in parts[:count])
    ends = [at + 1 for at, (label, _) in enumerate(parts) if label == last]
    if name == "libxl colo":  # the state that announces the next epoch is still between two
        ends.insert(2, ends[1] + 1)
    assert accepted == ends


@pytest.mark.parametrize("name", ["hvm", "pv", "libxl", "libxl remus", "libxl colo", "xl"])
def test_a_stream_cut_anywhere_within_an_item_is_found_with_its_octet(name: str) -> None:
    parts = SAMPLES[name]
    offset = 0
    for label, octets in parts:
        for missing in {1, len(octets) // 2, len(octets) - 1} - {0}:
            report = verify([fuzz.join(parts)[: offset + len(octets) - missing]])
            finding = report.findings[-1]
            assert finding.position.offset == offset, label
            assert f"ends at octet {offset + len(octets) - missing}," in finding.what
        offset += len(octets)


# -- one thing wrong -------------------------------------------------------------------------------


def edit(name: str, label: str, change: Callable[[bytes], bytes | None]) -> Parts:
    """A sample with its first part of that label changed, or left out (None)."""
    parts = list(SAMPLES[name])
    at = [label for label, _ in parts].index(label)
    changed = change(parts[at][1])
    parts[at : at + 1] = [] if changed is None else [(label, changed)]
    return parts


def without(name: str, label: str) -> Parts:
    return edit(name, label, lambda _: None)


def body(name: str, label: str, octets: bytes) -> Parts:
    """A sample with another body in its first record of that label."""
    return edit(name, label, lambda old: record(int.from_bytes(old[:4], "little"), octets))


def poke(name: str, label: str, offset: int, octets: str) -> Parts:
    new = bytes.fromhex(octets)
    return edit(name, label, lambda old: old[:offset] + new + old[offset + len(new) :])


def before(name: str, label: str, *new: tuple[str, bytes]) -> Parts:
    parts = list(SAMPLES[name])
    at = [label for label, _ in parts].index(label)
    return parts[:at] + list(new) + parts[at:]


def moved(name: str, label: str, target: str) -> Parts:
    """A sample with its first part of one label put before the first of another."""
    parts = list(SAMPLES[name])
    part = parts.pop([label for label, _ in parts].index(label))
    parts.insert([label for label, _ in parts].index(target), part)
    return parts


def rec(kind: RecordType, octets: bytes = b"") -> tuple[str, bytes]:
    return kind.name, record(kind, octets)


def xl(kind: LibxlType, octets: bytes = b"") -> tuple[str, bytes]:
    return f"libxl {kind.name}", record(kind, octets)


def words(*values: int) -> bytes:
    return bodies.page_data_head(values)


OPTIONAL = ("optional", record(0x80000001, b"hint"))
LONG = bytes(PAGE_SIZE)
NO_NUL = XlHeader(3, 0, b"\2\0\0\0{}")
NO_JSON = XlHeader.with_config("{")
DEEP_JSON = XlHeader.with_config("[" * 100_000)

BROKEN: dict[str, tuple[Parts, str]] = {
    # headers
    "options": (poke("hvm", "image header", 16, "0002"), "octet 0, .*reserved option bits"),
    "image reserved": (poke("hvm", "image header", 20, "00000001"), "reserved fields"),
    "BE bit": (poke("hvm", "image header", 16, "0001"), "octet 0, .*big endian"),
    "version 1": (poke("hvm", "image header", 15, "01"), "version 1 is unknown"),
    "domain type": (poke("hvm", "domain header", 0, "03"), "octet 24, .*domain type 3"),
    "page_shift": (poke("hvm", "domain header", 4, "0d"), "page_shift 13"),
    "domain reserved": (poke("hvm", "domain header", 6, "01"), "reserved field"),
    "libxl options": (poke("libxl", "libxl header", 12, "80000000"), "reserved option bits"),
    "libxl BE bit": (poke("libxl", "libxl header", 15, "01"), "big endian"),
    "xl mandatory": (poke("xl", "xl header", 36, "07"), "unknown mandatory flags 0x4"),
    "xl optional": (poke("xl", "xl header", 40, "01"), "unknown optional flags 0x1"),
    "xl legacy": (poke("xl", "xl header", 36, "01"), "flag STREAMv2 is missing"),
    "xl no NUL": (edit("xl", "xl header", lambda _: NO_NUL.pack()), "does not end with a NUL"),
    "xl no JSON": (edit("xl", "xl header", lambda _: NO_JSON.pack()), "no JSON"),
    "xl deep JSON": (edit("xl", "xl header", lambda _: DEEP_JSON.pack()), "no JSON"),
    "xl length": (poke("xl", "xl header", 48, "00"), "configuration announces 0"),
    "xl libxc": ([fuzz.XL_HEADER, *SAMPLES["hvm"]], "libxl stream should follow"),
    # single records of libxc
    "unknown record": (
        before("hvm", "END", ("x", record(0x13))),
        "unknown mandatory record type 0x13",
    ),
    "END body": (body("hvm", "END", bytes(8)), "has 8 octets; it must be empty"),
    "padding": (
        edit("hvm", "HVM_CONTEXT", lambda old: old[:-1] + b"\1"),
        r"\(HVM_CONTEXT\).*padding is not zero",
    ),
    "TOOLSTACK": (before("hvm", "END", rec(R.TOOLSTACK, b"x")), "deprecated"),
    "back channel": (before("hvm", "END", rec(R.CHECKPOINT_DIRTY_PFN_LIST, bytes(8))), "forward"),
    "PAGE_DATA short": (body("hvm", "PAGE_DATA", bytes(4)), "too few for its count"),
    "PAGE_DATA count 0": (body("hvm", "PAGE_DATA", bytes(8)), "count is 0"),
    "PAGE_DATA reserved": (poke("hvm", "PAGE_DATA", 12, "01"), "reserved field is not zero"),
    "PAGE_DATA count": (poke("hvm", "PAGE_DATA", 8, "ffffff7f"), "announces 2147483647 entries"),
    "PAGE_DATA few pages": (body("hvm", "PAGE_DATA", words(1)), "1 of which|1 entries"),
    "PAGE_DATA XTAB page": (body("hvm", "PAGE_DATA", words(0xF << 60) + LONG), "0 have data"),
    "PAGE_DATA BROKEN page": (body("hvm", "PAGE_DATA", words(0xD << 60) + LONG), "0 have data"),
    "PAGE_DATA bits": (body("hvm", "PAGE_DATA", words(1 << 55) + LONG), "reserved bits"),
    "PAGE_DATA low bits": (body("hvm", "PAGE_DATA", words(1 << 52) + LONG), "reserved bits"),
    **{
        f"PAGE_DATA type {kind}": (
            body("hvm", "PAGE_DATA", words(kind << 60)),
            f"reserved page type {kind}",
        )
        for kind in (5, 6, 7, 8)
    },
    "PV_INFO length": (body("pv", "X86_PV_INFO", bytes(16)), "has 16 octets, not 8"),
    "PV_INFO pair": (body("pv", "X86_PV_INFO", b"\x08\x03" + bytes(6)), "width 8 with 3 levels"),
    "PV_INFO reserved": (body("pv", "X86_PV_INFO", b"\x08\x04\1" + bytes(5)), "reserved fields"),
    "P2M length": (body("pv", "X86_PV_P2M_FRAMES", bytes(4)), "not 8 and a multiple of 8"),
    "P2M frames": (
        body("pv", "X86_PV_P2M_FRAMES", struct.pack("<IIQ", 0, 600, 7)),
        "need 2 frames, 24 octets",
    ),
    "P2M 32 bit": (
        body("pv v2", "X86_PV_P2M_FRAMES", struct.pack("<IIQ", 0, 1024, 7)),
        "32-bit guest need 2 frames",
    ),
    "P2M order": (body("pv", "X86_PV_P2M_FRAMES", struct.pack("<IIQ", 9, 8, 7)), "is behind end"),
    "pfn beyond p2m": (
        before("pv", "X86_TSC_INFO", rec(R.PAGE_DATA, words(601) + LONG)),
        "pfn 0x259 is beyond",
    ),
    "vcpu short": (body("pv", "X86_PV_VCPU_MSRS", bytes(4)), "too few for the vcpu"),
    "vcpu reserved": (poke("pv", "X86_PV_VCPU_XSAVE", 12, "01"), "reserved field"),
    "vcpu context": (body("pv", "X86_PV_VCPU_BASIC", bytes(2808)), "64-bit guest's has 5176"),
    "vcpu context 32": (body("pv v2", "X86_PV_VCPU_BASIC", bytes(5176)), "32-bit .* 2808"),
    "vcpu extended": (body("pv", "X86_PV_VCPU_EXTENDED", bytes(144)), "more than 136"),
    "vcpu xsave": (body("pv", "X86_PV_VCPU_XSAVE", bytes(16)), "fewer than 24"),
    "vcpu msrs": (body("pv", "X86_PV_VCPU_MSRS", bytes(16)), "a multiple of 16"),
    "SHARED_INFO": (body("pv", "SHARED_INFO", bytes(4095)), "has 4095 octets, not 4096"),
    "TSC_INFO": (body("hvm", "X86_TSC_INFO", bytes(20)), "has 20 octets, not 24"),
    "TSC_INFO reserved": (poke("hvm", "X86_TSC_INFO", 28, "01"), "reserved field"),
    "HVM_CONTEXT": (body("hvm", "HVM_CONTEXT", b""), "no registers"),
    "HVM_PARAMS short": (body("hvm", "HVM_PARAMS", b""), "too few for its count"),
    "HVM_PARAMS reserved": (poke("hvm", "HVM_PARAMS", 12, "01"), "reserved field"),
    "HVM_PARAMS count": (poke("hvm", "HVM_PARAMS", 8, "03"), "3 parameters make 56"),
    "CPUID length": (body("hvm", "X86_CPUID_POLICY", bytes(25)), "multiple of 24 above 0"),
    "CPUID empty": (body("hvm", "X86_CPUID_POLICY", b""), "multiple of 24 above 0"),
    "MSR length": (body("hvm", "X86_MSR_POLICY", bytes(8)), "multiple of 16 above 0"),
    "CPUID in v2": (before("hvm v2", "PAGE_DATA", SAMPLES["hvm"][2]), "belongs to version 3"),
    "MSR in v2": (before("hvm v2", "PAGE_DATA", SAMPLES["hvm"][3]), "belongs to version 3"),
    "static end in v2": (before("hvm v2", "PAGE_DATA", SAMPLES["hvm"][4]), "belongs to version 3"),
    # order in libxc
    "no static end": (without("hvm", "STATIC_DATA_END"), r"\(PAGE_DATA\).*no STATIC_DATA_END"),
    "no static end, PV": (without("pv", "STATIC_DATA_END"), r"P2M_FRAMES\).*no STATIC_DATA_END"),
    "headers and END": ([*SAMPLES["hvm"][:2], fuzz.END], r"\(END\).*no STATIC_DATA_END"),
    "static end twice": (before("hvm", "HVM_CONTEXT", rec(R.STATIC_DATA_END)), "second time"),
    "static repeated": (before("hvm remus", "HVM_CONTEXT", SAMPLES["hvm"][2]), "second time"),
    "static late": (moved("hvm", "STATIC_DATA_END", "X86_MSR_POLICY"), "behind STATIC_DATA_END"),
    "PV in HVM": (before("hvm", "END", rec(R.SHARED_INFO, LONG)), "domain header says HVM"),
    "HVM in PV": (before("pv", "END", rec(R.HVM_CONTEXT, b"x")), "domain header says PV"),
    "PV_INFO missing": (without("pv", "X86_PV_INFO"), "no X86_PV_INFO before it"),
    "P2M missing": (without("pv", "X86_PV_P2M_FRAMES"), "no X86_PV_P2M_FRAMES before it"),
    "P2M late": (
        before("pv", "END", SAMPLES["pv"][5]),
        "comes again behind PAGE_DATA",
    ),
    "vcpu early": (moved("pv", "X86_PV_VCPU_BASIC", "PAGE_DATA"), "no PAGE_DATA before it"),
    "no registers": (without("hvm", "HVM_CONTEXT"), r"\(END\).*no HVM_CONTEXT"),
    "no registers in an epoch": (
        without("hvm remus", "HVM_CONTEXT"),
        r"\(CHECKPOINT\), epoch 1: the epoch has no HVM_CONTEXT",
    ),
    "no vcpu 0": (without("pv", "X86_PV_VCPU_BASIC"), "no X86_PV_VCPU_BASIC of vcpu 0"),
    "vcpu 0 is another": (poke("pv", "X86_PV_VCPU_BASIC", 8, "01"), "BASIC of vcpu 0"),
    "no shared info": (without("pv", "SHARED_INFO"), "no SHARED_INFO"),
    # the framing of epochs, and END
    "optional in an epoch": (
        [*SAMPLES["hvm remus"], OPTIONAL, *fuzz.hvm_epoch(4), fuzz.CHECKPOINT],
        "epoch 4: optional record in a buffered epoch",
    ),
    "VERIFY and CHECKPOINT": (before("hvm remus", "CHECKPOINT", rec(R.VERIFY)), "epoch is lost"),
    "END in mid-epoch": (
        [*SAMPLES["hvm remus"], *fuzz.hvm_epoch(4), fuzz.END],
        r"\(END\), epoch 4: END in mid-epoch.*PAGE_DATA",
    ),
    "no END": (SAMPLES["hvm"][:-1], "stops here, without END"),
    "headers alone": (SAMPLES["hvm"][:2], "stops here, without END"),
    "behind END": ([*SAMPLES["hvm"], fuzz.END], "8 octets follow the last END"),
    "mid-epoch": (
        [*SAMPLES["hvm remus"], *fuzz.hvm_epoch(4)],
        "epoch 4: the stream stops in mid-epoch, before CHECKPOINT; 3 whole epochs",
    ),
    "no CHECKPOINT_END": (
        SAMPLES["libxl remus"][:-1],
        "epoch 2: the stream stops in mid-epoch, before CHECKPOINT_END; 1 whole",
    ),
    "libxl END in mid-epoch": (
        [*SAMPLES["libxl remus"][:-1], fuzz.LIBXL_END],
        r"libxl .*\(END\), epoch 2: END in mid-epoch",
    ),
    "CHECKPOINT_END behind END": (
        before("libxl", "libxl END", fuzz.CHECKPOINT_END),
        "no libxc CHECKPOINT before it",
    ),
    # single records of libxl, and their order
    "libxl unknown": (before("libxl", "libxl END", ("x", record(6))), "unknown type 0x6"),
    "libxl optional": (
        before("libxl", "libxl END", ("x", record(0x80000001))),
        "refuses it, marked optional or not",
    ),
    "libxl END body": (body("libxl", "libxl END", bytes(8)), "it must be empty"),
    "CONTEXT body": (body("libxl", "libxl LIBXC_CONTEXT", bytes(8)), "it must be empty"),
    "emulator short": (body("libxl", "libxl EMULATOR_CONTEXT", bytes(4)), "emulator's id"),
    "emulator id": (poke("libxl", "libxl EMULATOR_CONTEXT", 8, "03"), "emulator id 3"),
    **{
        f"xenstore {data!r}": (
            body("libxl xenstore", "libxl EMULATOR_XENSTORE_DATA", Emulator(2, 0, data).pack()),
            complaint,
        )
        for data, complaint in (
            (b"a\0b", "does not end with a NUL"),
            (b"a\0b\0c\0", "a key without a value"),
            (b"/a\0b\0", "xenstore key '/a'"),
            (b"\0b\0", "xenstore key ''"),
        )
    },
    "xenstore huge": (
        body("libxl xenstore", "libxl EMULATOR_XENSTORE_DATA", bytes(5 << 20)),
        "no model has 4194304",
    ),
    "emulator of a PV guest": (before("libxl pv", "libxl END", fuzz.EMULATOR), "PV guest has no"),
    "emulator twice": (before("libxl", "libxl END", fuzz.EMULATOR), "comes twice in one epoch"),
    "no LIBXC_CONTEXT": ([fuzz.LIBXL_START[0], fuzz.LIBXL_END], "no LIBXC_CONTEXT before it"),
    "LIBXC_CONTEXT twice": (
        before("libxl", "libxl END", *SAMPLES["libxl"][1:-2]),
        r"\(LIBXC_CONTEXT\).*comes a second time",
    ),
    "context per epoch": (
        [*SAMPLES["libxl remus"], *SAMPLES["libxl remus"][1:]],
        "image header where a record should begin",
    ),
    "state in mid-epoch": (
        before("libxl remus", "libxl CHECKPOINT_END", fuzz.COLO_NEW),
        "belongs between two epochs",
    ),
    "state of the back channel": (
        [*SAMPLES["libxl remus"], xl(LibxlType.CHECKPOINT_STATE, b"\2\0\0\0")],
        "SVM_READY goes from secondary to primary",
    ),
    "state unknown": (
        [*SAMPLES["libxl remus"], xl(LibxlType.CHECKPOINT_STATE, b"\4\0\0\0")],
        "state 4 is unknown",
    ),
    "state length": (
        before("libxl", "libxl END", xl(LibxlType.CHECKPOINT_STATE, bytes(8))),
        "has 8 octets, not 4",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str) -> None:
    parts, complaint = BROKEN[name]
    report = judge(parts)
    assert not report.ok
    assert any(re.search(complaint, text) for text in errors(report)), errors(report)


NOTED: dict[str, tuple[Parts, str]] = {
    "converted": (poke("hvm", "domain header", 8, "00000000"), "made by the converter"),
    "optional": (before("hvm", "PAGE_DATA", OPTIONAL), "optional record of type 0x80000001"),
    "count": (
        body("hvm", "PAGE_DATA", words(*[0xF << 60] * (BATCH_MAX + 1))),
        "1025 entries; Xen's sender",
    ),
    "XALLOC": (body("hvm", "PAGE_DATA", words(0xE << 60)), "XALLOC"),
    "empty params": (body("hvm", "HVM_PARAMS", bytes(8)), "Xen 4.6 to 4.8 sent such"),
    "empty vcpu record": (body("pv", "X86_PV_VCPU_MSRS", bytes(8)), "Xen 4.6 to 4.8 sent such"),
    "P2M twice": (before("pv", "PAGE_DATA", SAMPLES["pv"][5]), "Xen's sender sends one"),
    "no xenstore": (body("libxl xenstore", "libxl EMULATOR_XENSTORE_DATA", bytes(8)), "leave"),
    "emulator index": (poke("libxl", "libxl EMULATOR_CONTEXT", 12, "01"), "index 1"),
    "emulator order": (before("libxl", "libxl END", fuzz.XENSTORE), "libxl sends it before"),
    "no JSON flag": (poke("xl", "xl header", 36, "02"), "older than JSON"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_receivers_take_is_noted_not_refused(name: str) -> None:
    parts, remark = NOTED[name]
    report = judge(parts)
    assert report.ok, errors(report)
    assert any(re.search(remark, text) for text in notes(report)), notes(report)


# -- many things wrong -----------------------------------------------------------------------------


def test_all_findings_are_gathered_with_their_places() -> None:
    parts = poke("hvm remus", "image header", 20, "00000001")
    parts += [("x", record(0x13)), ("y", record(0x14)), *fuzz.hvm_epoch(4)]
    offset = len(fuzz.join(SAMPLES["hvm remus"]))
    report = judge(parts)
    assert [finding.position.offset for finding in report.findings] == [
        0,
        offset,
        offset + 8,
        len(fuzz.join(parts)),
    ]
    assert {finding.position.epoch for finding in report.findings[1:]} == {4}


def test_a_guest_of_unknown_type_is_not_asked_for_registers() -> None:
    assert len(errors(judge(poke("hvm", "domain header", 0, "03")))) == 1


def test_findings_are_bounded_and_counted() -> None:
    many = FINDINGS_MAX + 500
    report = judge(before("hvm", "END", *[("x", record(0x13))] * many))
    assert report.errors == many
    assert len(report.findings) == FINDINGS_MAX


def test_a_missing_static_end_is_told_once_not_for_every_record() -> None:
    report = judge(before("hvm", "PAGE_DATA", *[SAMPLES["hvm"][5]] * 10))
    assert report.ok
    parts = before("hvm", "STATIC_DATA_END", *[SAMPLES["hvm"][5]] * 10)
    assert len(errors(judge(parts))) == 1
