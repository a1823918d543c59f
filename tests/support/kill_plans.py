"""What is killed, where and when: the plans that kills.py carries out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

HOST, PRIMARY, SECONDARY = "host", "primary", "secondary"
NEW_HOST = "new-host"  # the process that an activation makes the guest's host

Victims = frozenset[str]
STALL: Victims = frozenset()  # nobody dies; the one at the point stands still for too long
ENGINE: Victims = frozenset({PRIMARY})
GUEST: Victims = frozenset({HOST})
STANDBY: Victims = frozenset({SECONDARY})
MACHINE: Victims = frozenset({PRIMARY, HOST})  # as when a whole machine is lost
DAEMONS: Victims = frozenset({PRIMARY, SECONDARY})
BOTH_COPIES: Victims = frozenset({HOST, SECONDARY})  # of the guest's memory

ENGINE_POINTS = (
    "primary.before-pause", "hv.suspend", "hv.p2m_changes", "hv.harvest", "hv.types", "hv.context",
    "hv.output_close", "hv.resume", "primary.after-pause", "ship.frame", "ship.end", "ship.shipped",
    "primary.before-release", "primary.after-release",
)  # fmt: skip
STANDBY_POINTS = (
    "secondary.frame", "secondary.part-whole", "secondary.before-ack", "secondary.after-ack",
    "secondary.before-commit", "secondary.mid-commit", "secondary.after-commit",
)  # fmt: skip
# Passed for each request: clients come only once the guest is protected.
REQUEST_POINTS = ("host.step", "host.input-logged", "host.release")
HOST_POINTS = (*REQUEST_POINTS, "host.suspended")
EPOCH_POINTS = ENGINE_POINTS + STANDBY_POINTS + HOST_POINTS
# Of a copy with the guest running: before the first epoch, and when an engine comes back.
COPY_POINTS = ("primary.before-round", "hv.harvest", "hv.types", "ship.frame", "ship.end")
BEFORE_FENCE = ("secondary.before-probe", "secondary.before-fence")
# From host.before-bind on the guest comes to life without its creator, and stays alive without it.
GUEST_ON_ITS_OWN = ("host.before-bind", "host.started", "secondary.after-start")
TERM_STORED = ("secondary.after-term", "secondary.before-start", *GUEST_ON_ITS_OWN)
ACTIVATION_POINTS = (*BEFORE_FENCE, "secondary.after-fence", *TERM_STORED)


class Phase(StrEnum):
    FIRST_COPY = "first copy"  # nothing is committed yet
    STEADY = "steady"
    SECOND_COPY = "second copy"  # by a second engine; the replica is an epoch of the first one's
    ACTIVATION = "activation"


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    phase: Phase
    victims: Victims  # killed while a process stands at the point
    point: str = ""  # "": at no point, but at a random moment
    passage: int = 1
    returns: bool = True  # an engine that dies alone comes back in time; else never
    trigger: Victims = STALL  # of an activation: the kills that bring it about

    @property
    def stands(self) -> str:
        """Who stops at the point of an epoch or a copy."""
        if self.point in HOST_POINTS:
            return HOST
        return SECONDARY if self.point in STANDBY_POINTS else PRIMARY

    @property
    def victims_named(self) -> str:
        names = "+".join(sorted(self.victims)) or "none"
        if self.phase is Phase.ACTIVATION:
            return names + ", engine back" * self.returns
        return names + ", not restarted" * (self.victims == ENGINE and not self.returns)

    def __str__(self) -> str:
        where = f"{self.point}@{self.passage}" if self.point else "a random moment"
        cause = f" after {'+'.join(sorted(self.trigger))}" if self.trigger else ""
        return f"{self.phase}{cause}, {where}: {self.victims_named} (seed {self.seed})"


# What is killed together, and whether an engine that is killed alone comes back.
EPOCH_KILLS = (
    (ENGINE, True), (GUEST, True), (STANDBY, True), (MACHINE, True), (DAEMONS, True),
    (BOTH_COPIES, True), (ENGINE, False),
)  # fmt: skip
TRIGGERS = (MACHINE, GUEST, ENGINE)  # what brings an activation about
# Where there is a host that waits for its guest, or runs it already.
NEW_HOST_KILLS = {
    "secondary.before-start": (frozenset({NEW_HOST}), frozenset({NEW_HOST, SECONDARY})),
    "host.before-bind": (frozenset({NEW_HOST, SECONDARY}),),
    "host.started": (frozenset({NEW_HOST, SECONDARY}),),
    "secondary.after-start": (frozenset({NEW_HOST}), frozenset({NEW_HOST, SECONDARY})),
}


def steady(point: str, victims: Victims, seed: int, *, returns: bool = True) -> Plan:
    """A kill under full protection: every point is passed a few times an epoch at most, so this passage comes long
    after the first commit.
    """
    passage = random.Random(f"{seed} {point}").randint(25, 60)
    if point in REQUEST_POINTS:
        passage *= 3
    return Plan(seed, Phase.STEADY, victims, point, passage, returns)


def activation(
    point: str, trigger: Victims, victims: Victims, seed: int, *, returns: bool = False
) -> Plan:
    """A kill in the middle of an activation that the kills of `trigger` bring about."""
    return Plan(seed, Phase.ACTIVATION, victims, point, returns=returns, trigger=trigger)


def matrix(seed: int, each: int) -> list[Plan]:
    """At least `each` kills at every point of every phase, spread over all that can be killed there; and stalls."""
    plans = []
    for point in EPOCH_POINTS:
        for n in range(each):
            victims, returns = EPOCH_KILLS[n % len(EPOCH_KILLS)]
            plans.append(steady(point, victims, seed + n, returns=returns))
        plans.append(steady(point, STALL, seed))
    for phase in (Phase.FIRST_COPY, Phase.SECOND_COPY):
        for point in COPY_POINTS:
            for n in range(each):
                victims, returns = EPOCH_KILLS[n % len(EPOCH_KILLS)]
                plans.append(Plan(seed + n, phase, victims, point, returns=returns))
    for point in ACTIVATION_POINTS:
        kills = [(trigger, STANDBY) for trigger in TRIGGERS]
        for victims in NEW_HOST_KILLS.get(point, ()):
            kills += [(MACHINE, victims), (ENGINE, victims)]
        plans += [activation(point, *kills[n % len(kills)], seed + n) for n in range(each)]
        plans += [activation(point, trigger, STALL, seed) for trigger in TRIGGERS]
        if point in BEFORE_FENCE:
            plans.append(activation(point, ENGINE, STALL, seed, returns=True))
    return plans


def moments(seed: int, count: int) -> list[Plan]:
    """Random sets at random moments of protection."""
    chance = random.Random(f"{seed} moments")
    plans = []
    for n in range(count):
        victims, returns = chance.choice(EPOCH_KILLS)
        plans.append(Plan(seed + n, Phase.STEADY, victims, returns=returns))
    return plans
