"""One domain's standby at work: performs what the machine in standby/ decides, and reports what came of it.

Everything here runs on the acceptor's thread, except what is handed to two threads of the domain's own: the
*replica* thread (admit, commit, digests, keep, start) and the *authority* thread (probe, fence,
terms), so that neither a long commit nor a slow fence keeps a heartbeat from being answered.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, assert_never

from checkpointd import faults
from checkpointd.native import DigestKey
from checkpointd.wire import messages
from checkpointd.wire.frames import Header, Kind

from .authority import Authority
from .digests import DigestAnswer
from .epochs import Acked, EpochAssembler, Lacking, Load
from .expander import NotHeldError
from .foresight import Foresight
from .jobs import Jobs, nothing
from .replica import NoRoomError
from .standby import Policy, Standby, State
from .standby import events as ev
from .standby.detector import Detector

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.authority.terms import TermRecord
    from checkpointd.errors import CheckpointdError
    from checkpointd.wire.acceptor import Peer, Sent
    from checkpointd.wire.frames import Octets

    from .activations import Activation
    from .surroundings import DomainMetrics, Link, Surroundings
    from .worker import ReplicaWorker

log = logging.getLogger(__name__)

# Hellos that wait for their answer at once, of which the machine keeps the last: more are a peer's fault.
OFFERS = 8
# States in which nothing is amiss, be it that there is nothing to protect.
READY = (State.WAITING, State.STANDBY, State.ACTIVE, State.RETIRED)


class Driver:
    def __init__(
        self,
        record: TermRecord,
        around: Surroundings,
        link: Link,
        worker: ReplicaWorker,
        metrics: DomainMetrics,
        left: Activation | None = None,
    ) -> None:
        """`left`: an activation that an earlier life of this process did not finish."""
        self.uuid = record.uuid
        self.machine = Standby(Policy(around.limits.engine_restart_ns), record, left)
        self.peer: Peer | None = None  # the control connection of the session
        self.bulk_peer: Peer | None = None
        self._around = around
        self._paused = around.limits.activate_paused
        self._link = link
        self._worker = worker
        self._metrics = metrics
        self._replica_jobs = Jobs(f"replica-{self.uuid[:8]}", link.post)
        self._authority_jobs = Jobs(f"authority-{self.uuid[:8]}", link.post)
        self._authority = Authority(
            self.uuid,
            around.terms,
            around.activations,
            around.make_fence,
            around.limits.fence_timeout,
            around.clock,
        )
        self._hello: messages.Hello | None = None  # of the session
        self._offered: dict[int, tuple[Peer, messages.Hello]] = {}  # Hellos not answered yet
        self._assembler: EpochAssembler | None = None
        self._loads: dict[int, Load] = {}  # final parts by epoch, from whole to commit
        self._detector: Detector | None = None
        self._prepared = False
        self._has_pages = False
        self._digests: DigestAnswer | None = None  # under way
        self._discarded = 0
        self._alarm = ""
        self._no_fence = ""  # why the session's guest could not be fenced, if that is known already
        self._cause = "silence"  # of an activation, for the metrics
        self._told_at_end: set[State] = set()  # told, while the process was to end
        self._metrics.state(str(self.machine.state))

    # ------------------------------------------------------------ from the wire

    def owns(self, key: bytes, session: int, term: int) -> bool:
        """Whether this is the current session, and the peer with this key opened it."""
        hello = self._hello
        if hello is None or self.peer is None:
            return False
        return (self.peer.key, hello.session, hello.term) == (key, session, term)

    def hello(self, peer: Peer, hello: messages.Hello, *, guest_here: bool) -> None:
        self._offered[hello.session] = (peer, hello)
        if len(self._offered) > OFFERS:
            del self._offered[next(iter(self._offered))]
        old = self._hello
        same_guest = old is None or (
            (old.info.nr_pfns, old.info.domid) == (hello.info.nr_pfns, hello.info.domid)
        )
        if self._detector and hello.session == self.machine.session:
            self._hear()
        self.handle(
            ev.HelloReceived(hello.session, hello.term, hello.resume, guest_here, same_guest)
        )

    def control(self, peer: Peer, message: messages.Message) -> None:
        """A word of the current session."""
        session = self.machine.session
        assert session is not None, "the service looks sessions up"
        self._hear()
        if isinstance(message, messages.EngineLost):
            self.peer = peer  # the engine's own connection is dead: the watcher is answered
            detail = f"the guest is {message.guest}; {message.detail}"
            self.handle(ev.EngineLostHeard(session, detail, self._around.clock()))
            return
        self.handle(ev.Heard(session))
        match message:
            case messages.Heartbeat():
                self._heartbeat(message)
            case messages.Query(epoch, part):
                self.handle(ev.Queried(session))
                if self.machine.taking and self._assembler:
                    self._answer(self._assembler.query(epoch, part))
            case messages.Retire(reason):
                self.handle(ev.RetireReceived(session, reason))
            case messages.End(reason):
                self.peer = peer  # the engine says it, or its watcher
                self.handle(ev.EndReceived(session, reason))

    def bulk(self, peer: Peer, header: Header, payload: Octets) -> None:
        """A frame of the current session and term. Raises FrameError."""
        self.bulk_peer = peer
        if header.kind is Kind.DIGESTS_WANTED:
            self._answer_digests()
            return
        if not self.machine.taking or self._assembler is None:
            return
        faults.point("secondary.frame")
        self._metrics.received(len(payload))
        result = self._assembler.frame(header, payload)
        if self._assembler.discarded != self._discarded:
            # Before a part of the higher epoch is acked: see _admitted().
            self._discarded = self._assembler.discarded
            self._release_loads()
            self.handle(ev.EpochGivenUp())
            self._metrics.discarded()
        if isinstance(result, Load):
            faults.point("secondary.part-whole")
            self._admit(result)
        else:
            self._answer(result)

    def fault(self, text: str) -> None:
        """A frame of this session was malformed."""
        if self.machine.session is not None:
            self.handle(ev.ProtocolFault(self.machine.session, text))

    def tick(self, now_ns: int) -> None:
        silent_ns = 0
        if self._detector:
            silent_ns = self._detector.tick(now_ns)
            stuck_ns = self._detector.stuck_for(now_ns)
            if stuck_ns and self.machine.state is not State.ENGINE_LOST:
                self._raise_alarm(
                    f"the primary is alive and has done nothing for {stuck_ns // 1_000_000} ms"
                )
            self._metrics.peer_connected(not silent_ns)
        if self._digests:
            self._digests.tick()
        self.handle(ev.Tick(now_ns, silent_ns))

    # ------------------------------------------------------------ events and instructions

    def handle(self, event: ev.Event) -> None:
        before = self.machine.state
        for instruction in self.machine.handle(event):
            self._perform(instruction)
        after = self.machine.state
        if after is not before:
            log.info("%s: %s -> %s: %s", self.uuid, before, after, self.machine.reason)
            self._metrics.state(str(after))
            self._around.on_state(self.uuid, after)
            if after is State.ENGINE_LOST:
                self._cause = "engine-lost"
            elif after is State.STANDBY:
                self._cause = "silence"
            elif after is State.ACTIVE:
                self._metrics.failover(self._cause)
                self._has_pages = self._prepared = False  # they became the guest
                # What came since the last acked epoch will not be.
                self._release_loads()
                if self._assembler:
                    self._assembler.discard()

    def _perform(self, step: ev.Instruction) -> None:
        match step:
            case ev.BeginSession(session):
                self._begin(session)
            case ev.SendWelcome(session, last_epoch, committed):
                self._welcome(session, last_epoch, committed)
            case ev.SendRefused(session, code, text):
                self._refuse(session, code, text)
            case ev.SendAck(epoch, part, final):
                faults.point("secondary.before-ack")
                if self._assembler:
                    self._assembler.acked(epoch, part, final=final)
                self._send(messages.Ack(epoch, part, final))
                faults.point("secondary.after-ack")
            case ev.SendCommitted(epoch, commit_ns, audited):
                self._send(messages.Committed(epoch, commit_ns, audited))
            case ev.SendFullCopyWanted(reason):
                self._send(messages.FullCopyWanted(reason))
            case ev.SendRetired():
                assert self.machine.session is not None, "a Retire is of a session"
                self._send(messages.Retired(self.machine.session))
            case ev.SendEngineLostHeard():
                assert self.machine.session is not None, "it is of a session"
                self._send(messages.EngineLostHeard(self.machine.session))
            case ev.Commit(epoch):
                self._commit(self._loads.pop(epoch))
            case ev.DropReplica(_, keep_pages):
                self._drop(keep_pages=keep_pages)
            case ev.SuspendSession():
                if self._assembler:
                    self._assembler.restart_part()
            case ev.Probe(attempt):
                self._authority_jobs.do(lambda: self._authority.probe(attempt), self.handle)
            case ev.Fence(attempt):
                term, last = self.machine.term + 1, self.machine.committed
                assert last is not None, "fenced for a committed epoch"
                self._authority_jobs.do(
                    lambda: self._authority.fence(attempt, term, last), self._fenced
                )
            case ev.StoreTerm():
                self._authority_jobs.do(lambda: self._authority.store_term(step), self.handle)
            case ev.StartGuest(epoch):
                log.info("%s: starting the guest from epoch %d", self.uuid, epoch)
                self._replica_jobs.do(lambda: self._worker.start(paused=self._paused), self.handle)
            case ev.ResumeActivation():
                self._replica_jobs.do(lambda: self._worker.resume(paused=self._paused), self.handle)
            case ev.ForgetActivation():
                self._authority_jobs.do(self._authority.forget, nothing)
            case ev.Alarm(text):
                self._raise_alarm(text)
            case _:
                assert_never(step)

    def _begin(self, session: int) -> None:
        self.peer, hello = self._offered[session]
        self._hello = hello
        self.bulk_peer = None
        self._release_loads()
        if self._assembler:
            self._assembler.discard()
        if self._digests:
            self._digests.cancel()
            self._digests = None
        key = DigestKey(hello.digest_seed)
        self._assembler = assembler = EpochAssembler(
            hello.info.nr_pfns, key, self._around.budget, first_epoch=hello.first_epoch
        )
        assembler.ahead = Foresight(
            self._replica_jobs,
            lambda epoch, content: self._worker.foresee(session, epoch, content),
            assembler.foreseen,
        )
        self._discarded = 0
        now = self._around.clock()
        limits = self._around.limits
        self._detector = Detector(limits.silence_ns, limits.stuck_ns, limits.tick_ns, now)
        self._replica_jobs.do(lambda: self._worker.begin(hello), nothing)
        address = self.peer.address
        self._authority_jobs.do(
            lambda: self._authority.begin(hello.info, address), self._fence_made
        )

    def _fence_made(self, why: str) -> None:
        self._no_fence = why
        if why:
            self._raise_alarm(why)

    def _fenced(self, event: ev.FenceDone) -> None:
        self._metrics.fence_attempt(event.result.fenced)
        self.handle(event)

    def _welcome(self, session: int, last_epoch: int, committed: int | None) -> None:
        # A resumed session comes by a new connection.
        self.peer, hello = self._offered.pop(session)
        has_image = self._has_pages or self._around.image_exists(self.uuid)
        self._send(
            messages.Welcome(
                session, hello.term, last_epoch, committed, has_image,
                self._around.budget.limit, self._around.identity,
            )
        )  # fmt: skip

    def _refuse(self, session: int, code: str, text: str) -> None:
        offered = self._offered.pop(session, None)
        peer = offered[0] if offered else self.peer
        if peer is not None:
            term = self.machine.term
            message = messages.Refused(session, term, code, text)
            self._link.send(peer, message, session=session, term=term)

    def _send(self, message: messages.FromSecondary) -> None:
        """To the session's primary. What is lost is asked for again."""
        if self.peer and self._hello:
            self._link.send(self.peer, message, session=self._hello.session, term=self._hello.term)

    def _heartbeat(self, beat: messages.Heartbeat) -> None:
        if self._detector:
            self._detector.progressed(beat.progress, beat.phase, self._around.clock())
        if self.machine.state not in (State.ACTIVATING, State.ACTIVE):
            self._send(messages.Echo(beat.count, beat.sent_ns, self.machine.committed))

    def _hear(self) -> None:
        if self._detector and not self.machine.deaf:
            self._detector.heard(self._around.clock())

    def _answer(self, result: Lacking | Acked | None) -> None:
        match result:
            case Lacking(epoch, part, ranges):
                self._send(messages.Missing(epoch, part, ranges))
            case Acked(epoch, part, final):
                self._send(messages.Ack(epoch, part, final))

    def _raise_alarm(self, text: str) -> None:
        self._alarm = text
        self._metrics.alarm()
        log.error("%s: %s", self.uuid, text)

    # ------------------------------------------------------------ the replica's thread

    def _admit(self, load: Load) -> None:
        session = self.machine.session
        assert session is not None, "frames are of a session"

        def admit() -> CheckpointdError | None:
            try:
                self._worker.admit(load)
            except (NoRoomError, NotHeldError) as error:
                return error
            return None

        def then(error: CheckpointdError | None) -> None:
            if isinstance(error, NotHeldError):
                self._not_held(session, load, str(error))
            elif error is not None:
                self._no_room(session, load, str(error))
            else:
                self._admitted(session, load)

        self._replica_jobs.do(admit, then)

    def _admitted(self, session: int, load: Load) -> None:
        current = session == self.machine.session and self.machine.taking
        under_way = self._assembler and self._assembler.under_way == (load.epoch, load.part)
        if not (current and under_way):
            # Given up meanwhile. To commit it now would mix it with what came after it.
            self._release(load)
            return
        self._has_pages = True
        if load.final:
            # One that came before was held during a fence, and void once its session was suspended.
            if before := self._loads.pop(load.epoch, None):
                self._release(before)
            self._loads[load.epoch] = load
        self.handle(ev.PartWhole(session, load.epoch, load.part, load.final))

    def _no_room(self, session: int, load: Load, text: str) -> None:
        if session == self.machine.session and self.machine.taking and not load.final:
            self.handle(ev.MemoryShort(session, text))
            if self.machine.state is State.SYNCING and self.machine.reason.endswith(text):
                self._admit(load)  # now straight into the image
                return
        if text != self._alarm:
            self._raise_alarm(text)
        self._release(load)
        if session == self.machine.session and self._assembler:
            self._assembler.restart_part()  # the primary asks, and ships it again

    def _not_held(self, session: int, load: Load, text: str) -> None:
        """Nothing of the part was taken in. All of it is asked for again, and comes as it is."""
        log.warning("%s: epoch %d: %s; asking for it again", self.uuid, load.epoch, text)
        self._metrics.not_held()
        self._release(load)
        if session != self.machine.session or self._assembler is None:
            return
        if self._assembler.under_way == (load.epoch, load.part):
            self._assembler.restart_part()
            if self.machine.taking:
                self._answer(Lacking(load.epoch, load.part, messages.EVERYTHING))

    def _commit(self, load: Load) -> None:
        self._metrics.lag(len(self.machine.pending))
        self._replica_jobs.do(lambda: self._worker.commit(load), self._committed)

    def _committed(self, event: ev.CommitDone | ev.CommitFailed) -> None:
        if isinstance(event, ev.CommitDone):
            self._metrics.committed(event.commit_ns)
            self._metrics.audited(event.audited, len(event.mismatches))
            self._metrics.replica_bytes(self._worker.octets)
        self.handle(event)
        self._metrics.lag(len(self.machine.pending))
        if not self._prepared and self.machine.state is State.STANDBY:
            self._prepared = True
            self._replica_jobs.do(self._worker.prepare, nothing)

    def _drop(self, *, keep_pages: bool) -> None:
        if not keep_pages:
            self._release_loads()
            if self._assembler:
                self._assembler.discard()
            self._has_pages = False
        self._prepared = False
        self._replica_jobs.do(lambda: self._worker.drop(keep_pages=keep_pages), nothing)

    def _release_loads(self) -> None:
        for load in self._loads.values():
            self._release(load)
        self._loads.clear()

    def _release(self, load: Load) -> None:
        self._around.budget.give_back(load.octets)
        load.octets = 0

    def _answer_digests(self) -> None:
        hello = self._hello
        assert hello is not None, "frames are of a session"
        if self._digests:
            self._digests.cancel()

        def make(first: int, count: int, then: Callable[[bytes], None]) -> None:
            self._replica_jobs.do(lambda: self._worker.digests(first, count), then)

        def send(header: Header, payload: bytes) -> Sent:
            assert self.bulk_peer is not None, "they were asked for by it"
            return self._link.send_bulk(self.bulk_peer, header, payload)

        self._digests = DigestAnswer(
            hello.session, hello.term, hello.info.nr_pfns, DigestKey(hello.digest_seed), make, send
        )

    # ------------------------------------------------------------ life

    def may_end(self) -> bool:
        """Whether the process may end now, for all that this domain knows. Why not is logged, once for each reason."""
        machine = self.machine
        if machine.at_end and machine.state not in self._told_at_end:
            self._told_at_end.add(machine.state)
            log.error("%s: %s", self.uuid, machine.at_end)
        return not machine.owes_guest

    def not_ready(self) -> str:
        """Why its guest, which ought to be protected, could not be activated at this moment; "": it could."""
        machine = self.machine
        if machine.state not in READY or machine.wants_copy:
            return f"{machine.state}: {machine.reason}"
        if machine.state is State.STANDBY and (trouble := self._worker.trouble()):
            return f"{machine.state}: {trouble}"
        return ""

    def close(self) -> None:
        """After the acceptor has ended. Waits for both threads."""
        self._authority_jobs.close(self._authority.close)
        self._replica_jobs.close(self._worker.close)
        self._release_loads()
        if self._assembler:
            self._assembler.discard()

    def status(self) -> dict[str, Any]:
        """A snapshot for people and programs; from any thread."""
        machine, hello, detector = self.machine, self._hello, self._detector
        info = hello.info if hello else None
        return {
            "uuid": self.uuid,
            "domain": info.name if info else None,
            "domid": info.domid if info else None,
            "state": str(machine.state),
            "reason": machine.reason,
            "term": machine.term,
            "session": f"{machine.session:#x}" if machine.session else None,
            "acked_epoch": machine.acked or None,
            "committed_epoch": machine.committed,
            "uncommitted": len(machine.pending),
            "replica_bytes": self._worker.octets,
            "ram_pages": info.ram_pages if info else None,
            "silent_ns": detector.silent_for(self._around.clock()) if detector else None,
            "stalls": detector.stalls if detector else 0,
            "no_fence": self._no_fence or None,
            "alarm": self._alarm or None,
            "warm": self._worker.warm(),
        }
