"""Who owns each dirty bit (invariant 3)."""

from __future__ import annotations

from checkpointd.native import Bitmap


class DirtySet:
    """A dirty bit cleared in the hypervisor lives in at least one of these until its epoch is acked:

    - `pending`: to be staged;
    - `carried[a]`: staged in arena a, its part not yet acked;
    - `unsettled`: in acked live parts of an epoch that is not itself acked yet.

    Order that keeps it: the native call moves pending -> carried and undoes that if it fails; `keep` copies before it
    clears; `settle` is called at the ack of an epoch's final part only, and parts are acked in the order they were
    staged, so `unsettled` then holds nothing of a later epoch; `give_back` collects all of them.
    """

    def __init__(self, nr_pfns: int, arenas: int) -> None:
        self.pending = Bitmap(nr_pfns)
        self.carried = [Bitmap(nr_pfns) for _ in range(arenas)]
        self.unsettled = Bitmap(nr_pfns)

    def begin_anew(self) -> None:
        """Every page is to be sent: no earlier dirty log is trusted."""
        self.pending.fill()

    def keep(self, arena: int) -> None:
        """A live part is acked: its arena is free, its dirt still ours."""
        self.unsettled.update(self.carried[arena])
        self.carried[arena].clear()

    def settle(self, arena: int) -> None:
        """The epoch whose final part is in `arena` is acked: its dirt is the secondary's now."""
        self.carried[arena].clear()
        self.unsettled.clear()

    def give_back(self) -> None:
        """Nothing in flight will be acked: all of it is pending again."""
        for carried in self.carried:
            self.pending.update(carried)
            carried.clear()
        self.pending.update(self.unsettled)
        self.unsettled.clear()
