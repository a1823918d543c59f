"""What of the lab can be judged without a Xen host: its guest's program, its fence, and who is who."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import fence, guests
from lab.__main__ import parse
from lab.guests import Guest, ticks
from lab.machine import Machine
from lab.places import GUEST_FILES, HOSTS, LabError, Place, digest
from lab.plug import Process, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 30.0  # s


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.open(tmp_path)


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def fence_port(place: Place) -> Iterator[int]:
    with fence.Server(place) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as answer:
            return answer.read()


def test_a_process_is_known_by_more_than_its_number(victim: subprocess.Popen[bytes]) -> None:
    process = Process.of(victim.pid)
    other = Process(victim.pid, process.start_time + 1)
    assert not other.alive()
    other.kill()
    assert process.alive(), "another process of that number is not ours to kill"
    process.kill()
    assert not process.alive()
    process.kill()  # twice is no error


def test_records_of_the_dead_are_none(place: Place, victim: subprocess.Popen[bytes]) -> None:
    Record("a", Process.of(victim.pid), {"suite": "bookworm"}).write(place.run)
    record = Record.read(place.run, "a")
    assert record is not None
    assert Machine(place, "a").record == record
    record.process.kill()
    assert Record.read(place.run, "a") is None
    assert Record.last(place.run, "a") == record
    with pytest.raises(LabError, match="host a is off"):
        Machine(place, "a").ssh("true")


@pytest.mark.parametrize("name", [b"a", b"198.18.0.1"])
def test_the_fence_answers_when_the_host_is_gone(
    place: Place, victim: subprocess.Popen[bytes], fence_port: int, name: bytes
) -> None:
    process = Process.of(victim.pid)
    Record("a", process, {}).write(place.run)
    assert ask(fence_port, b"pull-plug " + name + b"\n") == b"off " + name + b"\n"
    assert not process.alive()
    assert ask(fence_port, b"pull-plug b\n") == b"off b\n", "a host that is off is fenced"


@pytest.mark.parametrize(
    "request_", [b"\n", b"pull-plug c\n", b"pull-plug\n", b"x" * 100, b"push a\n"]
)
def test_the_fence_takes_no_other_word(
    place: Place, victim: subprocess.Popen[bytes], fence_port: int, request_: bytes
) -> None:
    Record("a", Process.of(victim.pid), {}).write(place.run)
    assert ask(fence_port, request_).startswith(b"usage")
    assert victim.poll() is None


def test_hosts_have_addresses_and_no_others_are_known(place: Place) -> None:
    assert {Machine(place, name).address for name in HOSTS} == {"198.18.0.1", "198.18.0.2"}
    with pytest.raises(LabError, match="a and b"):
        Machine(place, "c")


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="--dir"):
        Place.open(tmp_path / ("x" * 100))


def test_a_digest_is_of_names_contents_and_words(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    first = digest([tmp_path], "word")
    assert digest([tmp_path], "word") == first
    assert digest([tmp_path], "other") != first
    (tmp_path / "one").write_text("2")
    second = digest([tmp_path], "word")
    (tmp_path / "one").rename(tmp_path / "two")
    assert len({first, second, digest([tmp_path], "word")}) == 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's program, which runs on any Linux. Without -static: not every machine has a static libc."""
    path = tmp_path_factory.mktemp("work") / "work"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source = str(GUEST_FILES / "work.c")
    subprocess.run(["gcc", "-O2", *warnings, "-pthread", "-o", str(path), source], check=True)
    return path


def test_the_guests_program_says_what_the_tests_read(work: Path) -> None:
    with subprocess.Popen(
        [work], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(3)]
        finally:
            process.kill()
    assert lines[0].startswith("work: ")
    first, second = ticks("\r\n".join(lines))
    assert (first.number, second.number) == (1, 2)
    assert first.ok
    assert second.ok
    assert second.uptime > first.uptime
    assert second.ops > 0
    assert second.mem_kb > 0


def test_the_guests_program_finds_a_page_that_was_changed(work: Path) -> None:
    """Written from outside, into any page of its working set: the next tick says so."""
    with subprocess.Popen(
        [work], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            while not ticks(process.stdout.readline()):
                pass
            change_a_page(process.pid)
            lines = [process.stdout.readline() for _ in range(4)]
        finally:
            process.kill()
    assert any(line.startswith("CORRUPT worker 0 page 5: its words sum up") for line in lines), (
        lines
    )
    assert not ticks("".join(lines))[-1].ok


def name_of(page: int) -> bytes:
    """Word 0 of a page of worker 0 (work.c, mix)."""
    word = (page + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return (word ^ word >> 31).to_bytes(8, "little")


def change_a_page(pid: int) -> None:
    """A word of page 5, found by its name at the beginning of some page of the process."""
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *$", line):
                begin, end = int(found[1], 16), int(found[2], 16)
                memory.seek(begin)
                content = memory.read(end - begin)
                for at in range(0, len(content), 4096):
                    if content[at : at + 8] == name_of(5):
                        memory.seek(begin + at + 2048)
                        memory.write(b"changed!")
                        return
    raise AssertionError("the working set is not found")


def test_a_disk_is_what_the_guest_expects(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    subprocess.run([work, "make-disk", path, "3"], check=True)
    content = path.read_bytes()
    assert len(content) == 3 * 4096
    assert len({content[at : at + 8] for at in range(0, len(content), 8)}) == 3 * 512, (
        "each word is another"
    )


def test_configurations_hold_what_was_asked_for() -> None:
    text = Guest("g", vcpus=2, pages=7, rate=9, pressure=3, network=True, disk=True).config()
    for part in (
        "vcpus=2",
        "pages=7",
        "rate=9",
        "pressure=3",
        "access=ro",
        "bridge=guests",
        "persistent=0",
    ):
        assert part in text
    assert "vif" not in Guest("g").config()
    assert set(guests.SAMPLES) == {"pvh", "pvh2", "pvh-idle", "pvh-net", "pvh-disk"}


def test_tests_of_the_lab_get_all_arguments() -> None:
    words = ["-k", "power_failures", "--rounds", "10", "tests/xen/test_failover.py"]
    assert parse(["campaign", *words]).for_pytest == words
    assert parse(["--dir", "lab", "test", "-x"]).for_pytest == ["-x"]


def test_no_other_command_takes_what_it_does_not_know() -> None:
    with pytest.raises(SystemExit):
        parse(["status", "-k", "x"])
