"""checkpointd stream: show, verify and copy files in Xen's migration stream format.

The JSON (--json) is an interface: `schema` grows when a field changes its meaning or goes; fields
may be added.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from checkpointd.errors import StreamError
from checkpointd.stream import bodies, files
from checkpointd.stream.convert import Converter
from checkpointd.stream.libxl import LibxlHeader, LibxlType, XlHeader
from checkpointd.stream.reader import BrokenStreamError, Content, Reader, Record
from checkpointd.stream.records import (
    PFN_MASK,
    DomainHeader,
    DomainType,
    ImageHeader,
    Layer,
    PageType,
    RecordType,
)
from checkpointd.stream.verify import Report, Shape, Verifier, verify
from checkpointd.stream.writer import encode

if TYPE_CHECKING:
    import argparse

SCHEMA = 1
RUNS_SHOWN = 8  # runs of pfns shown of one record; scattered pages make hundreds
KINDS_COUNTED = 64  # twice the kinds there are; a hostile stream makes up 4 billion types

DESCRIPTION = """\
Show, verify and copy files in Xen's migration stream format: libxc streams of version 2 and 3,
alone, in libxl's framing, or in a file of `xl save`. The file's first octets say which it is.

FILE may be - for standard input, and is decompressed if its name ends in .zst.
"""
FILE = "- is standard input; one in .zst is decompressed"
COPY = """\
Read a whole stream, and write it again. A faultless stream comes back octet for octet, unless its
version is changed. OUT gets its new content only when all of it is written and IN had no fault;
it may be - for standard output, and is compressed if its name ends in .zst.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "stream",
        help="show, verify and copy files in Xen's migration stream format",
        description=DESCRIPTION,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    show = actions.add_parser(
        "show",
        help="list the records of a stream",
        description="List the records of a stream. Pages are summed up, never printed.",
    )
    show.add_argument("file", metavar="FILE", help=FILE)
    show.add_argument(
        "--json", action="store_true", help="JSON lines, one a record; the last is a summary"
    )

    check = actions.add_parser(
        "verify",
        help="tell whether Xen would restore a stream",
        description="Tell whether Xen would restore a stream. All that is wrong goes to standard"
        " error, and the exit code is then 10.",
    )
    check.add_argument("file", metavar="FILE", help=FILE)
    check.add_argument("--json", action="store_true", help="print the report as one JSON object")

    copy = actions.add_parser("copy", help="decode a stream and encode it", description=COPY)
    copy.add_argument("source", metavar="IN", help=FILE)
    copy.add_argument(
        "target", metavar="OUT", help="- is standard output; one in .zst is compressed"
    )
    copy.add_argument(
        "--to-version",
        type=int,
        choices=(2, 3),
        help="write this version of the libxc stream (default: as it is);"
        " 2 cannot carry the CPUID and MSR policies",
    )


def run(args: argparse.Namespace) -> int:
    if args.action == "show":
        return run_show(args.file, as_json=args.json)
    if args.action == "verify":
        return run_verify(args.file, as_json=args.json)
    return run_copy(args.source, args.target, args.to_version)


# -- verify ----------------------------------------------------------------------------------------


def run_verify(path: str, *, as_json: bool) -> int:
    report = verify(files.read_chunks(path))
    if as_json:
        findings = [
            {
                "severity": finding.severity,
                "offset": finding.position.offset,
                "layer": finding.position.layer,
                "record": finding.position.record,
                "epoch": finding.position.epoch,
                "name": finding.position.name,
                "what": finding.what,
            }
            for finding in report.findings
        ]
        print(json.dumps({"schema": SCHEMA, **summary(report), "findings": findings}))
    elif report.ok:
        print(f"{path}: ok: {sentence(report)}")
    print_findings(path, report)
    return 0 if report.ok else StreamError.exit_code


def print_findings(path: str, report: Report) -> None:
    for finding in report.findings:
        print(f"{path}: {finding}", file=sys.stderr)
    if more := report.errors + report.notes - len(report.findings):
        print(f"{path}: and {more} more findings", file=sys.stderr)


def summary(report: Report) -> dict[str, object]:
    return {
        "ok": report.ok,
        "formats": report.formats,
        "version": report.version,
        "domain": domain_name(report.domain_type),
        "shape": report.shape,
        "closed": report.closed,
        "whole_epochs": report.whole_epochs,
        "records": report.records,
        "octets": report.octets,
        "errors": report.errors,
        "notes": report.notes,
    }


def sentence(report: Report) -> str:
    if not report.formats:
        return f"no stream, {report.octets} octets"
    formats = " in ".join(reversed(report.formats))
    end = "closed by END" if report.closed else "not closed by END"
    if report.shape is Shape.CHECKPOINTED:
        end = f"{report.whole_epochs} whole epochs, {end}"
        if not report.closed and report.ok:
            end += " (the usual end of a checkpointed stream)"
    return (
        f"{report.shape} stream, {formats}, version {report.version},"
        f" {domain_name(report.domain_type)} guest, {end},"
        f" {report.records} records, {report.octets} octets"
    )


def domain_name(domain_type: int | None) -> str | None:
    return DomainType(domain_type).name if domain_type in tuple(DomainType) else None


# -- show ------------------------------------------------------------------------------------------


def run_show(path: str, *, as_json: bool) -> int:
    reader, verifier = Reader(), Verifier()
    counts: Counter[str] = Counter()
    pages = 0
    broken = None
    try:
        for chunk in files.read_chunks(path):
            for event in reader.feed(chunk):
                verifier.event(event)
                position, details = event.position, describe(event.content)
                kind = f"{position.layer} {position.name}"
                counts[kind if kind in counts or len(counts) < KINDS_COUNTED else "others"] += 1
                found = details.get("pages", 0)
                pages += found if isinstance(found, int) else 0
                if as_json:
                    where = {
                        "offset": position.offset,
                        "layer": position.layer,
                        "record": position.record,
                        "epoch": position.epoch,
                        "name": position.name,
                    }
                    print(json.dumps(where | details))
                else:
                    number = position.record or ""
                    print(
                        f"{position.offset:>14} {position.layer or '':5} {number:>6}"
                        f" {position.name:22} {text_of(details)}".rstrip()
                    )
        reader.finish()
    except BrokenStreamError as error:
        verifier.broken(error)
        broken = error
    report = verifier.finish(reader)
    if as_json:
        print(json.dumps({"schema": SCHEMA, **summary(report), "pages": pages, "counts": counts}))
    else:
        for name, count in counts.items():
            print(f"{count:>10}  {name}")
        print(f"{sentence(report)}, {pages} pages")
        if not report.ok and broken is None:
            print(f"{report.errors} errors: `checkpointd stream verify` lists them")
    if broken is not None:
        raise StreamError(f"{path}: {broken}")
    return 0


def describe(content: Content) -> dict[str, object]:
    """What is worth showing of a header or record; of bounded size."""
    match content:
        case XlHeader():
            return {
                "mandatory_flags": content.mandatory_flags,
                "optional_flags": content.optional_flags,
                "config_octets": len(content.optional_data),
            }
        case LibxlHeader():
            return {"version": content.version, "options": content.options}
        case ImageHeader():
            return {"version": content.version, "options": content.options}
        case DomainHeader():
            return {
                "domain": domain_name(content.type) or content.type,
                "page_shift": content.page_shift,
                "xen": f"{content.xen_major}.{content.xen_minor}",
            }
        case Record():
            return {"length": len(content.body), **describe_body(content)}


def describe_body(record: Record) -> dict[str, object]:
    """Details of the records whose content a person can use; none where the body is malformed."""
    try:
        if record.layer is Layer.LIBXL:
            return describe_libxl(record)
        if record.type == RecordType.PAGE_DATA:
            return describe_pages(bodies.PageData.unpack(record.body))
        if record.type in VCPU:  # a copy of the state, which may be large, is not needed
            return {"vcpu": bodies.Vcpu.unpack(record.body[:8]).vcpu_id}
        if record.type not in DESCRIBED:
            return {}
        match bodies.decode(record.type, record.body):
            case bodies.PvInfo(guest_width=width, pt_levels=levels):
                return {"guest_width": width, "pt_levels": levels}
            case bodies.TscInfo() as tsc:
                return {"mode": tsc.mode, "khz": tsc.khz, "nsec": tsc.nsec}
    except StreamError:
        return {"malformed": True}
    return {}


DESCRIBED = (
    RecordType.X86_PV_INFO,
    RecordType.X86_TSC_INFO,
)
VCPU = (
    RecordType.X86_PV_VCPU_BASIC,
    RecordType.X86_PV_VCPU_EXTENDED,
    RecordType.X86_PV_VCPU_XSAVE,
    RecordType.X86_PV_VCPU_MSRS,
)


def describe_libxl(record: Record) -> dict[str, object]:
    if record.type == LibxlType.CHECKPOINT_STATE:
        return {"state": int.from_bytes(record.body[:4], "little")}
    if record.type in (LibxlType.EMULATOR_XENSTORE_DATA, LibxlType.EMULATOR_CONTEXT):
        if len(record.body) < 8:
            raise StreamError("too short for an emulator's id")
        return {"emulator": int.from_bytes(record.body[:4], "little")}
    return {}


def describe_pages(data: bodies.PageData) -> dict[str, object]:
    runs: list[list[int]] = []
    omitted = 0
    last = -2
    for word in bodies.iter_words(data.words):
        pfn = word & PFN_MASK
        if pfn != last + 1 and len(runs) == RUNS_SHOWN:
            omitted += 1
        elif pfn != last + 1:
            runs.append([pfn, pfn])
        elif not omitted:
            runs[-1][1] = pfn
        last = pfn
    types = {type_name(kind): count for kind, count in data.census().types.items()}
    return {
        "entries": len(data.words) // 8,
        "pages": data.census().pages,
        "types": types,
        "pfns": runs,
        **({"runs_omitted": omitted} if omitted else {}),
    }


def type_name(kind: int) -> str:
    return PageType(kind).name if kind in tuple(PageType) else f"reserved {kind}"


def text_of(details: dict[str, object]) -> str:
    parts = []
    for key, value in details.items():
        if key == "pfns" and isinstance(value, list):
            value = ",".join(f"{first:#x}-{last:#x}" for first, last in value)
        elif isinstance(value, dict):
            value = ",".join(f"{name}:{count}" for name, count in value.items())
        parts.append(f"{key}={value}")
    return " ".join(parts)


# -- copy ------------------------------------------------------------------------------------------


def run_copy(source: str, target: str, version: int | None) -> int:
    reader, verifier, converter = Reader(), Verifier(), Converter(version)
    with files.replacing(target) as sink:
        try:
            for chunk in files.read_chunks(source):
                for event in reader.feed(chunk):
                    verifier.event(event)
                    for content in converter.convert(event.content):
                        for octets in encode(content):
                            sink.write(octets)
            reader.finish()
        except BrokenStreamError as error:
            verifier.broken(error)
        report = verifier.finish(reader)
        print_findings(source, report)
        if not report.ok:  # leaving the block by an error keeps the old OUT
            raise StreamError(f"{source} is faulty, so {target} is left as it was")
    if converter.dropped:
        print(
            f"{target}: {converter.dropped} policy records left out, version 2 has none:"
            " the receiver derives the policies from the domain's configuration",
            file=sys.stderr,
        )
    return 0
