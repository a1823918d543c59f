"""The engine's end of its watcher (watcher.py): starts it, keeps it informed, and starts another if it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from checkpointd.authority.processes import identify
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.xen.watcher import READY, TICK
from checkpointd.wire.messages import End, Retire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from checkpointd.hypervisor.port import Contact

log = logging.getLogger(__name__)

# s; a Python with zmq and Xen's libraries starts in half a second, and in half a minute on a machine in trouble.
START_TIMEOUT: Final = 120.0
# s; an engine whose threads do nothing for so long is stopped or stuck: a beat needs no more than a moment of a
# processor. The guest may be suspended all the while, so not longer than a person's patience.
SILENCE: Final = 10.0
REASON_MAX: Final = (
    500  # characters; in a line that is to be written whole, six octets each at most
)
BYE_TIMEOUT: Final = 5.0  # s; it only has to read one line and exit


class WatcherHandle:
    """One for each attached domain. Its thread sends the beats, so they say that the process lives, not that the
    epoch loop makes progress: that is the watchdog's to see.
    """

    def __init__(
        self,
        domid: int,
        uuid: str,
        run_dir: Path,
        *,
        untested: bool = False,
        limit: float = SILENCE,
        command: Sequence[str] = (sys.executable, "-P", "-m", "checkpointd.hypervisor.xen.watcher"),
        on_start: Callable[[int], object] = lambda pid: None,
    ) -> None:
        """`limit`: s of silence after which the watcher ends this process. `on_start` gets the pid of each watcher,
        also of one that replaces another, on a thread of the handle's.
        """
        us = identify()
        self._command = [
            *command, "--domid", str(domid), "--uuid", uuid, "--engine", str(us.pid),
            "--started", str(us.start_time), "--run-dir", str(run_dir), "--limit", str(limit),
            *["--untested"] * untested,
        ]  # fmt: skip
        self._on_start = on_start
        self._lock = threading.Lock()  # of the pipe, and of who is behind it
        self._process: subprocess.Popen[bytes] | None = None
        self._contacts: list[Contact] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"watcher-{domid}", daemon=True)

    def start(self) -> int:
        """Its pid, once it is ready. Raises HypervisorError."""
        process = self._launch()
        self._process = process
        self._on_start(process.pid)
        self._thread.start()
        return process.pid

    def update(self, contact: Contact) -> None:
        """Whom to tell from now on. Also the one before is told, to whom this session may not have come yet."""
        with self._lock:
            self._contacts = [*self._contacts[-1:], contact]
            self._write(_described(contact))

    def bye(self, word: Retire | End | None = None) -> None:
        """The guest is left in order: the watcher ends; if it is given a last word, once that is answered, or after
        LAST_WORD_FOR (watcher.py). Idempotent.
        """
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            assert process.stdin is not None, "it is a pipe"
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), _line({"bye": True, **_spoken(word)}))
            process.stdin.close()
            if word is not None:
                _speaking.append(process)
                return
            try:
                process.wait(BYE_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _launch(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            start_new_session=True,  # what is sent to our process group or terminal does not reach it
        )
        assert process.stdin is not None and process.stdout is not None, "they are pipes"  # noqa: PT018 - one fact
        with process.stdout:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            if not poll.poll(START_TIMEOUT * 1000) or process.stdout.read(len(READY)) != READY:
                process.kill()
                code = process.wait()
                process.stdin.close()
                raise HypervisorError(
                    f"the watcher of the guest did not start (exit code {code}): what it said is above; without it "
                    "a crash of this engine could leave the guest suspended"
                )
        # A watcher that is stuck must not make the engine wait.
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _beat(self) -> None:
        while not self._ended.wait(TICK / 2):
            with self._lock:
                gone = self._process is not None and self._process.poll() is not None
                if not gone:
                    self._write({"beat": True})
            if gone:
                log.error("the watcher of the guest has died: starting another")
                self._replace()

    def _replace(self) -> None:
        try:
            process = self._launch()
        except (HypervisorError, OSError) as error:
            log.error("%s", error)
            return
        with self._lock:
            old, self._process = self._process, process
            for contact in self._contacts:
                self._write(_described(contact))
        if old is not None and old.stdin is not None:
            old.stdin.close()
        try:
            self._on_start(process.pid)
        except HypervisorError as error:  # it watches all the same, and these beats must go on
            log.error("%s", error)

    def _write(self, word: dict[str, Any]) -> None:
        """What does not fit into its pipe is lost: a beat of many, or it is stuck. The lock is held."""
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._process.stdin.fileno(), _line(word))


_speaking: list[
    subprocess.Popen[bytes]
] = []  # watchers that outlive their handles; they end with us, or before


def _spoken(word: Retire | End | None) -> dict[str, str]:
    match word:
        case Retire(reason):
            return {"retire": reason[:REASON_MAX]}
        case End(reason):
            return {"end": str(reason)}
    return {}


def _line(word: dict[str, Any]) -> bytes:
    """Shorter than PIPE_BUF (4096 octets), so that it is written whole or not at all."""
    return json.dumps(word, separators=(",", ":")).encode("ascii") + b"\n"


def _described(contact: Contact) -> dict[str, Any]:
    return {
        "contact": {
            "session": contact.session,
            "term": contact.term,
            "host": contact.endpoint.host,
            "port": contact.endpoint.control_port,
            "key": contact.endpoint.key.decode("ascii"),
            "public": contact.keys.public.decode("ascii"),
            "secret": contact.keys.secret.decode("ascii"),
        }
    }
