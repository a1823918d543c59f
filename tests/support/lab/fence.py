"""The lab's fence: pulls the plug of a host when another one asks (tools/lab-fence), and answers only
when its QEMU is gone. One process for a lab, on loopback; hosts reach it as 10.0.2.2.
"""

from __future__ import annotations

import os
import socketserver
import subprocess
import sys
import time
from pathlib import Path

from lab.places import HERE, HOSTS, LINK_NET, LabError, Place
from lab.plug import Process, Record

NAME = "fence"
TIMEOUT = 10.0  # s in which a client must have asked
# What a host may be called: the secondary's fence knows its primary's address.
_NAMES = {word: name for name, number in HOSTS.items() for word in (name, f"{LINK_NET}.{number}")}
READY = 30.0  # s in which the server must be up; Python starts in 0.1 s on an idle machine


class _Request(socketserver.StreamRequestHandler):
    timeout = TIMEOUT

    def handle(self) -> None:
        word, _, host = self.rfile.readline(64).decode("ascii", "replace").strip().partition(" ")
        name = _NAMES.get(host)
        if word != "pull-plug" or not name:
            self.wfile.write(b"usage: pull-plug HOST\n")
            return
        assert isinstance(self.server, Server)
        try:
            if record := Record.read(self.server.place.run, name):
                record.process.kill()
        except LabError as error:
            self.wfile.write(f"{error}\n".encode())
        else:
            self.wfile.write(f"off {host}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True

    def __init__(self, place: Place) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.place = place


def serve(place: Place) -> None:
    with Server(place) as server:
        Record(NAME, Process.of(os.getpid()), {"port": server.server_address[1]}).write(place.run)
        server.serve_forever()


def ensure(place: Place) -> int:
    """The port of this lab's fence, which is started if it does not run."""
    if not (record := Record.read(place.run, NAME)):
        with (place.run / "fence.log").open("a") as log:
            # Through a shell, which leaves it to init: it outlives whoever boots the first host.
            subprocess.run(
                [
                    "/bin/sh",
                    "-c",
                    'setsid "$0" -m lab --dir "$1" serve-fence &',
                    sys.executable,
                    place.path,
                ],
                env={**os.environ, "PYTHONPATH": str(HERE.parent)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )
        record = _await(place)
    return int(record.facts["port"])


def _await(place: Place) -> Record:
    deadline = time.monotonic() + READY
    while not (record := Record.read(place.run, NAME)):
        if time.monotonic() > deadline:
            raise LabError(f"the fence does not start: {Path(place.run / 'fence.log').read_text()}")
        time.sleep(0.05)
    return record
