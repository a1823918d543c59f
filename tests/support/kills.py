"""Kills at named points: what is done, and what must come of it.

A plan stops one process at a point of an epoch, a copy or an activation (CHECKPOINTD_FAULTS, `POINT@N=stop`), kills a
set of processes while it stands there, lets it run on if it was not one of them, and checks all that can be seen:
whether the secondary activated, and only where it had to; that the replica is one committed epoch, bit for bit; that
the guest which runs afterwards is what its inputs make it; and that no client ever saw an answer that the surviving
history does not contain.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from installation import (
    ACTING,
    DOMID,
    NEVER,
    SILENCE,
    Installation,
    outcome,
    resume,
    said,
    wait_ended,
)
from kill_plans import (
    BEFORE_FENCE,
    BOTH_COPIES,
    COPY_POINTS,
    DAEMONS,
    ENGINE,
    ENGINE_POINTS,
    GUEST,
    GUEST_ON_ITS_OWN,
    HOST,
    HOST_POINTS,
    NEW_HOST,
    PRIMARY,
    REQUEST_POINTS,
    SECONDARY,
    STALL,
    STANDBY,
    STANDBY_POINTS,
    TERM_STORED,
    Phase,
    Plan,
    Victims,
)
from processes import PATIENCE, end, state_of, stops, until

from checkpointd.errors import HostLostError, NoSuchDomainError, RefusedError
from checkpointd.hypervisor.embedded import toolstack

if TYPE_CHECKING:
    from pathlib import Path

ENGINE_RESTART = "300ms"  # where no engine is to come back
SETTLED = 1.2 * SILENCE  # s; by then a secondary that wants to act has begun to
MOMENTS = 1.5  # s; random kills come within this time after the guest is protected
MOST_BETWEEN = 0.03  # s between two kills of one set, in random order


@dataclass(slots=True)
class Report:
    plan: Plan
    activated: bool = False
    wrong: list[str] = field(default_factory=list)
    answers: int = 0


def play(plan: Plan, directory: Path) -> Report:
    """Carry the plan out in `directory`, a new and short one, and check all that can be seen."""
    report = Report(plan)
    dies_for_good = not plan.returns or plan.phase is Phase.ACTIVATION
    restart = ENGINE_RESTART if dies_for_good else NEVER
    installation = Installation(directory, seed=plan.seed, engine_restart=restart)
    try:
        if plan.phase is Phase.ACTIVATION:
            _Activation(plan, installation, report).play()
        else:
            _Epoch(plan, installation, report).play()
    except Exception as error:  # noqa: BLE001 - told with the logs, like every other thing that went wrong
        report.wrong.append(f"{type(error).__name__}: {error}")
    if report.wrong:
        report.wrong.append(installation.rig.logs())
    report.wrong += [f"left behind: {stray}" for stray in installation.close()]
    return report


class _Scene:
    """What both kinds of plan need: the beginning, the kill, and the endings."""

    def __init__(self, plan: Plan, installation: Installation, report: Report) -> None:
        self.plan = plan
        self.on = installation
        self.report = report
        # How much primary and secondary had said when somebody was killed.
        self._since = self._secondary_since = 0

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.report.wrong.append(otherwise)

    def kill(self, victims: Victims) -> None:
        """In an order and with gaps of the seed's choice."""
        chance = random.Random(f"{self.plan.seed} order")
        order = sorted(victims - {NEW_HOST})
        chance.shuffle(order)
        for name in order:
            self.on.named(name).kill()
            threading.Event().wait(chance.uniform(0, MOST_BETWEEN))

    # ------------------------------------------------------------ endings

    def ends_active(self, known_acked: int | None = None) -> None:
        """The secondary runs the guest."""
        takeover = outcome(self.on)
        if takeover is None:
            # Nothing was committed: then nothing must run.
            never = not said(self.on.named(SECONDARY), "standby", *ACTING)
            self.check(never, "a replica was there, and was not activated")
            if HOST in self.plan.victims:
                self.ends_lost()
            else:  # the guest lives, its output perhaps shut already, and waits for an engine
                self.on.start_primary()
                self.ends_protected(0)
            return
        self.report.activated = True
        acked = takeover.acked or takeover.epoch  # none in this session: an epoch of the one before
        self.check(
            takeover.epoch == acked >= (known_acked or 0),
            f"epoch {takeover.epoch} was activated; acknowledged were {acked}, and {known_acked} as the engine knew",
        )
        self.report.wrong += self.on.prove_replica(takeover.epoch)
        self.ends_alive("secondary")

    def ends_alive(self, namespace: str) -> None:
        """One guest, there, answers every client; nobody saw anything that did not happen."""
        self.check(self.on.clients.all_answered(PATIENCE), "not every client is answered again")
        places = [place for place, _ in self.on.hosts()]
        self.check(places == [namespace], f"guests live at {places}")
        self.report.wrong += self.on.clients.finish()
        if namespace == "primary" and self.on.look().engine:
            self._replica_as_well()
        self.report.wrong += self.on.prove_guest(namespace)
        self._conclude()

    def ends_lost(self) -> None:
        """Both of the guest's places are gone: nothing answers, nothing is started."""
        self.check(self.on.clients.silent(SETTLED), "an answer came from a guest that is lost")
        self.check(not self.on.hosts(), f"a guest lives at {self.on.hosts()}")
        self.report.wrong += self.on.clients.give_up()
        self._conclude()

    def ends_protected(self, since: int) -> None:
        """The guest was never lost, and is protected again."""
        self.on.named(PRIMARY).state("protected", since=since)
        self.check(not said(self.on.named(SECONDARY), *ACTING), "the secondary acted")
        self.ends_alive("primary")

    def _replica_as_well(self) -> None:
        """Both daemons end in order; the secondary first, so that it leaves its replica behind."""
        epoch = self.on.standby()["committed_epoch"]
        self.report.wrong += wait_ended_after_stop(self.on, SECONDARY)
        images = sorted(
            (path for path in self.on.image(0).parent.glob("*.xen") if not path.is_symlink()),
            key=lambda path: int(path.suffixes[-2][1:]),
        )
        newest = int(images[-1].suffixes[-2][1:]) if images else 0
        self.check(newest >= epoch, f"image of epoch {newest} is kept, {epoch} was committed")
        self.report.wrong += self.on.prove_replica(newest)
        self.on.named(PRIMARY).kill()
        until(lambda: not self.on.look().engine, "the host to see that its engine is gone")

    def _conclude(self) -> None:
        self.report.wrong += self.on.prove_answers()
        self.report.answers = len(self.on.clients.seen)


class _Epoch(_Scene):
    """A kill in the middle of an epoch or of a copy."""

    def play(self) -> None:
        self._begin()
        known = self._strike()
        victims = self.plan.victims
        if victims == STALL:
            self._stalled()
        elif victims == ENGINE and self.plan.returns:
            self._engine_restarted()
        elif victims == STANDBY:
            self.on.start_secondary()
            self.ends_protected(self._since)
        elif victims == DAEMONS:
            self.on.start_secondary()
            self.on.start_primary()
            self.ends_protected(0)
        elif victims == BOTH_COPIES:
            self._host_lost()
            self.on.start_secondary()
            self.ends_lost()
            self.check(not said(self.on.named(SECONDARY), *ACTING), "the secondary acted")
        else:
            if victims == GUEST:
                self._host_lost()
            self.ends_active(known)

    def _armed(self, points: tuple[str, ...]) -> str:
        wanted = self.plan.point in points
        return f"{self.plan.point}@{self.plan.passage}=stop" if wanted else ""

    def _begin(self) -> None:
        self.on.start_guest(faults=self._armed(HOST_POINTS))
        early = self.plan.point not in REQUEST_POINTS
        if early:
            self.on.clients.start()
        self.on.start_secondary(faults=self._armed(STANDBY_POINTS))
        engine = self._armed((*ENGINE_POINTS, *COPY_POINTS))
        if self.plan.phase is Phase.SECOND_COPY:
            self.on.start_primary().state("protected")
            self.on.named(PRIMARY).kill()
        self.on.start_primary(faults=engine)
        if not early:
            self.on.named(PRIMARY).state("protected")
            self.on.clients.start()

    def _strike(self) -> int | None:
        """Kill them; the last epoch of which the engine knew just before that it was acked, where it can say so."""
        plan = self.plan
        if not plan.point:
            self.on.named(PRIMARY).state("protected")
            moment = random.Random(f"{plan.seed} moment").uniform(0, MOMENTS)
            threading.Event().wait(moment)  # not for anything: it is the random moment
            struck = None
        else:
            struck = self.on.named(plan.stands)
            assert stops(struck.pid), f"{struck.name} ended before it was stopped\n{struck.tail()}"
        known: int | None = None
        if struck is not self.on.primary:
            known = self.on.rig.status(PRIMARY).get("acked_epoch")
        self._since = self.on.named(PRIMARY).catch_up()
        self._secondary_since = self.on.named(SECONDARY).catch_up()
        self.kill(plan.victims)
        if plan.victims and struck is not None and struck.process.returncode is None:
            resume(struck.pid)
        return known

    def _stalled(self) -> None:
        """Nobody died: one process stands still for longer than anybody waits for it, and then goes on."""
        struck = self.on.named(self.plan.stands)
        match self.plan.stands:
            case "primary":
                self.on.named(SECONDARY).state("active", since=self._secondary_since)
                resume(struck.pid)
                code = struck.wait()
                left = (HostLostError.exit_code, RefusedError.exit_code)
                self.check(code in left, f"the engine came back and ended with {code}, not {left}")
                self.ends_active()
            case "secondary":
                self.on.named(PRIMARY).state("holding", since=self._since)
                self.check(self.on.clients.silent(0.3), "an answer left while the standby stood")
                resume(struck.pid)
                self.ends_protected(self.on.named(PRIMARY).catch_up())
            case _:
                self.check(self.on.clients.silent(SETTLED), "an answer left a host that stood")
                resume(struck.pid)
                self.check(not said(self.on.named(SECONDARY), *ACTING), "the secondary acted")
                self.ends_alive("primary")

    def _host_lost(self) -> None:
        self.report.wrong += wait_ended(self.on.named(PRIMARY), HostLostError.exit_code)

    def _engine_restarted(self) -> None:
        """The guest goes on alone, its output shut if it was, until a new engine takes it up."""
        whole = self.plan.phase is not Phase.FIRST_COPY
        if whole:
            self.on.named(SECONDARY).state("engine-lost", since=self._secondary_since)
            view = self.on.look()
            self.check(not view.engine and not view.paused, f"engine or pause left: {view}")
            self.check(view.shut, "the output was opened by the engine's death")
            self.check(self.on.clients.silent(0.3), "an answer left without an engine")
            until(lambda: self.on.look().step > view.step, "the guest to run on by itself")
        self.on.start_primary()
        self.ends_protected(0)


class _Activation(_Scene):
    """A kill (or a stall) while the secondary takes over."""

    def play(self) -> None:
        plan = self.plan
        self.on.start_guest()
        self.on.clients.start()
        struck = self.on.start_secondary(faults=f"{plan.point}@{plan.passage}=stop")
        self.on.start_primary().state("protected")
        self.check(self.on.clients.all_answered(PATIENCE), "no answers under protection")
        self.kill(plan.trigger)
        if PRIMARY not in plan.trigger:
            self.report.wrong += wait_ended(self.on.named(PRIMARY), HostLostError.exit_code)
        if plan.point.startswith("host."):
            stopped = self.on.waiting_host_stopped()
        else:
            stopped = struck.pid
            assert stops(stopped), f"the secondary ended before it was stopped\n{struck.tail()}"
        new_host = self.on.waiting_host()
        self.kill(plan.victims)
        if NEW_HOST in plan.victims:
            assert new_host, "no new host to kill"
            end(new_host)
        if plan.returns:
            self.on.start_primary().ready()  # it has attached, and cannot be heard yet
        if state_of(stopped) == "T":
            resume(stopped)
        if plan.returns:
            self._engine_came_back()
        elif SECONDARY in plan.victims:
            self._after_restart()
        elif plan.point == "secondary.after-start" and plan.victims:
            struck.state("active")  # it was, and nobody watches over a guest that nobody protects
            self.ends_lost()
        else:
            self.ends_active()

    def _engine_came_back(self) -> None:
        """At the last moment. It may be heard in time or not; but either it goes on, or the guest is there."""
        primary = self.on.named(PRIMARY)
        until(
            lambda: primary.ended(0) or said(primary, "protected") or _active(self.on),
            "the end of the race between engine and standby",
        )
        if said(primary, "protected"):
            self.ends_protected(0)
            return
        code = primary.wait()
        left = (HostLostError.exit_code, RefusedError.exit_code)
        self.check(code in left, f"the engine that came too late ended with {code}, not {left}")
        self.ends_active()

    def _after_restart(self) -> None:
        """The secondary died in the middle of it: its memory, and so the replica, went with it."""
        plan = self.plan
        self.on.start_secondary()
        if plan.point in BEFORE_FENCE and HOST not in plan.trigger:
            self.on.start_primary()
            self.ends_protected(0)
            return
        if plan.point in GUEST_ON_ITS_OWN and NEW_HOST not in plan.victims:
            self.report.activated = True
            self._old_engine_refused()
            self.ends_alive("secondary")
            return
        if plan.point in TERM_STORED:
            self._old_engine_refused()
        else:
            self.on.start_primary()
            self.report.wrong += wait_ended(self.on.named(PRIMARY), NoSuchDomainError.exit_code)
        self.ends_lost()

    def _old_engine_refused(self) -> None:
        """An engine of the old term, with a guest that it takes for the same, is sent away; that guest is stopped."""
        self.report.wrong += stale_engine_refused(self.on)


def _active(on: Installation) -> bool:
    return on.standby().get("state") == "active"


def stale_engine_refused(on: Installation, *, domid: int = DOMID + 1) -> list[str]:
    """Start a stale copy of the guest on the primary side and an engine with the old state for it. It must be refused
    with RefusedError's code, and its guest left paused. The stale guest is ended at the end.
    """
    assert on.info is not None
    address = f"127.0.0.1:{on.rig.udp_port()}"
    stale = on.rig.guest(domid, "--uuid", on.info.uuid, "--memory", "4MiB", "--listen", address)
    on.rig.guest_is_up(stale)
    wrong = wait_ended(on.start_primary(domid=domid), RefusedError.exit_code)
    view = next(info for info in on.hypervisor("primary").domains() if info.domid == domid)
    if not toolstack.look(view).paused:
        wrong.append("the stale guest was left running")
    stale.kill()
    return wrong


def wait_ended_after_stop(on: Installation, name: str) -> list[str]:
    """SIGTERM, and exit code 0."""
    code = on.named(name).stop()
    return [] if code == 0 else [f"{name} ended with {code} at SIGTERM\n{on.named(name).tail()}"]
