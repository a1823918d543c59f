"""What a single record must look like, whatever stands around it (order is verify.py's business).

Each rule is a generator of faults: a Severity and what is wrong. ERROR: some receiver of Xen
refuses or misreads it, or Xen's specification forbids it. NOTE: receivers take it, but no sender
of today makes it.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import TYPE_CHECKING

from checkpointd.errors import StreamError
from checkpointd.stream.bodies import census
from checkpointd.stream.libxl import (
    LIBXL_OPTION_LEGACY,
    XL_FLAG_JSON,
    XL_FLAG_STREAM_V2,
    XL_FLAGS_KNOWN,
    ColoState,
    EmulatorId,
    LibxlHeader,
    LibxlType,
    XlHeader,
)
from checkpointd.stream.records import (
    BATCH_MAX,
    OPTIONAL,
    PAGE_SHIFT,
    PAGE_SIZE,
    RECORD_HEADER,
    V3_ONLY,
    DomainHeader,
    DomainType,
    ImageHeader,
    PageType,
    RecordType,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Severity(StrEnum):
    ERROR = "error"
    NOTE = "note"


ERROR, NOTE = Severity.ERROR, Severity.NOTE

if TYPE_CHECKING:
    Faults = Iterator[tuple[Severity, str]]

# guest width -> octets of vcpu_guest_context, exact
_VCPU_CONTEXT = {4: 2800, 8: 5168}
_EXTENDED_MAX = 128  # octets of xen_domctl_ext_vcpucontext behind the sub-header
_XSAVE_MIN = 16  # octets: xfeature_mask and size
_MSR_SIZE = 16  # octets of xen_domctl_vcpu_msr
_CPUID_LEAF_SIZE = 24  # octets of xen_cpuid_leaf
_MSR_ENTRY_SIZE = 16  # octets of xen_msr_entry
_HVM_PARAM_SIZE = 16  # octets: index, value
# Octets: xenstore's default quota, 1000 nodes of 4 KiB. Splitting much more would cost many times
# its size.
_XENSTORE_MAX = 4 << 20


def header_faults(header: XlHeader | LibxlHeader | ImageHeader | DomainHeader) -> Faults:
    match header:
        case XlHeader():
            yield from _xl_header(header)
        case LibxlHeader(options=options):
            if options & ~LIBXL_OPTION_LEGACY:
                yield ERROR, f"reserved option bits are set: {options:#x}"
        case ImageHeader(options=options, reserved=reserved):
            if options:
                yield ERROR, f"reserved option bits are set: {options:#x}"
            if any(reserved):
                yield ERROR, f"reserved fields are not zero: {reserved}"
        case DomainHeader():
            if header.type not in tuple(DomainType):
                yield ERROR, f"domain type {header.type} is unknown; there are 1 (PV) and 2 (HVM)"
            if header.page_shift != PAGE_SHIFT:
                yield ERROR, f"page_shift {header.page_shift}; receivers take only {PAGE_SHIFT}"
            if header.reserved:
                yield ERROR, f"reserved field is not zero: {header.reserved:#x}"
            if not header.xen_major:
                yield NOTE, "made by the converter of streams older than version 2"


def _xl_header(header: XlHeader) -> Faults:
    if unknown := header.mandatory_flags & ~XL_FLAGS_KNOWN:
        yield ERROR, f"unknown mandatory flags {unknown:#x}"
    if header.optional_flags:
        yield ERROR, f"unknown optional flags {header.optional_flags:#x}"
    if not header.mandatory_flags & XL_FLAG_STREAM_V2:
        yield ERROR, "the flag STREAMv2 is missing: xl would take what follows for an older format"
    if not header.mandatory_flags & XL_FLAG_JSON:
        yield NOTE, "the flag JSON is missing: the configuration has a form older than JSON"
    else:
        try:
            header.config()
        except StreamError as error:
            yield ERROR, str(error)


# -- libxc ----------------------------------------------------------------------------------------


def libxc_faults(
    record_type: int, body: memoryview, *, version: int, guest_width: int | None
) -> Faults:
    """Faults of one libxc record. `guest_width`: octets of X86_PV_INFO, None where not known."""
    try:
        known = RecordType(record_type)
    except ValueError:
        if record_type & OPTIONAL:
            yield NOTE, f"optional record of type {record_type:#x}: receivers skip it"
        else:
            yield ERROR, f"unknown mandatory record type {record_type:#x}"
        return
    if version < 3 and known in V3_ONLY:
        yield ERROR, "belongs to version 3, the image header says version 2"
    if known is RecordType.X86_PV_P2M_FRAMES:
        yield from _p2m_frames(body, guest_width)
    elif known is RecordType.X86_PV_VCPU_BASIC:
        yield from _vcpu_basic(body, guest_width)
    else:
        yield from _LIBXC[known](body)


def _empty(body: memoryview) -> Faults:
    if body:
        yield ERROR, f"has {len(body)} octets; it must be empty"


def _page_data(body: memoryview) -> Faults:
    if len(body) < 8:
        yield ERROR, f"has {len(body)} octets, too few for its count"
        return
    count, reserved = RECORD_HEADER.unpack_from(body)
    if reserved:
        yield ERROR, f"reserved field is not zero: {reserved:#x}"
    if not count:
        yield ERROR, "count is 0: a record without entries must not be sent"
        return
    if len(body) < 8 + 8 * count:
        yield ERROR, f"announces {count} entries, but has only {len(body)} octets"
        return
    words = body[8 : 8 + 8 * count]
    found = census(words)
    if found.reserved:
        yield ERROR, "reserved bits (59-52) are set in a pfn word"
    if unknown := sorted(kind for kind in found.types if 5 <= kind <= 8):
        yield ERROR, f"reserved page type {', '.join(map(str, unknown))}"
    wanted = 8 + 8 * count + PAGE_SIZE * found.pages
    if len(body) != wanted:
        yield ERROR, (
            f"has {len(body)} octets; {count} entries of which {found.pages} have data"
            f" make {wanted}"
        )
    if count > BATCH_MAX:
        yield NOTE, f"{count} entries; Xen's sender makes no record of more than {BATCH_MAX}"
    if PageType.XALLOC in found.types:
        yield NOTE, "page type XALLOC; only senders of Xen 4.2 to 4.5 made it"


def _pv_info(body: memoryview) -> Faults:
    if len(body) != 8:
        yield ERROR, f"has {len(body)} octets, not 8"
        return
    width, levels = body[0], body[1]
    if (width, levels) not in ((4, 3), (8, 4)):
        yield ERROR, f"guest width {width} with {levels} levels; there are 4 with 3 and 8 with 4"
    if any(body[2:]):
        yield ERROR, "reserved fields are not zero"


def _p2m_frames(body: memoryview, guest_width: int | None) -> Faults:
    if len(body) < 8 or len(body) % 8:
        yield ERROR, f"has {len(body)} octets, not 8 and a multiple of 8"
        return
    start, end = RECORD_HEADER.unpack_from(body)
    if start > end:
        yield ERROR, f"start pfn {start:#x} is behind end pfn {end:#x}"
    elif guest_width in _VCPU_CONTEXT:
        per_frame = PAGE_SIZE // guest_width
        frames = end // per_frame - start // per_frame + 1
        if len(body) != 8 + 8 * frames:
            yield ERROR, (
                f"has {len(body)} octets; pfns {start:#x} to {end:#x} of a"
                f" {8 * guest_width}-bit guest need {frames} frames, {8 + 8 * frames} octets"
            )


def _vcpu(body: memoryview) -> Faults:
    if len(body) < 8:
        yield ERROR, f"has {len(body)} octets, too few for the vcpu's number"
        return
    _, reserved = RECORD_HEADER.unpack_from(body)
    if reserved:
        yield ERROR, f"reserved field is not zero: {reserved:#x}"
    if len(body) == 8:
        yield NOTE, "has no content; Xen 4.6 to 4.8 sent such, receivers skip it"


def _vcpu_basic(body: memoryview, guest_width: int | None) -> Faults:
    yield from _vcpu(body)
    if guest_width in _VCPU_CONTEXT and len(body) > 8:
        wanted = 8 + _VCPU_CONTEXT[guest_width]
        if len(body) != wanted:
            yield ERROR, (
                f"has {len(body)} octets; a {8 * guest_width}-bit guest's has {wanted}"
            )


def _vcpu_extended(body: memoryview) -> Faults:
    yield from _vcpu(body)
    if len(body) > 8 + _EXTENDED_MAX:
        yield ERROR, f"has {len(body)} octets, more than {8 + _EXTENDED_MAX}"


def _vcpu_xsave(body: memoryview) -> Faults:
    yield from _vcpu(body)
    if 8 < len(body) < 8 + _XSAVE_MIN:
        yield ERROR, f"has {len(body)} octets, fewer than {8 + _XSAVE_MIN}"


def _vcpu_msrs(body: memoryview) -> Faults:
    yield from _vcpu(body)
    if len(body) > 8 and (len(body) - 8) % _MSR_SIZE:
        yield ERROR, f"has {len(body)} octets, not 8 and a multiple of {_MSR_SIZE}"


def _shared_info(body: memoryview) -> Faults:
    if len(body) != PAGE_SIZE:
        yield ERROR, f"has {len(body)} octets, not {PAGE_SIZE}"


def _tsc_info(body: memoryview) -> Faults:
    if len(body) != 24:
        yield ERROR, f"has {len(body)} octets, not 24"
    elif any(body[20:]):
        yield ERROR, "reserved field is not zero"


def _hvm_context(body: memoryview) -> Faults:
    if not body:
        yield ERROR, "is empty: the guest would have no registers"


def _hvm_params(body: memoryview) -> Faults:
    if len(body) < 8:
        yield ERROR, f"has {len(body)} octets, too few for its count"
        return
    count, reserved = RECORD_HEADER.unpack_from(body)
    if reserved:
        yield ERROR, f"reserved field is not zero: {reserved:#x}"
    if len(body) != 8 + _HVM_PARAM_SIZE * count:
        yield ERROR, (
            f"has {len(body)} octets; {count} parameters make {8 + _HVM_PARAM_SIZE * count}"
        )
    elif not count:
        yield NOTE, "has no content; Xen 4.6 to 4.8 sent such, receivers skip it"


def _toolstack(_body: memoryview) -> Faults:
    yield ERROR, "is deprecated; no receiver of today takes it"


def _dirty_pfn_list(_body: memoryview) -> Faults:
    yield ERROR, "goes from secondary to primary; it has no place in a forward stream"


def _table(size: int) -> Callable[[memoryview], Faults]:
    def rule(body: memoryview) -> Faults:
        if not body or len(body) % size:
            yield ERROR, f"has {len(body)} octets, not a multiple of {size} above 0"

    return rule


_LIBXC: dict[RecordType, Callable[[memoryview], Faults]] = {
    RecordType.END: _empty,
    RecordType.PAGE_DATA: _page_data,
    RecordType.X86_PV_INFO: _pv_info,
    RecordType.X86_PV_VCPU_EXTENDED: _vcpu_extended,
    RecordType.X86_PV_VCPU_XSAVE: _vcpu_xsave,
    RecordType.SHARED_INFO: _shared_info,
    RecordType.X86_TSC_INFO: _tsc_info,
    RecordType.HVM_CONTEXT: _hvm_context,
    RecordType.HVM_PARAMS: _hvm_params,
    RecordType.TOOLSTACK: _toolstack,
    RecordType.X86_PV_VCPU_MSRS: _vcpu_msrs,
    RecordType.VERIFY: _empty,
    RecordType.CHECKPOINT: _empty,
    RecordType.CHECKPOINT_DIRTY_PFN_LIST: _dirty_pfn_list,
    RecordType.STATIC_DATA_END: _empty,
    RecordType.X86_CPUID_POLICY: _table(_CPUID_LEAF_SIZE),
    RecordType.X86_MSR_POLICY: _table(_MSR_ENTRY_SIZE),
}


# -- libxl ----------------------------------------------------------------------------------------


def libxl_faults(record_type: int, body: memoryview) -> Faults:
    """Faults of one libxl record."""
    match record_type:
        case LibxlType.END | LibxlType.LIBXC_CONTEXT | LibxlType.CHECKPOINT_END:
            yield from _empty(body)
        case LibxlType.EMULATOR_XENSTORE_DATA:
            yield from _emulator(body)
            yield from _xenstore(body[8:])
        case LibxlType.EMULATOR_CONTEXT:
            yield from _emulator(body)
        case LibxlType.CHECKPOINT_STATE:
            yield from _checkpoint_state(body)
        case _:
            yield ERROR, f"unknown type {record_type:#x}: libxl refuses it, marked optional or not"


def _emulator(body: memoryview) -> Faults:
    if len(body) < 8:
        yield ERROR, f"has {len(body)} octets, too few for the emulator's id"
        return
    emulator, index = RECORD_HEADER.unpack_from(body)
    if emulator not in tuple(EmulatorId):
        yield ERROR, f"emulator id {emulator} is unknown"
    if index:
        yield NOTE, f"index {index}; there is one emulator, index 0"


def _xenstore(data: memoryview) -> Faults:
    if not data:
        yield NOTE, "has no content; senders leave such a record out"
        return
    if data[-1]:
        yield ERROR, "the xenstore data does not end with a NUL"
        return
    if len(data) > _XENSTORE_MAX:
        yield ERROR, f"{len(data)} octets of xenstore data; no model has {_XENSTORE_MAX}"
        return
    parts = bytes(data[:-1]).split(b"\0")
    if len(parts) % 2:
        yield ERROR, f"the xenstore data holds {len(parts)} strings: a key without a value"
    for key in parts[::2]:
        if not key or key.startswith(b"/"):
            yield ERROR, f"xenstore key {ascii(key[:64])[1:]}: keys are relative and not empty"
            return


def _checkpoint_state(body: memoryview) -> Faults:
    if len(body) != 4:
        yield ERROR, f"has {len(body)} octets, not 4"
        return
    (state,) = struct.unpack("<I", body)
    if state in tuple(ColoState) and state != ColoState.NEW:
        yield ERROR, f"{ColoState(state).name} goes from secondary to primary, on the back channel"
    elif state != ColoState.NEW:
        yield ERROR, f"state {state} is unknown"
