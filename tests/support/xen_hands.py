"""A Xen domain made of files, for tests of the watcher: what is done to it is seen from every process.

    python xen_hands.py DIR [arguments of the watcher]   be a watcher whose domain is in DIR
    python xen_hands.py engine DIR RUN_DIR LIMIT         be an engine: start a watcher, suspend the domain, and wait

An engine prints the watcher's pid once the domain is suspended, and takes orders line by line: "contact HOST PORT KEY
PUBLIC SECRET SESSION", "bye", and "bye retire" or "bye REASON" (of an end) with that last word; then it lives on.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointd.authority.processes import identify
from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.port import Contact, EndReason
from checkpointd.hypervisor.xen import state as states
from checkpointd.hypervisor.xen import watcher
from checkpointd.hypervisor.xen.handle import WatcherHandle
from checkpointd.hypervisor.xen.release import Seen
from checkpointd.wire.keys import KeyPair
from checkpointd.wire.messages import End, Retire
from checkpointd.wire.sockets import Endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

DOMID = 4
UUID = "12345678-1234-4234-8234-123456789abc"
SERVER = 3  # id of the ioreq server


@dataclass
class FileHands:
    """Facts are files: suspended, asked (to suspend), paused, log, ioreq-N, ended (with its reason), gone, saver
    (somebody else saves it), others (somebody else has asked it to suspend).
    """

    place: Path

    def has(self, name: str) -> bool:
        return (self.place / name).exists()

    def set(self, name: str, text: str = "") -> None:
        (self.place / name).write_text(text, encoding="ascii")

    def drop(self, name: str) -> bool:
        if self.has("fail-" + name):
            raise HypervisorError(f"{name} cannot be dropped")
        there = self.has(name)
        (self.place / name).unlink(missing_ok=True)
        return there

    def look(self, domid: int) -> Seen | None:
        assert domid == DOMID
        if self.has("gone"):
            return None
        ended = None
        if self.has("ended"):
            ended = EndReason((self.place / "ended").read_text(encoding="ascii"))
        return Seen(UUID, self.has("suspended"), self.has("paused"), ended)

    def destroy_ioreq_server(self, domid: int, server: int) -> bool:
        return self.drop(f"ioreq-{server}")

    def withdraw_suspend(self, domid: int) -> bool:
        return self.drop("asked")

    def resume(self, domid: int) -> None:
        assert self.has("suspended"), "resumed a domain that was not suspended"
        self.drop("suspended")

    def tell_store(self, domid: int) -> None:
        self.set("store-told")

    def stop_log(self, domid: int) -> bool:
        return self.drop("log")

    def pause(self, domid: int) -> None:
        if self.has("fail-paused"):
            raise HypervisorError("it cannot be paused")
        self.set("paused")

    def saved_by_others(self, domid: int) -> str:
        return "xl save" if self.has("saver") else ""

    def others_ask(self, domid: int) -> bool:
        return self.has("others")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def engine(place: Path, run_dir: Path, limit: float) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by all whom it starts
    hands = FileHands(place)
    handle = WatcherHandle(
        DOMID, UUID, run_dir, limit=limit, command=(sys.executable, __file__, str(place))
    )
    with states.DomainLock(run_dir, DOMID):
        pid = handle.start()
        states.store(run_dir, states.EngineState(UUID, DOMID, identify(), SERVER, pid))
        for name in (f"ioreq-{SERVER}", "log", "suspended"):
            hands.set(name)
        say(str(pid))
        for line in sys.stdin:
            match line.split():
                case ["contact", host, port, key, public, secret, session]:
                    endpoint = Endpoint(host, key.encode(), int(port))
                    pair = KeyPair(public.encode(), secret.encode())
                    handle.update(Contact(int(session), 1, endpoint, pair))
                    say("told")
                case ["bye"]:
                    states.remove(run_dir, DOMID)
                    handle.bye()
                    return
                case ["bye", word]:
                    states.remove(run_dir, DOMID)
                    handle.bye(Retire("stopped") if word == "retire" else End(EndReason(word)))
                    say("bye")


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == "engine":
        engine(Path(arguments[1]), Path(arguments[2]), float(arguments[3]))
        return 0
    return watcher.main(arguments[1:], hands=FileHands(Path(arguments[0])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
