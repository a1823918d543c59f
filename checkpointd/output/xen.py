"""The output of a Xen guest, which nothing holds yet. See OutputBuffer in output/port.py.

A guest that has a network is attached to only with --unsafe-output (hypervisor/xen/devices.py). One without any has no
output that somebody could see too early, so an epoch's output is trivially told apart from the next one's.
"""

from __future__ import annotations

import sys

from checkpointd.output.port import OutputStats


class XenOutput:
    """Never shut: what leaves, leaves at once."""

    @property
    def depth(self) -> int:
        return sys.maxsize

    def release(self, closed: int) -> None:
        """Nothing was held."""

    def open(self) -> None:
        """It is."""

    def stats(self) -> OutputStats:
        return OutputStats(
            held_packets=0,
            held_bytes=0,
            limit_bytes=0,
            dropped_packets=0,
            released_packets=0,
            shut=False,
        )
