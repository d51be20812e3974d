"""Transactions: a group that exists at once or never, an export that happened or did not."""

from __future__ import annotations

import pytest

from areal_fast.core.codes import (
    OUTCOME_ABORTED,
    OUTCOME_COMMITTED,
    OUTCOME_PENDING,
    REC_EXPORTING,
    REC_FLAG_REMOVE,
    STATE_FREE,
    TXN_COMMITTED,
    TXN_GONE,
    TXN_OPEN,
    Gone,
)

NEVER = 2**62


def start_group(arena, n, **first):
    ref = arena.txn_begin()
    members = [arena.start(b"task", b"key%d" % i, txn=ref, **(first if i == 0 else {})) for i in range(n)]
    return ref, members


def test_a_group_appears_at_once(arena):
    ref, members = start_group(arena, 4)
    assert arena.txn_state(ref) == TXN_OPEN
    for i, (slot, name) in enumerate(members):
        assert arena.pin_id(name) == -1 and arena.pin_key(b"key%d" % i) == -1 and not arena.pin_slot(slot)
        assert not arena.detach(slot, NEVER)
    arena.txn_commit(ref)
    assert arena.txn_state(ref) == TXN_COMMITTED
    slots = [slot for slot, _ in members]
    assert [arena.pin_id(name) for _, name in members] == slots
    arena.txn_finish(ref, slots)
    assert arena.txn_state(ref) == TXN_GONE
    assert [arena.pin_key(b"key%d" % i) for i in range(4)] == slots
    assert {arena.slot_info(slot).txn for slot in slots} == {0}


def test_an_aborted_group_never_was(arena):
    ref, members = start_group(arena, 3)
    arena.txn_abort(ref, [slot for slot, _ in members])
    assert arena.txn_state(ref) == TXN_GONE
    assert all(arena.slot_info(slot).state == STATE_FREE for slot, _ in members)
    assert arena.sessions(0, 10)[0] == []
    assert arena.start(b"task", b"key0")[1] == b"task-0"


@pytest.mark.parametrize("commit", [True, False])
def test_a_key_moves_only_with_the_commit(arena, commit):
    old, _ = arena.start(b"old", b"key0")
    ref, members = start_group(arena, 2, rebind_from=old)
    slots = [slot for slot, _ in members]
    assert arena.pin_key(b"key0") == old
    arena.unpin(old)
    if commit:
        arena.txn_commit(ref)
        arena.txn_finish(ref, slots)
    else:
        arena.txn_abort(ref, slots)
    assert arena.pin_key(b"key0") == (slots[0] if commit else old)


def test_a_transaction_ends_once(arena):
    ref = arena.txn_begin()
    with pytest.raises(Gone):
        arena.txn_finish(ref, [])
    arena.txn_commit(ref)
    with pytest.raises(Gone):
        arena.txn_commit(ref)
    with pytest.raises(Gone):
        arena.txn_abort(ref, [])
    arena.txn_finish(ref, [])
    with pytest.raises(Gone):
        arena.txn_commit(ref)
    assert arena.txn_begin() != ref


def export(arena, names, flags=0):
    """EXPORTING records in every named session, pinned as an exporter does -> (ref, slots, offsets)."""
    ref = arena.txn_begin()
    slots = [arena.pin_id(name) for name in names]
    for slot in slots:
        arena.append(slot, REC_EXPORTING, b"", expect=arena.head(slot), aux=ref, flags=flags, critical=True)
    return ref, slots, [arena.read(slot)[2][-1][0] for slot in slots]


def outcomes(arena, slots, offsets):
    return [arena.record_outcome(s, arena.head(s), o) for s, o in zip(slots, offsets, strict=True)]


@pytest.mark.parametrize("commit", [True, False])
def test_an_export_is_decided_by_one_word(arena, commit):
    names = [arena.start(b"task", b"")[1] for _ in range(3)]
    ref, slots, offsets = export(arena, names)
    assert outcomes(arena, slots, offsets) == [OUTCOME_PENDING] * 3
    assert [arena.read(slot)[2][-1][4] for slot in slots] == [OUTCOME_PENDING] * 3
    if commit:
        arena.txn_commit(ref)
        assert outcomes(arena, slots, offsets) == [OUTCOME_COMMITTED] * 3
        arena.txn_finish(ref, slots)
    else:
        arena.txn_abort(ref, slots)
    expected = OUTCOME_COMMITTED if commit else OUTCOME_ABORTED
    assert outcomes(arena, slots, offsets) == [expected] * 3
    assert [arena.read(slot)[2][-1][4] for slot in slots] == [expected] * 3
    for slot in slots:
        arena.unpin(slot)
    assert arena.pin_id(names[0]) == slots[0], "not flagged for removal"


@pytest.mark.parametrize("commit", [True, False])
def test_removal_comes_with_the_commit(arena, commit):
    slot, name = arena.start(b"task", b"key")
    ref, slots, _ = export(arena, [name], flags=REC_FLAG_REMOVE)
    if commit:
        arena.txn_commit(ref)
        arena.txn_finish(ref, slots)
    else:
        arena.txn_abort(ref, slots)
    arena.unpin(slot)
    if commit:
        assert arena.pin_id(name) == -1 and arena.slot_info(slot).state == STATE_FREE
    else:
        assert arena.pin_id(name) == slot


def test_the_sweep_aborts_what_was_open(arena):
    dead = type(arena).attach(arena.fileno(), 5)
    kept, name = arena.start(b"task", b"mine")
    ref, members = start_group(dead, 3)
    export_ref, _, [offset] = export(dead, [name], flags=REC_FLAG_REMOVE)
    done = arena.sweep(5)
    assert (done["txns_aborted"], done["txns_finished"], done["pins"]) == (2, 0, 1)
    assert arena.txn_state(ref) == arena.txn_state(export_ref) == TXN_GONE
    assert arena.sessions(0, 10)[0] == [kept]
    assert all(arena.slot_info(slot).state == STATE_FREE for slot, _ in members)
    assert arena.record_outcome(kept, arena.head(kept), offset) == OUTCOME_ABORTED
    dead.close()


def test_the_sweep_finishes_what_was_committed(arena):
    dead = type(arena).attach(arena.fileno(), 5)
    kept, name = arena.start(b"task", b"mine")
    gone, gone_name = arena.start(b"task", b"exported")
    ref, members = start_group(dead, 3)
    dead.txn_commit(ref)
    keeping, _, [offset] = export(dead, [name])
    removing, _, _ = export(dead, [gone_name], flags=REC_FLAG_REMOVE)
    dead.txn_commit(keeping)
    dead.txn_commit(removing)
    done = arena.sweep(5)
    assert (done["txns_aborted"], done["txns_finished"]) == (0, 3)
    assert arena.sweep(5)["txns_finished"] == 0
    assert sorted(arena.sessions(0, 10)[0]) == sorted([kept, *(slot for slot, _ in members)])
    assert arena.record_outcome(kept, arena.head(kept), offset) == OUTCOME_COMMITTED
    assert arena.slot_info(gone).state == STATE_FREE and arena.pin_id(gone_name) == -1
    assert {arena.slot_info(slot).txn for slot, _ in members} == {0}
    dead.close()
