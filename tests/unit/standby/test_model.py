"""The standby's state machine under every order of events: hypothesis plays the world around it.

The world keeps its own books (what was acked, committed, fenced, stored) from what it did and saw, and checks each
instruction against them; it knows nothing of the machine's states.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.terms import Role, TermRecord
from checkpointd.hypervisor.port import EndReason
from checkpointd.secondary.activations import Activation, Phase
from checkpointd.secondary.standby import Policy, Standby, State
from checkpointd.secondary.standby import events as ev

UUID = "6f1c1bd4-6d0c-4c52-9a53-1c1f6f7d0a11"
SECOND = 1_000_000_000
RESTART = 3 * SECOND
JOBS = (ev.Commit, ev.Probe, ev.Fence, ev.StoreTerm, ev.StartGuest, ev.ResumeActivation)
ON_REPLICA = (ev.Commit, ev.StartGuest, ev.ResumeActivation)


@dataclass
class Life:
    """What one life of the secondary's process has seen."""

    machine: Standby
    jobs: list[ev.Instruction] = field(default_factory=list)
    session: int | None = None  # welcomed last
    session_term: int = 0
    known: set[int] = field(default_factory=set)  # sessions begun with resume=False
    whole: set[tuple[int, int, int]] = field(default_factory=set)  # (session, epoch, part) told
    acked: list[int] = field(default_factory=list)  # epochs that the replica owes
    replica: int | None = None  # the committed epoch
    worthless: bool = False  # the session's epochs are deltas to nothing
    retired: bool = False  # promised: never activated
    fencing: bool = False
    fenced: bool = False
    owed: bool = False  # fencing, or fenced and not started
    silent: bool = False  # a silent tick since the primary was last heard
    lost_since: int | None = None  # the watcher's first word that the engine is gone
    started: bool = False


class World(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.stored = TermRecord(UUID)  # on stable storage
        self.note: Activation | None = None  # so, too
        self.now = 0
        self.epoch = 0
        self.next_session = 1
        self.runs_here = False  # a guest was started on this side and lives
        self.starts: list[int] = []  # terms in which a guest was started here
        self.life = Life(Standby(Policy(RESTART), self.stored))
        self.stand_by()

    def stand_by(self) -> None:
        """The usual beginning, so that most steps go into what comes after it."""
        self.hello(resume=False, delta=0, fresh=True)
        self.finish_all()
        if self.life.session is not None:  # else refused: this side has taken the guest over
            self.part(final=True, stale=False)
            self.finish_all()

    def finish_all(self) -> None:
        while self.life.jobs:
            self.job_done(which=0, good=True, view=(False, False))

    # ------------------------------------------------------------ what the world does

    @rule(resume=st.booleans(), delta=st.sampled_from([0, 0, -1, 1]), fresh=st.booleans())
    def hello(self, resume: bool, delta: int, fresh: bool) -> None:
        life = self.life
        session = life.session
        if fresh or session is None:
            session = self.next_session
            self.next_session += 1
        term = max(1, max(self.stored.term, life.session_term) + delta)
        if session == life.session:
            term = life.session_term
        self.hello_now = (session, term, resume)
        self.tell(ev.HelloReceived(session, term, resume, self.runs_here))

    @precondition(lambda self: self.life.session is not None)
    @rule(final=st.booleans(), stale=st.booleans())
    def part(self, final: bool, stale: bool) -> None:
        session = self.life.session
        assert session is not None
        self.epoch += 1
        session -= int(stale)
        if not stale and self.life.machine.taking:
            self.life.whole.add((session, self.epoch, 0))
        elif not stale:
            return  # the driver takes no frame of it
        self.tell(ev.PartWhole(session, self.epoch, 0, final))

    @precondition(lambda self: self.life.session is not None)
    @rule()
    def heard(self) -> None:
        assert self.life.session is not None
        self.life.silent = self.life.silent and self.life.machine.deaf
        if not self.life.machine.deaf:
            self.life.lost_since = None
        self.tell(ev.Heard(self.life.session))

    @precondition(lambda self: self.life.session is not None)
    @rule(step=st.sampled_from([0, SECOND, RESTART]), stale=st.booleans())
    def engine_lost(self, step: int, stale: bool) -> None:
        """The watcher is heard, and then the time passes."""
        life = self.life
        assert life.session is not None
        if not stale and not life.machine.deaf:
            life.silent = False
            if life.lost_since is None:
                life.lost_since = self.now
        self.tell(ev.EngineLostHeard(life.session - int(stale), "killed", self.now))
        self.now += step
        self.tell(ev.Tick(self.now, 0))

    @rule(step=st.sampled_from([1, SECOND, 2 * RESTART]))
    def silence(self, step: int) -> None:
        self.now += step
        self.life.silent = True
        self.tell(ev.Tick(self.now, 5 * SECOND))

    @rule()
    def silence_until_it_acts(self) -> None:
        for _ in range(3):
            self.silence(2 * RESTART)
            self.finish_all()

    @precondition(lambda self: self.life.session is not None)
    @rule(
        what=st.sampled_from(
            ["time", "retire", "end", "fault", "memory", "poweroff here", "crash"]
        ),
        reason=st.sampled_from(list(EndReason)),
        flag=st.booleans(),
    )
    def something_rare(self, what: str, reason: EndReason, flag: bool) -> None:
        session = self.life.session
        assert session is not None
        match what:
            case "time":
                self.now += 2 * SECOND
                self.tell(ev.Tick(self.now, 0))
            case "retire":
                self.tell(ev.RetireReceived(session - int(flag), "stop"))
            case "end":
                self.tell(ev.EndReceived(session, reason))
            case "fault":
                self.tell(ev.ProtocolFault(session, "garbage"))
            case "memory":
                self.tell(ev.MemoryShort(session, "full"))
            case "poweroff here":
                self.runs_here = False
            case "crash":
                self.crash(term_written=flag)

    @rule()
    def all_jobs_done(self) -> None:
        self.finish_all()

    @precondition(lambda self: self.life.jobs)
    @rule(
        which=st.integers(0, 7),
        good=st.sampled_from([True, True, True, False]),
        view=st.sampled_from([(False, False), (True, False), (True, True), (None, None)]),
    )
    def job_done(self, which: int, good: bool, view: tuple[bool | None, bool | None]) -> None:
        """Any job may end next, except that jobs of one thread end in order."""
        life = self.life
        threads: list[list[ev.Instruction]] = [
            [job for job in life.jobs if isinstance(job, ON_REPLICA)],
            [job for job in life.jobs if not isinstance(job, ON_REPLICA)],
        ]
        heads = [thread[0] for thread in threads if thread]
        job = heads[which % len(heads)]
        life.jobs.remove(job)
        match job:
            case ev.Commit(epoch) if good:
                owed = epoch in life.acked
                if owed:
                    assert epoch == life.acked[0], "commits out of order"
                    life.acked.pop(0)
                    life.replica = epoch
                self.tell(ev.CommitDone(epoch, 4, (), 1))
            case ev.Commit(epoch):
                if epoch in life.acked:
                    life.acked.clear()
                    life.replica = None
                    life.retired = life.worthless = True
                self.tell(ev.CommitDone(epoch, 4, (7,), 1))
            case ev.Probe(attempt):
                self.tell(ev.ProbeDone(attempt, HostView(*view, "seen"), self.now))
            case ev.Fence(attempt):
                self.note = self.noted(Phase.FEEDING) if good else None
                life.fencing = False
                life.fenced = life.owed = good and not life.retired
                self.tell(ev.FenceDone(attempt, FenceResult(good, "so"), self.now))
            case ev.StoreTerm(term, role, next_epoch) if good:
                assert term >= self.stored.term
                assert next_epoch >= self.stored.next_epoch
                self.stored = TermRecord(UUID, term, role, next_epoch)
                if role is Role.NONE:
                    self.note = None
                self.tell(ev.TermStored(term, role))
            case ev.StoreTerm():
                self.tell(ev.TermFailed("disk full", self.now))
            case ev.StartGuest() if good:
                self.runs_here = life.started = True
                life.owed = False
                self.starts.append(self.stored.term)
                self.tell(ev.GuestStarted(7))
            case ev.ResumeActivation() if good:
                assert self.note is not None
                assert self.note.is_of(self.stored), "a term that is not ours"
                if not self.runs_here:
                    self.starts.append(self.stored.term)
                self.runs_here = life.started = True
                self.tell(ev.GuestStarted(7))
            case ev.ResumeActivation():
                self.tell(ev.StartFailed("it may not be the whole epoch", self.now))
            case ev.StartGuest():
                self.tell(ev.StartFailed("address in use", self.now))

    def noted(self, phase: Phase) -> Activation:
        return Activation(UUID, "g", "192.0.2.1", self.life.machine.term + 1, self.epoch, phase, "")

    def crash(self, term_written: bool) -> None:
        """The process dies; a term that was being written is there or not."""
        if self.life.fencing:
            self.note = self.noted(Phase.FENCING)
        for job in self.life.jobs:
            if isinstance(job, ev.StoreTerm) and term_written:
                self.stored = TermRecord(UUID, job.term, job.role, job.next_epoch)
                break
        left = self.note
        if left is not None and not left.is_of(self.stored) and not left.is_ahead_of(self.stored):
            left = self.note = None
        self.life = Life(Standby(Policy(RESTART), self.stored, left))
        assert left is None or self.life.machine.state not in (State.WAITING, State.ACTIVE)
        self.stand_by()

    # ------------------------------------------------------------ what it checks

    def tell(self, event: ev.Event) -> None:
        for step in self.life.machine.handle(event):
            self.check(step)
            if isinstance(step, JOBS):
                self.life.jobs.append(step)

    def check(self, step: ev.Instruction) -> None:
        life = self.life
        match step:
            case ev.SendEngineLostHeard():
                assert not life.fencing
                assert not life.fenced
            case ev.ForgetActivation():
                self.note = None
            case ev.BeginSession(session):
                self.note = None
                life.lost_since = None
                _, term, resume = self.hello_now
                life.session, life.session_term = session, term
                life.worthless = resume
                life.retired = False
                life.fenced = life.fenced and not life.started  # what was started is history
                life.started = False
            case ev.SendWelcome(session):
                assert session == life.session
                assert life.session_term >= self.stored.term, "welcomed below the stored term"
                assert not life.fencing
                assert not life.fenced or life.started or not self.runs_here
                if self.stored.role is Role.SECONDARY_ACTIVE:
                    raise AssertionError("welcomed while this side holds the term")
            case ev.SendAck(epoch, part, final):
                assert life.session is not None
                assert (life.session, epoch, part) in life.whole, "acked what is not whole"
                assert not life.worthless, "acked changes to a replica that is not here"
                assert not life.retired
                assert not life.fencing
                assert not life.fenced
                if final:
                    life.acked.append(epoch)
            case ev.Commit(epoch):
                assert epoch == life.acked[-1], "committed what was not acked"
            case ev.DropReplica():
                life.replica = None
                life.acked.clear()
                life.retired = life.retired or not step.keep_pages
                life.owed = life.owed and step.keep_pages  # the guest has ended by itself
            case ev.SendRetired():
                life.retired = True
                assert not life.fenced
            case ev.Fence():
                waited = life.lost_since is not None and self.now - life.lost_since >= RESTART
                assert life.silent or waited, "fenced a primary that is heard"
                assert life.replica is not None
                assert not life.acked, "fenced before the acked epochs were audited"
                assert not life.retired
                assert not life.fenced
                life.fencing = life.owed = True
            case ev.StoreTerm(term, Role.SECONDARY_ACTIVE):
                assert life.fenced
                assert term > max(self.stored.term, life.session_term), "a term used before"
            case ev.StartGuest(epoch):
                assert life.fenced, "started without proof"
                assert self.stored.role is Role.SECONDARY_ACTIVE, "the term is not stored"
                assert self.stored.term > life.session_term
                assert epoch == life.replica
                assert not life.acked
                assert not life.retired, "started a retired replica"
                assert not life.started, "started twice"
                assert self.stored.term not in self.starts

    @invariant()
    def a_fenced_guest_is_owed_until_it_runs_here(self) -> None:
        if hasattr(self, "life"):
            assert self.life.machine.owes_guest == self.life.owed

    @invariant()
    def reset_after_being_superseded(self) -> None:
        """A higher term was adopted: what was fenced and started is history."""
        if hasattr(self, "life") and self.stored.role is Role.NONE:
            self.life.fenced = self.life.fenced and self.life.session_term >= self.stored.term


World.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # the same on each machine; a campaign may lift it
    suppress_health_check=[HealthCheck.too_slow],
)
TestStandbyModel = World.TestCase
