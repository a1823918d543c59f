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
from enum import StrEnum
from typing import TYPE_CHECKING

from installation import ACTING, DOMID, NEVER, Installation, outcome, resume, said, wait_ended
from processes import PATIENCE, end, state_of, stops, until

from checkpointd.errors import HostLostError, NoSuchDomainError, RefusedError
from checkpointd.hypervisor.embedded import toolstack

if TYPE_CHECKING:
    from pathlib import Path

HOST, PRIMARY, SECONDARY = "host", "primary", "secondary"
NEW_HOST = "new-host"  # the one that an activation starts

SETS: tuple[frozenset[str], ...] = (
    frozenset({PRIMARY}),
    frozenset({HOST}),
    frozenset({SECONDARY}),
    frozenset({PRIMARY, HOST}),
    frozenset({PRIMARY, SECONDARY}),
    frozenset({HOST, SECONDARY}),
)
# Sets after which the secondary is the one to act, if it has a committed epoch. (The primary alone: unless a new
# engine comes in time.)
ONE_SIDE = (SETS[0], SETS[1], SETS[3])

ENGINE_POINTS = (
    "primary.before-pause", "hv.suspend", "hv.p2m_changes", "hv.harvest", "hv.types", "hv.context",
    "hv.output_close", "hv.resume", "primary.after-pause", "ship.frame", "ship.end", "ship.shipped",
    "primary.before-release", "primary.after-release",
)  # fmt: skip
STANDBY_POINTS = (
    "secondary.frame", "secondary.part-whole", "secondary.before-ack", "secondary.after-ack",
    "secondary.before-commit", "secondary.mid-commit", "secondary.after-commit",
)  # fmt: skip
HOST_POINTS = ("host.step", "host.input-logged", "host.suspended", "host.release")
# Passed for each request: clients come only when the guest is protected.
REQUEST_POINTS = ("host.step", "host.input-logged", "host.release")
EPOCH_POINTS = ENGINE_POINTS + STANDBY_POINTS + HOST_POINTS
# Copies with the guest running: before the first epoch, and when an engine comes back.
COPY_POINTS = ("primary.before-round", "hv.harvest", "hv.types", "ship.frame", "ship.end")
ACTIVATION_POINTS = (
    "secondary.before-probe", "secondary.before-fence", "secondary.after-fence",
    "secondary.after-term", "secondary.before-start", "host.before-bind", "host.started",
    "secondary.after-start",
)  # fmt: skip
# From here on the term is on stable storage; from there on the guest lives without its creator.
TERM_STORED = ACTIVATION_POINTS[3:]
GUEST_ON_ITS_OWN = ACTIVATION_POINTS[5:]

ENGINE_RESTART = "300ms"  # where no engine is to come back
SETTLED = 1.0  # s; more than the secondary's silence: by then it would have acted
MOMENTS = 1.5  # s; random kills come within this time after the guest is protected
MOST_BETWEEN = 0.03  # s between two kills of one set, in random order


class Phase(StrEnum):
    FIRST_COPY = "first copy"  # nothing is committed yet
    STEADY = "steady"
    SECOND_COPY = "second copy"  # by a second engine; the replica is an epoch of the first one's
    ACTIVATION = "activation"


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    phase: Phase
    victims: frozenset[
        str
    ]  # killed while the process stands at the point; empty: it only stalled there
    point: str = ""  # "": no point but a random moment
    passage: int = 1
    returns: bool = (
        True  # a killed engine is started again (in time), or its host is left to the secondary
    )
    trigger: frozenset[str] = frozenset()  # of an activation: the kills that bring it about

    @property
    def victims_named(self) -> str:
        names = "+".join(sorted(self.victims)) or "none"
        alone = self.victims == {PRIMARY} or (not self.victims and self.trigger == {PRIMARY})
        return names + (", not restarted" if alone and not self.returns else "")

    def __str__(self) -> str:
        where = f"{self.point}@{self.passage}" if self.point else "a random moment"
        cause = f" after {'+'.join(sorted(self.trigger))}" if self.trigger else ""
        return f"{self.phase}{cause}, {where}: {self.victims_named} (seed {self.seed})"


@dataclass(slots=True)
class Report:
    plan: Plan
    activated: bool = False
    wrong: list[str] = field(default_factory=list)
    answers: int = 0


# What is killed together, and whether an engine that is killed alone comes back.
EPOCH_KILLS = (*((victims, True) for victims in SETS), (SETS[0], False))
# (what brings the activation about, what is killed in its middle)
ACTIVATION_KILLS = tuple(
    (trigger, victims)
    for victims in (frozenset({SECONDARY}), frozenset[str]())
    for trigger in (SETS[3], SETS[1], SETS[0])
)
# Where there is a host that waits, or runs the guest already: it alone, or with the secondary.
NEW_HOST_KILLS = {
    "secondary.before-start": (frozenset({NEW_HOST}), frozenset({NEW_HOST, SECONDARY})),
    "host.before-bind": (frozenset({NEW_HOST, SECONDARY}),),
    "host.started": (frozenset({NEW_HOST, SECONDARY}),),
    "secondary.after-start": (frozenset({NEW_HOST}), frozenset({NEW_HOST, SECONDARY})),
}


def steady(point: str, victims: frozenset[str], seed: int, *, returns: bool = True) -> Plan:
    """A kill under full protection: every point is passed a few times an epoch at most, so this passage comes long
    after the first commit.
    """
    passage = random.Random(f"{seed} {point}").randint(25, 60)
    if point in REQUEST_POINTS:
        passage *= 3
    return Plan(seed, Phase.STEADY, victims, point, passage, returns)


def activation(point: str, trigger: frozenset[str], victims: frozenset[str], seed: int) -> Plan:
    return Plan(seed, Phase.ACTIVATION, victims, point, returns=False, trigger=trigger)


def matrix(seed: int, each: int) -> list[Plan]:
    """Every point of every phase at least `each` times, spread over all that can be killed there."""
    plans = [plan for point in EPOCH_POINTS for plan in _kills_at(Phase.STEADY, point, seed, each)]
    for phase in (Phase.FIRST_COPY, Phase.SECOND_COPY):
        for point in COPY_POINTS:
            plans += _kills_at(phase, point, seed, each)
    for point in ACTIVATION_POINTS:
        kills = [*ACTIVATION_KILLS]
        for victims in NEW_HOST_KILLS.get(point, ()):
            kills += [(SETS[3], victims), (SETS[0], victims)]
        plans += [
            activation(point, *kills[n % len(kills)], seed + n)
            for n in range(max(each, len(kills)))
        ]
    return plans


def _kills_at(phase: Phase, point: str, seed: int, each: int) -> list[Plan]:
    plans = []
    for n in range(max(each, len(EPOCH_KILLS))):
        victims, returns = EPOCH_KILLS[n % len(EPOCH_KILLS)]
        if phase is Phase.STEADY:
            plans.append(steady(point, victims, seed + n, returns=returns))
        else:
            plans.append(Plan(seed + n, phase, victims, point, 1, returns))
    return plans


def moments(seed: int, count: int) -> list[Plan]:
    """Random sets at random moments of protection."""
    chance = random.Random(f"{seed} moments")
    return [
        Plan(seed + n, Phase.STEADY, *chance.choice(EPOCH_KILLS)[:1], returns=chance.random() < 0.5)
        for n in range(count)
    ]


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

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.report.wrong.append(otherwise)

    def kill(self, victims: frozenset[str]) -> None:
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
            else:
                self.ends_alive("primary")
            return
        self.report.activated = True
        acked = max(takeover.acked or 0, known_acked or 0)
        self.check(
            takeover.epoch >= acked,
            f"epoch {takeover.epoch} was activated, {acked} was acknowledged",
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
        match self.plan.victims:
            case v if v == {PRIMARY} and self.plan.returns:
                self._engine_restarted()
            case v if v == {SECONDARY}:
                since = self._since
                self.on.start_secondary()
                self.ends_protected(since)
            case v if v == {PRIMARY, SECONDARY}:
                self.on.start_secondary()
                self.on.start_primary()
                self.ends_protected(0)
            case v if v == {HOST, SECONDARY}:
                self._host_lost()
                self.on.start_secondary()
                self.ends_lost()
                self.check(not said(self.on.named(SECONDARY), *ACTING), "the secondary acted")
            case v if v == {HOST}:
                self._host_lost()
                self.ends_active(known)
            case _:
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
            struck = self.on.named(
                HOST if plan.point in HOST_POINTS
                else SECONDARY if plan.point in STANDBY_POINTS
                else PRIMARY
            )  # fmt: skip
            assert stops(struck.pid), f"{struck.name} ended before it was stopped\n{struck.tail()}"
        known: int | None = None
        if struck is not self.on.primary:
            known = self.on.rig.status(PRIMARY).get("acked_epoch")
        self._since = self.on.named(PRIMARY).catch_up()
        self._secondary_since = self.on.named(SECONDARY).catch_up()
        self.kill(plan.victims)
        if struck is not None and struck.process.returncode is None:
            resume(struck.pid)
        return known

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
        if state_of(stopped) == "T":
            resume(stopped)
        if SECONDARY in plan.victims:
            self._after_restart()
        elif plan.point == "secondary.after-start" and plan.victims:
            struck.state("active")  # it was, and nobody watches over a guest that nobody protects
            self.ends_lost()
        else:
            self.ends_active()

    def _after_restart(self) -> None:
        """The secondary died in the middle of it: its memory, and so the replica, went with it."""
        plan = self.plan
        self.on.start_secondary()
        before_fence = plan.point in ACTIVATION_POINTS[:2]
        if before_fence and HOST not in plan.trigger:
            self.on.start_primary()  # nothing has happened to the guest
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
