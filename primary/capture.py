"""A guest's memory into a stream: live rounds with the guest running, then epochs. For `checkpointd save` and
`primary --to`, which have nobody who acknowledges: what is written is settled.
"""

from __future__ import annotations

import errno
import json
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from checkpointd.errors import HypervisorError, NativeError, ProtectionLostError
from checkpointd.native import TOO_MANY, DigestKey
from checkpointd.stream.remus import RemusStream
from checkpointd.wire.frames import Kind
from checkpointd.wire.messages import SEED_BYTES

from .epoch import EpochTaker
from .rounds import LiveRounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.hypervisor.port import Domain, DomainInfo
    from checkpointd.native import Outcome
    from checkpointd.stream.records import Octets

PAGE_SIZE = 4096  # octets


@dataclass(frozen=True, slots=True)
class Limits:
    arena: int  # octets of pages that one round or pause can take
    mapping_budget: int  # octets
    suspend_timeout_ns: int
    # Passes over the whole memory, in pages copied while the guest runs: beyond it the guest is faster than we are.
    max_live_rounds: int
    detect_zero: bool = True


class Capture:
    """Takes one attached domain into `write`, from its first page on. Used by one thread.

    No lost dirt (invariant 3): the dirty set is the same as under protection, with one arena. What a round or an epoch
    took is written before its bits are let go, and after a failure nothing more is written: the stream then ends
    within an epoch, which no receiver takes, and whoever begins anew sends every page.
    """

    def __init__(
        self,
        domain: Domain,
        write: Callable[[Octets], object],
        limits: Limits,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        seen: Callable[[Outcome], object] = lambda outcome: None,
    ) -> None:
        """`progress` gets (pages copied, pages of RAM) in the first copy, `seen` every outcome of the native calls."""
        info = domain.info
        self._domain = domain
        self._stream = RemusStream(write)
        self._progress = progress
        self._seen = seen
        self._arena_pages = min(limits.arena // PAGE_SIZE, info.nr_pfns)
        self._most_live = limits.max_live_rounds * max(1, info.ram_pages)
        self._taker = EpochTaker(
            domain.table,
            info.nr_pfns,
            DigestKey(secrets.token_bytes(SEED_BYTES)),
            arenas=1,
            arena_pages=self._arena_pages,
            mapping_budget=limits.mapping_budget,
            audit_pages=0,
            suspend_timeout_ns=limits.suspend_timeout_ns,
            detect_zero=limits.detect_zero,
            sealed=False,
        )

    def begin(self) -> None:
        """Headers, and live rounds until what is left fits half an arena. Raises HypervisorError, ProtectionLostError,
        and whatever `write` does; so does each call below.
        """
        self._domain.enable_log()
        self._stream.begin(configuration(self._domain.info), self._domain.static_records())
        self._taker.dirty.begin_anew()
        self._taker.mappings.replica_has(None)
        self._copy_live()
        ram_pages = self._domain.info.ram_pages
        self._progress(ram_pages, ram_pages)

    def take(self, *, stay: bool = False) -> Outcome:
        """Stop the guest once all that is dirty fits the arena, and write it; `stay` leaves the guest suspended. The
        epoch wants its tail() or end_epoch() yet.
        """
        while True:
            outcome = self._taker.take(0, close_output=False, stay=stay)
            self._seen(outcome)
            if outcome.status != TOO_MANY:
                break
            self._copy_live()
        self._check(outcome)
        if outcome.resume_status:
            # Our death makes the host resume it: invariant 5.
            raise HypervisorError(f"ending, since the guest could not be resumed: {outcome.fault}")
        self._write()
        return outcome

    @property
    def tail(self) -> memoryview:
        """Of the last take()."""
        return self._taker.arenas[0].context

    def write_tail(self) -> None:
        """Beforehand and alone; then comes seal()."""
        self._stream.tail(self.tail)

    def seal(self) -> None:
        """The epoch is whole: CHECKPOINT and CHECKPOINT_END, in one piece."""
        self._stream.end_epoch()
        self._taker.dirty.settle(0)

    def end(self) -> None:
        """The stream is one image: tail records, END."""
        self._stream.end(self.tail)

    def look_after(self) -> None:
        """Between two epochs: frames that the guest gave back are unmapped, and its end is told (GuestEndedError)."""
        with suppress(HypervisorError):  # the next pause says what is wrong
            self._taker.mappings.refresh()
        ended = self._domain.ended()
        if ended is not None:
            raise GuestEndedError(f"the guest has ended ({ended})")

    def close(self) -> None:
        with suppress(NativeError):
            # A write that failed holds its pages in the traceback. Closing the domain unmaps, too; the arena goes with
            # the process.
            self._taker.close()

    def _copy_live(self) -> None:
        rounds = LiveRounds(self._arena_pages, self._most_live)
        while True:
            outcome = self._taker.live_round(0)
            self._seen(outcome)
            self._check(outcome)
            self._write()
            self._taker.dirty.keep(0)
            if rounds.enough(outcome.pages + outcome.zeros, outcome.remaining):
                return
            ram_pages = self._domain.info.ram_pages
            self._progress(min(rounds.staged, ram_pages - 1), ram_pages)
            if rounds.used_up:
                raise ProtectionLostError(
                    f"{self._domain.info.name} dirties its memory faster than it can be copied: after "
                    f"{rounds.staged} pages {outcome.remaining} are still to be sent, and a pause takes "
                    f"{self._arena_pages}. "
                    "Give a larger --arena (one as large as the guest is always enough)"
                )

    def _check(self, outcome: Outcome) -> None:
        if not outcome.status:
            return
        ended = self._domain.ended()
        if ended is not None or outcome.status in (-errno.ESHUTDOWN, -errno.EHOSTDOWN):
            raise GuestEndedError(f"the guest has ended ({ended or 'its host is gone'})")
        raise HypervisorError(f"the guest's memory could not be taken: {outcome.fault}")

    def _write(self) -> None:
        for frame in self._taker.frames(0):
            match frame.kind:
                case Kind.PAGES:
                    self._stream.pages(frame.payload)
                case Kind.ZERO:
                    self._stream.zero(frame.payload)
                case Kind.GONE:
                    self._stream.gone(frame.payload)


class GuestEndedError(HypervisorError):
    """The guest is no more; what is whole of it by then stays whole."""


def configuration(info: DomainInfo) -> str:
    """What the receiver builds the domain from, as JSON: xl's own words, or, for an embedded guest, ours."""
    if info.hypervisor != "xen":
        return json.dumps({"checkpointd": asdict(info)})
    if info.config.get("type") == "hvm":
        raise HypervisorError(
            f'{info.name} has a device model (type "hvm"), whose state is not in our stream: use `xl save`'
        )
    return str(info.config["xl"])
