"""Our own death while a guest is taken in or activated through xl, and what the next life does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import xl_guest
from xl_guest import (
    HASTY,
    INFO,
    NR_PFNS,
    PATIENCE,
    UUID,
    Guest,
    Pages,
    activations_in,
    dying_guest,
    fenced,
    runs,
    same_memory,
    until,
)

from checkpointd.authority.processes import identify
from checkpointd.errors import HypervisorError
from checkpointd.secondary.activations import Activation, Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_xl import FakeDomains

    from checkpointd.secondary.restorers.xl import XlRestorer

EPOCH = 3  # that is activated


def die(xen: FakeDomains, point: str) -> None:
    """A process like ours is killed at this point."""
    done = subprocess.run(
        (sys.executable, xl_guest.__file__, str(xen.folder)),
        env={
            **os.environ,
            "CHECKPOINTD_FAULTS": f"{point}=kill",
            "PYTHONPATH": os.path.dirname(xl_guest.__file__),
        },
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def what_it_was() -> Pages:
    """The memory of the guest that is activated, made again."""
    guest = dying_guest()
    guest.run(NR_PFNS)
    for _ in range(EPOCH - 1):
        guest.run(30)
    guest.replica.close()
    return guest.memory


def left(xen: FakeDomains) -> Activation:
    found = activations_in(xen.folder).load(UUID)
    assert found is not None
    return found


def domain(xen: FakeDomains) -> dict[str, Any]:
    found = xen.get(UUID)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("point", "epochs", "here"),
    [
        ("xl.pages", 0, False),
        ("xl.before-seal", 0, False),
        ("xl.after-seal", 1, True),
        ("xl.pages@5", 1, True),
        ("xl.before-seal@2", 1, True),
        ("xl.after-seal@2", 2, True),
        ("xl.sealed", 3, True),
        ("xl.finished", 3, True),
        ("xl.before-release", 3, True),
    ],
)
def test_our_death_never_starts_the_guest(
    xen: FakeDomains,
    guest: Guest,
    make: Callable[..., XlRestorer],
    point: str,
    epochs: int,
    here: bool,
) -> None:
    """The pipe ends; the domain stays paused, or is none. A life that takes the guest in anew destroys it."""
    die(xen, point)
    if here:
        until(lambda: (xen.get(UUID) or {}).get("name") == "guest", "xl has not finished it")
        assert (domain(xen)["epochs"], domain(xen)["pauses"]) == (epochs, 1), "held"
    else:
        until(lambda: xen.get(UUID) is None, "xl has not given up")
    guest.run()
    restorer = make()
    restorer.committed(guest.replica)
    until(lambda: restorer.status()["applied_epoch"] == 1, "not warm")
    restorer.start(INFO, guest.replica, paused=False)
    same_memory(xen, guest.memory)


# ---------------------------------------------------------------- in an activation


@pytest.mark.parametrize("point", ["xl.before-seal@3", "xl.after-seal@3"])
def test_what_may_not_be_the_last_acked_epoch_is_left_paused_and_told(
    xen: FakeDomains, make: Callable[..., XlRestorer], point: str
) -> None:
    die(xen, point)
    until(lambda: (xen.get(UUID) or {}).get("name") == "guest", "xl has not finished it")
    number = domain(xen)["domid"]
    restorer = make()
    assert left(xen).phase is Phase.FEEDING
    for _ in range(2):
        with pytest.raises(
            HypervisorError,
            match=rf"192\.0\.2\.1 counts as stopped .*, and nobody runs guest: .*epoch 3, .*`xl unpause {number}`; "
            rf"else `xl destroy {number}`",
        ):
            restorer.resume(left(xen))
        assert domain(xen)["pauses"] == 1
    xen.add_pauses(UUID, -1)
    assert restorer.resume(left(xen)) == number, "the operator has taken it"


@pytest.mark.parametrize(
    ("point", "phase"),
    [
        ("xl.sealed", Phase.SEALED),
        ("xl.finished", Phase.SEALED),
        ("xl.before-release", Phase.FINISHED),
        ("xl.unnoted", Phase.FINISHED),
        ("xl.after-release", Phase.FINISHED),
    ],
)
def test_the_whole_last_acked_epoch_is_let_go_by_the_next_life(
    xen: FakeDomains, make: Callable[..., XlRestorer], point: str, phase: Phase
) -> None:
    die(xen, point)
    assert left(xen).phase is phase
    assert make().resume(left(xen)) == domain(xen)["domid"]
    assert (domain(xen)["name"], domain(xen)["pauses"]) == ("guest", 0)
    assert domain(xen)["epochs"] == EPOCH
    memory = xen.pages(UUID)
    expected = what_it_was()
    assert {pfn: memory[pfn] for pfn in expected} == expected
    assert not list((xen.folder / "notes").iterdir())
    assert make().resume(left(xen)) == domain(xen)["domid"], "once more changes nothing"


@pytest.mark.parametrize("point", ["xl.before-release", "xl.unnoted", "xl.after-release"])
def test_a_life_that_dies_while_it_finishes_is_followed_by_one_that_does(
    xen: FakeDomains, make: Callable[..., XlRestorer], point: str
) -> None:
    die(xen, "xl.sealed")
    die(xen, point)
    assert make().resume(left(xen)) == domain(xen)["domid"]
    assert runs(xen)


@pytest.mark.parametrize("point", ["xl.sealed", "xl.before-release"])
def test_one_that_was_to_be_left_paused_is(
    xen: FakeDomains, make: Callable[..., XlRestorer], point: str
) -> None:
    (xen.folder / "paused").touch()
    die(xen, point)
    assert make().resume(left(xen)) == domain(xen)["domid"]
    assert (domain(xen)["name"], domain(xen)["pauses"]) == ("guest", 1)


def test_an_xl_that_hangs_after_our_death_is_killed_and_its_domain_not_trusted(
    xen: FakeDomains, make: Callable[..., XlRestorer]
) -> None:
    xen.order("no-finish")
    die(xen, "xl.sealed")
    restorer = make(HASTY)
    builder = restorer._notes.builder(UUID)
    assert builder is not None
    with pytest.raises(HypervisorError, match="part of one if its name ends in --incoming"):
        restorer.resume(left(xen))
    assert domain(xen)["pauses"] == 2
    with pytest.raises(ProcessLookupError):
        identify(builder.pid)


def test_an_xl_that_was_still_fed_makes_no_domain_beside_a_guest_that_is_started_anew(
    make: Callable[..., XlRestorer], old_xl: subprocess.Popen[bytes]
) -> None:
    restorer = make(HASTY)
    restorer._notes.write(UUID, identify(old_xl.pid))
    with pytest.raises(HypervisorError, match="nobody runs guest"):
        restorer.resume(fenced(EPOCH))
    assert old_xl.wait(PATIENCE) == -signal.SIGKILL


def test_a_domain_that_is_gone_is_told_with_what_to_do(
    xen: FakeDomains, make: Callable[..., XlRestorer]
) -> None:
    with pytest.raises(
        HypervisorError, match=r"lost with the process that died.*nobody runs guest"
    ):
        make().resume(fenced(EPOCH))
    with pytest.raises(HypervisorError, match=r"lost with the memory of this machine"):
        make().resume(replace(fenced(EPOCH), boot_id="before"))


@pytest.mark.parametrize(
    "note",
    [
        replace(fenced(EPOCH, phase=Phase.SEALED), domid=4),
        replace(fenced(EPOCH, phase=Phase.FINISHED), domid=4),
        replace(fenced(EPOCH, phase=Phase.FINISHED), domid=3, boot_id="before"),
        replace(fenced(EPOCH, phase=Phase.SEALED), domid=3, boot_id="before"),
    ],
)
def test_a_paused_domain_that_is_not_the_notes_is_not_let_go(
    xen: FakeDomains, make: Callable[..., XlRestorer], note: Activation
) -> None:
    xen.put(UUID, domid=3, name="guest", pauses=1)
    with pytest.raises(HypervisorError, match="nothing starts it by itself"):
        make().resume(note)
    assert domain(xen)["pauses"] == 1


def test_a_domain_that_is_lost_in_an_activation_is_not_said_to_be_whole(
    xen: FakeDomains, guest: Guest, make: Callable[..., XlRestorer]
) -> None:
    """Sealed once, then lost: what the next xl has is to be told from it."""
    xen.order("no-finish")
    guest.run()
    activations = activations_in(xen.folder)
    activations.begin(fenced(guest.epoch))
    with pytest.raises(HypervisorError, match="did not finish the domain"):
        make(HASTY).start(INFO, guest.replica, paused=False)
    assert left(xen) == fenced(guest.epoch)
