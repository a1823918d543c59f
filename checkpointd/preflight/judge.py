"""From facts to verdicts: one item for each thing that decides whether a guest can be protected (pure).

The items come in the order in which `checkpointd primary` would meet them, so that the first refusal is the one that it
would end with. An item that the primary itself would not refuse is refused here where a failover could not succeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from checkpointd.errors import CheckpointdError, DomainBusyError
from checkpointd.hypervisor.port import PAGE_SIZE
from checkpointd.hypervisor.xen.devices import DISK, NETWORK, PASSTHROUGH, Allowances
from checkpointd.hypervisor.xen.devices import judge as judge_devices
from checkpointd.preflight.items import (
    MIB,
    PER_PFN,
    Item,
    Verdict,
    failed,
    mib,
    refused,
    version_item,
)
from checkpointd.preflight.there import judge_secondary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from checkpointd.hypervisor.capacity import Capacity
    from checkpointd.preflight.facts import DomainFacts, Facts


def judge(facts: Facts) -> list[Item]:
    """Every item that can be told from these facts."""
    items = [*_software(facts)]
    domain, here, peer = facts.domain, facts.here, facts.peer
    if isinstance(domain, CheckpointdError):
        items.append(failed("domain", domain))
    elif domain is not None:
        items += _guest(domain, facts)
    if facts.keys_trouble:
        items.append(failed("keys", facts.keys_trouble))
    else:
        items.append(
            Item("keys", Verdict.OK, "this side has its key, and one to know the secondary by")
        )
    if isinstance(here, CheckpointdError):
        items.append(failed("memory here", here))
    elif here is not None and not isinstance(domain, CheckpointdError | None):
        items.append(_memory_here(domain, facts, here))
    if isinstance(peer, CheckpointdError):
        items.append(failed("ports", peer))
    elif peer is not None:
        items += judge_secondary(peer, facts)
    elif facts.keys_trouble:
        items.append(Item("secondary", Verdict.UNKNOWN, "not asked, for want of keys"))
    elif facts.not_asked:
        items.append(Item("secondary", Verdict.UNKNOWN, facts.not_asked, "say --secondary ADDRESS"))
    return items


def exit_code(items: Sequence[Item]) -> int:
    """0 if nothing is refused, else that of the first refusal."""
    return next((item.exit_code for item in items if item.verdict is Verdict.REFUSED), 0)


# -------------------------------------------------------------------- this host


def _software(facts: Facts) -> Iterator[Item]:
    if facts.native_trouble:
        yield failed("checkpointd", facts.native_trouble)
    else:
        yield Item(
            "checkpointd",
            Verdict.OK,
            f"release {facts.release}, its compiled half passes its self-test",
        )
    here = facts.here
    if facts.hypervisor == "xen" and not facts.may_call_xen:
        yield refused("privilege", "this process may not call Xen", "run it as root, in dom0")
    elif facts.hypervisor == "xen":
        yield Item("privilege", Verdict.OK, "this process may call Xen")
    if facts.hypervisor_trouble:
        yield failed("hypervisor", facts.hypervisor_trouble)
    elif facts.hypervisor != "xen":
        yield Item("hypervisor", Verdict.OK, "embedded: guests are processes of this machine")
    elif here is not None and not isinstance(here, CheckpointdError):
        yield version_item(
            "hypervisor",
            here.xen,
            facts.tested,
            allowed=facts.wanted.unsafe_untested_xen,
            libraries=facts.libraries,
        )


def _guest(domain: DomainFacts, facts: Facts) -> Iterator[Item]:
    info = domain.info
    yield Item(
        "domain",
        Verdict.OK,
        f"{info.domid} ({info.name}), {info.ram_pages * PAGE_SIZE // MIB} MiB, UUID {info.uuid}",
    )
    yield _type(domain)
    yield _state(domain)
    yield _engine(domain)
    if not domain.says_it_suspends:
        yield Item(
            "suspend",
            Verdict.WARNING,
            "the guest's kernel has not said that it can suspend, which is how it is stopped for an epoch",
            "if it is booting, look again; Linux needs CONFIG_XEN and CONFIG_HIBERNATE_CALLBACKS",
        )
    if domain.log_trouble:
        yield refused("dirty log", domain.log_trouble, _LOG_HINTS.get(domain.kind, _LOG_HINT))
    elif domain.log_trouble is None:
        yield Item("dirty log", Verdict.UNKNOWN, "not tried")
    elif domain.engine and domain.engine.alive:
        yield Item("dirty log", Verdict.OK, "an engine has it")
    else:
        yield Item("dirty log", Verdict.OK, "can begin")
    yield from _devices(domain, facts)
    if facts.hypervisor == "xen":
        yield from _layout(domain)


_LOG_HINT: Final = "end what has it, and look again"
_LOG_HINTS: Final = {
    "pv": 'protect it as a PVH guest (type="pvh"), or boot a Xen that is built with CONFIG_SHADOW_PAGING'
}


def _type(domain: DomainFacts) -> Item:
    match domain.kind:
        case "pvh":
            return Item("type", Verdict.OK, "PVH")
        case "embedded":
            return Item("type", Verdict.OK, "embedded")
        case "hvm":
            return refused(
                "type",
                "HVM: its device model (QEMU) has state that is not taken with a checkpoint yet",
                'run it as a PVH guest (type="pvh"), if it needs no emulated devices',
            )
        case "pv":
            return refused(
                "type",
                "PV: its page tables hold machine addresses, which are not translated yet; and a Xen that is built "
                "without shadow paging has no dirty log for it",
                'run it as a PVH guest (type="pvh"): Linux kernels since 4.20 can',
            )
        case kind:
            return refused("type", f"{kind}: not known", "protect PVH guests")


def _state(domain: DomainFacts) -> Item:
    match domain.state:
        case "running":
            return Item("state", Verdict.OK, "running")
        case "paused":
            return refused(
                "state",
                "paused: a guest that does not run cannot be asked to stop for an epoch",
                "unpause it",
            )
        case "suspended" if domain.engine is not None:
            return Item(
                "state",
                Verdict.WARNING,
                "suspended, by an engine that is gone",
                "a new primary lets it go on, and so does `checkpointd release`",
            )
        case "suspended":
            return refused(
                "state",
                "suspended, and not by an engine of ours: a save or a migration is under way, or was broken off",
                f"wait for its end; if none is under way, `checkpointd release --domid {domain.info.domid} --force`",
            )
        case state:
            return refused("state", f"{state}: it will not run again", "start it anew")


def _engine(domain: DomainFacts) -> Item:
    engine, domid = domain.engine, domain.info.domid
    if engine is None:
        return Item("engine", Verdict.OK, "none is attached")
    who = f"process {engine.pid}" if engine.pid is not None else "another process"
    if engine.alive:
        return refused(
            "engine",
            f"{who} protects it already",
            "one engine at a time: end that first",
            DomainBusyError,
        )
    return Item(
        "engine",
        Verdict.WARNING,
        f"{who} protected it and is gone, and its traces are still there",
        f"a new primary takes over from it; to do without: `checkpointd release --domid {domid}`",
    )


_DEVICE_ITEMS: Final = {
    DISK: "disk",
    NETWORK: "output",
    **dict.fromkeys(PASSTHROUGH, "passthrough"),
}
_WITHOUT: Final = {  # what is told of a Xen guest that has no such device
    "disk": "none",
    "output": "the guest has no network",
    "passthrough": "none",
}


def _devices(domain: DomainFacts, facts: Facts) -> Iterator[Item]:
    wanted = facts.wanted
    allow = Allowances(wanted.unsafe_disk, wanted.unsafe_output, wanted.unsafe_untested_xen)
    for device in domain.devices:
        name = _DEVICE_ITEMS.get(device.kind, "device")
        judgement = judge_devices((device,), allow)
        for text in judgement.refused:
            risk, _, remedy = text.partition("; ")
            yield refused(name, risk, remedy)
        for text in judgement.unprotected:
            yield Item(name, Verdict.WARNING, text, "status shows it for as long as it holds")
        if not judgement.refused and not judgement.unprotected:
            hint = "the other host needs the same image by the same name" if name == "disk" else ""
            yield Item(name, Verdict.OK, str(device), hint)
    if domain.kind == "embedded":
        yield Item("output", Verdict.OK, "held until its epoch is acknowledged")
        return
    there = {_DEVICE_ITEMS.get(device.kind) for device in domain.devices}
    for name, text in _WITHOUT.items():
        if name not in there:
            yield Item(name, Verdict.OK, text)


def _layout(domain: DomainFacts) -> Iterator[Item]:
    if domain.vnuma_nodes:
        yield refused(
            "vNUMA",
            f"{domain.vnuma_nodes} virtual nodes: the stream has no place for them",
            "take vnuma out of the guest's configuration",
        )
    else:
        yield Item("vNUMA", Verdict.OK, "none")
    if domain.pod_pages:
        yield refused(
            "populate on demand",
            f"{domain.pod_pages} pages have nothing behind them yet, and looking at one would populate it",
            "start the guest with memory equal to maxmem, or let it boot until it has ballooned down",
        )
    else:
        yield Item("populate on demand", Verdict.OK, "no page of that kind")
    if domain.nested:
        yield refused(
            "nested virtualization",
            "the guest may run guests of its own, whose state the stream does not have",
            "take nestedhvm out of the guest's configuration",
        )
    if domain.boot_file:
        yield Item(
            "start at boot",
            Verdict.WARNING,
            f"this host starts it when it boots ({domain.boot_file}): after a failover it would run twice",
            "remove that link; who runs the guest is checkpointd's business from now on",
        )
    else:
        yield Item("start at boot", Verdict.OK, "not by this host")


def _memory_here(domain: DomainFacts, facts: Facts, here: Capacity) -> Item:
    wanted, info = facts.wanted, domain.info
    arenas = wanted.arenas * min(wanted.arena, info.nr_pfns * PAGE_SIZE)
    mapped = min(wanted.mapping_budget, info.ram_pages * PAGE_SIZE)
    # A PV dom0, and any process elsewhere, pays for a mapping with entries of page tables, 8 octets a page.
    mappings = mapped if here.ballooned else mapped // 512
    history = min(wanted.delta_history, info.ram_pages * PAGE_SIZE)
    need = arenas + mappings + history + PER_PFN * info.nr_pfns
    text = (
        f"{mib(need)} of {mib(here.memory_free)}: {mib(arenas)} arenas, {mib(mappings)} mappings, "
        f"{mib(history)} history, {mib(PER_PFN * info.nr_pfns)} bitmaps"
    )
    if need <= here.memory_free:
        return Item("memory here", Verdict.OK, text)
    return refused(
        "memory here",
        text,
        "lower --mapping-budget, --delta-history or --arena, or give this machine memory",
    )
