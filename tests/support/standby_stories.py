"""How stories of the standby's state machine begin, and its words in short."""

from __future__ import annotations

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import Role, TermRecord
from checkpointd.secondary.standby import Policy, Standby, State
from checkpointd.secondary.standby import events as ev

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
SECOND = 1_000_000_000
RESTART = 10 * SECOND
DEAD = HostView(False, False, "the host has exited")
ENGINE_GONE = HostView(True, False, "no engine is attached")
STUCK = HostView(True, True, "an engine is attached")
FENCED = FenceResult(True, "it has exited")
NOT_FENCED = FenceResult(False, "it does not answer")


def machine(record: TermRecord | None = None) -> Standby:
    return Standby(Policy(RESTART), record or TermRecord(UUID))


def hello(session: int = 1, term: int = 1, **extra: bool) -> ev.HelloReceived:
    fields = {"resume": False, "guest_here": False, **extra}
    return ev.HelloReceived(session, term, **fields)


def tell(standby: Standby, *events: ev.Event) -> list[ev.Instruction]:
    """The instructions that the last event gave; those of Hello's term are done on the way."""
    out: list[ev.Instruction] = []
    for event in events:
        out = standby.handle(event)
        for step in out:
            if isinstance(step, ev.StoreTerm) and step.role is Role.NONE:
                out = [*out, *standby.handle(ev.TermStored(step.term, step.role))]
    return out


def state(standby: Standby) -> State:
    """Asked anew each time; mypy would take a second `standby.state` for the first."""
    return standby.state


def of_kind(kind: type, out: list[ev.Instruction]) -> list[ev.Instruction]:
    return [step for step in out if isinstance(step, kind)]


def final(epoch: int, session: int = 1, part: int = 0) -> ev.PartWhole:
    return ev.PartWhole(session, epoch, part, final=True)


def committed(epoch: int, *mismatches: int) -> ev.CommitDone:
    return ev.CommitDone(epoch, 16, mismatches, 1000)


def standing_by(*, pending: bool = False) -> Standby:
    """After epoch 1 was committed; with `pending`, epoch 2 is acked and not committed."""
    standby = machine()
    tell(standby, hello(), final(1), committed(1))
    assert state(standby) is State.STANDBY
    if pending:
        tell(standby, final(2))
    return standby


def silence(now: int = 0) -> ev.Tick:
    return ev.Tick(now, 2 * SECOND)


def fencing() -> Standby:
    standby = standing_by()
    tell(standby, silence(), ev.ProbeDone(1, DEAD, 0))
    assert state(standby) is State.FENCING
    return standby


def activating() -> Standby:
    standby = fencing()
    tell(standby, ev.FenceDone(2, FENCED, 0))
    assert state(standby) is State.ACTIVATING
    return standby


def active() -> Standby:
    standby = activating()
    tell(standby, ev.TermStored(2, Role.SECONDARY_ACTIVE), ev.GuestStarted(7))
    assert state(standby) is State.ACTIVE
    return standby


def refused(out: list[ev.Instruction]) -> list[str]:
    assert not of_kind(ev.SendWelcome, out)
    return [step.code for step in out if isinstance(step, ev.SendRefused)]
