"""Looking at everything that a preflight judges, in the order in which `checkpointd primary` would meet it.

Nothing here changes the guest, attaches to it or opens a session. What cannot be seen is kept as the error that says
why, so that one look finds everything that is wrong.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

import checkpointd
from checkpointd import native, node
from checkpointd.authority.processes import boot_id
from checkpointd.daemon.config import PrimaryOptions
from checkpointd.errors import CheckpointdError
from checkpointd.hypervisor.capacity import measure
from checkpointd.hypervisor.port import EndReason
from checkpointd.hypervisor.xen import survey, versions
from checkpointd.hypervisor.xen.devices import Allowances, devices_of
from checkpointd.preflight.ask import TIMEOUT, ask
from checkpointd.preflight.facts import DomainFacts, Engine, Facts, Wanted
from checkpointd.wire.messages import Check
from checkpointd.wire.sockets import Contexts

if TYPE_CHECKING:
    from checkpointd.hypervisor.port import DomainInfo, Hypervisor
    from checkpointd.preflight.facts import Peer

NOBODY: Final = str(UUID(int=0))  # asked for where there is no guest to ask for

# Those that the adapter calls (hypervisor/xen/csrc/libs.c); what they need themselves is their own affair.
_LIBRARY: Final = re.compile(
    r"/(libxen(?:ctrl|guest|foreignmemory|evtchn|devicemodel|store)\.so[.\d]*)$", re.MULTILINE
)


def gather(options: PrimaryOptions, timeout: float = TIMEOUT) -> Facts:
    """All that can be seen now; `timeout` in seconds, for each of the three answers of a secondary."""
    kind = options.hypervisor
    if kind == "auto":
        kind = "xen" if node.is_dom0() else "embedded"
    facts = Facts(
        wanted=Wanted(
            arena=options.arena,
            arenas=options.arenas,
            mapping_budget=options.mapping_budget,
            delta_history=options.delta_history if options.reduce != "off" else 0,
            unsafe_disk=options.unsafe_disk,
            unsafe_output=options.unsafe_output,
            unsafe_untested_xen=options.unsafe_untested_xen,
            secondary=str(options.secondary),
        ),
        hypervisor=kind,
        release=checkpointd.__version__,
        tested=tuple(f"{major}.{minor}" for major, minor in versions.TESTED),
    )
    if kind == "xen":
        facts = replace(facts, may_call_xen=os.access(survey.PRIVCMD, os.R_OK | os.W_OK))
    try:
        native.self_test()
    except CheckpointdError as error:
        facts = replace(facts, native_trouble=error)
    try:
        facts = replace(facts, here=measure(kind))
        # Any release is looked at; whether it is one that was tested is judged.
        allow = Allowances(disk=True, output=True, untested=True)
        hypervisor = node.choose_hypervisor(kind, options.run_dir, options.namespace, allow)
    except CheckpointdError as error:
        facts = replace(facts, hypervisor_trouble=error)
    else:
        libraries = xen_libraries() if kind == "xen" else ()
        facts = replace(facts, libraries=libraries, domain=_domain(hypervisor, options))
    return _other_side(facts, options, timeout)


def xen_libraries(maps: Path = Path("/proc/self/maps")) -> tuple[str, ...]:
    """Xen's libraries in this process, by the names of their files: what was found, not what was looked for."""
    return tuple(sorted(set(_LIBRARY.findall(maps.read_text(encoding="utf-8", errors="replace")))))


# -------------------------------------------------------------------- the guest


def _domain(hypervisor: Hypervisor, options: PrimaryOptions) -> DomainFacts | CheckpointdError:
    try:
        info = hypervisor.find(domid=options.domid, uuid=options.uuid)
        if info.hypervisor == "xen":
            return _xen_domain(info, options.run_dir)
        return _embedded_domain(info)
    except CheckpointdError as error:
        return error


def _embedded_domain(info: DomainInfo) -> DomainFacts:
    from checkpointd.hypervisor.embedded import toolstack

    view = toolstack.look(info)
    return DomainFacts(
        info,
        "embedded",
        "paused" if view.paused else "running",
        Engine(None, alive=True) if view.engine else None,
    )


def _xen_domain(info: DomainInfo, run_dir: Path) -> DomainFacts:
    from checkpointd.hypervisor.xen import autostart, lib, state, toolstack

    libs = lib.open_libs(untested=True)
    left = state.load(run_dir, info.domid)
    engine = Engine(left.engine.pid, left.engine_lives) if left else None
    attached = engine is not None and engine.alive
    described = lib.ffi.new("struct xen_dominfo *")
    status = lib.lib.xen_domain_state(libs, info.domid, described)
    lib.check(status, f"Xen does not describe domain {info.domid}")
    look = survey.survey(info.domid, engine_attached=attached)
    config = toolstack.configuration(info.domid)
    store = lib.Store(libs)
    try:
        devices = devices_of(store, info.domid)
        says = store.read(f"/local/domain/{info.domid}/control/feature-suspend")
    finally:
        store.close()
    return DomainFacts(
        info,
        config.kind,
        _state(described.flags, attached=attached),
        engine,
        says == "1",
        look.log_trouble,
        devices,
        look.pod_pages,
        config.vnuma_nodes,
        config.nested,
        int(described.max_vcpu_id) + 1,
        look.features,
        str(autostart.starts_at_boot(info.uuid, info.name) or ""),
    )


def _state(flags: int, *, attached: bool) -> str:
    """In the judgement's words. A guest that an engine of ours has stopped for an epoch is running, too."""
    from checkpointd.hypervisor.xen.facts import end_of
    from checkpointd.hypervisor.xen.lib import lib

    end = end_of(flags)
    if end is not None:
        return "crashed" if end is EndReason.CRASH else "ended"
    if flags & lib.XEN_STATE_SHUTDOWN:
        return "running" if attached else "suspended"
    return "paused" if flags & lib.XEN_STATE_PAUSED else "running"


# -------------------------------------------------------------------- the other side


def _other_side(facts: Facts, options: PrimaryOptions, timeout: float) -> Facts:
    try:
        keys, endpoint = node.initiator_keys(options)
    except CheckpointdError as error:
        return replace(facts, keys_trouble=error)
    info = facts.domain.info if isinstance(facts.domain, DomainFacts) else None
    check = Check(info.uuid, info.name, boot_id()) if info else Check(NOBODY, "", boot_id())
    contexts = Contexts.make()
    try:
        peer: Peer | CheckpointdError = ask(contexts, endpoint, keys, check, timeout)
    except CheckpointdError as error:
        peer = error
    finally:
        contexts.close()
    default = PrimaryOptions.__dataclass_fields__["secondary"].default
    if isinstance(peer, CheckpointdError) and options.secondary == default:
        return replace(facts, not_asked=f"none was named, and none runs on this machine: {peer}")
    return replace(facts, peer=peer)
