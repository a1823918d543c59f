"""The standby's side: checking what arrived, and putting it into a guest's image.

An image has pfn p at octet p * 4096, and memory of a page that is not in its `populated` bitmap is
all zero. What is checked when it arrives cannot fail when it is committed: that lets an ack be a
promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd.native.bitmap import handle_of
from checkpointd.native.library import PAGE_SIZE, ffi, lib

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from checkpointd.native.bitmap import Bitmap

_FAULTS = {
    lib.CK_FAULT_SHORT: "it is too short to be a record",
    lib.CK_FAULT_TYPE: "it is not of type PAGE_DATA",
    lib.CK_FAULT_LENGTH: "its length field is not its length",
    lib.CK_FAULT_RESERVED: "its reserved field is not zero",
    lib.CK_FAULT_COUNT: "its count is zero, or more than it can hold",
    lib.CK_FAULT_WORD: "pfn word {at} has reserved bits set",
    lib.CK_FAULT_KIND: "pfn word {at} has a page type that is not allowed here",
    lib.CK_FAULT_PFN: "pfn word {at} names a pfn beyond the guest",
    lib.CK_FAULT_DATA: "it does not hold as many pages as its page types call for",
    lib.CK_FAULT_BASE: "pfn word {at} has changes of a page that is not held",
}


def fault_text(code: int, at: int) -> str | None:
    return _FAULTS[code].format(at=at) if code else None


def check_record(record: ReadableBuffer, nr_pfns: int) -> str | None:
    """What is wrong with a PAGE_DATA record, None if nothing is: structure, every bound, every
    type. After None scatter() cannot fail.
    """
    view, at = ffi.from_buffer("uint8_t[]", record), ffi.new("uint64_t *")
    code = lib.ck_record_check(view, len(view), nr_pfns, at)
    return fault_text(code, at[0])


def check_words(words: ReadableBuffer, nr_pfns: int, *, with_data: bool) -> str | None:
    """The same for a list of pfn words: with data as zero_pages() takes them, without as
    drop_pages() does.
    """
    view, at = ffi.from_buffer("uint8_t[]", words), ffi.new("uint64_t *")
    if len(view) % 8:
        return f"{len(view)} octets are no list of u64 words"
    return fault_text(lib.ck_words_check(view, len(view) // 8, with_data, nr_pfns, at), at[0])


def _check_aligned(address: int) -> None:
    """Streaming stores fault anywhere else."""
    if address % PAGE_SIZE:
        raise ValueError(f"an image at {address:#x}, which is no multiple of {PAGE_SIZE}")


def mark(pfns: Bitmap, words: ReadableBuffer) -> None:
    """Add the pfns of words that were checked for as many."""
    view = ffi.from_buffer("uint8_t[]", words)
    lib.ck_mark(pfns.handle, view, len(view) // 8)


def mark_extents(missing: Bitmap, reserved: Bitmap, words: ReadableBuffer) -> None:
    """Add the extents of 512 pages in which words, checked, name pages with data, but for those in `reserved`. Both
    bitmaps have a bit for each extent of the guest.
    """
    view = ffi.from_buffer("uint8_t[]", words)
    lib.ck_mark_extents(missing.handle, reserved.handle, view, len(view) // 8)


def scatter(image_address: int, nr_pfns: int, populated: Bitmap, record: ReadableBuffer) -> None:
    """Put the pages of a record in their places (pfn p at octet p * 4096) and mark them populated;
    what it says has gone is dropped. Raises ValueError, before anything is changed, if the record
    is malformed or the image not page aligned.
    """
    if fault := check_record(record, nr_pfns):
        raise ValueError(f"PAGE_DATA record: {fault}")
    _check_aligned(image_address)
    bits, view = handle_of(populated, nr_pfns), ffi.from_buffer("uint8_t[]", record)
    lib.ck_scatter(ffi.cast("uint8_t *", image_address), bits, view)


def zero_pages(image_address: int, nr_pfns: int, populated: Bitmap, words: ReadableBuffer) -> None:
    """Make the pages of a list of words zero and populated. Memory of a page that is not populated
    counts as zero already and is not touched, so that a sparse image stays sparse. Raises as
    scatter() does.
    """
    if fault := check_words(words, nr_pfns, with_data=True):
        raise ValueError(f"zero pages: {fault}")
    bits, view = handle_of(populated, nr_pfns), ffi.from_buffer("uint8_t[]", words)
    lib.ck_zero_pages(ffi.cast("uint8_t *", image_address), bits, view, len(view) // 8)


def drop_pages(image_address: int, nr_pfns: int, populated: Bitmap, words: ReadableBuffer) -> None:
    """Make the pages of a list of words zero and not populated. Raises as scatter() does."""
    if fault := check_words(words, nr_pfns, with_data=False):
        raise ValueError(f"dropped pages: {fault}")
    bits, view = handle_of(populated, nr_pfns), ffi.from_buffer("uint8_t[]", words)
    lib.ck_drop_pages(ffi.cast("uint8_t *", image_address), bits, view, len(view) // 8)


def merge(
    image_address: int, overlay_address: int, nr_pfns: int, overlay: Bitmap, populated: Bitmap
) -> None:
    """Copy each page in `overlay` from the image at overlay_address, and mark it populated. Raises ValueError if an
    image is not page aligned.
    """
    _check_aligned(image_address)
    lib.ck_merge(
        ffi.cast("uint8_t *", image_address),
        ffi.cast("uint8_t *", overlay_address),
        handle_of(overlay, nr_pfns),
        handle_of(populated, nr_pfns),
    )
