"""The watcher: a small process beside an engine, which undoes the engine's work when that dies (invariant 5).

    python -m checkpointd.hypervisor.xen.watcher --domid N --uuid UUID --engine PID --started TICKS
        --run-dir DIR --limit SECONDS

The engine starts it before it touches the guest, and talks to it by a pipe, its standard input: lines of JSON, each an
object with one name (handle.py writes them). "beat" says that the engine lives, "contact" whom to tell should it be
lost, "bye" that it has left the guest in order, with a last word of its own that nobody has answered. The end of the
pipe without "bye" is the engine's death, however it came. A line on standard output says once that the watcher is
ready.

What it needs later it has loaded, connected and locked into memory before that: an engine may die of want of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import math
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from checkpointd.authority.processes import HostIdentity, boot_id, start_time
from checkpointd.errors import CheckpointdError, DomainBusyError, HypervisorError
from checkpointd.hypervisor.port import EndReason
from checkpointd.hypervisor.xen import release as releases
from checkpointd.hypervisor.xen import state as states
from checkpointd.wire import messages
from checkpointd.wire.keys import KeyPair
from checkpointd.wire.notices import Notices
from checkpointd.wire.sockets import Contexts, Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from checkpointd.hypervisor.xen.release import Hands, Seen

log = logging.getLogger(__name__)

READY: Final = b"ready\n"
# s; the engine's beats come twice as often. Silence is counted in these ticks, not by a clock: when the whole machine
# was asleep, or this process stopped, the engine is not to blame.
TICK: Final = 1.0
TELL_EVERY: Final = (
    0.2  # s; well within the shortest silence that a secondary takes for one by default (1 s)
)
# s; beyond this a new engine's HELLO has ended the session that we speak of: our words are not answered any more.
UNANSWERED: Final = 2.0
END_FOR: Final = 5.0  # s; the engine itself says END for so long
# s; what a secondary has to be told that was not there to hear it. One that is away for longer has acted, or needs a
# person.
LAST_WORD_FOR: Final = 600.0
LAST_WORD_EVERY: Final = 1.0  # s
# s; an engine that closed its pipe, or was killed, has ended by then. Unmapping a large guest takes the kernel a while.
GONE: Final = 5.0
SESSIONS_KEPT: Final = 2  # the last one may not have reached the secondary yet


class Watcher:
    """Order of steps: engine gone (seen on its pidfd), secondary told, guest released. Told first, for that waits for
    nothing, and a secondary that hears nothing for a second takes the host for lost. The guest is not touched any more
    once a new engine holds the domain's lock, and nothing here opens its output.
    """

    def __init__(
        self,
        engine: HostIdentity,
        domid: int,
        uuid: str,
        run_dir: Path,
        hands: Hands,
        *,
        limit: float,
        dial: Callable[[dict[str, Any]], Notices],
        source: int = 0,
        tick: float = TICK,
    ) -> None:
        """`limit`: s of silence of the engine's pipe after which it is killed; `source`: the pipe's descriptor."""
        self._engine = engine
        self._domid = domid
        self._uuid = uuid
        self._run_dir = run_dir
        self._hands = hands
        self._ticks = max(1, round(limit / tick))
        self._dial = dial
        self._source = source
        self._tick = tick
        self._pidfd = _open(engine)
        self._contacts: list[Notices] = []
        self._buffer = b""
        self._why = ""
        self._trouble = ""
        self._last_word: messages.End | messages.Retire | None = (
            None  # that the engine got no answer to
        )
        self._asked: float | None = None  # of states.asked(), when the engine was found dead
        self.stop = False  # set by a signal: the machine goes down

    def run(self) -> None:
        """Until the engine says "bye", or what there is to do after its death is done."""
        try:
            if self._guard():
                self._say_last()
                return
            log.error("domain %d: %s", self._domid, self._why)
            self._asked = states.asked(self._run_dir, self._domid)
            self._after()
        finally:
            for contact in self._contacts:
                contact.close()
            if self._pidfd is not None:
                os.close(self._pidfd)

    # ------------------------------------------------------------ while the engine lives

    def _guard(self) -> bool:
        """True: it has said "bye". False: it is gone, and `_why` says how."""
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        if self._pidfd is not None:
            poll.register(self._pidfd, select.POLLIN)
        silent = 0
        while True:
            ready = dict(poll.poll(self._tick * 1000))
            if self._source in ready:
                silent = 0
                data = os.read(self._source, 1 << 16)
                if self._take(data):
                    return True
                if not data:
                    self._end_engine(f"engine {self._engine.pid} died")
                    return False
            elif self._pidfd in ready:
                self._why = f"engine {self._engine.pid} died"
                return False
            else:
                silent += 1
                if silent >= self._ticks:
                    seconds = self._ticks * self._tick
                    self._end_engine(
                        f"engine {self._engine.pid} did nothing for {seconds:g} s and was killed",
                        patience=0,
                    )
                    return False

    def _take(self, data: bytes) -> bool:
        """Lines from the engine; True: "bye"."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            word = json.loads(line)
            if "bye" in word:
                if "end" in word:
                    self._last_word = messages.End(EndReason(word["end"]))
                elif "retire" in word:
                    self._last_word = messages.Retire(word["retire"])
                return True
            if "contact" in word:
                self._contacts.append(self._dial(word["contact"]))
                while len(self._contacts) > SESSIONS_KEPT:
                    self._contacts.pop(0).close()
        return False

    def _end_engine(self, why: str, patience: float = GONE) -> None:
        """Wait until it is gone; one that does not go by itself is killed. While it lives nothing is undone."""
        self._why = why
        if self._pidfd is None:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        while not poll.poll(patience * 1000):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            if patience:
                log.error("engine %d was killed and is not gone yet", self._engine.pid)
            patience = GONE

    # ------------------------------------------------------------ after its end in order

    def _say_last(self) -> None:
        """Protection has ended, and a secondary that does not know of it would activate the guest."""
        word = self._last_word
        if word is None:
            return
        until = time.monotonic() + LAST_WORD_FOR
        self.stop = False  # as below
        while not self.stop and time.monotonic() < until and not self._is_protected_anew():
            self._say(word)
            for answer in self._hear(LAST_WORD_EVERY):
                if isinstance(answer, messages.Retired):
                    log.info("domain %d: the secondary has retired its replica", self._domid)
                    return
                if isinstance(answer, messages.Refused) and self._yield(word, answer):
                    return
        log.error("domain %d: the secondary does not know that its protection ended", self._domid)

    def _yield(self, word: messages.End | messages.Retire, refused: messages.Refused) -> bool:
        """The other side runs the guest. It may be here, too, if it had not ended."""
        seen = self._look()
        if isinstance(word, messages.Retire) and seen is not None and seen.uuid == self._uuid:
            return self._pause(refused)
        log.critical(
            "domain %d: the other side runs this guest now (%s), which must not run anywhere else",
            self._domid,
            refused.text,
        )
        return True

    def _is_protected_anew(self) -> bool:
        """By whatever process, as whatever domain: then there is a session after ours."""
        with contextlib.suppress(HypervisorError):
            states_of = (
                states.load(self._run_dir, n) for n in states.find(self._run_dir, uuid=self._uuid)
            )
            return any(state is not None and state.engine_lives for state in states_of)
        return False

    # ------------------------------------------------------------ after its death

    def _after(self) -> None:
        state = states.EngineState(self._uuid, self._domid, self._engine)
        undone: releases.Undone | None = None
        done: list[str] = []
        late_until = -math.inf
        self.stop = False  # a signal that came while the engine lived was not for us
        self._say(messages.EngineLost(self._uuid, messages.LeftGuest.STOPPED, self._why))
        answered = time.monotonic()
        ending: tuple[EndReason, float] | None = None
        while not self.stop:
            superseded = self._superseded()
            if not superseded and undone is None and (undone := self._release()) is not None:
                done += undone.done
                late_until = time.monotonic() + undone.late
            seen = self._look()
            if ending is None and (end := self._ended(seen)) is not None:
                log.info("domain %d has ended: %s", self._domid, end)
                ending = (end, time.monotonic() + END_FOR)
            late = time.monotonic() < late_until
            if late and not superseded and (came := self._look_for_late(state)) is not None:
                done += came
                late_until = -math.inf
            if ending is not None:
                self._say(messages.End(ending[0]))
            else:
                self._say(self._lost(seen, done))
            for answer in self._hear(TELL_EVERY):
                answered = time.monotonic()
                if isinstance(answer, messages.Retired) and ending is not None:
                    return
                # A new engine hears it, too, and pauses the guest itself.
                if isinstance(answer, messages.Refused) and (superseded or self._pause(answer)):
                    return
            if ending is not None and time.monotonic() >= ending[1]:
                return
            unanswered = time.monotonic() - answered >= UNANSWERED
            if superseded and unanswered:
                return
            if undone is not None and not late and not self._contacts:
                return

    def _superseded(self) -> bool:
        """A new engine has the domain."""
        with contextlib.suppress(HypervisorError):
            state = states.load(self._run_dir, self._domid)
            return state is not None and state.engine != self._engine and state.engine_lives
        return False

    def _release(self) -> releases.Undone | None:
        """What was undone, by us or by another; None: it is to be tried again."""
        try:
            with states.DomainLock(self._run_dir, self._domid, timeout=0):
                state = states.load(self._run_dir, self._domid)
                if state is None or state.engine != self._engine:
                    # Whoever was here before us may have ended since.
                    return releases.Undone([], releases.lateness(self._asked))
                undone = releases.undo(self._run_dir, state, self._hands)
        except DomainBusyError:
            return None
        except HypervisorError as error:
            self._complain(f"domain {self._domid} is not released yet: {error}")
            return None
        log.warning("domain %d: %s", self._domid, ", ".join(undone.done) or "nothing to undo")
        return undone

    def _look_for_late(self, state: states.EngineState) -> list[str] | None:
        try:
            came = releases.look_for_late(self._run_dir, state, self._hands)
        except HypervisorError as error:
            self._complain(f"domain {self._domid} may have suspended late: {error}")
            return None
        if came:
            log.warning("domain %d: %s", self._domid, ", ".join(came))
        return came

    def _look(self) -> Seen | None:
        try:
            return self._hands.look(self._domid)
        except HypervisorError as error:
            self._complain(f"domain {self._domid} cannot be looked at: {error}")
            return releases.Seen(self._uuid, suspended=False, paused=True, ended=None)

    def _complain(self, text: str) -> None:
        """Once for a trouble that lasts."""
        if text != self._trouble:
            log.error("%s", text)
        self._trouble = text

    def _ended(self, seen: Seen | None) -> EndReason | None:
        if seen is None or seen.uuid != self._uuid:
            return EndReason.DESTROYED
        return seen.ended

    def _lost(self, seen: Seen | None, done: list[str]) -> messages.EngineLost:
        runs = seen is not None and not seen.suspended and not seen.paused
        guest = messages.LeftGuest.RUNNING if runs else messages.LeftGuest.STOPPED
        return messages.EngineLost(self._uuid, guest, ", ".join([self._why, *done]))

    def _pause(self, refused: messages.Refused) -> bool:
        try:
            self._hands.pause(self._domid)
        except HypervisorError as error:
            self._complain(f"domain {self._domid} was taken over, and is not paused yet: {error}")
            return False
        log.critical(
            "domain %d stays paused, since the other side runs this guest now (%s): destroy it here",
            self._domid,
            refused.text,
        )
        return True

    def _say(self, message: messages.EngineLost | messages.End | messages.Retire) -> None:
        for contact in self._contacts:
            contact.say(message)

    def _hear(self, seconds: float) -> list[messages.Message]:
        """What is answered within this time; at once what decides."""
        found: list[messages.Message] = []
        deadline = time.monotonic() + seconds
        poll = select.poll()
        for contact in self._contacts:
            poll.register(contact.fileno(), select.POLLIN)
        while True:
            # First: zmq's descriptors tell of changes only.
            for contact in self._contacts:
                found += contact.heard()
            left = deadline - time.monotonic()
            if left <= 0 or any(
                isinstance(word, messages.Refused | messages.Retired) for word in found
            ):
                return found
            poll.poll(left * 1000)


def _open(process: HostIdentity) -> int | None:
    """A pidfd of this process and no other; None: it is gone."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if start_time(process.pid) == process.start_time:
        return pidfd
    os.close(pidfd)
    return None


def dial(contacts: Contexts) -> Callable[[dict[str, Any]], Notices]:
    """Makes a connection of what handle.py wrote about a contact."""

    def connect(word: dict[str, Any]) -> Notices:
        endpoint = Endpoint(word["host"], word["key"].encode(), word["port"])
        keys = KeyPair(word["public"].encode(), word["secret"].encode())
        return Notices(contacts.control, endpoint, keys, session=word["session"], term=word["term"])

    return connect


# mlockall(2), of <sys/mman.h> on x86 and Arm.
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def stay_in_memory() -> None:
    """What is loaded now stays, and so does what is touched later; the kernel kills others first."""
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_MCL_CURRENT, _MCL_FUTURE | _MCL_ONFAULT):
        if libc.mlockall(flags):
            log.warning("memory is not locked: %s", os.strerror(ctypes.get_errno()))
            break
    try:
        Path("/proc/self/oom_score_adj").write_text("-900", encoding="ascii")
    except OSError as error:
        log.warning("this process is not spared when memory runs out: %s", error.strerror)


def main(argv: Sequence[str] | None = None, hands: Hands | None = None) -> int:
    """Be the watcher that the command line asks for; `hands`: on what, if not on Xen."""
    parser = argparse.ArgumentParser(prog="checkpointd watcher", allow_abbrev=False)
    parser.add_argument("--domid", type=int, required=True)
    parser.add_argument("--uuid", required=True)
    parser.add_argument("--engine", type=int, required=True, help="pid of the engine")
    parser.add_argument(
        "--started", type=int, required=True, help="its start, as in /proc/PID/stat"
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--untested", action="store_true")
    args = parser.parse_args(argv)
    logging.basicConfig(format="checkpointd watcher: %(message)s", level=logging.INFO)
    for number in (signal.SIGHUP, signal.SIGINT):  # of a terminal that the engine was started from
        signal.signal(number, signal.SIG_IGN)
    contexts = Contexts.make()
    try:
        hands = hands or releases.UndoHands(untested=args.untested)
        engine = HostIdentity(boot_id(), args.engine, args.started)
        watcher = Watcher(
            engine, args.domid, args.uuid, args.run_dir, hands, limit=args.limit, dial=dial(contexts)
        )  # fmt: skip

        def stop(number: int, frame: object) -> None:
            watcher.stop = True

        signal.signal(signal.SIGTERM, stop)
        hands.look(args.domid)  # once, so that all of the way is in memory
        stay_in_memory()
        with contextlib.suppress(BrokenPipeError):  # the engine has died meanwhile: seen below
            os.write(sys.stdout.fileno(), READY)
        watcher.run()
    except CheckpointdError as error:
        log.error("%s", error)
        return 1
    finally:
        contexts.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
