"""What one domain's standby does about the other side and about its term; on a thread of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointd import faults
from checkpointd.authority.fence import FenceResult, HostView
from checkpointd.authority.processes import boot_id
from checkpointd.authority.terms import Role, TermRecord
from checkpointd.errors import CheckpointdError, StateError

from .activations import PROOF_KEPT, Activation, Phase
from .standby import events as ev

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointd.authority.fence import Fence
    from checkpointd.authority.terms import TermStore
    from checkpointd.hypervisor.port import DomainInfo

    from .activations import Activations

# s; a look at a host on this machine takes a millisecond; this bounds one that hangs.
PROBE_TIMEOUT = 1.0


class Authority:
    def __init__(
        self,
        uuid: str,
        terms: TermStore,
        activations: Activations,
        make_fence: Callable[[DomainInfo, str], Fence],
        fence_timeout: float,
        clock: Callable[[], int],
    ) -> None:
        """`fence_timeout` in seconds; `clock` gives monotonic ns."""
        self._uuid = uuid
        self._terms = terms
        self._activations = activations
        self._make_fence = make_fence
        self._fence_timeout = fence_timeout
        self._clock = clock
        self._fence: Fence | None = None
        self._why_none = "no session has begun"
        self._name = self._address = ""  # of the session's guest, and of its primary

    def begin(self, info: DomainInfo, address: str) -> str:
        """A session begins: make the fence while the other side lives. Why it could not be, or ""."""
        self.close()
        self.forget()  # the guest lives there: what an earlier life began is void
        self._name, self._address = info.name, address
        try:
            self._fence = self._make_fence(info, address)
        except (CheckpointdError, OSError) as error:
            self._why_none = f"the guest's host cannot be fenced: {error}"
            return self._why_none
        return ""

    def probe(self, attempt: int) -> ev.ProbeDone:
        faults.point("secondary.before-probe")
        view = HostView(None, None, self._why_none)
        if self._fence is not None:
            view = self._fence.probe(PROBE_TIMEOUT)
        return ev.ProbeDone(attempt, view, self._clock())

    def fence(self, attempt: int, term: int, epoch: int) -> ev.FenceDone:
        """For an activation in `term`, of `epoch`, which is noted before anything is done to the old guest. The note of
        a fence that failed stays: it may have stopped the guest all the same, and the next life is to say so.
        """
        faults.point("secondary.before-fence")
        result = FenceResult(False, self._why_none)
        if self._fence is not None:
            activation = Activation(
                self._uuid, self._name, self._address, term, epoch, Phase.FENCING, boot_id()
            )
            try:
                self._activations.begin(activation)
            except StateError as error:
                # The term could not be stored either: the old guest would be stopped for nothing.
                return ev.FenceDone(attempt, FenceResult(False, str(error)), self._clock())
            faults.point("secondary.fencing")
            result = self._fence.fence(self._fence_timeout)
        faults.point("secondary.after-fence")
        if result.fenced:
            proof = result.detail[:PROOF_KEPT]
            self._activations.advance(self._uuid, Phase.FEEDING, proof=proof)
            faults.point("secondary.fence-noted")
        return ev.FenceDone(attempt, result, self._clock())

    def store_term(self, step: ev.StoreTerm) -> ev.TermStored | ev.TermFailed:
        try:
            self._terms.store(TermRecord(self._uuid, step.term, step.role, step.next_epoch))
            if step.role is Role.SECONDARY_ACTIVE:
                faults.point("secondary.after-term")
            else:
                self.forget()  # the guest has lived on elsewhere
        except CheckpointdError as error:
            return ev.TermFailed(str(error), self._clock())
        return ev.TermStored(step.term, step.role)

    def forget(self) -> None:
        """No activation of this guest is unfinished."""
        self._activations.forget(self._uuid)

    def close(self) -> None:
        if self._fence is not None:
            self._fence.close()
            self._fence = None
