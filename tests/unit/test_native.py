"""The hot path's parts that need no hypervisor: bitmaps, digests, kernels, images, arenas, loading."""

from __future__ import annotations

import hashlib
import mmap
import random
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd import native
from checkpointd.errors import NativeError
from checkpointd.native import Arena, Bitmap, DigestKey, library, selftest

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
ROOT = Path(__file__).parents[2]
CSRC = ROOT / "checkpointd" / "csrc"
PRIME = 2**61 - 1
NR_PFNS = 70  # of the images here: more than one word of a bitmap, and not a multiple of 64


# Digests: the definition in csrc/digest.h, once more and plainly.


def digest_by_definition(seed: bytes, data: bytes) -> bytes:
    stream = hashlib.shake_256(seed).digest(4 * 1028 + 16)
    k = struct.unpack("<1028I", stream[: 4 * 1028])
    points = [value % PRIME for value in struct.unpack("<QQ", stream[4 * 1028 :])]
    result = []
    for j, point in enumerate(points):
        h = 1
        for at in range(0, len(data), PAGE):
            m = struct.unpack("<1024I", data[at : at + PAGE].ljust(PAGE, b"\0"))
            nh = 0
            for i in range(512):
                even = (m[2 * i] + k[2 * i + 4 * j]) % 2**32
                odd = (m[2 * i + 1] + k[2 * i + 1 + 4 * j]) % 2**32
                nh = (nh + even * odd) % 2**64
            h = (h * point + (nh >> 32)) % PRIME
            h = (h * point + (nh & 0xFFFFFFFF)) % PRIME
        result.append((h * point + len(data)) % PRIME)
    return struct.pack("<QQ", *result)


@given(seed=st.binary(min_size=32, max_size=32), data=st.binary(max_size=9000))
def test_digest_is_what_its_definition_says(seed: bytes, data: bytes) -> None:
    assert DigestKey(seed).digest(data) == digest_by_definition(seed, data)


@pytest.mark.parametrize("length", selftest.LENGTHS)
def test_digest_at_the_edges(length: int) -> None:
    seed, data = bytes(range(32)), random.Random(length).randbytes(length)
    assert DigestKey(seed).digest(data) == digest_by_definition(seed, data)


@pytest.mark.parametrize("fill", [0x00, 0xFF])
def test_digest_of_extreme_words(fill: int) -> None:
    seed, data = b"\xff" * 32, bytes([fill]) * 3 * PAGE
    assert DigestKey(seed).digest(data) == digest_by_definition(seed, data)


# Golden: both sides of a session must agree across versions of checkpointd.
GOLDEN = {
    b"": "1a61dd1489c3341ef757058c3e176b10",
    b"a": "681d81da8337d0193c391314d0f87a0d",
    bytes(PAGE): "ab46f38ed44e1c104fa87ee120c16e14",
    bytes(range(256)) * 17: "e8994c6fafa17b047bdda2bfe2ca3705",
}


@pytest.mark.parametrize("data", GOLDEN, ids=len)
def test_digest_stays_what_it_was(data: bytes) -> None:
    assert DigestKey(b"golden".ljust(32, b"!")).digest(data).hex() == GOLDEN[data]


def test_the_self_tests_golden_value_is_of_the_definition() -> None:
    data = hashlib.shake_128(b"self-test").digest(max(selftest.LENGTHS) + max(selftest.OFFSETS))
    total = hashlib.sha256()
    for offset in selftest.OFFSETS:
        for length in selftest.LENGTHS:
            total.update(digest_by_definition(bytes(range(32)), data[offset : offset + length]))
    assert total.hexdigest() == selftest.GOLDEN


def test_length_key_and_every_octet_count() -> None:
    key, page = DigestKey(bytes(32)), bytes(PAGE)
    digests = {key.digest(page), key.digest(page[:-1]), key.digest(page + b"\0"), key.digest(b"")}
    digests.add(DigestKey(b"\1" + bytes(31)).digest(page))
    for at in range(0, PAGE, 97):
        digests.add(key.digest(page[:at] + b"\1" + page[at + 1 :]))
    assert len(digests) == 5 + len(range(0, PAGE, 97))


def test_digests_of_pages() -> None:
    key, data = DigestKey(bytes(32)), random.Random(1).randbytes(5 * PAGE)
    pages = [key.digest(data[i * PAGE : (i + 1) * PAGE]) for i in range(5)]
    assert key.digest_pages(native.address_of(data), 5) == b"".join(pages)
    assert key.digest_pages(native.address_of(data), 0) == b""


def test_a_seed_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="31 octets"):
        DigestKey(bytes(31))


# Kernels.


@pytest.fixture(params=library.kernels())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel in turn, in use."""
    name = str(request.param)
    if not library.lib.ck_kernel_runs(library.kernels()[name]):
        pytest.skip(f"this CPU does not run {name}")
    library.choose_kernel(name)
    yield name
    library.choose_kernel(native.kernel())


@given(
    offset=st.integers(0, 64),
    length=st.one_of(st.integers(0, 300), st.integers(3900, 4300), st.integers(8000, 9000)),
    seed=st.integers(0, 2**32),
)
def test_kernels_agree_at_every_length_and_alignment(offset: int, length: int, seed: int) -> None:
    key = DigestKey(bytes(32))
    data = memoryview(random.Random(seed).randbytes(offset + length))[offset:]
    answers = set()
    try:
        for name, index in library.kernels().items():
            if library.lib.ck_kernel_runs(index):
                library.choose_kernel(name)
                answers.add(key.digest(data))
    finally:
        library.choose_kernel(native.kernel())
    assert len(answers) == 1


def test_each_kernel_follows_the_definition(kernel: str) -> None:
    data = random.Random(kernel).randbytes(2 * PAGE + 77)
    assert DigestKey(bytes(32)).digest(data) == digest_by_definition(bytes(32), data)


def test_each_kernel_counts(kernel: str) -> None:
    bits = Bitmap(100_003)
    dice = random.Random(kernel)
    expected = {dice.randrange(100_003) for _ in range(5000)}
    for bit in expected:
        bits.add(bit)
    assert bits.count() == len(expected)


def test_the_self_test_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    native.self_test()
    monkeypatch.setattr(selftest, "GOLDEN", "0" * 64)
    with pytest.raises(NativeError, match="kernel scalar gives wrong answers for the digest"):
        native.self_test()


def import_with_kernel(demanded: str) -> subprocess.CompletedProcess[str]:
    program = "from checkpointd import native; print(native.kernel())"
    environment = {library.KERNEL_ENVIRONMENT: demanded, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_kernel_is_demanded_by_the_environment() -> None:
    assert import_with_kernel("scalar").stdout == "scalar\n"


def test_a_kernel_that_cannot_be_had_is_refused() -> None:
    result = import_with_kernel("avx1024")
    assert result.returncode != 0
    assert "NativeError: CHECKPOINTD_KERNEL=avx1024: there is none of that name" in result.stderr


def test_without_a_demand_the_best_is_taken() -> None:
    running = [n for n, i in library.kernels().items() if library.lib.ck_kernel_runs(i)]
    assert library.choose_kernel(None) == running[-1]
    library.choose_kernel(native.kernel())


# The build.


def test_a_stale_module_is_noticed(tmp_path: Path) -> None:
    compiled = library.ffi.string(library.lib.CK_SOURCE_HASH).decode()
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    native.refuse_stale("checkpointd._native", compiled, copy)
    with (copy / "bitmap.c").open("a") as source:
        source.write("/* changed */\n")
    with pytest.raises(NativeError, match=r"checkpointd\._native .*rebuild"):
        native.refuse_stale("checkpointd._native", compiled, copy)
    native.refuse_stale("checkpointd._native", compiled, tmp_path)  # no sources: nothing to compare


def test_our_c_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = sysconfig.get_config_var("CC").split()[0]
    for source in sorted(CSRC.glob("*.c")):
        subprocess.run(
            [
                compiler,
                "-O3",
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-c",
                source,
                "-o",
                tmp_path / "object.o",
            ],
            check=True,
        )


def test_c_files_know_nothing_of_python_and_stay_short() -> None:
    for source in [*CSRC.glob("*.c"), *CSRC.glob("*.h")]:
        text = source.read_text()
        assert "Python.h" not in text
        assert len(text.splitlines()) <= 800


# Bitmaps against sets.

BITS = st.integers(1, 300).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1)))
)


def bitmap_of(size: int, bits: set[int]) -> Bitmap:
    bitmap = Bitmap(size)
    for bit in bits:
        bitmap.add(bit)
    return bitmap


# Around words and blocks (csrc/bitmap.h): a block is 4096 bits, and one that is empty is passed over.
SIZES = st.sampled_from([1, 63, 64, 65, 4095, 4096, 4097, 3 * 4096, 70 * 4096 + 5])


@given(size=SIZES, data=st.data())
def test_what_is_passed_over_is_empty_whatever_was_done(size: int, data: st.DataObject) -> None:
    ours = [Bitmap(size), Bitmap(size)]
    sets: list[set[int]] = [set(), set()]
    for _ in range(data.draw(st.integers(1, 12))):
        i = data.draw(st.integers(0, 1))
        match data.draw(
            st.sampled_from(["add", "update", "clear", "fill", "count", "any", "copy"])
        ):
            case "add":
                first = data.draw(st.integers(0, size - 1))
                count = data.draw(st.integers(0, min(size - first, 5000)))
                ours[i].add(first, count)
                sets[i] |= set(range(first, first + count))
            case "update":
                ours[i].update(ours[1 - i])
                sets[i] |= sets[1 - i]
            case "clear":
                ours[i].clear()
                sets[i] = set()
            case "fill":
                ours[i].fill()
                sets[i] = set(range(size))
            case "count":
                assert ours[i].count() == len(sets[i])
            case "any":
                assert bool(ours[i]) is bool(sets[i])
            case "copy":
                ours[i] = Bitmap.from_bytes(size, bytes(ours[1 - i]))
                sets[i] = set(sets[1 - i])
    for bitmap, expected in zip(ours, sets, strict=True):
        assert list(bitmap) == sorted(expected)
        assert bitmap.count() == len(expected)
        assert int.from_bytes(bytes(bitmap), "little") == sum(1 << bit for bit in expected)
        assert all((bit in bitmap) is (bit in expected) for bit in (0, size // 2, size - 1, size))


@given(BITS)
def test_a_bitmap_is_a_set(given_bits: tuple[int, set[int]]) -> None:
    size, bits = given_bits
    bitmap = bitmap_of(size, bits)
    assert list(bitmap) == sorted(bits)
    assert bitmap.count() == len(bits)
    assert bool(bitmap) == bool(bits)
    assert {bit for bit in range(-2, size + 70) if bit in bitmap} == bits
    assert bytes(bitmap) == sum(1 << b for b in bits).to_bytes(-(-size // 64) * 8, "little")
    assert Bitmap.from_bytes(size, bytes(bitmap)) == bitmap


@given(BITS, st.data())
def test_ranges_and_unions(given_bits: tuple[int, set[int]], data: st.DataObject) -> None:
    size, bits = given_bits
    bitmap = bitmap_of(size, bits)
    first = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - first))
    bitmap.add(first, count)
    bits |= set(range(first, first + count))
    assert set(bitmap) == bits
    other = data.draw(st.sets(st.integers(0, size - 1)))
    bitmap.update(bitmap_of(size, other))
    assert set(bitmap) == bits | other
    bitmap.fill()
    assert set(bitmap) == set(range(size))
    bitmap.clear()
    assert not bitmap


def test_a_large_bitmap_is_iterated_whole() -> None:
    bitmap = Bitmap(10_000)
    bitmap.fill()
    assert list(bitmap) == list(range(10_000))


def test_bitmaps_refuse_what_is_beyond_them() -> None:
    bitmap = Bitmap(100)
    for first, count in ((-1, 1), (0, 101), (100, 1), (3, -1)):
        with pytest.raises(ValueError, match="of a bitmap of 100"):
            bitmap.add(first, count)
    with pytest.raises(ValueError, match="99"):
        bitmap.update(Bitmap(99))
    with pytest.raises(ValueError, match="8 octets"):
        Bitmap.from_bytes(100, bytes(8))
    assert set(Bitmap.from_bytes(100, b"\xff" * 16)) == set(range(100))  # stray bits are dropped
    with pytest.raises(ValueError, match="0 bits"):
        Bitmap(0)
    assert bitmap != Bitmap(101)
    assert bitmap != object()
    assert repr(bitmap) == "<Bitmap: 0 of 100>"
    with pytest.raises(TypeError):
        hash(bitmap)


# Images.


def page_data(words: list[int], pages: bytes) -> bytes:
    body = struct.pack(f"<II{len(words)}Q", len(words), 0, *words) + pages
    return struct.pack("<II", 1, len(body)) + body


class Image:
    """An image as the code under test changes it, and beside it a dict as the oracle would."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, NR_PFNS * PAGE)
        self.address = native.address_of(self.memory)
        self.populated = Bitmap(NR_PFNS)
        self.oracle: dict[int, bytes] = {}

    def check(self) -> None:
        assert set(self.populated) == set(self.oracle)
        expected = b"".join(self.oracle.get(pfn, bytes(PAGE)) for pfn in range(NR_PFNS))
        assert self.memory[:] == expected


DATA_TYPES = (0, 1, 2, 3, 4, 9, 10, 11, 12)
GONE_TYPES = (0xD, 0xF)
PFNS = st.integers(0, NR_PFNS - 1)
ENTRIES = st.lists(
    st.tuples(st.sampled_from(DATA_TYPES + GONE_TYPES), PFNS), min_size=1, max_size=12
)


def words_of(pfns: list[int], kind: int = 0) -> bytes:
    return struct.pack(f"<{len(pfns)}Q", *(kind << 60 | pfn for pfn in pfns))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("scatter"), ENTRIES),
            st.tuples(st.just("zero"), st.lists(PFNS, max_size=9)),
            st.tuples(st.just("drop"), st.lists(PFNS, max_size=9)),
            st.tuples(st.just("merge"), st.lists(PFNS, max_size=9)),
        ),
        max_size=6,
    )
)
def test_an_image_is_what_was_done_to_it(steps: list[tuple[str, list]]) -> None:  # type: ignore[type-arg]  # of two kinds
    image = Image()
    for number, (what, items) in enumerate(steps):
        fill = bytes([number + 1]) * PAGE
        if what == "scatter":
            with_data = [pfn for kind, pfn in items if kind in DATA_TYPES]
            pages = b"".join(bytes([number + 1, i]) * (PAGE // 2) for i in range(len(with_data)))
            record = page_data([kind << 60 | pfn for kind, pfn in items], pages)
            assert native.check_record(record, NR_PFNS) is None
            native.scatter(image.address, NR_PFNS, image.populated, record)
            nth = iter(range(len(with_data)))
            for kind, pfn in items:  # in order: of two words for one pfn the later one counts
                if kind in DATA_TYPES:
                    image.oracle[pfn] = bytes([number + 1, next(nth)]) * (PAGE // 2)
                else:
                    image.oracle.pop(pfn, None)
        elif what == "zero":
            native.zero_pages(image.address, NR_PFNS, image.populated, words_of(items))
            image.oracle |= dict.fromkeys(items, bytes(PAGE))
        elif what == "drop":
            native.drop_pages(image.address, NR_PFNS, image.populated, words_of(items, 0xF))
            for pfn in items:
                image.oracle.pop(pfn, None)
        else:
            overlay, overlaid = fill * NR_PFNS, bitmap_of(NR_PFNS, set(items))
            address = native.address_of(overlay)
            native.merge(image.address, address, NR_PFNS, overlaid, image.populated)
            image.oracle |= dict.fromkeys(items, fill)
        image.check()


def test_zeroing_what_is_not_there_touches_no_memory() -> None:
    """A sparse image stays sparse: the page's memory counts as zero and is not looked at."""
    populated = Bitmap(NR_PFNS)
    native.zero_pages(0, NR_PFNS, populated, words_of([3, 4]))  # at address 0 a touch is a fault
    native.drop_pages(0, NR_PFNS, Bitmap(NR_PFNS), words_of([3, 4], 0xF))
    assert set(populated) == {3, 4}


GOOD = page_data([5, 0xF << 60 | 6, 0x9 << 60 | 7], bytes(2 * PAGE))


def patched(offset: int, layout: str, value: int) -> bytes:
    record = bytearray(GOOD)
    struct.pack_into(layout, record, offset, value)
    return bytes(record)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (b"", "too short"),
        (GOOD[:15], "too short"),
        (patched(0, "<I", 2), "not of type PAGE_DATA"),
        (GOOD[:-1], "length field"),
        (GOOD + bytes(8), "length field"),
        (patched(4, "<I", len(GOOD)), "length field"),
        (patched(12, "<I", 1), "reserved field"),
        (patched(8, "<I", 0), "count is zero"),
        (patched(8, "<I", 0xFFFFFFFF), "more than it can hold"),
        (patched(8, "<I", 2), "as many pages"),
        (patched(16, "<Q", 1 << 52 | 5), "pfn word 0 has reserved bits"),
        (patched(24, "<Q", 1 << 59 | 5), "pfn word 1 has reserved bits"),
        (patched(32, "<Q", 0x5 << 60 | 7), "pfn word 2 has a page type"),
        (patched(32, "<Q", 0x8 << 60 | 7), "pfn word 2 has a page type"),
        (patched(32, "<Q", 0xE << 60 | 7), "pfn word 2 has a page type"),
        (patched(16, "<Q", NR_PFNS), "pfn word 0 names a pfn beyond"),
        (patched(24, "<Q", 0xF << 60 | (1 << 52) - 1), "pfn word 1 names a pfn beyond"),
        (patched(24, "<Q", 6), "as many pages"),
        (patched(16, "<Q", 0xF << 60 | 5), "as many pages"),
        (page_data([1], b""), "as many pages"),
        (page_data([1], bytes(PAGE + 8)), "as many pages"),
    ],
)
def test_each_fault_of_a_record_is_found_and_changes_nothing(record: bytes, fault: str) -> None:
    found = native.check_record(record, NR_PFNS)
    assert found is not None
    assert fault in found
    image = Image()
    with pytest.raises(ValueError, match="PAGE_DATA record: "):
        native.scatter(image.address, NR_PFNS, image.populated, record)
    image.check()


def test_a_good_record_is_good_only_for_its_guest() -> None:
    assert native.check_record(GOOD, NR_PFNS) is None
    assert native.check_record(GOOD, 8) is None
    assert "pfn word 2" in (native.check_record(GOOD, 7) or "")
    with pytest.raises(ValueError, match="bitmap of 64"):
        native.scatter(0, NR_PFNS, Bitmap(64), GOOD)
    with pytest.raises(ValueError, match="no multiple of 4096"):
        native.scatter(native.address_of(bytes(PAGE)) | 8, NR_PFNS, Bitmap(NR_PFNS), GOOD)


@given(st.binary(max_size=200), st.integers(0, 199))
def test_no_octets_lead_the_check_astray(noise: bytes, at: int) -> None:
    """What passes the check obeys every bound; scatter() of it is then safe by the test above."""
    image, record = Image(), bytearray(GOOD[:200])
    record[at : at + len(noise)] = noise
    for candidate in (bytes(record) + GOOD[len(record) :], noise):
        if native.check_record(candidate, NR_PFNS) is None:
            native.scatter(image.address, NR_PFNS, image.populated, candidate)


@pytest.mark.parametrize(
    ("words", "with_data", "fault"),
    [
        (words_of([1, 2]) + b"\0", True, "17 octets"),
        (words_of([1, NR_PFNS]), True, "pfn word 1 names"),
        (words_of([1], 0xF), True, "pfn word 0 has a page type"),
        (words_of([1]), False, "pfn word 0 has a page type"),
        (words_of([1], 0x6), False, "pfn word 0 has a page type"),
        (words_of([1 << 55]), True, "pfn word 0 has reserved"),
    ],
)
def test_each_fault_of_a_list_is_found_and_changes_nothing(
    words: bytes, with_data: bool, fault: str
) -> None:
    assert fault in (native.check_words(words, NR_PFNS, with_data=with_data) or "")
    image = Image()
    act = native.zero_pages if with_data else native.drop_pages
    with pytest.raises(ValueError, match="pages: "):
        act(image.address, NR_PFNS, image.populated, words)
    image.check()
    assert native.check_words(b"", NR_PFNS, with_data=with_data) is None


# Arenas.


def test_an_arena_is_not_closed_while_a_view_is_in_use() -> None:
    arena = Arena(3, 100, context_bytes=100, audit_pages=2)
    view = arena.context
    with pytest.raises(NativeError, match="views of it are in use"):
        arena.close()
    assert arena.records == []  # it is as it was
    view.release()
    arena.close()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        _ = arena.records


@pytest.mark.parametrize(
    ("pages", "context_bytes", "audit_pages"),
    [(0, 1, 0), (101, 1, 0), (1, 0, 0), (1, 1 << 30, 0), (1, 1, -1), (1, 1, 1025)],
)
def test_arenas_of_impossible_shape_are_refused(
    pages: int, context_bytes: int, audit_pages: int
) -> None:
    with pytest.raises(ValueError, match="must be"):
        Arena(pages, 100, context_bytes, audit_pages)


def test_an_address_is_that_of_the_octets() -> None:
    memory = bytearray(b"abc")
    address = native.address_of(memory)
    assert native.address_of(memoryview(memory)[1:]) == address + 1
    assert library.ffi.string(library.ffi.cast("char *", address + 1)) == b"bc"


@given(ENTRIES)
def test_what_words_name_is_marked(entries: list[tuple[int, int]]) -> None:
    words = struct.pack(f"<{len(entries)}Q", *(kind << 60 | pfn for kind, pfn in entries))
    pfns = Bitmap(NR_PFNS)
    native.mark(pfns, words)
    assert set(pfns) == {pfn for _, pfn in entries}


@given(st.lists(st.tuples(st.sampled_from(DATA_TYPES + GONE_TYPES), st.integers(0, 9 * 512 + 3))))
def test_extents_that_lack_memory_are_those_of_pages_with_data(
    entries: list[tuple[int, int]],
) -> None:
    words = struct.pack(f"<{len(entries)}Q", *(kind << 60 | pfn for kind, pfn in entries))
    missing, reserved = Bitmap(10), bitmap_of(10, {0, 3, 9})
    native.mark_extents(missing, reserved, words)
    named = {pfn // 512 for kind, pfn in entries if kind in DATA_TYPES}
    assert set(missing) == named - {0, 3, 9}
