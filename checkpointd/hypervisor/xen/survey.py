"""What a preflight wants to know of a Xen host and of one of its domains. Looks, and changes nothing.

Xen's libraries are called through declarations of this module's own, not by the adapter's compiled door: it is the
preflight that has to say what is wrong where that door does not open. Only what releases 4.17 and 4.20 declare alike
is used (xenctrl.h, xenguest.h, public/sysctl.h), and the libraries are opened by the name of the running release. By
ctypes, for a handful of calls off every hot path: cffi would parse C at each start, or need one more compiled module.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.capacity import Capacity
from checkpointd.hypervisor.xen import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PRIVCMD: Final = Path("/dev/xen/privcmd")
_GUEST_TYPE: Final = Path("/sys/hypervisor/guest_type")
_PAGE: Final = 4096

_HVM_MAX: Final = 5  # XEN_SYSCTL_cpu_featureset_hvm_max
_FEATURE_WORDS_MAX: Final = 64  # 4.17 and 4.20 have 19; Xen fills as many as it knows
_LOG_OFF, _LOG_ENABLE = 0, 2  # XEN_DOMCTL_SHADOW_OP_OFF, _ENABLE_LOGDIRTY
_LEAF_WORDS: Final = (  # which register of which CPUID leaf a feature word is (public/arch-x86/cpufeatureset.h)
    (0x1, 0, "d"), (0x1, 0, "c"), (0x80000001, 0, "d"), (0x80000001, 0, "c"), (0xD, 1, "a"),
    (0x7, 0, "b"), (0x7, 0, "c"), (0x80000007, 0, "d"), (0x80000008, 0, "b"), (0x7, 0, "d"),
    (0x7, 1, "a"), (0x80000021, 0, "a"), (0x7, 1, "b"), (0x7, 2, "d"), (0x7, 1, "c"), (0x7, 1, "d"),
)  # fmt: skip

# Bits that AMD's leaf 0x80000001 repeats from leaf 1 in edx; Xen's feature sets have them once.
_REPEATED_1D: Final = 0x0183F3FF
_NO_SUBLEAF: Final = 0xFFFFFFFF  # XEN_CPUID_NO_SUBLEAF: of a leaf that has none


class _Physinfo(ctypes.Structure):
    """xc_physinfo_t, and room for what a later release may have added."""

    _fields_ = (
        ("counts", ctypes.c_uint32 * 7),
        ("capabilities", ctypes.c_uint32),
        ("arch_capabilities", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("total_pages", ctypes.c_uint64),
        ("free_pages", ctypes.c_uint64),
        ("scrub_pages", ctypes.c_uint64),
        ("outstanding_pages", ctypes.c_uint64),
        ("max_mfn", ctypes.c_uint64),
        ("hw_cap", ctypes.c_uint32 * 8),
        ("room", ctypes.c_uint8 * 256),
    )


class _Leaf(ctypes.Structure):
    """xen_cpuid_leaf_t."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("leaf", "subleaf", "a", "b", "c", "d"))


class _Msr(ctypes.Structure):
    """xen_msr_entry_t."""

    _fields_ = (("index", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("value", ctypes.c_uint64))


_HANDLE: Final = ctypes.c_void_p
_U32: Final = ctypes.c_uint32
_U32_AT: Final = ctypes.POINTER(ctypes.c_uint32)
_U64_AT: Final = ctypes.POINTER(ctypes.c_uint64)
_CTRL: Final[dict[str, tuple[Any, ...]]] = {  # name: result, arguments
    "xc_interface_open": (_HANDLE, _HANDLE, _HANDLE, ctypes.c_uint),
    "xc_interface_close": (ctypes.c_int, _HANDLE),
    "xc_physinfo": (ctypes.c_int, _HANDLE, ctypes.POINTER(_Physinfo)),
    "xc_domain_get_pod_target": (ctypes.c_int, _HANDLE, _U32, _U64_AT, _U64_AT, _U64_AT),
    "xc_shadow_control": (ctypes.c_int, _HANDLE, _U32, ctypes.c_uint, _U32_AT, ctypes.c_uint),
}
_GUEST: Final[dict[str, tuple[Any, ...]]] = {
    "xc_get_cpu_featureset": (ctypes.c_int, _HANDLE, _U32, _U32_AT, _U32_AT),
    "xc_cpu_policy_init": (_HANDLE,),
    "xc_cpu_policy_destroy": (None, _HANDLE),
    "xc_cpu_policy_get_domain": (ctypes.c_int, _HANDLE, _U32, _HANDLE),
    "xc_cpu_policy_get_size": (ctypes.c_int, _HANDLE, _U32_AT, _U32_AT),
    "xc_cpu_policy_serialise": (
        *(ctypes.c_int, _HANDLE, _HANDLE),
        *(ctypes.POINTER(_Leaf), _U32_AT, ctypes.POINTER(_Msr), _U32_AT),
    ),
}


@dataclass(frozen=True, slots=True)
class DomainSurvey:
    """One domain, beyond what DomainInfo has."""

    pod_pages: int  # promised and not populated
    log_trouble: str  # why the dirty log cannot begin; empty: it can, or an engine of ours has it
    features: tuple[int, ...]  # of the CPU that the guest sees, in words


class _Xen:
    """libxenctrl and libxenguest of the running release, with an interface to the hypervisor."""

    def __init__(self) -> None:
        version = versions.running()
        try:
            self.ctrl = _load(f"libxenctrl.so.{version}", _CTRL)
            self.guest = _load(f"libxenguest.so.{version}", _GUEST)
        except (OSError, AttributeError) as error:
            raise HypervisorError(
                f"Xen {version} runs here, and its libraries cannot be used: {error}; install them (Debian: "
                f"libxenmisc{version}), or boot the Xen that is installed"
            ) from None
        self.handle = self.ctrl.xc_interface_open(None, None, 0)
        if not self.handle:
            raise HypervisorError(f"Xen cannot be called: {_reason()}; run as root in dom0")


def _load(name: str, functions: dict[str, tuple[Any, ...]]) -> ctypes.CDLL:
    library = ctypes.CDLL(name, use_errno=True)
    for function, (result, *arguments) in functions.items():
        declared = getattr(library, function)
        declared.restype, declared.argtypes = result, arguments
    return library


def _reason() -> str:
    return os.strerror(ctypes.get_errno())


@contextmanager
def _opened() -> Iterator[_Xen]:
    xen = _Xen()
    try:
        yield xen
    finally:
        xen.ctrl.xc_interface_close(xen.handle)


def capacity(memory_free: int) -> Capacity:
    """Of this host; `memory_free`: dom0's, in octets."""
    with _opened() as xen:
        info = _Physinfo()
        if xen.ctrl.xc_physinfo(xen.handle, ctypes.byref(info)) < 0:
            raise HypervisorError(f"Xen does not describe this machine: {_reason()}")
        count, words = _U32(_FEATURE_WORDS_MAX), (_U32 * _FEATURE_WORDS_MAX)()
        status = xen.guest.xc_get_cpu_featureset(xen.handle, _HVM_MAX, ctypes.byref(count), words)
        # A Xen built without HVM has none.
        features = tuple(words[: count.value]) if status >= 0 else ()
    return Capacity(
        memory_free,
        max(0, info.free_pages - info.outstanding_pages) * _PAGE,
        str(versions.running()),
        features,
        ballooned=not _is_pv_dom0(),
    )


def _is_pv_dom0() -> bool:
    try:
        return _GUEST_TYPE.read_text(encoding="ascii").strip() == "PV"
    except OSError:
        return False  # the safe guess: it only ever asks for more memory


def survey(domid: int, *, engine_attached: bool) -> DomainSurvey:
    """Look at a domain; where an engine is attached its dirty log is not tried. Raises HypervisorError."""
    with _opened() as xen:
        total, cached, entries = (ctypes.c_uint64() for _ in range(3))
        status = xen.ctrl.xc_domain_get_pod_target(
            xen.handle, domid, ctypes.byref(total), ctypes.byref(cached), ctypes.byref(entries)
        )
        return DomainSurvey(
            entries.value if status >= 0 else 0,  # a PV guest has none: EINVAL
            "" if engine_attached else _log_trouble(xen, domid),
            _features(xen, domid),
        )


def _log_trouble(xen: _Xen, domid: int) -> str:
    """Begin the dirty log and end it. Where somebody has begun it already nothing changes: ENABLE fails then. An
    engine that begins in between is refused by Xen, aloud, and loses nothing.
    """
    if xen.ctrl.xc_shadow_control(xen.handle, domid, _LOG_ENABLE, None, 0) >= 0:
        if xen.ctrl.xc_shadow_control(xen.handle, domid, _LOG_OFF, None, 0) < 0:
            raise HypervisorError(
                f"the dirty log of domain {domid} was tried and cannot be ended again: {_reason()}; "
                f"`checkpointd release --domid {domid} --force` does it"
            )
        return ""
    match ctypes.get_errno():
        case errno.EOPNOTSUPP:
            return "this Xen has no dirty log for a guest of this type: for PV it must be built with shadow paging"
        case errno.EINVAL:
            return "somebody has it already: a save or a migration of this guest is under way, or was broken off"
        case number:
            return os.strerror(number)


def _features(xen: _Xen, domid: int) -> tuple[int, ...]:
    """The guest's CPUID as words of features; () where it cannot be had."""
    policy = xen.guest.xc_cpu_policy_init()
    if not policy:
        return ()
    try:
        nr_leaves, nr_msrs = _U32(), _U32()
        counts = ctypes.byref(nr_leaves), ctypes.byref(nr_msrs)
        if xen.guest.xc_cpu_policy_get_size(xen.handle, *counts) < 0:
            return ()
        leaves, msrs = (_Leaf * nr_leaves.value)(), (_Msr * nr_msrs.value)()
        if (
            xen.guest.xc_cpu_policy_get_domain(xen.handle, domid, policy) < 0
            or xen.guest.xc_cpu_policy_serialise(
                xen.handle, policy, leaves, counts[0], msrs, counts[1]
            )
            < 0
        ):
            return ()
        return feature_words(
            {
                (leaf.leaf, 0 if leaf.subleaf == _NO_SUBLEAF else leaf.subleaf): {
                    register: getattr(leaf, register) for register in "abcd"
                }
                for leaf in leaves[: nr_leaves.value]
            }
        )
    finally:
        xen.guest.xc_cpu_policy_destroy(policy)


def feature_words(leaves: Mapping[tuple[int, int], Mapping[str, int]]) -> tuple[int, ...]:
    """Words of Xen's feature sets, from registers a to d by leaf and subleaf."""
    words = [leaves.get((leaf, sub), {}).get(register, 0) for leaf, sub, register in _LEAF_WORDS]
    words[2] &= ~_REPEATED_1D
    return tuple(words)
