"""The Xen adapter's attach and detach on fake libraries: what is found of a domain, and how it is left."""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING, Any

import pytest
from fake_dom0 import (
    NOTHING,
    NR_PFNS,
    RAM,
    SUSPEND,
    UUID,
    VERSION,
    Attached,
    Dom0,
    FakeWatcher,
    info_of,
)
from fake_xen import ANSWERS_ONLY, DOMID, NODE
from processes import PATIENCE

from checkpointd.authority.processes import HostIdentity
from checkpointd.errors import HypervisorError, NoSuchDomainError
from checkpointd.hypervisor.port import EndReason
from checkpointd.hypervisor.xen import domain as domains
from checkpointd.hypervisor.xen import hypervisor as hypervisors
from checkpointd.hypervisor.xen import lib as xen
from checkpointd.hypervisor.xen import release as releases
from checkpointd.hypervisor.xen import savers, survey, toolstack, versions
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen.devices import Allowances
from checkpointd.hypervisor.xen.incoming import Domains
from checkpointd.hypervisor.xen.release import UndoHands
from checkpointd.wire.messages import End

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONFIG = toolstack.Configuration.of('{"c_info": {"type": "pvh"}}')


@pytest.fixture(scope="session")
def only_dom0(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dom0]:
    made = Dom0(tmp_path_factory.mktemp("fake-dom0"))
    yield made
    made.close()


@pytest.fixture
def dom0(only_dom0: Dom0, monkeypatch: pytest.MonkeyPatch) -> Dom0:
    only_dom0.reset()
    monkeypatch.setattr(domains, "WatcherHandle", FakeWatcher)
    return only_dom0


@pytest.fixture
def attach(dom0: Dom0, tmp_path: Path) -> Iterator[Callable[..., Attached]]:
    made: list[Attached] = []

    def make(**options: Any) -> Attached:
        made.append(Attached(dom0, tmp_path, **options))
        return made[-1]

    yield make
    for attached in made:
        attached.domain.close()


# -------------------------------------------------------------------- found and described


@pytest.fixture
def hypervisor(
    dom0: Dom0, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> hypervisors.XenHypervisor:
    monkeypatch.setattr(versions, "running", lambda: VERSION)
    monkeypatch.setattr(hypervisors, "open_libs", lambda **_: dom0.libs)
    monkeypatch.setattr(toolstack, "configuration", lambda domid: CONFIG)
    monkeypatch.setattr(survey, "survey", lambda *_, **__: survey.DomainSurvey(0, "", ()))
    return hypervisors.XenHypervisor(tmp_path, NOTHING)


def test_a_domain_is_described_once_xl_has_created_it(
    dom0: Dom0, hypervisor: hypervisors.XenHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is described before has hardly any memory yet: protection of it would fail at its first look."""
    dom0.guest.nr_pfns = dom0.guest.tot_pages = 1
    dom0.put(f"/local/domain/{DOMID}/name", "")

    def complete(domid: int) -> toolstack.Configuration:
        dom0.reset()
        return CONFIG

    monkeypatch.setattr(toolstack, "configuration", complete)
    info = hypervisor.find(uuid=UUID)
    assert (info.name, info.nr_pfns, info.ram_pages) == ("shop", NR_PFNS, RAM)
    assert info.config["type"] == "pvh"


def test_a_domain_that_goes_while_xl_is_asked_is_not_there(
    dom0: Dom0, hypervisor: hypervisors.XenHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(domid: int) -> toolstack.Configuration:
        dom0.guest.gone = True
        return CONFIG

    monkeypatch.setattr(toolstack, "configuration", vanish)
    with pytest.raises(NoSuchDomainError, match=f"no guest with domid {DOMID}"):
        hypervisor.find(domid=DOMID)


def test_a_domain_is_not_attached_to_as_it_was_once(attach: Callable[..., Attached]) -> None:
    with pytest.raises(
        HypervisorError, match="memory map of domain 4 has 1000 pages now and had 10"
    ):
        attach(info=info_of(nr_pfns=10))


# -------------------------------------------------------------------- its devices

BACKEND = f"/local/domain/0/backend/vbd/{DOMID}/51712"
FRONTEND = f"/local/domain/{DOMID}/device/vbd/51712"


def plug(dom0: Dom0, kind: str = "vbd", ident: str = "51712") -> None:
    """A read-only disk, or another device, as libxl makes it."""
    entry = f"/libxl/{DOMID}/device/{kind}/{ident}"
    behind, front = (part.replace("vbd/", f"{kind}/") for part in (BACKEND, FRONTEND))
    for key, value in {"dev": "xvda", "mode": "r", "type": "phy", "params": "/dev/vg/web"}.items():
        dom0.put(f"{behind}/{key}".replace("51712", ident), value)
    dom0.put(f"{entry}/backend", behind.replace("51712", ident))
    dom0.put(f"{entry}/frontend", front.replace("51712", ident))


def trouble(attached: Attached) -> str | None:
    """Once something is told."""
    assert select.select([attached.domain.fileno()], [], [], PATIENCE)[0], "nothing is told"
    return attached.domain.trouble


def test_persistent_grants_of_a_disk_that_connects_later_are_refused(
    dom0: Dom0, attach: Callable[..., Attached]
) -> None:
    plug(dom0)
    attached = attach()
    dom0.put(f"{FRONTEND}/feature-persistent", "1")
    dom0.put(f"{BACKEND}/feature-persistent", "1")  # of which no watch of ours tells
    dom0.put(f"{FRONTEND}/state", "4")
    assert "persistent grants" in (trouble(attached) or "")


@pytest.mark.parametrize(("kind", "ident"), [("vbd", "51728"), ("vif", "0")])
@pytest.mark.parametrize("comes", [True, False])
def test_devices_that_come_or_go_end_protection(
    dom0: Dom0, attach: Callable[..., Attached], kind: str, ident: str, *, comes: bool
) -> None:
    """What was told to the other side has others, and a domain of those would be built there."""
    plug(dom0)
    if not comes:
        plug(dom0, kind, ident)
    attached = attach(allow=Allowances(disk=False, output=True, untested=False))
    assert len(attached.domain.unsafe) == (kind == "vif" and not comes)
    if comes:
        plug(dom0, kind, ident)
    else:
        dom0.drop(f"/libxl/{DOMID}/device/{kind}/{ident}")
    assert "have changed (" in (trouble(attached) or "")
    assert attached.domain.ended() is None


def test_a_domain_that_xl_destroys_loses_its_devices_first(
    dom0: Dom0, attach: Callable[..., Attached]
) -> None:
    plug(dom0)
    attached = attach()
    dom0.guest.flags |= xen.lib.XEN_STATE_PAUSED
    dom0.drop(f"/libxl/{DOMID}/device")
    dom0.guest.gone = True
    dom0.put("@releaseDomain", "")
    assert trouble(attached) is None
    assert attached.domain.ended() is EndReason.DESTROYED


def test_a_paused_domain_is_looked_at_again(
    dom0: Dom0, attach: Callable[..., Attached], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domains, "PAUSED_LOOK", 0.01)
    plug(dom0)
    attached = attach()
    dom0.guest.flags |= xen.lib.XEN_STATE_PAUSED
    dom0.drop(f"/libxl/{DOMID}/device")
    dom0.guest.flags = 0
    assert "xvda (phy:/dev/vg/web) is gone" in (trouble(attached) or "")


# -------------------------------------------------------------------- how it is left

SHORT = 1  # ns: a timeout that has passed at the first look


def left_in_order(attached: Attached) -> bool:
    """Nothing is left for a watcher to do."""
    attached.domain.close()
    assert attached.watcher.gone == (attached.state is None)
    return attached.state is None


def test_an_engine_that_ends_in_order_leaves_nothing(
    dom0: Dom0, attach: Callable[..., Attached]
) -> None:
    attached = attach()
    attached.domain.enable_log()
    assert attached.suspend() == 0
    assert left_in_order(attached)
    assert not dom0.suspended
    assert not dom0.guest.log_on
    assert not dom0.guest.server


def test_a_last_word_is_left_to_the_watcher(attach: Callable[..., Attached]) -> None:
    attached = attach()
    attached.domain.leave_word(End(EndReason.MOVED))
    assert left_in_order(attached)
    assert attached.watcher.word == End(EndReason.MOVED)


def test_a_request_that_is_not_obeyed_yet_is_left_to_the_watcher(
    dom0: Dom0, attach: Callable[..., Attached]
) -> None:
    attached = attach()
    dom0.guest.manner = ANSWERS_ONLY
    assert attached.suspend(SHORT) == -errno.ETIMEDOUT
    assert not left_in_order(attached)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_late_guest_that_somebody_else_suspended_is_his(
    dom0: Dom0, attach: Callable[..., Attached], *, noticed: bool
) -> None:
    attached = attach()
    dom0.guest.manner = ANSWERS_ONLY
    assert attached.suspend(SHORT) == -errno.ETIMEDOUT
    dom0.put(NODE, "suspend")  # xl save
    dom0.put(NODE, "")  # the guest's answer
    dom0.stop(SUSPEND)
    if noticed:
        assert attached.suspend() == 0
        assert attached.resume() == -errno.ESHUTDOWN
        assert attached.domain.ended() is EndReason.MOVED
    assert left_in_order(attached)
    assert dom0.suspended
    assert dom0.guest.resumes == 0


def test_an_ioreq_server_that_stays_is_left_to_the_watcher_though_the_guest_has_moved(
    dom0: Dom0, attach: Callable[..., Attached]
) -> None:
    """Its vcpus would wait for ever, in whosever hands they are."""
    attached = attach()
    dom0.stop(SUSPEND)  # by xl save
    assert attached.suspend() == -errno.EBUSY
    dom0.guest.fail_destroy = errno.EPERM
    assert not left_in_order(attached)
    assert dom0.suspended


def test_a_log_that_somebody_else_has_begun_is_his(
    dom0: Dom0, attach: Callable[..., Attached]
) -> None:
    """xl migrate, while no epoch is taken and so nobody has noticed."""
    attached = attach()
    attached.domain.enable_log()
    xen.lib.xen_log_off(dom0.libs, DOMID)
    xen.lib.xen_log_enable(dom0.libs, DOMID)
    ended = dom0.guest.logs_ended
    assert left_in_order(attached)
    assert attached.domain.ended() is EndReason.MOVED
    assert dom0.guest.log_on
    assert dom0.guest.logs_ended == ended


# -------------------------------------------------------------------- what others see of it


@pytest.fixture
def hands(dom0: Dom0, monkeypatch: pytest.MonkeyPatch) -> Iterator[UndoHands]:
    monkeypatch.setattr(xen, "open_libs", lambda **_: dom0.libs)
    made = UndoHands()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("reason", "end"),
    [(0, EndReason.POWEROFF), (5, EndReason.REBOOT), (200, EndReason.CRASH), (SUSPEND, None)],
)
def test_a_dead_engines_guest_ends_as_it_would_under_a_living_one(
    dom0: Dom0, hands: UndoHands, reason: int, end: EndReason | None
) -> None:
    """Also by a soft reset, and for a reason that is not Xen's own."""
    dom0.stop(reason)
    seen = hands.look(DOMID)
    assert seen is not None
    assert (seen.uuid, seen.ended, seen.suspended) == (UUID, end, end is None)


def test_pages_are_taken_from_an_incoming_domain(dom0: Dom0) -> None:
    incoming = Domains(dom0.libs)
    incoming.drop_pages(DOMID, [3, 5, 8])
    assert dom0.guest.tot_pages == RAM - 3
    with pytest.raises(HypervisorError, match=r"1 pages of domain 4 cannot be taken back: .* busy"):
        incoming.drop_pages(DOMID, [NR_PFNS])
    incoming.close()


def test_a_request_of_somebody_else_is_seen_whatever_the_guest_did_with_it(
    dom0: Dom0, hands: UndoHands
) -> None:
    dom0.put(NODE, "suspend")
    assert hands.withdraw_suspend(DOMID)
    assert not hands.others_ask(DOMID)
    dom0.put(NODE, "poweroff")
    assert not hands.others_ask(DOMID)
    dom0.put(NODE, "")  # the guest's answer
    assert not hands.others_ask(DOMID)
    dom0.put(NODE, "suspend")
    assert hands.others_ask(DOMID)
    dom0.put(NODE, "")
    assert hands.others_ask(DOMID), "it stays so"
    assert not hands.withdraw_suspend(DOMID)
    dom0.put(NODE, "suspend")
    dom0.put(NODE, "")
    assert hands.others_ask(DOMID), "asked and answered between two looks"


def process(proc: Path, pid: int, *words: str) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))


def test_who_saves_a_domain_is_seen(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "17").mkdir()  # ends just now
    process(tmp_path, 18)  # of the kernel, or a zombie
    process(tmp_path, 19, "xl", "save", "4", "file")
    process(
        tmp_path, 20, "/usr/lib/xen/bin/libxl-save-helper", "--restore-domain", "9", "8", "4", "1"
    )
    process(
        tmp_path, 21, "/usr/lib/xen/bin/libxl-save-helper", "--save-domain", "9", "4", "14", "1"
    )
    assert savers.helper_of(DOMID, tmp_path) is None
    process(tmp_path, 22, "/usr/lib/xen/bin/libxl-save-helper", "--save-domain", "9", "8", "4", "1")
    assert savers.helper_of(DOMID, tmp_path) == 22
    assert savers.helper_of(14, tmp_path) == 21


def test_a_domain_that_xl_has_migrated_away_is_in_its_hands(dom0: Dom0, hands: UndoHands) -> None:
    assert hands.saved_by_others(DOMID) == ""
    dom0.put(f"/local/domain/{DOMID}/name", "shop--migratedaway")
    assert "xl migrate" in hands.saved_by_others(DOMID)


# -------------------------------------------------------------------- after a dead engine


@pytest.fixture
def dead(tmp_path: Path, hands: UndoHands) -> states.EngineState:
    """One that has asked the guest to suspend within a minute."""
    state = states.EngineState(UUID, DOMID, HostIdentity("an earlier boot", 1, 1))
    states.store(tmp_path, state)
    states.Asked(tmp_path, DOMID, late=60.0).close()
    return state


def test_a_guest_that_stops_for_a_dead_engine_is_resumed_by_the_next(
    dom0: Dom0,
    hypervisor: hypervisors.XenHypervisor,
    dead: states.EngineState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in the moment that an attach waits for it, and later."""
    monkeypatch.setattr(releases, "LATE_SUSPEND", 0.0)
    domain = hypervisor.attach(DOMID)
    assert states.asked(tmp_path, DOMID) == 60.0
    table = xen.ffi.cast("struct ck_hypervisor *", domain.table)
    dom0.stop(SUSPEND)
    assert table.suspend(table.domain, 10**10) == 0
    assert table.resume(table.domain) == 0
    assert domain.ended() is None
    assert states.asked(tmp_path, DOMID) == 0.0
    dom0.stop(SUSPEND)  # by somebody else
    assert table.suspend(table.domain, 10**10) == -errno.EBUSY
    assert domain.ended() is EndReason.MOVED
    domain.close()


def test_or_at_once_if_it_stops_while_the_next_looks_at_it(
    dom0: Dom0,
    hypervisor: hypervisors.XenHypervisor,
    dead: states.EngineState,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(releases, "LATE_SUSPEND", 0.0)

    def stops(domid: int) -> toolstack.Configuration:
        dom0.stop(SUSPEND)
        return CONFIG

    monkeypatch.setattr(toolstack, "configuration", stops)
    hypervisor.attach(DOMID).close()
    assert dom0.guest.resumes == 1
    assert not dom0.suspended


def test_or_while_the_next_attaches(
    dom0: Dom0,
    hypervisor: hypervisors.XenHypervisor,
    dead: states.EngineState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(releases, "LATE_LOOK", 0.0)

    def stops(*_: object) -> bool:
        dom0.stop(SUSPEND)
        return False

    monkeypatch.setattr(UndoHands, "others_ask", stops)
    domain = hypervisor.attach(DOMID)
    assert dom0.guest.resumes == 1
    assert states.asked(tmp_path, DOMID) == 0.0
    domain.close()


def test_a_guest_that_others_save_is_not_attached_to(
    dom0: Dom0,
    hypervisor: hypervisors.XenHypervisor,
    hands: UndoHands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(savers, "helper_of", lambda domid: 4711)
    with pytest.raises(HypervisorError, match=r"being saved or migrated \(process 4711\)"):
        hypervisor.attach(DOMID)
