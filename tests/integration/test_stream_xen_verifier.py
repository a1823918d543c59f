"""What we write, judged by Xen's own verifier; and what it rejects, judged by ours.

The verifier comes from Debian's package of Xen's tools, unpacked into .state/ and never installed: it
is pure Python and needs no Xen. Where the package cannot be downloaded these tests are skipped.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fuzz_stream as fuzz
import pytest

from checkpointd.stream import writer
from checkpointd.stream.convert import Converter
from checkpointd.stream.libxl import LIBXL_IDENT, XL_MAGIC, LibxlType
from checkpointd.stream.reader import Record
from checkpointd.stream.records import OPTIONAL, PAGE_SIZE, Layer, RecordType
from checkpointd.stream.remus import RemusStream
from checkpointd.stream.verify import Report, Shape, verify

if TYPE_CHECKING:
    from checkpointd.stream.reader import Event

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".state" / "xen-verifier"
PACKAGES = ("xen-utils-4.20", "xen-utils-4.17")  # Debian 13, Debian 12
DOWNLOAD_SECONDS = 120  # 1.4 MB; a mirror that is slower than that counts as not there
MUTANTS = 1000

# Runs the script's own read_stream() on each line "FORMAT PATH" of standard input, in one process:
# an interpreter for each of a thousand streams would take a minute.
DRIVER = """
import importlib.machinery, importlib.util, io, sys
loader = importlib.machinery.SourceFileLoader("verify_stream", sys.argv[1])
script = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(script)
script.quiet = True
for line in sys.stdin:
    form, path = line.rstrip("\\n").split(" ", 1)
    with open(path, "rb") as file:
        script.fin = io.BytesIO(file.read())
    print(script.read_stream(form))
"""


SAMPLES = fuzz.samples()
XTAB = 0xF << 60


def unpacked(package: str) -> str | None:
    """Download and unpack a package into the cache, once; the reason if that fails."""
    target = CACHE / package
    if target.is_dir():
        return None
    staging = CACHE / f"{package}.{os.getpid()}"
    staging.mkdir(parents=True, exist_ok=True)
    try:
        # As root apt would hand the download to a user who may not write here.
        subprocess.run(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package],
            cwd=staging,
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
        )
        (archive,) = staging.glob("*.deb")
        tree = staging / "tree"
        unpack = ["dpkg-deb", "-x", str(archive), str(tree)]
        subprocess.run(unpack, check=True, capture_output=True, text=True)
        tree.rename(target)
    except subprocess.CalledProcessError as error:
        return f"{package}: {(error.stderr.strip() or str(error)).splitlines()[-1]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{package}: {error}"
    finally:
        shutil.rmtree(staging)
    return None


class XenVerifier:
    def __init__(self, tree: Path) -> None:
        (self.script,) = tree.glob("usr/lib/xen-*/bin/verify-stream-v2")
        (library,) = tree.glob("usr/lib/xen-*/lib/python")
        self.environment = {**os.environ, "PYTHONPATH": str(library)}

    def verdict(self, path: Path, form: str) -> tuple[int, str]:
        """Exit code (0 accepted, 1 rejected, 2 the script failed) and what it printed."""
        done = subprocess.run(
            [sys.executable, "-B", self.script, "-i", path, "-f", form],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def verdicts(self, streams: list[tuple[str, Path]]) -> list[int]:
        lines = "".join(f"{form} {path}\n" for form, path in streams)
        done = subprocess.run(
            [sys.executable, "-B", "-c", DRIVER, self.script],
            env=self.environment,
            input=lines,
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(line) for line in done.stdout.split()]


@pytest.fixture(scope="module")
def xen() -> XenVerifier:
    reasons = []
    for package in PACKAGES:
        reason = unpacked(package)
        if reason is None:
            return XenVerifier(CACHE / package)
        reasons.append(reason)
    pytest.skip(f"Xen's verifier is not to be had: {'; '.join(reasons)}")


def form_of(stream: bytes) -> str:
    """What Xen's verifier must be told, and ours sees from the first octets."""
    return {XL_MAGIC[:8]: "xl", LIBXL_IDENT: "libxl"}.get(stream[:8], "libxc")


# What Xen's verifier rejects although Xen's receivers take it.
FALSELY_REJECTED = (
    "hvm remus",  # stops behind an epoch, without END, as every checkpointed stream does
    "pv remus",
    "libxl remus",  # goes on reading libxc records behind CHECKPOINT
    "libxl remus closed",
    "libxl colo",
    "libxl xenstore",  # compares an octet of the data with a string
)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in FALSELY_REJECTED])
def test_xen_accepts_what_we_write(name: str, xen: XenVerifier, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    stream = fuzz.join(SAMPLES[name])
    path.write_bytes(stream)
    code, output = xen.verdict(path, form_of(stream))
    assert code == 0, output


@pytest.mark.parametrize("name", FALSELY_REJECTED)
def test_what_xen_rejects_falsely_is_still_that(
    name: str, xen: XenVerifier, tmp_path: Path
) -> None:
    path = tmp_path / "stream"
    stream = fuzz.join(SAMPLES[name])
    path.write_bytes(stream)
    assert xen.verdict(path, form_of(stream))[0] != 0
    assert verify([stream]).ok


def test_xen_accepts_a_whole_image(xen: XenVerifier, tmp_path: Path) -> None:
    words = [pfn if pfn % 5 else 0xF << 60 | pfn for pfn in range(2500)]
    pages = bytes(PAGE_SIZE * sum(word < 1 << 60 for word in words))
    tail = fuzz.join(fuzz.hvm_epoch()[1:])
    path = tmp_path / "image"
    with path.open("wb") as file:
        writer.write_image(file, fuzz.join(fuzz.hvm_start()), [(words, pages)], tail)
    code, output = xen.verdict(path, "libxc")
    assert code == 0, output


def written(*, epochs: int) -> bytes:
    """What RemusStream writes: a checkpointed stream of so many epochs, or for 0 a plain one."""
    parts: list[bytes] = []
    stream = RemusStream(lambda octets: parts.append(bytes(octets)))
    stream.begin('{"c_info": {"name": "sample"}}', fuzz.join(fuzz.hvm_start()))
    for number in range(1, max(1, epochs) + 1):
        stream.pages(fuzz.pages(0, 1, XTAB | 2, seed=number)[1])
        stream.zero(struct.pack("<600Q", *range(3, 603)))
        stream.gone(struct.pack("<1500Q", *(XTAB | pfn for pfn in range(603, 2103))))
        tail = fuzz.join(fuzz.hvm_epoch(number)[1:])
        stream.end_epoch(tail) if epochs else stream.end(tail)
    return b"".join(parts)


def test_xen_accepts_a_saved_guest(xen: XenVerifier, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(written(epochs=0))
    code, output = xen.verdict(path, "xl")
    assert code == 0, output


def test_xen_accepts_the_libxc_part_of_a_recording(xen: XenVerifier, tmp_path: Path) -> None:
    events, fault = fuzz.read([written(epochs=3)])
    assert fault is None
    inner = [
        bytes(part)
        for event in events
        if event.position.layer is Layer.LIBXC
        for part in writer.encode(event.content)
    ]
    path = tmp_path / "recorded"
    path.write_bytes(b"".join(inner) + writer.record(RecordType.END))
    code, output = xen.verdict(path, "libxc")
    assert code == 0, output


@pytest.mark.parametrize("name", ["hvm", "pv", "hvm v2", "pv v2", "hvm remus closed", "libxl"])
@pytest.mark.parametrize("version", [2, 3])
def test_xen_accepts_what_we_convert(
    name: str, version: int, xen: XenVerifier, tmp_path: Path
) -> None:
    events, _ = fuzz.read([fuzz.join(SAMPLES[name])])
    converter = Converter(version)
    contents = [content for event in events for content in converter.convert(event.content)]
    path = tmp_path / "stream"
    stream = b"".join(bytes(part) for one in contents for part in writer.encode(one))
    path.write_bytes(stream)
    code, output = xen.verdict(path, form_of(stream))
    assert code == 0, output


def falsely_rejected(report: Report, events: list[Event]) -> bool:
    """Is there a reason for which Xen's verifier rejects what Xen's receivers take?"""
    records = [event.content for event in events if isinstance(event.content, Record)]
    return (
        any(one.layer is Layer.LIBXC and one.type & OPTIONAL for one in records)
        or (report.shape is Shape.CHECKPOINTED and Layer.LIBXL in report.formats)
        or (report.shape is Shape.CHECKPOINTED and not report.closed)
        or any(
            one.layer is Layer.LIBXL
            and one.type == LibxlType.EMULATOR_XENSTORE_DATA
            and len(one.body) > 8
            for one in records
        )
    )


def compare(xen: XenVerifier, folder: Path, count: int) -> tuple[list[str], int]:
    """Mutants that only Xen rejects, without an excuse; and how many both reject."""
    # A sample which Xen's verifier rejects anyway says nothing about a mutation.
    names = [name for name in SAMPLES if name not in FALSELY_REJECTED]
    corpus = list(SAMPLES.values())
    mutants, streams = [], []
    for number in range(count):
        rng = random.Random(f"differential/{number}")
        name = names[number % len(names)]
        mutants.append(fuzz.mutate(SAMPLES[name], corpus, rng))
        path = folder / str(number)
        path.write_bytes(mutants[-1])
        streams.append((form_of(mutants[-1]), path))
    verdicts = xen.verdicts(streams)

    missed, both = [], 0
    for data, (form, path), code in zip(mutants, streams, verdicts, strict=True):
        report = verify([data])
        if code and report.ok and not falsely_rejected(report, fuzz.read([data])[0]):
            missed.append(f"{form} {path.name}")
        both += bool(code) and not report.ok
    return missed, both


@pytest.mark.slow
def test_what_xen_rejects_is_rejected(xen: XenVerifier, tmp_path: Path) -> None:
    missed, both = compare(xen, tmp_path, MUTANTS)
    assert not missed
    assert both > MUTANTS // 3  # else the mutants prove nothing


def test_a_verifier_that_overlooks_bodies_would_be_seen(
    xen: XenVerifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpointd.stream.rules._LIBXC", dict.fromkeys(RecordType, lambda _: ()))
    assert compare(xen, tmp_path, MUTANTS // 4)[0]
