"""The pause and the live round: one native call each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointd.errors import NativeError
from checkpointd.native.bitmap import handle_of
from checkpointd.native.digest import DIGEST_SIZE
from checkpointd.native.library import ffi, lib

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from checkpointd._native import CData
    from checkpointd.native.arena import Arena
    from checkpointd.native.bitmap import Bitmap
    from checkpointd.native.digest import DigestKey
    from checkpointd.native.mappings import Mappings

TOO_MANY = lib.CK_TOO_MANY  # Outcome.status: the dirty set does not fit the arena


@dataclass(frozen=True, slots=True)
class Outcome:
    """What pause() or live_round() did. Unless status is 0, nothing is staged, the arena is empty,
    and every dirty bit is in `pending`. Times are nanoseconds of CLOCK_MONOTONIC.
    """

    status: int  # 0, TOO_MANY, or a negative errno
    step: str  # where it failed, "" if it did not; a failure of resume() with status 0 is "resume"
    resume_status: int  # of resume(), which is called on every path: 0 or a negative errno
    suspend_ns: int  # until the guest had stopped
    harvest_ns: int  # with the invalidation of mappings
    stage_ns: int
    context_ns: int
    audit_ns: int
    output_ns: int
    resume_ns: int
    pause_ns: int  # from the guest stopped to the guest running; 0 for a live round
    pages: int  # staged with data
    zeros: int
    gone: int
    known: int  # left out since the secondary has them already
    dirty: int  # bits found in all
    remaining: int  # bits in `pending` now
    audited: int
    cursor: int  # where the next audit (pause) or the next live round should begin
    closed_output: int  # number given by output_close

    @property
    def fault(self) -> str:
        """What failed, for a person; "" if nothing did."""
        status = self.status or self.resume_status
        if status == TOO_MANY:
            return f"{self.dirty} dirty pages do not fit the arena"
        return f"{self.step}: {os.strerror(-status)}" if status else ""


_STEPS = {
    lib.CK_STEP_NONE: "",
    lib.CK_STEP_ARENA: "arena",
    lib.CK_STEP_SUSPEND: "suspend",
    lib.CK_STEP_P2M: "p2m",
    lib.CK_STEP_HARVEST: "harvest",
    lib.CK_STEP_TYPES: "types",
    lib.CK_STEP_MAP: "map",
    lib.CK_STEP_STAGE: "stage",
    lib.CK_STEP_CONTEXT: "context",
    lib.CK_STEP_AUDIT: "audit",
    lib.CK_STEP_OUTPUT: "output",
    lib.CK_STEP_RESUME: "resume",
}
_NUMBERS = tuple(name for name in Outcome.__slots__ if name != "step")


def pause(
    table: int,
    mappings: Mappings,
    pending: Bitmap,
    carried: Bitmap,
    arena: Arena,
    *,
    key: DigestKey,
    audit: Bitmap | None = None,
    audit_cursor: int = 0,
    suspend_timeout_ns: int,
    close_output: bool = True,
    stay: bool = False,
    detect_zero: bool = True,
) -> Outcome:
    """One epoch in one native call: suspend, harvest, stage, context, audit, close the output,
    resume. With `stay` the guest is left suspended if all went well: closing the domain resumes it.

    Dirty bits come to `pending` and, once their pages are staged, are in `carried`, which is empty
    before and which the caller clears at the ack, or ORs back into `pending` if there will be none.
    `audit` says which pages may be audited, None: all that were ever staged through `mappings`;
    those not dirty now are taken in turn from `audit_cursor` on. Raises ValueError, and NativeError
    if `carried` is not empty; what the hypervisor does wrong is in the outcome.
    """
    request = _request(table, mappings, pending, carried, arena, audit_cursor, detect_zero)
    request.key = key.key
    if audit is not None:
        request.audit = handle_of(audit, mappings.nr_pfns)
    request.suspend_timeout_ns = suspend_timeout_ns
    request.close_output = close_output
    request.stay = stay
    result = ffi.new("struct ck_outcome *")
    lib.ck_pause(request, result)
    return _outcome(result)


def live_round(
    table: int,
    mappings: Mappings,
    pending: Bitmap,
    carried: Bitmap,
    arena: Arena,
    *,
    cursor: int,
    detect_zero: bool = True,
    key: DigestKey | None = None,
    known: WriteableBuffer | None = None,
) -> Outcome:
    """One round with the guest running: harvest into `pending`, stage from pfn `cursor` upwards,
    and round to it again, as many as fit; the rest stays in `pending`.

    `known` has the secondary's digest of each page, 16 octets a pfn, all zero where it has none. A
    page whose digest under `key` is that one is not staged, though its bit is in `carried` with the
    others: the log is on, so a later change shows. Where a page is staged, `known` becomes zero: the
    secondary's version is no longer that one, not even if the guest changes it back. For the same
    reason `known` is void once a pause has succeeded. Raises as pause() does.
    """
    request = _request(table, mappings, pending, carried, arena, cursor, detect_zero)
    if known is not None:
        if key is None:
            raise ValueError("known digests need the key they were made with")
        request.key = key.key
        digests = ffi.from_buffer("uint8_t[]", known, require_writable=True)
        if len(digests) != mappings.nr_pfns * DIGEST_SIZE:
            raise ValueError(f"{len(digests)} octets of digests for {mappings.nr_pfns} pfns")
        request.known = digests
    result = ffi.new("struct ck_outcome *")
    lib.ck_live_round(request, result)
    return _outcome(result)


def _request(
    table: int,
    mappings: Mappings,
    pending: Bitmap,
    carried: Bitmap,
    arena: Arena,
    cursor: int,
    detect_zero: bool,
) -> CData:
    nr_pfns = mappings.nr_pfns
    if mappings.table != table or arena.nr_pfns != nr_pfns or pending is carried:
        raise ValueError("table, mappings, bitmaps and arena must be of one domain, and distinct")
    request = ffi.new("struct ck_request *")
    request.mappings = mappings.handle
    request.pending = handle_of(pending, nr_pfns)
    request.carried = handle_of(carried, nr_pfns)
    request.arena = arena.handle
    request.cursor = cursor % nr_pfns
    request.detect_zero = detect_zero
    return request


def _outcome(result: CData) -> Outcome:
    if result.step == lib.CK_STEP_ARENA:
        raise NativeError(
            "an arena was to be staged into before the epoch it carries was acknowledged or given "
            "back (its `carried` bitmap is not empty)"
        )
    numbers = {name: int(getattr(result, name)) for name in _NUMBERS}
    return Outcome(step=_STEPS[result.step], **numbers)
