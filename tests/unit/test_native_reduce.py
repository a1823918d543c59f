"""Pages as their changes, against a model that keeps whole pages; and bodies that nobody sane would send."""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.native import Bitmap, History, address_of, body_size, check_record, expand, library

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.native import Reduction

PAGE = 4096
WAYS = library.lib.CK_HISTORY_WAYS
NR_PFNS = 100
HEAD = 16


def room_for(sets: int) -> int:
    """Octets that a history of so many sets takes."""
    return sets * library.lib.ck_history_size(1)


@pytest.fixture
def history() -> Iterator[History]:
    history = History(room_for(16))
    yield history
    history.close()


def record(pages: dict[int, bytes]) -> bytes:
    """A PAGE_DATA record as an arena holds it."""
    words = struct.pack(f"<{len(pages)}Q", *pages)
    data = b"".join(pages.values())
    return struct.pack("<IIII", 1, 8 + len(words) + len(data), len(pages), 0) + words + data


def reduce(history: History, sent: bytes) -> tuple[bytes, Reduction]:
    out = bytearray(body_size(len(sent)))
    result = history.reduce(sent, out)
    return bytes(out[: result.body]), result


class Held:
    """What a standby holds: an image, and perhaps an overlay."""

    def __init__(self, pages: dict[int, bytes], over: dict[int, bytes] | None = None) -> None:
        self.image, self.populated = self._lay(pages)
        self.overlay = None if over is None else self._lay(over)

    @staticmethod
    def _lay(pages: dict[int, bytes]) -> tuple[bytearray, Bitmap]:
        memory, bits = bytearray(NR_PFNS * PAGE), Bitmap(NR_PFNS)
        for pfn, page in pages.items():
            memory[pfn * PAGE : (pfn + 1) * PAGE] = page
            bits.add(pfn)
        return memory, bits

    def expand(self, body: bytes, length: int) -> bytes | str:
        out = bytearray(length)
        over = None if self.overlay is None else (address_of(self.overlay[0]), self.overlay[1])
        fault = expand(body, out, NR_PFNS, (address_of(self.image), self.populated), over)
        return bytes(out) if fault is None else fault


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def with_words(page: bytes, words: dict[int, int]) -> bytes:
    changed = bytearray(page)
    for at, value in words.items():
        struct.pack_into("<Q", changed, 8 * at, value)
    return bytes(changed)


def test_a_page_sent_again_travels_as_its_changes(history: History) -> None:
    before = {pfn: noise(pfn) for pfn in (3, 4, 90)}
    first, result = reduce(history, record(before))
    assert (result.seen, result.changes, result.octets) == (3, 0, 3 * PAGE)
    assert Held({}).expand(first, len(record(before))) == record(before)

    words = {60 * n: n for n in range(8)}  # on eight lines
    after = {3: before[3], 4: with_words(before[4], words), 90: noise(1000)}
    body, result = reduce(history, record(after))
    assert (result.seen, result.changes) == (3, 2)
    assert result.octets == 8 + (8 + 8 * (1 + 8)) + PAGE
    assert len(body) == HEAD + 3 * 8 + 1 + result.octets
    assert Held(before).expand(body, len(record(after))) == record(after)


def test_an_overlay_goes_before_the_image(history: History) -> None:
    old, new = noise(1), with_words(noise(1), {5: 5})
    newest = {7: with_words(new, {6: 6})}
    reduce(history, record({7: new}))
    body, _ = reduce(history, record(newest))
    assert Held({7: old}, {7: new}).expand(body, len(record(newest))) == record(newest)
    wrong = Held({7: new}, {7: old}).expand(body, len(record(newest)))
    assert wrong != record(newest)  # which the digest shows


@given(data=st.data())
@settings(deadline=None)
def test_what_leaves_comes_back(data: st.DataObject) -> None:
    """Rounds of pages, some of them forgotten in between, through a history that may be too small for them."""
    history = History(room_for(data.draw(st.sampled_from([1, 2, 16]))))
    held: dict[int, bytes] = {}
    shared = data.draw(st.integers(0, 3))
    for step in range(data.draw(st.integers(1, 6))):
        pages = {}
        for pfn in data.draw(st.sets(st.integers(0, NR_PFNS - 1), min_size=1, max_size=20)):
            changes = data.draw(
                st.one_of(
                    st.dictionaries(
                        st.integers(0, 511), st.integers(0, 2**64 - 1), max_size=12
                    ),
                    st.just(None),
                )
            )
            new = noise(pfn * shared + step) if changes is None else None
            pages[pfn] = new or with_words(held.get(pfn, noise(pfn)), changes or {})
        sent = record(pages)
        body, result = reduce(history, sent)
        assert result.seen == len(pages)
        assert len(body) == HEAD + 8 * len(pages) + (len(pages) + 7) // 8 + result.octets
        assert Held(held).expand(body, len(sent)) == sent
        held |= pages
        gone = data.draw(st.sets(st.integers(0, NR_PFNS - 1), max_size=5))
        history.forget(struct.pack(f"<{len(gone)}Q", *gone))
        for pfn in gone:
            held.pop(pfn, None)
    history.close()


@pytest.mark.parametrize("words", [0, 200, 224, 225, 226, 230, 512])
def test_where_the_changes_are_no_shorter_the_page_travels(history: History, words: int) -> None:
    """8 octets for the lines, one for each of them, 8 for each word: up to 2048."""
    before = noise(1)
    after = with_words(before, dict.fromkeys(range(words), 1))
    reduce(history, record({1: before}))
    body, result = reduce(history, record({1: after}))
    octets = 8 + -(-words // 8) + 8 * words
    assert result.changes == (octets <= 2048)
    assert result.octets == (octets if octets <= 2048 else PAGE)
    assert Held({1: before}).expand(body, len(record({1: after}))) == record({1: after})
    # And the history went along, whichever way it was.
    again = {1: with_words(after, {7: 7})}
    body, result = reduce(history, record(again))
    assert result.changes == 1
    assert Held({1: after}).expand(body, len(record(again))) == record(again)


def test_what_is_forgotten_travels_whole(history: History) -> None:
    pages = {pfn: noise(pfn) for pfn in range(10)}
    reduce(history, record(pages))
    history.forget(struct.pack("<2Q", 3, 0xF << 60 | 4))  # a type beside the pfn
    assert reduce(history, record(pages))[1].changes == 8
    history.clear()
    assert reduce(history, record(pages))[1].changes == 0


def test_a_sweep_does_not_drive_out_what_is_written_again_and_again() -> None:
    history = History(room_for(8))  # 64 pages
    hot, page = range(32), noise(0)
    for _ in range(2):
        reduce(history, record(dict.fromkeys(hot, page)))
    for start in range(1000, 3000, 32):
        assert reduce(history, record(dict.fromkeys(range(start, start + 32), page)))[1].changes == 0
        assert reduce(history, record(dict.fromkeys(hot, page)))[1].changes == 32
    history.close()


def test_a_sample_tells_what_all_would_be() -> None:
    history = History(room_for(256))
    pages = {pfn: noise(pfn) for pfn in range(1024)}
    parts = [record({pfn: pages[pfn] for pfn in range(at, at + 256)}) for at in range(0, 1024, 256)]
    for part in parts:
        history.reduce(part, every=16)
    results = [history.reduce(part, every=16) for part in parts]
    seen = sum(result.seen for result in results)
    assert 48 <= seen <= 80
    assert sum(result.changes for result in results) == seen
    # The others were forgotten: those of the sample alone are known.
    assert sum(reduce(history, part)[1].changes for part in parts) == seen
    history.close()


def test_a_sample_tells_so_of_more_pages_than_there_is_room_for() -> None:
    """Swept over in turn, four times as many: none is known when it comes again, in the sample as in all."""
    pages = {pfn: noise(pfn % 7) for pfn in range(1024)}
    parts = [record({pfn: pages[pfn] for pfn in range(at, at + 256)}) for at in range(0, 1024, 256)]
    for every in (1, 8):
        history = History(room_for(32))
        results = [history.reduce(part, every=every) for _ in range(4) for part in parts]
        assert sum(result.seen for result in results) > 0
        assert sum(result.changes for result in results) == 0
        history.close()


def test_a_sample_forgets_what_it_does_not_look_at(history: History) -> None:
    """Else a page that is sent beside the history would be taken for what it was before."""
    before = {pfn: noise(pfn) for pfn in range(64)}
    reduce(history, record(before))
    between = {pfn: noise(500 + pfn) for pfn in range(64)}
    history.reduce(record(between), every=16)
    body, _ = reduce(history, record(before))
    assert Held(between).expand(body, len(record(before))) == record(before)


def test_a_history_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="must be 32840 at least"):
        History(32839)
    history = History(room_for(3))
    assert history.capacity == 3 * WAYS
    with pytest.raises(ValueError, match="for the body of a record"):
        history.reduce(record({1: noise(1)}), bytearray(100))
    with pytest.raises(ValueError, match="for the body of a record"):
        history.reduce(record({1: noise(1)}), bytearray(9000), every=2)
    history.close()
    history.close()
    with pytest.raises(ValueError, match="closed"):
        history.clear()


# ---------------------------------------------------------------- bodies that nobody sane would send


def test_what_is_wrong_with_a_body_is_said(history: History) -> None:
    before = {pfn: noise(pfn) for pfn in (3, 4)}
    reduce(history, record(before))
    after = {3: with_words(before[3], {1: 1}), 4: noise(5)}
    body, _ = reduce(history, record(after))
    length, held = len(record(after)), Held(before)
    assert held.expand(body, length) == record(after)
    bits = HEAD + 16

    def with_octets(at: int, octets: bytes) -> bytes:
        return body[:at] + octets + body[at + len(octets) :]

    cases = {
        "it is too short": body[:15],
        "its count is zero, or more": with_octets(8, b"\xff\xff\xff\xff"),
        "its count": with_octets(8, b"\0\0\0\0"),
        "not of type PAGE_DATA": with_octets(0, b"\2"),
        "its reserved field": with_octets(12, b"\1"),
        "its length field": with_octets(4, b"\1"),
        "pfn word 0 names a pfn beyond": with_octets(16, struct.pack("<Q", NR_PFNS)),
        "pfn word 1 has a page type": with_octets(24, struct.pack("<Q", 0x5 << 60 | 4)),
        "as many pages as its page types": with_octets(24, struct.pack("<Q", 0xF << 60 | 4)),
        "changes of a page that is not held": with_octets(16, struct.pack("<Q", 9)),
        "it does not hold as many": body[:-1],
        "its length": body + b"\0",
    }
    for said, bad in cases.items():
        found = held.expand(bad, length)
        assert isinstance(found, str), said
        assert said in found
    assert held.expand(with_octets(bits, b"\3"), length) != record(after)
    assert isinstance(held.expand(body, length - PAGE), str)


@contextmanager
def guarded(octets: bytes) -> Iterator[memoryview]:
    """The octets right before memory that nobody may touch."""
    pages = -(-len(octets) // PAGE)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with mmap.mmap(-1, (pages + 1) * PAGE) as memory:
        guard = address_of(memory) + pages * PAGE
        memory[pages * PAGE - len(octets) : pages * PAGE] = octets
        assert mprotect(guard, PAGE, 0) == 0
        with (
            memoryview(memory) as view,
            view[pages * PAGE - len(octets) : pages * PAGE] as end,
        ):
            yield end
        assert mprotect(guard, PAGE, mmap.PROT_READ) == 0


@given(data=st.data())
@settings(deadline=None)
def test_no_octets_harm_a_standby(data: st.DataObject) -> None:
    """Whatever is damaged: a fault, or a record that passes every check; and nothing beside it is written."""
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    history = History(room_for(16))
    before = {pfn: rng.randbytes(PAGE) for pfn in range(0, 12, 3)}
    reduce(history, record(before))
    after = {pfn: with_words(page, {rng.randrange(512): 1}) for pfn, page in before.items()}
    body = bytearray(reduce(history, record(after))[0])
    history.close()
    for _ in range(data.draw(st.integers(1, 4))):
        body[rng.randrange(len(body))] = rng.randrange(256)
    cut = bytes(body[: len(body) - data.draw(st.integers(0, 3))])
    length = len(record(after))
    out = bytearray(length + 64)
    held = Held(before)
    with memoryview(out) as view, view[:length] as room, guarded(cut) as end:
        fault = expand(end, room, NR_PFNS, (address_of(held.image), held.populated))
    assert out[length:] == bytes(64)
    assert fault is not None or check_record(out[:length], NR_PFNS) is None
