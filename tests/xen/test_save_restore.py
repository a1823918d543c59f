"""Guests in files: `xl restore` of a `checkpointd save`, and recordings that were cut, brought up by `restore`."""

from __future__ import annotations

import json
import random
import shlex
import time
from typing import TYPE_CHECKING, Any

import pytest
from lab import daemons
from lab.console import TICK_LIMIT
from lab.guests import Guest
from lab.image import VENV

if TYPE_CHECKING:
    from lab.machine import Machine
    from xen_rig import Living, Rig

KEPT = Guest("kept", pages=256, rate=50)
FILE = "/root/guest.file"
EPOCHS = 3  # recorded, at least
RECORD_LIMIT = 600.0  # s; a first copy of 160 MiB takes 15 s on two idle cores
TICKS_AFTER = 2
# s of the guest's own time between its last tick seen and the moment it was saved at.
BETWEEN = 60.0

# Run in dom0: where the epochs of FILE end, and where each of its records begins.
LOOK = f"""
import json
from checkpointd.stream.reader import Reader
from checkpointd.stream.scan import whole_epochs
file = open({FILE!r}, "rb")
ends = list(whole_epochs(file))
file.seek(0)
reader, starts = Reader(), []
while piece := file.read(1 << 20):
    starts += [event.position.offset for event in reader.feed(piece)]
print(json.dumps({{"ends": ends, "starts": starts}}))
"""
# The libxc part of FILE, closed by END as Xen's own verifier wants it.
INNER = f"""
from checkpointd.stream.reader import Reader
from checkpointd.stream.records import Layer, RecordType
from checkpointd.stream.writer import encode, record
reader = Reader()
with open({FILE!r}, "rb") as file, open("{FILE}.libxc", "wb") as inner:
    while piece := file.read(1 << 20):
        for event in reader.feed(piece):
            if event.position.layer is Layer.LIBXC:
                inner.writelines(encode(event.content))
    inner.write(record(RecordType.END))
"""


def python(host: Machine, script: str) -> str:
    return host.ssh(f"{VENV}/bin/python -c {shlex.quote(script)}").out


def xen_verifies(host: Machine, path: str, form: str) -> None:
    """By the verifier of the Xen that runs there."""
    host.ssh(
        "tree=$(ls -d /usr/lib/xen-4.*) && "
        f"PYTHONPATH=$tree/lib/python $tree/bin/verify-stream-v2 -i {path} -f {form}"
    )


def goes_on(rig: Rig, living: Living, command: str) -> None:
    """`command` brings the guest back, after it was destroyed: its checks pass, and its clock goes on."""
    _, before = living.console.ticks[-1]
    rig.a.ssh(f"xl destroy {living.guest.name}")
    since = time.monotonic()
    rig.a.ssh(command)
    ticks = [tick for _, tick in living.console.wait_ticks(TICKS_AFTER, TICK_LIMIT, after=since)]
    assert all(tick.ok for tick in ticks), living.console.text
    assert [tick.number for tick in ticks] == list(
        range(ticks[0].number, ticks[0].number + len(ticks))
    )
    assert 0 < ticks[0].uptime < before.uptime + BETWEEN
    assert ticks[0].number > 1, "it has not been started anew"
    assert rig.uuid(rig.a, living.guest.name) == living.uuid


def test_xl_restores_what_save_wrote(rig: Rig) -> None:
    living = rig.create(KEPT)
    rig.a.ssh(f"checkpointd save --domid {living.domid} --force {FILE}")
    since = time.monotonic()
    living.console.wait_ticks(TICKS_AFTER, TICK_LIMIT, after=since)  # the guest went on
    rig.a.ssh(f"checkpointd stream verify {FILE}")
    xen_verifies(rig.a, FILE, "xl")
    goes_on(rig, living, f"xl restore {FILE}")


def test_a_saved_guest_that_was_to_be_destroyed_is_gone(rig: Rig) -> None:
    living = rig.create(KEPT)
    rig.a.ssh(f"checkpointd save --domid {living.domid} --destroy --force {FILE}")
    assert rig.state(rig.a, KEPT.name) == ""
    since = time.monotonic()
    rig.a.ssh(f"xl restore {FILE}")
    assert living.console.wait_ticks(1, TICK_LIMIT, after=since)[0][1].ok


def record(rig: Rig, living: Living) -> dict[str, Any]:
    """Some epochs into FILE; where they end, and where the records begin."""
    rig.a.ssh(f"rm -f {FILE}")
    recorder = daemons.start(
        rig.a, "recorder", "primary", "--domid", str(living.domid), "--to", FILE, "--interval", "1s"
    )
    wait = (
        "from checkpointd.stream.scan import survey; import os, sys, time\n"
        f"until = time.monotonic() + {RECORD_LIMIT}\n"
        f"while not os.path.exists({FILE!r}) or survey(open({FILE!r}, 'rb')).epochs < {EPOCHS}:\n"
        f"    if time.monotonic() > until or not os.path.exists('/proc/{recorder.pid}'): sys.exit(1)\n"
        "    time.sleep(1)\n"
    )
    python(rig.a, wait)
    assert recorder.end() == 0, recorder.said()
    found: dict[str, Any] = json.loads(python(rig.a, LOOK))
    assert len(found["ends"]) >= EPOCHS
    return found


def comes_up(rig: Rig, living: Living, cut: int, ends: list[int]) -> None:
    """FILE, cut there, gives the last whole epoch, or says that there is none."""
    whole = sum(end <= cut for end in ends)
    rig.a.ssh(f"cp --reflink=auto {FILE} {FILE}.cut && truncate -s {cut} {FILE}.cut")
    if not whole:
        said = rig.a.ssh(f"checkpointd restore {FILE}.cut", check=False)
        assert said.code == 10, said
        assert "no whole epoch" in said.err or "cut off" in said.err
        return
    if rig.state(rig.a, living.guest.name):
        rig.a.ssh(f"xl destroy {living.guest.name}")
    since = time.monotonic()
    said = rig.a.ssh(f"checkpointd restore {FILE}.cut")
    assert f"from epoch {whole} of" in said.out
    (_, tick), *_ = living.console.wait_ticks(1, TICK_LIMIT, after=since)
    assert tick.ok
    assert tick.number > 1, "it has not been started anew"


def test_a_recording_that_was_cut_comes_up(rig: Rig, pytestconfig: pytest.Config) -> None:
    """Whole, in the middle of its last epoch, right before the seal of one, and within the first."""
    choose = random.Random(pytestconfig.getoption("--seed"))
    living = rig.create(KEPT)
    found = record(rig, living)
    ends = found["ends"]
    python(rig.a, INNER)
    xen_verifies(rig.a, f"{FILE}.libxc", "libxc")
    boundaries = [at for at in found["starts"] if ends[-2] < at < ends[-1]]
    for cut in (ends[-1], choose.choice(boundaries), ends[1] - 8, choose.randrange(ends[0])):
        comes_up(rig, living, cut, ends)


@pytest.mark.campaign
def test_a_recording_comes_up_wherever_it_is_cut(rig: Rig, pytestconfig: pytest.Config) -> None:
    """At every record boundary and at ten random places."""
    choose = random.Random(pytestconfig.getoption("--seed"))
    living = rig.create(KEPT)
    found = record(rig, living)
    ends = found["ends"]
    cuts = [*found["starts"], *choose.sample(range(ends[-1]), 10), ends[-1]]
    for cut in sorted(cuts):
        comes_up(rig, living, cut, ends)
