"""Makes hosts that run ready for tests: checkpointd by pip, the guest."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lab import payload
from lab.guests import SAMPLES
from lab.image import VENV
from lab.places import TOOLS, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lab.machine import Machine

STAMP = "/var/lib/lab-provisioned"  # says what is there; written last
GUEST_DIR = "/root"


def provision(machines: Sequence[Machine], say: Callable[[str], None]) -> None:
    """All at once. What is there already is left as it is."""
    images = {machine: _image(machine) for machine in machines}
    made = {
        image: (payload.wheel(image, say), payload.guest(image)) for image in set(images.values())
    }
    with ThreadPoolExecutor() as pool:
        for done in [
            pool.submit(_install, machine, *made[image], say) for machine, image in images.items()
        ]:
            done.result()


def _image(machine: Machine) -> Path:
    record = machine.record
    assert record, machine.name
    return Path(record.facts["image"])


def _install(machine: Machine, wheel: Path, guest: Path, say: Callable[[str], None]) -> None:
    content = f"{wheel.parent.name} {guest.name} samples-{digest([TOOLS], *SAMPLES.values())}"
    if machine.ssh(f"cat {STAMP}", check=False).out == content:
        return
    say(f"host {machine.name}: installing checkpointd and the guest")
    machine.keep_no_more()
    with tempfile.TemporaryDirectory() as temporary:
        samples = []
        for name, text in SAMPLES.items():
            path = Path(temporary) / f"{name}.cfg"
            path.write_text(text)
            samples.append(path)
        machine.put(GUEST_DIR, guest / "initrd.gz", guest / "disk.img", *samples)
    machine.put("/usr/local/sbin", *TOOLS.iterdir())
    machine.put("/root/wheel", wheel)
    machine.ssh(
        f"{VENV}/bin/pip install --quiet --no-index --no-deps --force-reinstall --disable-pip-version-check"
        f" /root/wheel/{wheel.name} && rm -r /root/wheel"
        f" && ln -sf {VENV}/bin/checkpointd /usr/local/bin/checkpointd && printf %s '{content}' > {STAMP}"
    )
