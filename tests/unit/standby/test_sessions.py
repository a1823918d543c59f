"""The standby's state machine while its primary is heard: sessions, epochs, the replica that they make."""

from __future__ import annotations

from standby_stories import (
    DEAD,
    FENCED,
    SECOND,
    UUID,
    committed,
    final,
    hello,
    machine,
    of_kind,
    silence,
    standing_by,
    state,
    tell,
)  # fmt: skip

from checkpointd.authority.terms import Role, TermRecord
from checkpointd.hypervisor.port import EndReason
from checkpointd.secondary.standby import State
from checkpointd.secondary.standby import events as ev


def test_a_session_begins_with_a_stored_term_and_syncs() -> None:
    standby = machine()
    assert standby.handle(hello()) == [ev.StoreTerm(1, Role.NONE, 1)]
    assert state(standby) is State.WAITING  # nothing before the term is stored
    assert standby.handle(ev.TermStored(1, Role.NONE)) == [
        ev.BeginSession(1),
        ev.SendWelcome(1, 0, None),
    ]
    assert state(standby) is State.SYNCING


def test_a_term_that_cannot_be_stored_is_not_welcomed() -> None:
    standby = machine()
    standby.handle(hello())
    out = standby.handle(ev.TermFailed("disk full", 0))
    assert [type(step) for step in out] == [ev.SendRefused, ev.Alarm]
    assert state(standby) is State.WAITING
    assert of_kind(ev.SendWelcome, tell(standby, hello()))


def test_parts_are_acked_and_the_final_one_is_committed() -> None:
    standby = machine()
    tell(standby, hello())
    assert tell(standby, ev.PartWhole(1, 1, 0, final=False)) == [ev.SendAck(1, 0, False)]
    assert tell(standby, final(1, part=1)) == [ev.SendAck(1, 1, True), ev.Commit(1)]
    assert state(standby) is State.SYNCING
    assert tell(standby, committed(1)) == [ev.SendCommitted(1, 1000, 16)]
    assert state(standby) is State.STANDBY
    assert standby.committed == 1


def test_a_part_of_another_session_changes_nothing() -> None:
    standby = standing_by()
    assert tell(standby, final(2, session=9)) == []
    assert standby.pending == []


def test_a_resumed_session_is_told_what_was_acked() -> None:
    standby = standing_by(pending=True)
    assert tell(standby, hello(resume=True)) == [ev.SendWelcome(1, 2, 1)]


def test_a_session_that_this_life_does_not_know_has_to_begin_anew() -> None:
    standby = machine(TermRecord(UUID, 1, Role.NONE, 50))
    out = tell(standby, hello(resume=True))
    assert of_kind(ev.SendWelcome, out) == [ev.SendWelcome(1, 0, None)]
    assert not of_kind(ev.SendFullCopyWanted, out)  # the welcome says it; nothing was retired
    assert not standby.taking
    assert not of_kind(ev.SendAck, tell(standby, final(50)))
    assert of_kind(ev.SendFullCopyWanted, tell(standby, ev.Queried(1)))
    assert of_kind(ev.SendAck, tell(standby, hello(session=2), final(51, session=2)))


def test_an_engine_that_was_replaced_is_refused() -> None:
    standby = standing_by()
    tell(standby, hello(session=2))
    (refusal,) = tell(standby, hello(session=1, resume=True))
    assert isinstance(refusal, ev.SendRefused)
    assert refusal.code == "busy"


def test_a_new_engine_keeps_the_replica_until_its_first_epoch_is_whole() -> None:
    standby = standing_by()
    tell(standby, hello(session=2), ev.PartWhole(2, 2, 0, final=False))
    assert state(standby) is State.STANDBY
    tell(standby, silence(), ev.ProbeDone(1, DEAD, 0), ev.FenceDone(2, FENCED, 0))
    assert tell(standby, ev.TermStored(2, Role.SECONDARY_ACTIVE)) == [ev.StartGuest(1)]


def test_a_guest_of_another_size_is_another_replica() -> None:
    standby = standing_by()
    out = tell(standby, hello(session=2, same_guest=False))
    assert of_kind(ev.DropReplica, out)
    assert state(standby) is State.SYNCING
    assert of_kind(ev.SendAck, tell(standby, final(2, session=2)))


def test_nor_is_the_first_epoch_of_another_guest_whose_commit_is_under_way() -> None:
    standby = machine()
    tell(standby, hello(), final(1))
    assert of_kind(ev.DropReplica, tell(standby, hello(session=2, same_guest=False)))
    assert tell(standby, committed(1)) == []
    assert state(standby) is State.SYNCING


def test_a_failed_audit_retires_the_replica_and_wants_a_full_copy() -> None:
    standby = standing_by(pending=True)
    out = tell(standby, committed(2, 77, 78))
    assert [type(step) for step in out] == [ev.DropReplica, ev.Alarm, ev.SendFullCopyWanted]
    assert tell(standby, final(3)) == [out[2]]  # nothing of this session is acked any more
    assert tell(standby, ev.Queried(1)) == [out[2]]  # its loss on the way does not matter
    tell(standby, hello(session=2), final(4, session=2), committed(4))
    assert state(standby) is State.STANDBY


def test_a_retired_replica_is_never_activated() -> None:
    standby = standing_by(pending=True)
    out = tell(standby, ev.RetireReceived(1, "stopped by its operator"))
    assert [type(step) for step in out] == [ev.DropReplica, ev.SendRetired]
    assert tell(standby, committed(2), silence(), silence(100 * SECOND)) == []
    assert tell(standby, ev.RetireReceived(1, "again")) == [ev.SendRetired()]
    assert of_kind(ev.SendWelcome, tell(standby, hello(resume=True)))  # to say Retire once more
    assert tell(standby, final(3)) == []
    assert state(standby) is State.RETIRED


def test_a_reboot_begins_protection_anew() -> None:
    standby = standing_by()
    tell(standby, ev.EndReceived(1, EndReason.REBOOT), hello(session=2), final(9, session=2))
    assert standby.pending == [9]


def test_memory_that_is_short_costs_the_old_replica_and_says_so_first() -> None:
    standby = standing_by(pending=True)
    out = tell(standby, ev.MemoryShort(1, "full"))
    assert [type(step) for step in out] == [ev.Alarm, ev.DropReplica]
    assert state(standby) is State.SYNCING
    assert tell(standby, committed(2)) == []  # of the replica that is given up
    assert not of_kind(ev.Probe, tell(standby, silence()))
    tell(standby, final(3), committed(3))
    assert state(standby) is State.STANDBY


def test_a_malformed_frame_suspends_the_session_until_its_next_hello() -> None:
    standby = standing_by()
    out = tell(standby, ev.ProtocolFault(1, "length is 5"))
    assert [type(step) for step in out] == [ev.SuspendSession, ev.Alarm]
    assert tell(standby, ev.ProtocolFault(1, "length is 5")) == []
    assert tell(standby, final(2)) == []
    assert standby.committed == 1
    tell(standby, hello(resume=True))
    assert of_kind(ev.SendAck, tell(standby, final(2)))
