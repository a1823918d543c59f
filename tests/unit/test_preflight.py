"""The judgement of a preflight: from facts that are plain values to items, verdicts and the exit code."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from checkpointd.authority.command import CommandFence
from checkpointd.authority.processes import boot_id
from checkpointd.daemon.config import SecondaryOptions
from checkpointd.errors import (
    CheckpointdError,
    DomainBusyError,
    FenceError,
    HypervisorError,
    KeyFileError,
    NativeError,
    NoSuchDomainError,
    RefusedError,
    WireError,
)
from checkpointd.hypervisor.capacity import Capacity
from checkpointd.hypervisor.embedded.fence import EmbeddedFence
from checkpointd.hypervisor.port import DomainInfo, HostIdentity
from checkpointd.hypervisor.xen.devices import Device
from checkpointd.preflight.facts import DomainFacts, Engine, Facts, Peer, Wanted
from checkpointd.preflight.gather import xen_libraries
from checkpointd.preflight.items import Item, Verdict
from checkpointd.preflight.judge import exit_code, judge
from checkpointd.preflight.there import XL_ROUNDS
from checkpointd.secondary import preflight as answering
from checkpointd.secondary.fences import fence_of
from checkpointd.secondary.restorers import xl_feed
from checkpointd.wire.checks import Check, Checked

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
WANTED = Wanted(32 * MIB, 2, GIB, 256 * MIB, False, False, False, "standby:10946:10947")
# A PVH guest of 160 MiB: its p2m has the hole below 4 GiB.
INFO = DomainInfo(
    "12345678-1234-4234-8234-123456789abc",
    4,
    "web",
    1_044_480,
    40_960,
    "xen",
    HostIdentity("b", 0, 0),
)
FEATURES = (0x0183FBFF, 0x80202001)
GUEST = DomainFacts(INFO, "pvh", "running", features=FEATURES)
HERE = Capacity(800 * MIB, 900 * MIB, "4.17", FEATURES)
CHECKED = Checked(
    "0.1.0", "xen", "4.17", 2 * GIB, GIB, "memory", 0, 256 * MIB, "0183fbff:80202001",
    "the command fence", guest_here=False, starts_at_boot=False, clock_ns=0,
)  # fmt: skip
PEER = Peer(CHECKED, 1000)
GOOD = Facts(WANTED, "xen", "0.1.0", ("4.17", "4.20"), domain=GUEST, here=HERE, peer=PEER)


def with_guest(**changes: Any) -> Facts:
    return replace(GOOD, domain=replace(GUEST, **changes))


def with_peer(**changes: Any) -> Facts:
    return replace(GOOD, peer=replace(PEER, checked=replace(CHECKED, **changes)))


def wanting(**changes: Any) -> Facts:
    return replace(GOOD, wanted=replace(WANTED, **changes))


def the(facts: Facts, name: str) -> Item:
    (item,) = (item for item in judge(facts) if item.name == name)
    return item


def is_refused(facts: Facts, name: str, error: type[CheckpointdError] = HypervisorError) -> Item:
    """That item is refused, it alone, and with that error's exit code; the item, for its words."""
    items = judge(facts)
    (item,) = (item for item in items if item.verdict is Verdict.REFUSED)
    assert item.name == name
    assert exit_code(items) == item.exit_code == error.exit_code
    return item


def test_a_good_guest_on_two_good_hosts() -> None:
    items = judge(GOOD)
    assert {item.verdict for item in items} == {Verdict.OK}, [i for i in items if i.verdict != "ok"]
    assert exit_code(items) == 0
    assert [item.name for item in items] == [
        "checkpointd", "privilege", "hypervisor", "domain", "type", "state", "engine", "dirty log", "disk", "output",
        "passthrough", "vNUMA", "populate on demand", "start at boot", "keys", "memory here", "ports", "releases",
        "memory there", "CPU", "guest there", "fence", "clock",
    ]  # fmt: skip


def test_each_item_is_told_once() -> None:
    names = [item.name for item in judge(GOOD)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("kind", "word"), [("pv", "shadow"), ("hvm", "QEMU"), ("invented", "not known")]
)
def test_types_that_cannot_be_protected_say_why(kind: str, word: str) -> None:
    item = is_refused(with_guest(kind=kind), "type")
    assert word in item.text
    assert item.hint


@pytest.mark.parametrize("state", ["paused", "suspended", "crashed", "ended"])
def test_only_a_running_guest_is_protected(state: str) -> None:
    assert state in is_refused(with_guest(state=state), "state").text


def test_a_suspended_guest_is_released_by_force_unless_an_engine_left_it_so() -> None:
    """What nobody of ours wrote down may be somebody's migration, and is not undone without a word."""
    force = "checkpointd release --domid 4 --force"
    assert force in the(with_guest(state="suspended"), "state").hint
    left = with_guest(state="suspended", engine=Engine(4711, alive=False))
    assert the(left, "state").verdict is Verdict.WARNING  # `primary` resumes it, and begins
    assert exit_code(judge(left)) == 0


def test_another_engine_has_the_guest() -> None:
    item = is_refused(with_guest(engine=Engine(4711, alive=True)), "engine", DomainBusyError)
    assert "4711" in item.text


def test_what_a_dead_engine_left_is_in_nobodys_way_and_told() -> None:
    facts = with_guest(engine=Engine(4711, alive=False))
    assert the(facts, "engine").verdict is Verdict.WARNING
    assert "checkpointd release --domid 4" in the(facts, "engine").hint
    assert exit_code(judge(facts)) == 0


def test_no_dirty_log_and_a_log_that_was_not_tried() -> None:
    assert "shadow" in is_refused(with_guest(log_trouble="no shadow paging"), "dirty log").text
    assert the(with_guest(log_trouble=None), "dirty log").verdict is Verdict.UNKNOWN


def test_a_guest_that_has_not_said_that_it_suspends_is_a_warning() -> None:
    facts = with_guest(says_it_suspends=False)
    assert the(facts, "suspend").verdict is Verdict.WARNING
    assert exit_code(judge(facts)) == 0
    assert "suspend" not in {item.name for item in judge(GOOD)}


def test_what_the_stream_has_no_place_for_is_refused() -> None:
    is_refused(with_guest(nested=True), "nested virtualization")
    is_refused(with_guest(vnuma_nodes=2), "vNUMA")
    is_refused(with_guest(pod_pages=1), "populate on demand")


def test_a_guest_that_either_host_starts_at_boot_is_a_warning() -> None:
    assert (
        "/etc/xen/auto/web" in the(with_guest(boot_file="/etc/xen/auto/web"), "start at boot").text
    )
    assert the(with_peer(starts_at_boot=True), "start at boot there").verdict is Verdict.WARNING


def disk(**changes: Any) -> Device:
    return replace(Device("vbd", "51712", "xvda", "phy:/dev/vg/web"), **changes)


def test_disks_and_networks_are_judged_by_what_is_allowed() -> None:
    vif = Device("vif", "0", "vif0", "bridge xenbr0")
    assert "--unsafe-disk" in is_refused(with_guest(devices=(disk(writable=True),)), "disk").hint
    assert "--unsafe-output" in is_refused(with_guest(devices=(vif,)), "output").hint
    allowed = replace(
        with_guest(devices=(disk(writable=True), vif)),
        wanted=replace(WANTED, unsafe_disk=True, unsafe_output=True),
    )
    assert [the(allowed, name).verdict for name in ("disk", "output")] == [Verdict.WARNING] * 2
    assert exit_code(judge(allowed)) == 0


def test_a_read_only_disk_is_fine_if_the_other_host_has_it_too() -> None:
    item = the(with_guest(devices=(disk(),)), "disk")
    assert item.verdict is Verdict.OK
    assert "other host" in item.hint


def test_persistent_grants_and_passthrough_have_no_option() -> None:
    everything = replace(WANTED, unsafe_disk=True, unsafe_output=True, unsafe_untested_xen=True)
    for device, name in (
        (disk(persistent_grants=True), "disk"),
        (Device("pci", "0", "pci 0"), "passthrough"),
        (Device("vusb", "0", "vusb 0"), "passthrough"),
        (Device("vtpm", "0", "vtpm 0"), "device"),
    ):
        is_refused(replace(with_guest(devices=(device,)), wanted=everything), name)


def test_no_passthrough_and_no_disk_are_told_too() -> None:
    console = Device("console", "0", "console 0")
    for devices in ((), (console,)):
        facts = with_guest(devices=devices)
        assert [the(facts, name).text for name in ("passthrough", "disk")] == ["none", "none"]
    assert the(with_guest(devices=(disk(),)), "passthrough").verdict is Verdict.OK


def test_a_xen_that_no_test_has_run_on() -> None:
    facts = replace(GOOD, here=replace(HERE, xen="4.19"), peer=None)
    assert "4.17 and 4.20" in is_refused(facts, "hypervisor").text
    demanded = replace(facts, wanted=replace(WANTED, unsafe_untested_xen=True))
    assert the(demanded, "hypervisor").verdict is Verdict.WARNING


def test_the_libraries_that_were_found_are_told_beside_the_release() -> None:
    facts = replace(GOOD, libraries=("libxenctrl.so.4.17", "libxenstore.so.4.0"))
    assert "4.17" in the(facts, "hypervisor").text
    assert "libxenctrl.so.4.17, libxenstore.so.4.0" in the(facts, "hypervisor").text
    assert "libxenctrl" not in the(facts, "releases").text  # of the other host nothing is known


def test_libraries_are_those_that_this_process_has_mapped(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    lib = "/usr/lib/x86_64-linux-gnu"
    maps.write_text(
        f"7f00-7f01 r--p 00000000 fe:01 11      {lib}/libxenstore.so.4.0\n"
        f"7f02-7f03 r--p 00000000 fe:01 12      {lib}/libxenctrl.so.4.17\n"
        f"7f03-7f04 r-xp 00001000 fe:01 12      {lib}/libxenctrl.so.4.17\n"
        f"7f05-7f06 r-xp 00001000 fe:01 13      {lib}/libxentoollog.so.1.0\n"
        f"7f07-7f08 r-xp 00001000 fe:01 14      {lib}/libc.so.6\n"
        "7f09-7f0a rw-p 00000000 00:00 0\n"
    )
    assert xen_libraries(maps) == ("libxenctrl.so.4.17", "libxenstore.so.4.0")


def test_the_other_xen_may_be_later_and_not_earlier() -> None:
    assert exit_code(judge(with_peer(xen="4.20"))) == 0
    older = replace(with_peer(xen="4.17"), here=replace(HERE, xen="4.20"))
    assert "older" in is_refused(older, "releases").text
    assert "4.9" in is_refused(with_peer(xen="4.9"), "releases").text  # by numbers, not as text


def test_both_sides_run_one_release_of_one_hypervisor() -> None:
    is_refused(with_peer(release="0.2.0"), "releases", WireError)
    is_refused(with_peer(hypervisor="embedded"), "releases")


def test_memory_here_counts_arenas_mappings_history_and_bitmaps() -> None:
    # 64 MiB of arenas, 160 MiB of mapped guest, as much for its history, 0.996 MiB for the p2m.
    need = 64 * MIB + 160 * MIB + 160 * MIB + INFO.nr_pfns
    ballooned = replace(HERE, ballooned=True)
    assert exit_code(judge(replace(GOOD, here=replace(ballooned, memory_free=need)))) == 0
    is_refused(replace(GOOD, here=replace(ballooned, memory_free=need - 1)), "memory here")


def test_a_history_is_no_larger_than_it_may_be_nor_there_where_nothing_is_reduced() -> None:
    rest = 64 * MIB + 160 * MIB // 512 + INFO.nr_pfns
    for history in (0, 8 * MIB):
        good = replace(GOOD, wanted=replace(GOOD.wanted, delta_history=history))
        enough = replace(HERE, memory_free=rest + history)
        assert exit_code(judge(replace(good, here=enough))) == 0
        is_refused(replace(good, here=replace(HERE, memory_free=rest + history - 1)), "memory here")


def test_a_pv_dom0_pays_for_page_tables_only() -> None:
    need = 64 * MIB + 160 * MIB // 512 + 160 * MIB + INFO.nr_pfns
    assert exit_code(judge(replace(GOOD, here=replace(HERE, memory_free=need)))) == 0
    is_refused(replace(GOOD, here=replace(HERE, memory_free=need - 1)), "memory here")


@pytest.mark.parametrize(
    ("image", "need"),
    [  # MiB for dom0: an epoch of ours and one of xl's, and with `memory` the guest
        ("memory", 160 + 512),
        ("disk", 512),
        ("none", 512),
    ],
)
def test_memory_there_depends_on_where_the_image_is(image: str, need: int) -> None:
    enough = need * MIB + INFO.nr_pfns
    facts = with_peer(image=image, memory_free=enough, disk_free=160 * MIB)
    assert exit_code(judge(facts)) == 0
    short = with_peer(image=image, memory_free=enough - 1, disk_free=160 * MIB)
    item = is_refused(short, "memory there", RefusedError)
    assert all(f"--image {choice}" in item.text for choice in ("memory", "disk", "none"))


def test_memory_that_xl_may_come_to_hold_is_a_warning() -> None:
    # The image, an epoch of ours, and twice the guest in xl.
    most = (160 + 256 + 320) * MIB + INFO.nr_pfns
    assert the(with_peer(memory_free=most), "memory there").verdict is Verdict.OK
    item = the(with_peer(memory_free=most - 1), "memory there")
    assert item.verdict is Verdict.WARNING
    assert "320 MiB" in item.text
    assert XL_ROUNDS == xl_feed.MOST_ROUNDS


def test_memory_there_needs_disk_and_xens_own() -> None:
    is_refused(with_peer(image="disk", disk_free=160 * MIB - 1), "memory there", RefusedError)
    # The guest, its page tables (1/128 and 1 MiB a vcpu) and 4 MiB.
    guest = 160 * MIB + 160 * MIB // 128 + MIB + 4 * MIB
    assert exit_code(judge(with_peer(guest_memory_free=guest))) == 0
    is_refused(with_peer(guest_memory_free=guest - 1), "memory there", RefusedError)


def test_the_other_cpu_must_have_what_the_guest_sees() -> None:
    assert exit_code(judge(with_peer(cpu_features="ffffffff:ffffffff:1"))) == 0
    item = is_refused(with_peer(cpu_features="0183fbfe:00202001"), "CPU")
    assert "2 features" in item.text
    assert "0.0, 1.31" in item.text
    assert "1 features" in is_refused(with_peer(cpu_features="ffffffff:7fffffff"), "CPU").text
    is_refused(with_peer(cpu_features="0183fbff"), "CPU")  # a word it does not have at all


def test_a_cpu_of_which_nothing_is_known() -> None:
    assert the(with_peer(cpu_features=""), "CPU").verdict is Verdict.UNKNOWN
    assert the(with_guest(features=()), "CPU").verdict is Verdict.UNKNOWN


def test_a_guest_that_is_there_already() -> None:
    is_refused(with_peer(guest_here=True), "guest there", RefusedError)


def test_without_a_fence_there_is_no_failover() -> None:
    item = is_refused(with_peer(fence=""), "fence", FenceError)
    assert "--fence-command" in item.hint
    assert "--unsafe-no-fencing" in item.hint


def test_a_fence_that_was_declined_there_is_a_warning() -> None:
    facts = with_peer(fence="UNSAFE: nothing stops the old guest")
    assert the(facts, "fence").verdict is Verdict.WARNING
    assert exit_code(judge(facts)) == 0


@pytest.mark.parametrize(("ahead_ms", "word"), [(90_000, "1m30s ahead"), (-2_500, "2.5s behind")])
def test_clocks_that_differ_are_a_warning(ahead_ms: int, word: str) -> None:
    item = the(replace(GOOD, peer=replace(PEER, clock_ahead_ns=ahead_ms * 1_000_000)), "clock")
    assert item.verdict is Verdict.WARNING
    assert word in item.text


def test_a_bulk_port_that_does_not_answer() -> None:
    facts = replace(GOOD, peer=replace(PEER, bulk_trouble="no connection to standby"))
    is_refused(facts, "ports", WireError)


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("checkpointd", NativeError("stale"), lambda e: {"native_trouble": e}),
        ("hypervisor", HypervisorError("none"), lambda e: {"hypervisor_trouble": e, "domain": None, "here": None}),
        ("domain", NoSuchDomainError("none"), lambda e: {"domain": e}),
        ("keys", KeyFileError("no key"), lambda e: {"keys_trouble": e, "peer": None}),
        ("ports", WireError("no answer"), lambda e: {"peer": e}),
        ("privilege", HypervisorError(""), lambda _: {"may_call_xen": False}),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_refused_by_its_error(name: str, error: Any, change: Any) -> None:
    is_refused(replace(GOOD, **change(error)), name, type(error))


def test_without_keys_nobody_was_asked_and_that_is_told() -> None:
    facts = replace(GOOD, keys_trouble=KeyFileError("no key"), peer=None)
    assert the(facts, "secondary").verdict is Verdict.UNKNOWN


def test_the_exit_code_is_that_of_the_first_refusal() -> None:
    facts = replace(with_guest(engine=Engine(1, alive=True)), peer=WireError("no answer"))
    assert exit_code(judge(facts)) == DomainBusyError.exit_code


def test_a_secondary_that_nobody_named_is_unknown_and_no_refusal() -> None:
    facts = replace(GOOD, peer=None, not_asked="none was named")
    assert the(facts, "secondary").verdict is Verdict.UNKNOWN
    assert (
        the(facts, "keys").verdict is Verdict.OK
    )  # they were found, or it could not have been asked
    assert exit_code(judge(facts)) == 0


def test_an_embedded_guest_has_fewer_items() -> None:
    guest = replace(GUEST, kind="embedded", info=replace(INFO, hypervisor="embedded"))
    peer = replace(PEER, checked=replace(CHECKED, hypervisor="embedded", xen=""))
    facts = replace(GOOD, hypervisor="embedded", domain=guest, peer=peer)
    names = {item.name for item in judge(facts)}
    assert exit_code(judge(facts)) == 0
    assert not {"privilege", "passthrough", "vNUMA", "CPU"} & names
    assert "held" in the(facts, "output").text


# -------------------------------------------------------------------- what the secondary says of itself


def answered(tmp_path: Path, *, asks: str = "", **options: Any) -> Checked:
    """`asks`: the boot id of him who asks; "": this machine."""
    chosen = {"run_dir": tmp_path, "state_dir": tmp_path, **options}
    kind = "embedded"
    return answering.answer(
        Check(INFO.uuid, "web", asks or boot_id()),
        SecondaryOptions(**chosen),
        kind,
        guest_here=False,
    )


def test_a_secondary_says_what_it_has(tmp_path: Path) -> None:
    checked = answered(tmp_path, epoch_memory=7 << 20)
    assert (checked.image, checked.epoch_memory, checked.disk_free) == ("memory", 7 << 20, 0)
    assert checked.memory_free == checked.guest_memory_free > 0
    assert not checked.starts_at_boot  # of an embedded guest nobody asks /etc/xen
    disk = answered(tmp_path, image="disk", image_dir=tmp_path)
    assert disk.disk_free > 0
    assert answered(tmp_path, image="disk", image_dir=tmp_path / "missing").disk_free == 0


def test_a_secondary_says_how_the_old_guest_is_stopped(tmp_path: Path) -> None:
    assert "on this machine" in answered(tmp_path).fence
    assert answered(tmp_path, unsafe_no_fencing=True).fence.startswith("UNSAFE")


def test_an_embedded_guest_of_another_machine_is_not_stopped_by_its_process(tmp_path: Path) -> None:
    """Its process is out of reach from here: what the service itself would find once the guest is protected."""
    power = ("/sbin/power", "off")
    assert answered(tmp_path, asks="another").fence == ""
    assert (
        answered(tmp_path, asks="another", fence_command=power).fence == "the command /sbin/power"
    )
    assert "on this machine" in answered(tmp_path, fence_command=power).fence, "as it is chosen"
    for where in ("another", boot_id()):
        info = replace(INFO, hypervisor="embedded", host=HostIdentity(where, 1, 1))
        options = SecondaryOptions(run_dir=tmp_path, state_dir=tmp_path, fence_command=power)
        fence = fence_of(options, info, "192.0.2.1")
        assert isinstance(fence, CommandFence if where == "another" else EmbeddedFence)
        fence.close()
