"""In dom0: engines on a real guest that are killed with SIGKILL at each step at which that could strand the guest."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from checkpointd.errors import DomainBusyError
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen.lib import Store, open_libs
from checkpointd.hypervisor.xen.release import UndoHands, release

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = "/root/pvh.cfg"
NAME = "stranded"
QUIET = "console=hvc0 quiet rdinit=/init pages=64 rate=1"
LIMIT = 300.0  # s, for anything; software emulation beside other hosts is slow
RUNS_AGAIN = 1.0  # s from the death of an engine (docs/xen.md)
LOOK = 0.02  # s between two looks at what tells of itself by no event
LOOK_MOST = 0.1  # s; several times what a look and the wait before it take
ENGINE = Path(__file__).parent / "engine_at.py"
STEPS = ("attached", "asked", "suspended", "harvested", "resumed")


class Guest:
    def __init__(self) -> None:
        subprocess.run(
            ["xl", "create", "-q", CONFIG, f'name="{NAME}"', f'extra="{QUIET}"'], check=True, timeout=LIMIT
        )  # fmt: skip
        found = subprocess.run(["xl", "domid", NAME], check=True, capture_output=True, text=True)
        self.domid = int(found.stdout)
        self.libs = open_libs()
        self.store = Store(self.libs)
        self.hands = UndoHands()
        self.eventually(self.listens, "the guest's control of suspends")

    def listens(self) -> bool:
        """Its kernel says so once it watches control/shutdown."""
        path = f"/local/domain/{self.domid}/control/feature-suspend"
        return self.store.read(path) == "1"

    def eventually(self, condition: Any, what: str) -> float:
        """How long it took, s; of each look LOOK_MOST at most: in longer ones this host stood still, as in software
        emulation it does now and then, and the watcher with it.
        """
        began = last = time.monotonic()
        took = 0.0
        while not condition():
            assert last < began + LIMIT, f"never came: {what}"
            time.sleep(LOOK)
            now = time.monotonic()
            took += min(now - last, LOOK_MOST)
            last = now
        return took

    @property
    def suspended(self) -> bool:
        seen = self.hands.look(self.domid)
        assert seen is not None
        return seen.suspended

    def answers_a_suspend(self, run_dir: Path) -> None:
        """Its kernel runs, and the next engine gets its suspend and is told of it. The watcher has ended before:
        it resumes whatever suspends in its first seconds, for that may be what the dead engine had asked for.
        """
        watcher = ["pgrep", "-f", f"xen.watcher.*{run_dir}"]
        self.eventually(
            lambda: subprocess.run(watcher, check=False, capture_output=True).returncode == 1,
            "end of the watcher",
        )
        assert not self.suspended
        path = f"/local/domain/{self.domid}/control/shutdown"
        self.store.watch("@releaseDomain", "released")
        self.store.fired()
        self.store.write(path, "suspend")
        told = select.poll()
        told.register(self.store.fileno(), select.POLLIN)
        while not self.suspended:
            assert told.poll(LIMIT * 1000), "xenstored does not tell of the suspend"
            self.store.fired()
        self.store.unwatch("@releaseDomain", "released")
        self.hands.resume(self.domid)

    def close(self) -> None:
        subprocess.run(["xl", "destroy", NAME], check=False, timeout=LIMIT)
        self.hands.close()
        self.store.close()


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def start(guest: Guest, run_dir: Path, step: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, str(ENGINE), str(guest.domid), str(run_dir), step],
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    with process.stdout:
        assert select.select([process.stdout], [], [], LIMIT)[0], (
            f"the engine did not come to {step}"
        )
        assert process.stdout.readline() == b"there\n"
    return process


def watcher_of(run_dir: Path, domid: int) -> int:
    state = states.load(run_dir, domid)
    assert state is not None
    assert state.watcher_pid is not None
    return state.watcher_pid


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_engines_guest_runs_on(guest: Guest, tmp_path: Path, step: str) -> None:
    process = start(guest, tmp_path, step)
    process.kill()
    took = guest.eventually(lambda: states.load(tmp_path, guest.domid) is None, "release")
    took += guest.eventually(lambda: not guest.suspended, "resume")
    assert took < RUNS_AGAIN
    process.wait(LIMIT)
    guest.answers_a_suspend(tmp_path)
    assert release(tmp_path, guest.domid, guest.hands) == []


def test_after_a_killed_engine_the_guest_gives_memory_back_and_takes_it(
    guest: Guest, tmp_path: Path
) -> None:
    """An ioreq server that nobody answers would stop it at the first page."""
    process = start(guest, tmp_path, "attached")
    process.kill()
    process.wait(LIMIT)
    guest.eventually(lambda: states.load(tmp_path, guest.domid) is None, "release")
    for size in ("144", "160"):
        subprocess.run(["xl", "mem-set", NAME, size], check=True, timeout=LIMIT)
    guest.answers_a_suspend(tmp_path)


def test_with_the_watcher_killed_too_release_lets_the_guest_go(
    guest: Guest, tmp_path: Path
) -> None:
    process = start(guest, tmp_path, "suspended")
    os.kill(watcher_of(tmp_path, guest.domid), signal.SIGKILL)
    process.kill()  # sooner than it starts another, which takes a second
    process.wait(LIMIT)
    replaced = states.load(tmp_path, guest.domid) is None
    done = release(tmp_path, guest.domid, guest.hands)
    assert replaced or "resumed the guest" in done
    assert not guest.suspended
    guest.answers_a_suspend(tmp_path)


def test_release_refuses_while_an_engine_lives(guest: Guest, tmp_path: Path) -> None:
    process = start(guest, tmp_path, "suspended")
    with pytest.raises(DomainBusyError, match=f"engine {process.pid}"):
        release(tmp_path, guest.domid, guest.hands)
    assert guest.suspended
    done = release(tmp_path, guest.domid, guest.hands, force=True)
    assert done[0] == f"killed engine {process.pid}"
    process.wait(LIMIT)
    guest.answers_a_suspend(tmp_path)
