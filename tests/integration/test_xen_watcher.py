"""The watcher beside real engine processes that are killed and stopped, on a domain made of files (xen_hands.py)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import xen_hands
from processes import PATIENCE, state_of, until
from wire_rig import SESSION, Rig, wire_rig
from xen_hands import DOMID, SERVER, UUID, FileHands

from checkpointd.authority.processes import identify
from checkpointd.errors import DomainBusyError, HypervisorError
from checkpointd.hypervisor.port import EndReason
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen.release import Seen, release, undo
from checkpointd.hypervisor.xen.watcher import TICK
from checkpointd.wire.messages import (
    End,
    EngineLost,
    EngineLostHeard,
    FromSecondary,
    LeftGuest,
    Message,
    Refused,
    Retire,
    Retired,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 600.0  # s; a limit of silence that no test comes near
PROGRAM = [sys.executable, xen_hands.__file__]


class Side:
    """The primary's machine: a domain of files, and engines with their watchers."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        self.domain = FileHands(directory / "domain")
        self.domain.place.mkdir()
        self.engines: list[subprocess.Popen[str]] = []
        self.watchers: list[int] = []

    def engine(self, limit: float = LONG) -> subprocess.Popen[str]:
        """One that has suspended the domain, with its watcher."""
        engine = subprocess.Popen(
            [*PROGRAM, "engine", str(self.domain.place), str(self.run_dir), str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self.engines.append(engine)
        self.watchers.append(int(self.says(engine)))
        return engine

    def says(self, engine: subprocess.Popen[str]) -> str:
        assert engine.stdout is not None
        assert select.select([engine.stdout], [], [], PATIENCE)[0], "the engine says nothing"
        return engine.stdout.readline().strip()

    def order(self, engine: subprocess.Popen[str], line: str) -> None:
        assert engine.stdin is not None
        engine.stdin.write(line + "\n")

    def introduce(self, engine: subprocess.Popen[str], rig: Rig, session: int = SESSION) -> None:
        pair, end = rig.primary_keys.own(), rig.endpoint
        keys = f"{end.key.decode()} {pair.public.decode()} {pair.secret.decode()}"
        self.order(engine, f"contact {end.host} {end.control_port} {keys} {session}")
        assert self.says(engine) == "told"

    def released(self) -> bool:
        return not any(map(self.domain.has, ("suspended", "log", f"ioreq-{SERVER}")))

    def gone(self, pid: int) -> bool:
        return state_of(pid) in ("", "Z")

    def close(self) -> None:
        for engine in self.engines:
            engine.kill()
            engine.wait(PATIENCE)
            for pipe in (engine.stdin, engine.stdout):
                assert pipe is not None
                pipe.close()
        for pid in self.watchers:
            if not self.gone(pid):
                os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: self.gone(pid), "end of the watcher")  # type: ignore[misc] # mypy has no type for a default


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    before = len(os.listdir("/proc/self/fd"))
    side = Side(tmp_path)
    yield side
    side.close()
    # A rig beside it has seen connections end, which takes it a moment.
    until(lambda: len(os.listdir("/proc/self/fd")) <= before, "end of all descriptors")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with wire_rig(tmp_path / "keys") as made:
        yield made


def said(rig: Rig, kind: type[Message], session: int = SESSION) -> list[Any]:
    return [m for _, h, m in list(rig.secondary.control) if isinstance(m, kind) and h.session == session]  # fmt: skip


def answer(rig: Rig, kind: type[Message], word: FromSecondary) -> None:
    """From now on each such message is answered so."""
    remember = rig.secondary.on_control

    def on_control(peer: Any, header: Any, message: Message) -> None:
        remember(peer, header, message)
        if isinstance(message, kind):
            term = word.term if isinstance(word, Refused) else header.term
            rig.secondary.acceptor.send(peer, word, session=header.session, term=term)

    rig.secondary.acceptor._on_control = on_control


@pytest.mark.parametrize("whom", ["engine", "its process group"])
def test_a_killed_engines_guest_runs_again_within_a_second(side: Side, whom: str) -> None:
    engine = side.engine()
    began = time.monotonic()
    if whom == "engine":
        engine.kill()
    else:
        os.killpg(engine.pid, signal.SIGKILL)
    until(side.released, "release")
    assert time.monotonic() - began < 5.0  # a few ms on a machine that has them
    assert not side.domain.has("paused")
    until(lambda: states.load(side.run_dir, DOMID) is None, "removal of the state")


def test_a_terminal_that_hangs_up_takes_the_engine_and_not_the_watcher(side: Side) -> None:
    engine = side.engine()
    os.kill(side.watchers[0], signal.SIGHUP)
    os.kill(side.watchers[0], signal.SIGINT)
    os.killpg(engine.pid, signal.SIGHUP)
    until(side.released, "release")


def test_a_stopped_engine_is_killed_after_its_limit(side: Side) -> None:
    engine = side.engine(limit=2 * TICK)
    engine.send_signal(signal.SIGSTOP)
    until(side.released, "release")
    assert engine.wait(PATIENCE) == -signal.SIGKILL


def test_an_engine_that_lives_is_left_alone(side: Side) -> None:
    engine = side.engine(limit=2 * TICK)
    # Longer than the limit: only its beats keep it alive. There is no event to wait for.
    with pytest.raises(subprocess.TimeoutExpired):
        engine.wait(4 * TICK)
    assert side.domain.has("suspended")


def test_an_engine_that_says_bye_leaves_its_guest_as_it_wants(side: Side) -> None:
    engine = side.engine()
    side.order(engine, "bye")
    assert engine.wait(PATIENCE) == 0
    until(lambda: side.gone(side.watchers[0]), "end of the watcher")
    assert side.domain.has("suspended")


def test_a_last_word_is_said_until_it_is_answered(rig: Rig, side: Side) -> None:
    """The guest was migrated away while the secondary was not there to hear of it."""
    engine = side.engine()
    side.introduce(engine, rig)
    side.order(engine, "bye moved")
    assert side.says(engine) == "bye"
    until(lambda: len(said(rig, End)) >= 2, "words of the watcher")
    assert said(rig, End)[-1] == End(EndReason.MOVED)
    assert side.domain.has("suspended"), "it is somebody else's"
    answer(rig, End, Retired(SESSION))
    until(lambda: side.gone(side.watchers[0]), "end of the watcher")


@pytest.mark.parametrize(("order", "word"), [("bye moved", End), ("bye retire", Retire)])
def test_a_last_word_that_is_refused_pauses_a_guest_that_is_here(
    rig: Rig, side: Side, order: str, word: type[Message]
) -> None:
    answer(rig, word, Refused(SESSION, 2, "active", "it runs here"))
    engine = side.engine()
    side.introduce(engine, rig)
    side.order(engine, order)
    assert side.says(engine) == "bye"
    until(lambda: side.gone(side.watchers[0]), "end of the watcher")
    assert side.domain.has("paused") == (word is Retire)


def test_a_last_word_ends_once_the_guest_is_protected_anew(rig: Rig, side: Side) -> None:
    """Also by the same process, which follows a reboot, and as another domain."""
    engine = side.engine()
    side.introduce(engine, rig)
    side.order(engine, "bye reboot")
    assert side.says(engine) == "bye"
    until(lambda: bool(said(rig, End)), "a word of the watcher")
    states.store(side.run_dir, states.EngineState(UUID, DOMID + 1, identify(engine.pid)))
    until(lambda: side.gone(side.watchers[0]), "end of the watcher")


def test_a_watcher_that_dies_is_replaced(side: Side) -> None:
    engine = side.engine()
    os.kill(side.watchers[0], signal.SIGKILL)

    def others() -> list[int]:
        tasks = Path(f"/proc/{engine.pid}/task").iterdir()
        children = " ".join((task / "children").read_text("ascii") for task in tasks)
        return [int(pid) for pid in children.split() if int(pid) != side.watchers[0]]

    until(lambda: bool(others()), "another watcher")
    side.watchers += others()
    # It may be at any point of its beginning: that takes longer than its engine lives.
    engine.kill()
    until(side.released, "release")


def test_the_secondary_hears_of_it_until_a_new_engine_has_begun(rig: Rig, side: Side) -> None:
    answer(rig, EngineLost, EngineLostHeard(SESSION))
    engine = side.engine()
    side.introduce(engine, rig)
    engine.kill()
    until(lambda: len(said(rig, EngineLost)) >= 3, "words of the watcher")
    word = said(rig, EngineLost)[-1]
    assert word == EngineLost(UUID, LeftGuest.RUNNING, word.detail)
    assert f"engine {engine.pid} died, destroyed ioreq server {SERVER}" in word.detail
    assert "resumed the guest" in word.detail

    side.engine()
    heard = len(said(rig, EngineLost))
    until(lambda: len(said(rig, EngineLost)) >= heard + 3, "words until the new engine's HELLO")
    assert side.domain.has("suspended"), "the old watcher has touched a new engine's guest"
    rig.secondary.acceptor._on_control = rig.secondary.on_control  # its session is over: dropped
    until(lambda: side.gone(side.watchers[0]), "end of the old watcher")
    assert side.domain.has("suspended")


def test_a_guest_that_was_taken_over_stays_paused(rig: Rig, side: Side) -> None:
    answer(rig, EngineLost, Refused(SESSION, 2, "active", "it runs here"))
    side.domain.set("fail-paused")
    engine = side.engine()
    side.introduce(engine, rig)
    engine.kill()
    until(lambda: len(said(rig, EngineLost)) >= 2, "another try")
    (side.domain.place / "fail-paused").unlink()
    until(lambda: side.gone(side.watchers[0]), "end of the watcher")
    assert side.domain.has("paused")
    assert side.released()


def test_a_guest_that_ends_later_is_told_as_its_end(rig: Rig, side: Side) -> None:
    answer(rig, EngineLost, EngineLostHeard(SESSION))
    answer(rig, End, Retired(SESSION))
    engine = side.engine()
    side.introduce(engine, rig)
    engine.kill()
    until(lambda: bool(said(rig, EngineLost)), "words of the watcher")
    side.domain.set("ended", "poweroff")
    until(lambda: side.gone(side.watchers[0]), "end of the watcher")
    assert said(rig, End)[-1] == End(EndReason.POWEROFF)


def test_a_guest_that_suspends_late_is_resumed(side: Side) -> None:
    engine = side.engine()
    side.domain.drop("suspended")
    engine.kill()
    until(lambda: states.load(side.run_dir, DOMID) is None, "removal of the state")
    side.domain.set("suspended")  # it had taken the request before
    until(side.released, "release of the guest that suspended late")


def test_a_guest_that_somebody_else_asks_later_is_his(side: Side) -> None:
    """And the watcher of an engine that asked for nothing looks for no late suspend."""
    engine = side.engine()
    side.domain.drop("suspended")
    states.Asked(side.run_dir, DOMID).close()
    engine.kill()
    until(lambda: side.gone(side.watchers[0]), "end of the watcher")
    assert side.released()


def test_a_guest_that_somebody_saves_is_left_to_him(rig: Rig, side: Side) -> None:
    """All but the ioreq server, until it is known whose its suspend is."""
    answer(rig, EngineLost, EngineLostHeard(SESSION))
    engine = side.engine()
    side.introduce(engine, rig)
    side.domain.set("saver")
    engine.kill()
    until(lambda: len(said(rig, EngineLost)) >= 3, "words of the watcher")
    assert not side.domain.has(f"ioreq-{SERVER}")
    assert side.domain.has("suspended")
    assert side.domain.has("log")
    side.domain.set("asked")  # he waits for its answer, and has the guest with it
    until(lambda: states.load(side.run_dir, DOMID) is None, "removal of the state")
    assert not side.domain.has("asked")
    assert side.domain.has("suspended")
    assert side.domain.has("log")


def test_both_sessions_are_told_while_the_new_one_may_not_have_begun(rig: Rig, side: Side) -> None:
    engine = side.engine()
    side.introduce(engine, rig)
    side.introduce(engine, rig, SESSION + 1)
    engine.kill()
    for session in (SESSION, SESSION + 1):
        until(lambda session=session: bool(said(rig, EngineLost, session)), "both words")  # type: ignore[misc] # as above


def test_what_cannot_be_undone_at_once_is_tried_again_and_told(rig: Rig, side: Side) -> None:
    engine = side.engine()
    side.introduce(engine, rig)
    side.domain.set("fail-suspended")
    engine.kill()
    until(lambda: len(said(rig, EngineLost)) > 1, "words of the watcher")
    assert {word.guest for word in said(rig, EngineLost)} == {LeftGuest.STOPPED}
    assert not side.domain.has("log")  # the other steps were done
    assert states.load(side.run_dir, DOMID) is not None
    (side.domain.place / "fail-suspended").unlink()
    until(side.released, "release")
    until(lambda: said(rig, EngineLost)[-1].guest is LeftGuest.RUNNING, "the guest runs")


# -------------------------------------------------------------------- release, by hand


@pytest.fixture
def dead(side: Side) -> states.EngineState:
    """What an engine and a watcher have left that were both killed."""
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    state = states.EngineState(UUID, DOMID, identify(process.pid), SERVER)
    process.stdin.close()
    process.wait(PATIENCE)
    for name in (f"ioreq-{SERVER}", "log", "asked"):
        side.domain.set(name)
    states.store(side.run_dir, state)
    return state


def test_release_does_what_the_watcher_would_and_then_nothing(
    side: Side, dead: states.EngineState
) -> None:
    assert release(side.run_dir, DOMID, side.domain, patience=0) == [
        f"destroyed ioreq server {SERVER}",
        "withdrew the request to suspend",
        "ended the dirty log",
    ]
    assert side.domain.has("store-told")
    assert release(side.run_dir, DOMID, side.domain, patience=0) == []


def test_release_waits_for_a_guest_that_suspends_late(side: Side, dead: states.EngineState) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            side.domain.set("suspended")

    done = release(side.run_dir, DOMID, side.domain, patience=1, clock=lambda: 0.0, sleep=sleep)
    assert done[-1] == "resumed the guest, which had suspended late"
    assert not side.domain.has("suspended")


def test_release_waits_as_long_as_the_engine_would_have(
    side: Side, dead: states.EngineState
) -> None:
    states.Asked(side.run_dir, DOMID, late=600.0).close()
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 10.0
        if now == 500.0:
            side.domain.set("suspended")

    done = release(side.run_dir, DOMID, side.domain, clock=lambda: now, sleep=sleep)
    assert done[-1] == "resumed the guest, which had suspended late"


def test_a_suspend_that_somebody_else_asked_for_meanwhile_is_his(
    side: Side, dead: states.EngineState
) -> None:
    side.domain.drop("asked")

    def sleep(seconds: float) -> None:
        side.domain.set("others")
        side.domain.set("suspended")

    done = release(side.run_dir, DOMID, side.domain, clock=lambda: 0.0, sleep=sleep)
    assert done[-1] == "left its next suspend to somebody else, who has asked for it"
    assert side.domain.has("suspended")


def test_where_nothing_was_asked_a_suspend_and_a_request_are_somebody_elses(
    side: Side, dead: states.EngineState
) -> None:
    """The engine was connecting or holding, and xl save came."""
    states.Asked(side.run_dir, DOMID).close()
    side.domain.set("suspended")
    done = release(side.run_dir, DOMID, side.domain)
    assert done == [f"destroyed ioreq server {SERVER}", "ended the dirty log"]
    assert side.domain.has("suspended")
    assert side.domain.has("asked")
    states.store(side.run_dir, dead)
    states.Asked(side.run_dir, DOMID).close()
    release(side.run_dir, DOMID, side.domain, force=True)  # he that did it has died, too
    assert not side.domain.has("suspended")


@pytest.mark.parametrize("asked", [0.0, 5.0])
def test_what_is_saved_by_others_is_left_but_for_the_ioreq_server(
    side: Side, dead: states.EngineState, asked: float
) -> None:
    states.Asked(side.run_dir, DOMID, asked).close()
    for name in ("saver", "suspended"):
        side.domain.set(name)
    done = release(side.run_dir, DOMID, side.domain)
    assert done == [f"destroyed ioreq server {SERVER}", "left the rest to xl save"]
    assert side.domain.has("suspended")
    assert side.domain.has("log")
    # One that asks a guest which stands still for us gets the answer that it cannot give.
    assert side.domain.has("asked") == (asked == 0.0)
    assert states.load(side.run_dir, DOMID) is None


@pytest.mark.parametrize("suspended", [True, False])
def test_a_suspend_that_may_be_anybodys_is_left_and_that_is_said(
    side: Side, dead: states.EngineState, *, suspended: bool
) -> None:
    side.domain.drop("asked")
    for name in ("saver", "suspended"):
        side.domain.set(name)
    with pytest.raises(HypervisorError, match="there is xl save, while a suspend for the dead"):
        release(side.run_dir, DOMID, side.domain)
    side.domain.drop("saver")  # it has ended, well or not
    if not suspended:
        side.domain.drop("suspended")
    done = release(side.run_dir, DOMID, side.domain, patience=0)
    assert any("--force" in what for what in done) == suspended
    assert side.domain.has("suspended") == suspended
    release(side.run_dir, DOMID, side.domain, force=True, patience=0)
    assert not side.domain.has("suspended")


def test_release_refuses_while_an_engine_lives_and_kills_it_only_if_forced(side: Side) -> None:
    engine = side.engine()
    os.kill(side.watchers[0], signal.SIGSTOP)  # it would be faster
    with pytest.raises(DomainBusyError, match=f"engine {engine.pid} protects domain {DOMID}"):
        release(side.run_dir, DOMID, side.domain)
    assert side.domain.has("suspended")
    done = release(side.run_dir, DOMID, side.domain, force=True)
    assert done[0] == f"killed engine {engine.pid}"
    assert "resumed the guest" in done
    assert engine.wait(PATIENCE) == -signal.SIGKILL
    os.kill(side.watchers[0], signal.SIGCONT)


def test_release_touches_no_guest_that_no_engine_has_left(side: Side) -> None:
    side.domain.set("suspended")  # by xl save, say
    assert release(side.run_dir, DOMID, side.domain) == []
    assert side.domain.has("suspended")
    assert release(side.run_dir, DOMID, side.domain, force=True) == ["resumed the guest"]


@pytest.mark.parametrize("fate", ["gone", "another", "ended"])
def test_release_of_a_domain_that_is_no_more_only_forgets_it(
    side: Side, dead: states.EngineState, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    side.domain.set("suspended")
    if fate == "another":  # its domid was given to another guest
        monkeypatch.setattr(FileHands, "look", lambda *_: Seen("other", True, False, None))
    else:
        side.domain.set(fate, "crash")
    assert release(side.run_dir, DOMID, side.domain) == []
    assert states.load(side.run_dir, DOMID) is None
    assert side.domain.has("suspended")


def test_each_step_is_tried_though_one_before_it_fails(
    side: Side, dead: states.EngineState
) -> None:
    side.domain.set(f"fail-ioreq-{SERVER}")
    with pytest.raises(HypervisorError, match="ioreq"):
        undo(side.run_dir, dead, side.domain)
    assert not side.domain.has("asked")
    assert states.load(side.run_dir, DOMID) == dead


def test_a_state_that_cannot_be_read_is_named(side: Side) -> None:
    path = states.path_of(side.run_dir, DOMID)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"uuid": UUID}), encoding="ascii")
    with pytest.raises(HypervisorError, match=r"4\.json cannot be read"):
        states.load(side.run_dir, DOMID)


def test_a_domain_has_one_engine(side: Side) -> None:
    with (
        closing(states.DomainLock(side.run_dir, DOMID)),
        pytest.raises(DomainBusyError, match=rf"engine \(pid {os.getpid()}\) protects domain 4"),
    ):
        states.DomainLock(side.run_dir, DOMID, timeout=0)
    states.DomainLock(side.run_dir, DOMID, timeout=0).close()
