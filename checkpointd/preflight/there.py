"""Verdicts on the other side: could it take the guest over? (Pure.)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from checkpointd.daemon.units import format_duration
from checkpointd.errors import CheckpointdError, FenceError, RefusedError, WireError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.preflight.items import MIB, PER_PFN, Item, Verdict, mib, refused, version_item
from checkpointd.wire.checks import UNSAFE, Checked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointd.preflight.facts import DomainFacts, Facts, Peer

IMAGES: Final = ("memory", "disk", "none")  # the choices of `secondary --image`
# What Xen takes for a guest beside its memory: page tables of HAP as libxl sizes them, 1 MiB for each vcpu and 8 KiB
# for each MiB (libs/light: paging memory), and what a domain has besides, rounded up.
PER_VCPU: Final = MIB
PAGING_SHARE: Final = 128
PER_DOMAIN: Final = 4 * MIB
# Times the guest's memory that xl may come to hold while it is fed: what `secondary` allows it (restorers/xl_feed.py).
XL_ROUNDS: Final = 2
# Two clocks that differ by more are worth a word: whoever compares the logs of both hosts is misled. Nothing here
# depends on wall clocks.
CLOCKS_DIFFER_NS: Final = 1_000_000_000


def judge_secondary(peer: Peer, facts: Facts) -> Iterator[Item]:
    checked, domain = peer.checked, facts.domain
    if peer.bulk_trouble:
        yield refused(
            "ports",
            peer.bulk_trouble,
            "open both ports, control and bulk, for this machine",
            WireError,
        )
    else:
        yield Item("ports", Verdict.OK, f"{facts.wanted.secondary} answers on both")
    yield _release(checked, facts)
    if domain is not None and not isinstance(domain, CheckpointdError):
        yield _memory_there(domain, checked)
        if facts.hypervisor == "xen":
            yield _cpu(domain.features, checked)
    yield _there(checked)
    if checked.starts_at_boot:
        yield Item(
            "start at boot there",
            Verdict.WARNING,
            "the other host starts such a guest when it boots: it would run twice",
            "remove its link in /etc/xen/auto there",
        )
    yield _fence(checked)
    yield _clock(peer.clock_ahead_ns)


def _release(checked: Checked, facts: Facts) -> Item:
    name = "releases"
    if checked.release != facts.release:
        return refused(
            name,
            f"checkpointd {checked.release} there, {facts.release} here",
            "run one release on both sides; upgrade the secondary first",
            WireError,
        )
    if checked.hypervisor != facts.hypervisor:
        return refused(
            name, f"{checked.hypervisor} there, {facts.hypervisor} here", "pair hosts of one kind"
        )
    here = facts.here
    if facts.hypervisor != "xen" or here is None or isinstance(here, CheckpointdError):
        return Item(name, Verdict.OK, f"checkpointd {checked.release} on both sides")
    if _number(checked.xen) < _number(here.xen):
        return refused(
            name,
            f"Xen {checked.xen} there is older than {here.xen} here: Xen promises restoring on the same or a later one",
            "upgrade the other host",
        )
    return version_item(name, checked.xen, facts.tested, allowed=facts.wanted.unsafe_untested_xen)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _memory_there(domain: DomainFacts, checked: Checked) -> Item:
    info = domain.info
    ram = info.ram_pages * PAGE_SIZE
    bookkeeping = PER_PFN * info.nr_pfns
    xen = checked.hypervisor == "xen"
    # libxenguest keeps a whole epoch before it applies it, beside our copy of it.
    epochs = checked.epoch_memory * (2 if xen else 1)
    domain0 = {
        "memory": ram + epochs + bookkeeping,
        "disk": epochs + bookkeeping,
        "none": epochs + bookkeeping,
    }
    needs = ", ".join(
        f"--image {image} {mib(domain0[image])}"
        + (f" and {mib(ram)} of disk" if image == "disk" else "")
        for image in (IMAGES if xen else IMAGES[:2])
    )
    text = f"the daemon has {mib(checked.memory_free)} and needs: {needs}; it runs with --image {checked.image}"
    short = []
    if domain0.get(checked.image, 0) > checked.memory_free:
        short.append(f"its memory is too small for --image {checked.image}")
    if checked.image == "disk" and ram > checked.disk_free:
        short.append(f"its disk has {mib(checked.disk_free)} free")
    if xen:
        guest = ram + ram // PAGING_SHARE + PER_VCPU * domain.vcpus + PER_DOMAIN
        text += f"; Xen has {mib(checked.guest_memory_free)} and the guest needs {mib(guest)}"
        if guest > checked.guest_memory_free:
            short.append("Xen has not enough for the guest")
    most = ram * XL_ROUNDS
    if (
        not short
        and xen
        and domain0.get(checked.image, 0) - checked.epoch_memory + most > checked.memory_free
    ):
        return Item(
            "memory there",
            Verdict.WARNING,
            f"{text}; a guest that changes faster than xl takes it in may make xl hold up to {mib(most)}, too",
            "give dom0 there so much more, or raise the interval if its memory gets short",
        )
    if not short:
        return Item("memory there", Verdict.OK, text)
    return refused(
        "memory there",
        f"{' and '.join(short)}: {text}",
        "give that host memory, choose another --image or a smaller --epoch-memory there",
        RefusedError,
    )


def _cpu(guest: tuple[int, ...], checked: Checked) -> Item:
    there = tuple(int(word, 16) for word in checked.cpu_features.split(":") if word)
    if not guest or not there:
        return Item("CPU", Verdict.UNKNOWN, "one of the hosts does not say what its CPU can do")
    missing = [
        f"{number}.{bit}"
        for number, word in enumerate(guest)
        for bit in range(32)
        if word >> bit & 1 and not (there[number] if number < len(there) else 0) >> bit & 1
    ]
    if not missing:
        return Item(
            "CPU",
            Verdict.OK,
            "every CPUID feature that the guest sees is there on the other host, too; MSRs were not compared",
        )
    return refused(
        "CPU",
        f"the guest sees {len(missing)} features that the other host cannot give it (word.bit of Xen's feature set: "
        f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''})",
        "mask them in the guest's configuration (cpuid=) and start it anew, or choose a host with such a CPU",
    )


def _there(checked: Checked) -> Item:
    if checked.guest_here:
        return refused(
            "guest there",
            "a domain with this guest's UUID lives on the other host already",
            "if it is the guest, protect it there; if it is a leftover, destroy it",
            RefusedError,
        )
    return Item("guest there", Verdict.OK, "none of this UUID")


def _fence(checked: Checked) -> Item:
    if checked.fence.startswith(UNSAFE):
        return Item("fence", Verdict.WARNING, checked.fence, "give the secondary a --fence-command")
    if checked.fence:
        return Item("fence", Verdict.OK, checked.fence)
    return refused(
        "fence",
        "the secondary has no way to stop this host, and so would never activate the guest",
        "give it a --fence-command; or --unsafe-no-fencing, with which both may run",
        FenceError,
    )


def _clock(ahead_ns: int) -> Item:
    if abs(ahead_ns) <= CLOCKS_DIFFER_NS:
        return Item("clock", Verdict.OK, "both hosts agree within a second")
    shown = format_duration(abs(ahead_ns) // 1_000_000 * 1_000_000)
    return Item(
        "clock",
        Verdict.WARNING,
        f"the other host's is {shown} {'ahead' if ahead_ns > 0 else 'behind'}",
        "run NTP on both: nothing here depends on it, but comparing their logs does, and the guest may",
    )
