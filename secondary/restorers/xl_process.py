"""One `xl migrate-receive -r`: xl's own receiver of Remus streams, started, fed, and ended by us.

libxl has the domain built and paused all along, under the name NAME--incoming, and applies an epoch
when it has read the epoch's CHECKPOINT_END. It takes the end of its input, wherever that comes, for the
loss of the primary: then it finishes the domain as of the last whole epoch, gives it its own name and
unpauses it. Facts that the code below stands on, each seen on Xen 4.17 and 4.20:

- xl unpauses once. A pause more, taken by us as the toolstack takes its own, keeps the guest still.
- Input that ends between CHECKPOINT and CHECKPOINT_END makes xl spin for ever, eating memory.
- The header of the next record is read only after an epoch has been applied, so octets of it that are
  left in the pipe tell that it has not been.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import termios
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol

from checkpointd.authority.processes import identify
from checkpointd.errors import HypervisorError
from checkpointd.stream.records import RecordType, split_records
from checkpointd.stream.remus import SEAL
from checkpointd.stream.writer import record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from checkpointd.authority.processes import HostIdentity
    from checkpointd.stream.records import Octets

log = logging.getLogger(__name__)

COMMAND = ("xl", "migrate-receive", "-r")
INCOMING = "--incoming"  # so ends the name of a domain that xl has not finished (xl_migrate.c)
BANNER = b"xl migration receiver ready, send binary domain data.\n"

PIPE_SIZE = 1 << 20  # octets: what an unprivileged process may have, and one record of ours
POLL = 0.005  # s between two looks at what nothing announces: a new domain, an emptied pipe
LINES_KEPT = 20  # of xl's stderr, for the message that says why it failed
LINE_MAX = 1000  # octets of one such line
LAST_WORDS = 1.0  # s; for what a dead xl said last, which its helper may keep from ending


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. xl answers within milliseconds, ten times that where everybody is busy; these are for an
    xl that hangs, and each of them is a part of how long an activation may take that meets one.
    """

    banner: float = 10.0  # from its start to its first words
    domain: float = 60.0  # until it has made the domain, for which it may wait for free memory
    stall: float = 10.0  # without an octet read from its pipe
    exit: float = 30.0  # from end of input to its exit; devices are connected in it
    destroy: float = 30.0  # for `xl destroy`
    kill: float = (
        5.0  # from SIGKILL to its end, which only a call that hangs in the kernel puts off
    )


class Found(Protocol):
    @property
    def domid(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def paused(self) -> bool: ...


class Domains(Protocol):
    """What is needed of the hypervisor itself. Every call raises HypervisorError."""

    def find(self, uuid: str) -> Found | None: ...
    def pause(self, domid: int) -> None:
        """One controller pause more than there are."""
        ...

    def unpause(self, domid: int) -> None:
        """One controller pause less."""
        ...

    def drop_pages(self, domid: int, pfns: Sequence[int]) -> None:
        """Take back the memory behind these pfns."""
        ...

    def destroy(self, domid: int, timeout: float) -> None:
        """The domain and all that the toolstack has for it; `timeout` in seconds."""
        ...


class InterruptedFeedError(HypervisorError):
    """Somebody wants this receiver ended, and does it next."""


class XlReceive:
    """One incoming domain. Used by one thread at a time.

    Never loose (invariant 5), by this order: xl is started, the stream's headers make it create the
    domain, hold() takes a pause of our own, and only then is the first CHECKPOINT_END written, without
    which xl starts nothing. So our death, which closes the pipe, leaves a paused domain behind.
    Whole epochs only (invariant 2): CHECKPOINT and CHECKPOINT_END leave in one write of fewer octets
    than PIPE_BUF, which the kernel does wholly or not at all, whatever kills us.
    """

    def __init__(
        self,
        domains: Domains,
        uuid: str,
        *,
        interrupt: int | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`interrupt`: a descriptor that is readable once nobody wants the result any more."""
        self.uuid = uuid
        self.domid: int | None = None  # once hold() has found it
        self.identity: HostIdentity | None = None  # of xl, for whoever looks for it after our death
        self._domains = domains
        self._interrupt = interrupt
        self._limits = limits or Limits()
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = -1  # pidfd of xl
        self._pipe = -1
        self._owed = b""  # the rest of the record whose header told on the epoch before
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._listener: threading.Thread | None = None

    # ------------------------------------------------------------ begin

    def start(self) -> None:
        """Start xl and wait for its banner. Raises HypervisorError."""
        if found := self._domains.find(self.uuid):
            raise HypervisorError(
                f"domain {found.domid} ({found.name}) with UUID {self.uuid} lives here: two of them "
                f"cannot; if it is not needed, `xl destroy {found.domid}`"
            )
        try:
            process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd="/",
                # A signal to our process group, such as Ctrl-C, is none of xl's business; and its group
                # is how abort() finds its helper.
                start_new_session=True,
            )
        except OSError as error:
            raise HypervisorError(f"cannot run xl ({error.strerror}): install xen-utils") from None
        self._process = process
        with contextlib.suppress(ProcessLookupError):  # it has ended already, which is told below
            self.identity = identify(process.pid)
        assert process.stdin is not None, "asked for"
        assert process.stderr is not None, "asked for"
        self._exited = os.pidfd_open(process.pid)
        self._pipe = process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        with contextlib.suppress(OSError):  # a pipe of 64 KiB is slower, no more
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._listener = threading.Thread(
            target=self._listen,
            args=(process.stderr,),
            name=f"xl-stderr-{self.uuid[:8]}",
            daemon=True,
        )
        self._listener.start()
        self._await_banner()

    def _await_banner(self) -> None:
        assert self._process is not None, "started"
        assert self._process.stdout is not None, "asked for"
        descriptor = self._process.stdout.fileno()
        deadline = self._clock() + self._limits.banner
        said = b""
        while len(said) < len(BANNER):
            if not self._wait(descriptor, select.POLLIN, deadline - self._clock()):
                raise self._failed(f"did not say that it is ready within {self._limits.banner:g} s")
            some = os.read(descriptor, len(BANNER) - len(said))
            if not some:
                raise self._failed("ended before it was ready")
            said += some
        if said != BANNER:
            raise self._failed(f"began with {said!r}, which is no receiver's banner")

    def hold(self) -> None:
        """Once the stream's headers are written: wait for the domain, and keep it from ever running.

        Raises HypervisorError.
        """
        deadline = self._clock() + self._limits.domain
        while not (found := self._domains.find(self.uuid)):
            # No event tells it before the domain is introduced to xenstored, which is done last.
            self._wait(None, 0, POLL)
            if self._clock() > deadline:
                raise self._failed(f"made no domain within {self._limits.domain:g} s")
        self._domains.pause(found.domid)
        self.domid = found.domid

    # ------------------------------------------------------------ feed

    def feed(self, data: Octets) -> None:
        """Octets of an epoch, but not its seal. Returns once they are in the pipe. Raises
        HypervisorError: xl has died, or has taken nothing for its limit.
        """
        owed, self._owed = self._owed, b""
        self._write(memoryview(owed))
        self._write(memoryview(data).cast("B"))

    def seal(self, tail: Octets) -> None:
        """End the epoch whose tail records, `tail`, have been fed: from here on it counts.

        Raises HypervisorError.
        """
        assert self.domid is not None, "an epoch that counts, and nothing that holds the guest"
        self.feed(b"")
        probe = _probe(tail)
        last = SEAL + probe[:8]
        assert len(last) <= select.PIPE_BUF, "one write"
        while True:
            self._check()
            try:
                written = os.write(self._pipe, last)
            except BlockingIOError:
                self._await_room()
            except BrokenPipeError:
                raise self._failed("closed its pipe") from None
            else:
                break
        assert written == len(last), "POSIX: so few octets are written as a whole"
        self._owed = probe[8:]

    @property
    def unread(self) -> int:
        """Octets in the pipe. 0 after seal(): xl has applied the epoch."""
        unread = bytearray(4)
        fcntl.ioctl(self._pipe, termios.FIONREAD, unread)
        return int.from_bytes(unread, "little")

    def wait_applied(self, limit: float) -> None:
        """Until xl has applied the epoch that was sealed last; `limit` in seconds. Raises
        HypervisorError.
        """
        deadline = self._clock() + limit
        while self.unread:
            self._wait(None, 0, POLL)
            if self._clock() > deadline:
                raise self._failed(f"has not applied an epoch within {limit:g} s")

    def wait(self, wake: int) -> None:
        """Until `wake` is readable. Raises HypervisorError if xl dies first."""
        while not self._wait(wake, select.POLLIN, None):
            pass

    def _write(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self._pipe, view) :]
            except BlockingIOError:
                self._await_room()
            except BrokenPipeError:
                raise self._failed("closed its pipe") from None

    def _await_room(self) -> None:
        if not self._wait(self._pipe, select.POLLOUT, self._limits.stall):
            raise self._failed(f"hangs: it has read nothing for {self._limits.stall:g} s")

    def _check(self) -> None:
        self._wait(None, 0, 0)

    def _wait(self, descriptor: int | None, events: int, timeout: float | None) -> bool:
        """Whether `descriptor` is ready within `timeout` (s). Raises HypervisorError if xl has died."""
        poll = select.poll()
        poll.register(self._exited, select.POLLIN)
        if self._interrupt is not None:
            poll.register(self._interrupt, select.POLLIN)
        if descriptor is not None:
            poll.register(descriptor, events)
        ready = dict(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))
        if self._interrupt in ready:
            raise InterruptedFeedError("given up")
        if self._exited in ready:
            assert self._process is not None, "it has a pidfd"
            code = self._process.wait()
            raise self._failed(
                f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            )
        return descriptor in ready

    # ------------------------------------------------------------ end

    def finish(self) -> int:
        """Close the pipe: xl finishes the domain as of the last sealed epoch. Gives its domid; it is
        still held by our pause. Raises HypervisorError; abort() is next then.
        """
        assert self._process is not None, "started"
        assert self.domid is not None, "held"
        self._check()
        self._close_pipe(self._process)
        try:
            code = self._process.wait(self._limits.exit)
        except subprocess.TimeoutExpired:
            raise self._failed(
                f"did not finish the domain within {self._limits.exit:g} s"
            ) from None
        if code:
            raise self._failed(f"ended with code {code} instead of finishing the domain")
        found = self._domains.find(self.uuid)
        if found is None or found.domid != self.domid:
            raise self._failed(f"has ended well, but domain {self.domid} is not here")
        if not found.paused:
            log.warning("domain %d runs already: somebody has unpaused it", found.domid)
        if found.name.endswith(INCOMING):
            log.warning(
                "domain %d keeps the name %s, for xl could not change it; `xl rename` does",
                found.domid,
                found.name,
            )
        self._let_go(self._process)
        return found.domid

    def drop_pages(self, pfns: Sequence[int]) -> None:
        """Between finish() and release(): take back the memory of pages that the guest has given up since
        they were sent, for xl keeps it, and then the guest could not grow again. Raises HypervisorError.
        """
        assert self.domid is not None, "held"
        self._domains.drop_pages(self.domid, pfns)

    def release(self) -> None:
        """Take our pause away: the guest runs, unless somebody else holds it, too. Raises HypervisorError."""
        assert self.domid is not None, "held"
        try:
            self._domains.unpause(self.domid)
        except HypervisorError:
            # Xen refuses to unpause a domain that runs: somebody has done so already.
            found = self._domains.find(self.uuid)
            if found is None or found.domid != self.domid or found.paused:
                raise

    def abort(self) -> None:
        """Kill xl and its helper, and destroy the domain. Idempotent: it tries once, within the limits of `kill` and
        `destroy`. Raises HypervisorError if xl or the domain is still there.
        """
        process, self._process = self._process, None
        self.domid = None
        if process is None:
            return
        if process.poll() is None or self._pipe >= 0:
            with contextlib.suppress(ProcessLookupError):
                # xl may be dead and its helper not: the group is there as long as one of them.
                os.killpg(process.pid, signal.SIGKILL)
        dead = True
        try:
            process.wait(self._limits.kill)
        except subprocess.TimeoutExpired:
            dead = False
        self._close_pipe(process)
        self._let_go(process)
        # Killed before hold() it may have made a domain, or not: no other can have this UUID, or
        # start() would have refused.
        if found := self._domains.find(self.uuid):
            self._domains.destroy(found.domid, self._limits.destroy)
        if not dead:
            raise HypervisorError(hangs(process.pid, self._limits))

    def _close_pipe(self, process: subprocess.Popen[bytes]) -> None:
        if self._pipe >= 0:
            assert process.stdin is not None, "it has a pipe"
            process.stdin.close()
            self._pipe = -1

    def _let_go(self, process: subprocess.Popen[bytes]) -> None:
        """After the end of xl; what it left to look after the guest has closed our stderr."""
        if self._listener is not None:
            self._listener.join(LAST_WORDS)
            self._listener = None
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        if self._exited >= 0:
            os.close(self._exited)
            self._exited = -1

    # ------------------------------------------------------------ what it says

    def _listen(self, stderr: IO[bytes]) -> None:
        rest = b""
        descriptor = stderr.fileno()
        while some := os.read(descriptor, 4096):
            *lines, rest = (rest + some).split(b"\n")
            for line in lines:
                self._said(line)
            if len(rest) > LINE_MAX:
                self._said(rest)
                rest = b""
        if rest:
            self._said(rest)

    def _said(self, line: bytes) -> None:
        text = line[:LINE_MAX].decode(errors="replace").strip()
        if text:
            self._lines.append(text)
            log.info("%s: xl: %s", self.uuid, text)

    def _failed(self, what: str) -> HypervisorError:
        """`what`: a predicate, its subject is xl."""
        if (
            self._listener is not None
            and self._process is not None
            and self._process.poll() is not None
        ):
            self._listener.join(LAST_WORDS)
        said = "; it said: " + " | ".join(self._lines) if self._lines else ""
        return HypervisorError(f"xl, which was to take in {self.uuid}, {what}{said}")


def hangs(pid: int, limits: Limits) -> str:
    """For people: it was killed, and is there yet."""
    return (
        f"xl (pid {pid}) is not dead {limits.kill:g} s after SIGKILL: it hangs in the kernel, and this host may have "
        "to be started anew"
    )


def _probe(tail: Octets) -> bytes:
    """A record that may begin any epoch and changes nothing: its header, written behind a seal, stays in
    the pipe until xl has applied the epoch. It is the epoch's X86_TSC_INFO once more, which every
    epoch of every kind of guest has, and the next one's own replaces.
    """
    for kind, body in split_records(tail):
        if kind == RecordType.X86_TSC_INFO:
            return record(kind, body)
    return b""
