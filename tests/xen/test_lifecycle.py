"""What a toolstack does to a guest while it is protected: each ends protection with its reason, or is followed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lab.guests import Guest

if TYPE_CHECKING:
    from lab.daemons import Daemon
    from xen_rig import Living, Rig

IDLE = Guest("lived", pages=256, rate=50)
ENDED = 600  # s from what ends protection to the end of its daemon; a guest takes 20 s to power off, alone
FOLLOWED = 900  # s from a reboot to protection of the guest that came up


def protect(rig: Rig, guest: Guest) -> tuple[Living, Daemon, Daemon]:
    """The guest, its primary, its secondary."""
    living = rig.create(guest)
    secondary = rig.secondary()
    primary = rig.primary(living)
    rig.protected(living, primary)
    return living, primary, secondary


def forgotten_by_b(rig: Rig, living: Living, secondary: Daemon) -> None:
    """Host b has not started it, and keeps nothing of it."""
    rig.not_started_on_b(living)
    assert secondary.alive(), secondary.said()
    for name in (living.guest.name, f"{living.guest.name}--incoming"):
        assert not rig.state(rig.b, name), f"{name} is still there"


@pytest.mark.parametrize("order", [pytest.param("shutdown", marks=pytest.mark.short), "destroy"])
def test_a_guest_that_ends_is_not_started_elsewhere(rig: Rig, order: str) -> None:
    """`xl shutdown` and `xl destroy`: the primary ends in order, and the secondary drops its replica."""
    living, primary, secondary = protect(rig, IDLE)
    rig.a.ssh(f"xl {order} {living.domid}")
    assert primary.wait(ENDED) == 0, primary.said()
    assert not rig.state(rig.a, living.guest.name), (
        "it is still there, shut down: nobody destroyed it"
    )
    forgotten_by_b(rig, living, secondary)


def test_a_reboot_is_followed_to_the_new_domid(rig: Rig) -> None:
    """`xl reboot`: protection begins anew, with a full copy, on the domain that has the same UUID."""
    living, primary, _secondary = protect(rig, IDLE)
    rig.a.ssh(f"xl reboot {living.domid}")
    rig.a.ssh(
        f"timeout {FOLLOWED} sh -c 'until id=$(xl domid {IDLE.name} 2>/dev/null) && [ $id != {living.domid} ];"
        " do sleep 1; done'"
    )
    assert primary.alive(), primary.said()
    again = rig.living(rig.a, IDLE, living.console)
    assert again.uuid == living.uuid
    document = rig.protected(again, primary, limit=FOLLOWED)
    assert document["domid"] == again.domid
    rig.runs_on_a(again)


def test_a_crash_is_reported_and_not_activated(rig: Rig) -> None:
    living, primary, secondary = protect(rig, IDLE)
    rig.a.ssh(f"xl sysrq {living.domid} c")
    assert primary.wait(ENDED) == 1, primary.said()
    assert "crash" in primary.said()
    rig.not_started_on_b(living)
    assert secondary.alive()


def test_a_save_ends_protection(rig: Rig) -> None:
    """`xl save` of a protected guest is somebody else's will: the save is whole, and nothing runs on host b."""
    living, primary, secondary = protect(rig, IDLE)
    rig.a.ssh(f"xl save {living.domid} /root/saved")
    code = primary.wait(ENDED)
    assert code in (0, 1), primary.said()
    assert "moved" in primary.said() or "destroyed" in primary.said(), primary.said()
    rig.not_started_on_b(living)
    assert secondary.alive()
    rig.a.ssh("xl restore /root/saved && rm /root/saved")
    rig.runs_on_a(living)


MIGRATION = "printf 'xl migration receiver ready, send binary domain data.\\n'; exec cat"


def begin_migration(rig: Rig, living: Living) -> None:
    """`xl migrate` into a pipe that nobody reads: it stands still in its first copy, and the guest runs."""
    rig.a.ssh(
        "mkfifo /root/sink; exec </dev/null >/root/migrate.log 2>&1;"
        " sleep 3600 3<>/root/sink & echo $! >/root/holder.pid;"
        f" xl migrate -s '' {living.guest.name} \"{MIGRATION} >/root/sink\" &"
    )
    rig.a.ssh("timeout 120 sh -c 'until grep -q iteration /root/migrate.log; do sleep 0.2; done'")


def break_migration_off(rig: Rig) -> None:
    """Its sink goes: xl lets the guest run on here."""
    rig.a.ssh("kill $(cat /root/holder.pid); pkill -f 'exec cat'; rm -f /root/sink", check=False)
    rig.a.ssh("timeout 300 sh -c 'while pgrep -x xl >/dev/null; do sleep 0.2; done'")


def test_a_guest_that_is_being_migrated_is_refused(rig: Rig) -> None:
    """Protection that begins while `xl migrate` copies the guest is refused, and harms the guest in nothing."""
    living = rig.create(Guest("lived", pages=4096, rate=200))
    rig.secondary()
    begin_migration(rig, living)
    primary = rig.primary(living)
    code = primary.wait(ENDED)
    said = primary.said()
    break_migration_off(rig)
    assert code not in (0, 137), said
    assert "it is being saved or migrated" in said, said
    rig.runs_on_a(living)


def test_a_migration_ends_protection(rig: Rig) -> None:
    """`xl migrate` of a protected guest takes its dirty log: protection ends, and nothing runs on host b."""
    living, primary, secondary = protect(rig, Guest("lived", pages=4096, rate=200))
    begin_migration(rig, living)
    code = primary.wait(ENDED)
    said = primary.said()
    break_migration_off(rig)
    assert code in (0, 1), said
    assert "moved" in said, said
    rig.not_started_on_b(living)
    assert secondary.alive()
    rig.runs_on_a(living)


def test_devices_come_and_go_under_protection(rig: Rig) -> None:
    """What host b would build has the devices of the start: a change ends protection, loudly."""
    living = rig.create(Guest("lived", pages=256, rate=50, network=True))
    rig.secondary()
    primary = rig.primary(living)
    document = rig.protected(living, primary)
    assert any("vif" in text or "network" in text for text in document["unsafe"]), document
    rig.a.ssh(f"xl network-detach {living.domid} 0")
    assert primary.wait(ENDED) == 14, primary.said()
    assert "device" in primary.said()
    rig.runs_on_a(living)


@pytest.mark.loses_host
def test_vcpus_come_and_go_under_protection(rig: Rig) -> None:
    """`xl vcpu-set`: epochs go on, and the guest that host b starts has its memory whole."""
    living, primary, _secondary = protect(rig, Guest("lived", vcpus=2, pages=512, rate=100))
    for count in (1, 2, 1):
        rig.a.ssh(f"xl vcpu-set {living.domid} {count}")
        rig.runs_on_a(living)
    document = rig.protected(living, primary)
    there = rig.console(rig.b, living.guest.name)
    rig.protected(living, primary, epochs=document["acked_epoch"] + 3)
    rig.a.pull_plug()
    there.wait_ticks(3)


def test_a_paused_guest_is_given_up_and_stays_paused(rig: Rig) -> None:
    """`xl pause`: nobody's pause but its operator's is undone; protection ends loudly."""
    living = rig.create(IDLE)
    rig.secondary()
    primary = rig.primary(
        living, "--suspend-timeout", "5s", "--give-up-after", "20s", name="patient"
    )
    rig.protected(living, primary)
    rig.a.ssh(f"xl pause {living.domid}")
    assert primary.wait(ENDED) == 14, primary.said()
    assert "p" in rig.state(rig.a, living.guest.name)
    rig.a.ssh(f"xl unpause {living.domid}")
    rig.runs_on_a(living)
