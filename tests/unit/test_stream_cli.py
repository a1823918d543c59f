"""checkpointd stream: what a user sees, and what becomes of files."""

from __future__ import annotations

import io
import json
import os
import stat
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fuzz_stream as fuzz
import pytest
import zstandard

from checkpointd.cli import main as command_line
from checkpointd.errors import StreamError, UsageError
from checkpointd.stream import files
from checkpointd.stream.records import RecordType
from checkpointd.stream.verify import verify
from checkpointd.stream.writer import record

if TYPE_CHECKING:
    from collections.abc import Iterator


SAMPLES = fuzz.samples()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which no temporary file may be left."""
    yield tmp_path
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def hvm(folder: Path) -> str:
    return save(folder / "hvm", "hvm")


def save(path: Path, name: str) -> str:
    path.write_bytes(fuzz.join(SAMPLES[name]))
    return str(path)


def stream(*arguments: object) -> int:
    return command_line.main(["stream", *map(str, arguments)])


class StandardInput:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


# -- show ------------------------------------------------------------------------------------------


def test_show_lists_records_and_sums_up(hvm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stream("show", hvm) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["0", "libxc", "image", "header"]
    pages = next(line for line in lines if "PAGE_DATA" in line)
    assert "entries=3 pages=2 types=NOTAB:2,XTAB:1 pfns=0x0-0x2" in pages
    assert lines[-1].startswith("plain stream, libxc, version 3, HVM guest, closed by END")


def test_show_as_json_is_one_object_a_line(hvm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stream("show", hvm, "--json") == 0
    *records, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(records) == len(SAMPLES["hvm"])
    pages = next(line for line in records if line["name"] == "PAGE_DATA")
    assert pages["types"] == {"NOTAB": 2, "XTAB": 1}
    assert pages["pfns"] == [[0, 2]]
    assert (total["ok"], total["pages"], total["schema"]) == (True, 2, 1)
    assert total["counts"]["libxc PAGE_DATA"] == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_show_prints_no_page(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--json"]):
        assert stream("show", save(folder / "sample", name), *flags) == 0
        assert len(capsys.readouterr().out) < 200 * (len(SAMPLES[name]) + 20)


def test_show_bounds_what_it_says_of_a_record(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scattered = [0xF << 60 | 2 * pfn for pfn in range(1000)]
    path = folder / "scattered"
    path.write_bytes(fuzz.join([*fuzz.hvm_start(), fuzz.pages(*scattered)]))
    assert stream("show", path, "--json") == 0
    pages = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert len(pages["pfns"]) == 8
    assert pages["runs_omitted"] == 992


def test_show_tells_what_it_has_seen_before_the_stream_broke(
    hvm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(hvm).write_bytes(fuzz.join(SAMPLES["hvm"])[:-1])
    assert stream("show", hvm, "--json") == StreamError.exit_code
    out, err = capsys.readouterr()
    total = json.loads(out.splitlines()[-1])
    assert (total["ok"], total["records"]) == (False, len(SAMPLES["hvm"]) - 3)
    assert f"checkpointd: {hvm}: octet" in err


def test_show_survives_malformed_bodies_and_invented_types(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "odd"
    odd = b"".join(record(kind, b"odd") for kind in range(1000))
    path.write_bytes(fuzz.join(fuzz.hvm_start()) + odd.replace(record(0, b"odd"), b""))
    assert stream("show", path, "--json") == 0
    total = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert total["counts"]["others"] > 900
    assert len(total["counts"]) < 70


# -- verify ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_verify_accepts(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stream("verify", save(folder / "sample", name)) == 0
    out, err = capsys.readouterr()
    assert "ok: " in out
    assert not err


def test_verify_says_that_a_stop_behind_an_epoch_is_usual(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stream("verify", save(folder / "remus", "libxl remus")) == 0
    assert "2 whole epochs, not closed by END (the usual end" in capsys.readouterr().out


def test_verify_puts_all_findings_on_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "cut"
    broken = [*SAMPLES["hvm remus"], ("x", record(0x13)), *fuzz.hvm_epoch(4)]
    path.write_bytes(fuzz.join(broken))
    assert stream("verify", path) == 10
    out, err = capsys.readouterr()
    assert not out
    unknown, cut = err.splitlines()
    assert unknown.startswith(f"{path}: error: octet ")
    assert "unknown mandatory record type 0x13" in unknown
    assert "epoch 4: the stream stops in mid-epoch" in cut


def test_verify_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "broken"
    path.write_bytes(fuzz.join(SAMPLES["hvm"][:-1]))
    assert stream("verify", "--json", path) == 10
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["errors"]) == (False, 1)
    (finding,) = report["findings"]
    assert finding["offset"] == path.stat().st_size
    assert (finding["layer"], finding["epoch"], finding["severity"]) == ("libxc", 1, "error")


def test_verify_counts_the_findings_it_does_not_keep(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "broken"
    path.write_bytes(fuzz.join(fuzz.hvm_start()) + record(0x13) * 1500)
    assert stream("verify", path) == 10
    assert capsys.readouterr().err.splitlines()[-1] == f"{path}: and 501 more findings"


@pytest.mark.parametrize("action", ["show", "verify"])
def test_standard_input_is_a_file_too(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", StandardInput(fuzz.join(SAMPLES["xl"])))
    assert stream(action, "-") == 0
    assert "plain stream, libxc in libxl in xl, version 2" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["show", "{}"], ["verify", "{}"], ["copy", "{}", "out"]])
@pytest.mark.parametrize("what", ["missing", "."])
def test_a_file_that_cannot_be_opened_is_wrong_usage(
    arguments: list[str],
    what: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    path = str(folder / what)
    assert stream(*(argument.format(path) for argument in arguments)) == UsageError.exit_code
    assert "cannot be opened" in capsys.readouterr().err
    assert not (folder / "out").exists()


# -- copy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_a_copy_is_the_same_octet_for_octet(name: str, folder: Path) -> None:
    source, target = folder / "in", folder / "out"
    save(source, name)
    assert stream("copy", source, target) == 0
    assert target.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600  # it may hold a guest's memory


@pytest.mark.parametrize(
    ("source", "target"), [("hvm v2", "hvm"), ("pv v2", "pv"), ("xl", None), ("hvm", None)]
)
def test_versions_are_converted_into_valid_streams(
    source: str, target: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, up, down = (str(folder / name) for name in ("in", "up", "down"))
    save(Path(first), source)
    assert stream("copy", first, up, "--to-version", 3) == 0
    report = verify([Path(up).read_bytes()])
    assert (report.ok, report.version) == (True, 3)
    if target is not None:  # as a sender of version 3 would have it, but for the policies
        labels = [label for label, _ in SAMPLES[target] if "POLICY" not in label]
        assert stream("show", up, "--json") == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["name"] for line in shown[:-1]] == labels
    assert stream("copy", up, down, "--to-version", 2) == 0
    report = verify([Path(down).read_bytes()])
    assert (report.ok, report.version) == (True, 2)
    if source != "hvm":
        assert Path(down).read_bytes() == Path(first).read_bytes()


def test_what_version_2_cannot_carry_is_told(
    hvm: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stream("copy", hvm, folder / "out", "--to-version", 2) == 0
    assert "2 policy records left out" in capsys.readouterr().err


@pytest.mark.parametrize("existing", [None, b"the old content"])
@pytest.mark.parametrize("fault", ["cut", "finding"])
def test_a_bad_input_loses_nothing(
    existing: bytes | None, fault: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = folder / "in", folder / "out"
    data = fuzz.join(SAMPLES["hvm"])
    source.write_bytes(data[:-9] if fault == "cut" else data + b"x")
    if existing is not None:
        target.write_bytes(existing)
    assert stream("copy", source, target) == 10
    assert (target.read_bytes() if target.exists() else None) == existing
    assert "is left as it was" in capsys.readouterr().err


def test_a_copy_onto_itself_and_through_a_link(hvm: str, folder: Path) -> None:
    os.chmod(hvm, 0o640)
    link = folder / "link"
    link.symlink_to(hvm)
    assert stream("copy", hvm, link) == 0
    assert link.is_symlink()
    assert Path(hvm).read_bytes() == fuzz.join(SAMPLES["hvm"])
    assert stat.S_IMODE(Path(hvm).stat().st_mode) == 0o640


def test_a_device_is_not_replaced_by_a_file(
    hvm: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    assert stream("copy", hvm, pipe) == UsageError.exit_code
    assert pipe.is_fifo()
    assert "not a regular file; use -" in capsys.readouterr().err


def test_an_interrupted_copy_leaves_nothing(folder: Path) -> None:
    def interrupted() -> None:
        with files.replacing(str(folder / "out")) as sink:
            sink.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(folder.iterdir())


def test_a_copy_can_go_through_pipes(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    data = fuzz.join(SAMPLES["libxl remus"])
    monkeypatch.setattr("sys.stdin", StandardInput(data))
    assert stream("copy", "-", "-") == 0
    assert capsysbinary.readouterr().out == data


# -- compressed files ------------------------------------------------------------------------------


def test_zst_is_read_and_written(hvm: str, folder: Path) -> None:
    packed, back = folder / "packed.zst", folder / "back"
    assert stream("copy", hvm, packed) == 0
    assert packed.stat().st_size < Path(hvm).stat().st_size / 4
    assert stream("verify", packed) == 0
    assert stream("copy", packed, back) == 0
    assert back.read_bytes() == Path(hvm).read_bytes()


def test_frames_in_a_row_are_one_stream(folder: Path) -> None:
    data = fuzz.join(SAMPLES["hvm"])
    packed = folder / "two.zst"
    halves = (data[:5000], data[5000:])
    packed.write_bytes(b"".join(zstandard.compress(half) for half in halves))
    assert b"".join(files.read_chunks(str(packed))) == data


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda packed: packed[:-1], "cut off"),
        (lambda packed: packed[: len(packed) // 2], "cut off"),
        (lambda packed: b"no zstd at all" + packed, "not zstd, or damaged"),
        (lambda packed: packed + b"junk", "not zstd, or damaged"),
    ],
)
def test_a_spoilt_zst_is_refused(
    spoil: Any, complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = folder / "spoilt.zst"
    packed.write_bytes(spoil(zstandard.compress(fuzz.join(SAMPLES["hvm remus"]))))
    assert stream("verify", packed) == 10
    assert complaint in capsys.readouterr().err


def test_a_bomb_bursts_in_bounded_memory(folder: Path) -> None:
    """24 KiB that unpack to 768 MiB of zeros, of which a stream parser holds 128 MiB at most."""
    megabytes = 768
    block = bytes(1 << 20)
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    packed = b"".join(compressor.compress(block) for _ in range(megabytes)) + compressor.flush()
    bomb = folder / "bomb.zst"
    bomb.write_bytes(packed)
    tracemalloc.start()
    try:
        size = sum(len(piece) for piece in files.read_chunks(str(bomb)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == megabytes << 20
    assert peak < 96 << 20


def test_a_window_beyond_the_limit_is_refused(folder: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    bomb = folder / "window.zst"
    bomb.write_bytes(compressor.compress(bytes(1 << 20)) + compressor.flush())
    with pytest.raises(StreamError, match="not zstd, or damaged"):
        list(files.read_chunks(str(bomb)))


def test_no_sample_lacks_its_record_types() -> None:
    """The samples hold every record that a stream may hold, so that show and copy meet them all."""
    labels = {label for parts in SAMPLES.values() for label, _ in parts}
    never_sent = {"TOOLSTACK", "CHECKPOINT_DIRTY_PFN_LIST", "VERIFY"}
    assert {kind.name for kind in RecordType} - labels == never_sent
