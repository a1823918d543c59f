"""A secondary that dies at each step of an activation of a Xen guest, and what its next life does.

Whatever that is: the guest runs at most once, and never silently nowhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import xen_standby
import xl_guest
from fake_xl import FakeDomains, install
from secondary_rig import LIMIT_S, Engine, eventually
from xen_standby import XenStandby
from xl_guest import INFO, STATIC, UUID, tail

from checkpointd.authority.terms import Role, read_record
from checkpointd.demo.rig import free_port
from checkpointd.secondary.standby import State
from checkpointd.wire import messages as m
from checkpointd.wire.keys import loopback_pair
from checkpointd.wire.sockets import Contexts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EPOCH = 2  # the last acked one


class Scene:
    """A fake host, and the old guest's engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.xen: FakeDomains = install(folder)
        self.contexts = Contexts.make()
        self.keys = loopback_pair(folder / "keys")[0]
        self.ports = free_port(), free_port()

    def engine(self, session: int, **more: Any) -> Engine:
        return Engine(
            self.contexts, self.keys, self.ports, session=session, info=INFO,
            static=STATIC, tail=tail(EPOCH), **more,
        )  # fmt: skip

    def protect_and_die(self, point: str) -> None:
        """A secondary takes two epochs; its primary falls silent; it is killed at `point` of the activation."""
        with self.process(point) as life:
            engine = self.engine(7)
            try:
                engine.protect(1)
                engine.protect(EPOCH, fill=3)
            finally:
                engine.close()
            assert life.wait(LIMIT_S) == -signal.SIGKILL

    @contextmanager
    def process(self, point: str) -> Iterator[subprocess.Popen[bytes]]:
        command = (sys.executable, xen_standby.__file__, str(self.folder), *map(str, self.ports))
        environment = {
            **os.environ,
            "CHECKPOINTD_FAULTS": f"{point}=kill",
            "PYTHONPATH": os.path.dirname(xl_guest.__file__),
        }
        with subprocess.Popen(command, env=environment) as life:
            try:
                yield life
            finally:
                life.kill()

    @contextmanager
    def next_life(self) -> Iterator[XenStandby]:
        life = XenStandby(self.folder, *self.ports)
        thread = threading.Thread(target=life.service.run)
        thread.start()
        try:
            yield life
        finally:
            life.service.stop()
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "what is left to the next life must hold up no end"
            life.close()

    def fences(self) -> int:
        path = self.folder / "fenced"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def pauses(self) -> int | None:
        """None: there is no domain."""
        domain = self.xen.get(UUID)
        return None if domain is None else int(domain["pauses"])


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    scene = Scene(tmp_path)
    yield scene
    scene.contexts.close()


def told(life: XenStandby, state: State) -> dict[str, Any]:
    """The guest's status once it is in this state and an alarm was raised."""

    def domain() -> dict[str, Any]:
        return next((d for d in life.service.status()["domains"] if d["uuid"] == UUID), {})

    eventually(lambda: domain().get("state") == state and domain()["alarm"], f"state {state}")
    return domain()


@pytest.mark.parametrize(
    "point", ["secondary.fencing", "secondary.after-fence", "secondary.fence-noted"]
)
def test_a_fence_without_a_term_is_told_and_a_primary_that_is_back_begins_anew(
    scene: Scene, point: str
) -> None:
    scene.protect_and_die(point)
    assert scene.fences() == (point != "secondary.fencing")
    assert read_record(scene.folder / "terms", UUID).role is Role.NONE
    with scene.next_life() as life:
        domain = told(life, State.UNFINISHED)
        assert f"Epoch {EPOCH}" in domain["reason"]
        assert "Look at 127.0.0.1" in domain["alarm"]
        (why,) = life.service.not_ready()
        assert why.startswith(f"{UUID}: unfinished: an earlier process")
        assert scene.pauses != 0
        back = scene.engine(8)
        try:
            back.wait(m.Welcome)
            assert life.service.status()["domains"][0]["state"] == State.SYNCING
            back.protect(5)
            eventually(lambda: not life.service.not_ready(), "ready")
        finally:
            back.close()
            assert scene.fences() == (point != "secondary.fencing")
    with scene.next_life() as life:
        assert life.service.status()["domains"] == [], "it is over"


@pytest.mark.parametrize("point", ["secondary.after-term", "secondary.before-start"])
def test_what_may_not_be_the_last_acked_epoch_is_told_and_does_not_run(
    scene: Scene, point: str
) -> None:
    scene.protect_and_die(point)
    with scene.next_life() as life:
        told(life, State.FAILED)
        (why,) = life.service.not_ready()
        assert "nobody runs guest" in why
        assert scene.pauses in (None, 1)
        refused_as(scene, "term")
        assert scene.fences() == 1


def test_with_its_image_on_disk_the_guest_is_built_anew(scene: Scene) -> None:
    """What xl had of it is destroyed: the image is certainly the last acked epoch, and that domain is not."""
    (scene.folder / "images").mkdir()
    scene.protect_and_die("secondary.before-start")
    before = scene.xen.get(UUID)
    with scene.next_life() as life:
        told(life, State.ACTIVE)
        after = scene.xen.get(UUID)
        assert after is not None
        assert before is None or after["xl"] != before["xl"]
        assert scene.pauses == 0
        pages = scene.xen.pages(UUID)
        assert {pfn: page[0] for pfn, page in pages.items()} == {1: 3, 2: 3}
        refused_as(scene, "term")
        assert scene.fences() == 1
        eventually(lambda: not list((scene.folder / "images").iterdir()), "the image is let go")
        eventually(lambda: not list((scene.folder / "activations").iterdir()), "forgotten")


@pytest.mark.parametrize("point", ["xl.unnoted", "xl.after-release", "secondary.after-start"])
def test_a_guest_that_was_let_go_and_is_gone_is_not_built_a_second_time(
    scene: Scene, point: str
) -> None:
    """It has run, and ended or moved since: with its image still on disk there would be two of it."""
    (scene.folder / "images").mkdir()
    scene.protect_and_die(point)
    gone = scene.xen.find(UUID)
    assert gone is not None
    scene.xen.destroy(gone.domid, LIMIT_S)
    with scene.next_life() as life:
        domain = told(life, State.FAILED)
        assert "not here any more" in domain["reason"]
        assert scene.xen.get(UUID) is None
        assert life.service.not_ready()


def test_an_image_goes_when_the_next_life_finds_its_guest(scene: Scene) -> None:
    (scene.folder / "images").mkdir()
    scene.protect_and_die("xl.after-release")
    assert list((scene.folder / "images").iterdir())
    with scene.next_life() as life:
        told(life, State.ACTIVE)
        eventually(lambda: not list((scene.folder / "images").iterdir()), "the image is let go")


@pytest.mark.parametrize(
    "point",
    [
        "xl.sealed",
        "xl.finished",
        "xl.before-release",
        "xl.unnoted",
        "xl.after-release",
        "secondary.after-start",
    ],
)
def test_the_whole_last_acked_epoch_runs_in_the_next_life(scene: Scene, point: str) -> None:
    scene.protect_and_die(point)
    with scene.next_life() as life:
        domain = told(life, State.ACTIVE)
        assert domain["term"] == 2
        assert life.service.not_ready() == []
        assert scene.pauses == 0
        pages = scene.xen.pages(UUID)
        assert {pfn: page[0] for pfn, page in pages.items()} == {1: 3, 2: 3}
        refused_as(scene, "term")
        assert scene.fences() == 1
    with scene.next_life() as life:
        (domain,) = life.service.status()["domains"]
        assert (domain["state"], domain["alarm"]) == (State.ACTIVE, None)
    assert scene.pauses == 0


def test_two_lives_that_die_are_followed_by_one_that_finishes(scene: Scene) -> None:
    scene.protect_and_die("xl.sealed")
    with scene.process("xl.unnoted") as life:
        assert life.wait(LIMIT_S) == -signal.SIGKILL
    with scene.next_life() as last:
        told(last, State.ACTIVE)
        assert scene.pauses == 0


def refused_as(scene: Scene, code: str) -> None:
    """The old primary, should it come back."""
    back = scene.engine(7, resume=True)
    try:
        assert back.wait(m.Refused).code == code
        assert not any(isinstance(got, m.Welcome) for got in back.got)
    finally:
        back.close()
