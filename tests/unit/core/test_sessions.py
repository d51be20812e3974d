"""Sessions: names, keys, pins, removal, detaching. The same tests hold the arena and its model."""

from __future__ import annotations

import pytest

from areal_fast.core.codes import (
    MAX_NAME_BYTES,
    STATE_ACTIVE,
    STATE_CLOSING,
    STATE_DETACHED,
    STATE_DUMPED,
    STATE_FREE,
    BadArgument,
    Exists,
    Gone,
)

NEVER = 2**62  # later than any time


def test_ids_count_from_zero_and_fill_gaps(arena):
    started = [arena.start(b"task", b"key%d" % i) for i in range(5)]
    assert [name for _, name in started] == [b"task-%d" % i for i in range(5)]
    slot = started[2][0]
    assert arena.pin_slot(slot)
    arena.close_session(slot)
    arena.unpin(slot)
    assert arena.start(b"task", b"another")[1] == b"task-2"
    assert arena.start(b"task", b"yet another")[1] == b"task-5"


def test_a_task_named_like_an_id(arena):
    a, name = arena.start(b"t-0", b"")
    assert name == b"t-0-0"
    b, name = arena.start(b"t", b"")
    assert name == b"t-0" and b != a


def test_lookup_by_id_and_key(arena):
    slot, name = arena.start(b"task", b"secret")
    assert arena.pin_id(name) == slot
    assert arena.pin_key(b"secret") == slot
    assert arena.slot_info(slot).pins == 1 << arena.proc
    assert arena.pin_id(b"secret") == -1
    assert arena.pin_key(name) == -1
    assert arena.pin_id(b"task-1") == -1
    arena.unpin(slot)
    arena.unpin(slot)
    info = arena.slot_info(slot)
    assert (info.state, info.pins, info.id, info.key) == (STATE_ACTIVE, 0, name, b"secret")


def test_unpin_of_what_is_not_pinned(arena):
    slot, _ = arena.start(b"task", b"")
    with pytest.raises(BadArgument):
        arena.unpin(slot)


@pytest.mark.parametrize("length", [1, 63, 64, 200, MAX_NAME_BYTES])
def test_long_names(arena, length):
    task, key = b"t" * length, b"k" * length
    slot, name = arena.start(task, key)
    info = arena.slot_info(slot)
    assert (info.id, info.key) == (name, key) and name == task + b"-0"
    assert arena.pin_key(key) == slot
    assert arena.pin_id(name) == slot
    arena.close_session(slot)
    arena.unpin(slot)
    arena.unpin(slot)
    assert arena.pin_key(key) == -1 and arena.slot_info(slot).state == STATE_FREE


def test_names_too_long(arena):
    with pytest.raises(BadArgument):
        arena.start(b"t" * (MAX_NAME_BYTES + 1), b"")
    with pytest.raises(BadArgument):
        arena.start(b"t", b"k" * (MAX_NAME_BYTES + 1))
    assert arena.sessions(0, 10) == ([], 0)


def test_a_bound_key_is_refused_and_named(arena):
    slot, _ = arena.start(b"task", b"key")
    with pytest.raises(Exists) as refused:
        arena.start(b"other", b"key")
    assert refused.value.slot == slot
    assert arena.sessions(0, 10) == ([slot], 0)


def test_a_key_moves_to_the_new_session(arena):
    old, name = arena.start(b"task", b"key")
    new, _ = arena.start(b"task", b"key", rebind_from=old)
    assert new != old
    assert arena.pin_key(b"key") == new
    assert arena.pin_id(name) == old
    arena.unpin(new)
    arena.unpin(old)
    with pytest.raises(Exists):
        arena.start(b"task", b"key", rebind_from=old)


def test_no_key_binds_nothing(arena):
    a, _ = arena.start(b"a", b"")
    b, _ = arena.start(b"b", b"")
    assert a != b and arena.pin_key(b"") == -1


def test_open_named_finds_or_creates(arena):
    slot = arena.open_named(b"__hitl__")
    assert arena.open_named(b"__hitl__") == slot
    assert arena.pin_id(b"__hitl__") == slot
    for _ in range(3):
        arena.unpin(slot)
    assert arena.slot_info(slot).pins == 0


def test_close_waits_for_the_last_pin(arena):
    slot, name = arena.start(b"task", b"key")
    arena.pin_id(name)
    arena.pin_key(b"key")
    arena.append(slot, 2, b"before")
    arena.close_session(slot)
    assert arena.slot_info(slot).state == STATE_CLOSING
    assert arena.pin_id(name) == -1 and arena.pin_key(b"key") == -1 and not arena.pin_slot(slot)
    with pytest.raises(Gone):
        arena.append(slot, 2, b"after")
    with pytest.raises(Gone):
        arena.close_session(slot)
    assert [r[5] for r in arena.read(slot)[2]] == [b"before"]
    arena.unpin(slot)
    assert arena.slot_info(slot).state == STATE_CLOSING
    arena.unpin(slot)
    assert arena.slot_info(slot).state == STATE_FREE
    assert arena.start(b"task", b"key")[1] == name


def test_ordinals_and_deadline(arena):
    slot, _ = arena.start(b"task", b"")
    assert arena.pin_slot(slot)
    assert [arena.next_ordinal(slot) for _ in range(3)] == [0, 1, 2]
    assert arena.deadline(slot) == 0
    arena.set_deadline(slot, 12345)
    assert arena.deadline(slot) == 12345 == arena.slot_info(slot).deadline_ns
    arena.close_session(slot)
    arena.unpin(slot)
    again, _ = arena.start(b"task", b"")
    assert arena.slot_info(again).ordinal == 0 and arena.deadline(again) == 0


def test_touch_moves_the_time_forward(arena):
    slot, _ = arena.start(b"task", b"")
    info = arena.slot_info(slot)
    assert 0 < info.created_ns <= info.touched_ns <= arena.now_ns()
    while arena.now_ns() == info.touched_ns:  # the clock is coarse: a few milliseconds a step
        pass
    arena.pin_slot(slot)
    arena.touch(slot)
    assert info.touched_ns < arena.slot_info(slot).touched_ns <= arena.now_ns()
    arena.unpin(slot)


def test_detach_dump_reap(arena):
    slot, name = arena.start(b"task", b"key")
    head = arena.append(slot, 2, b"kept", [b"data"])
    assert not arena.detach(slot, 1), "used after the cutoff"
    assert arena.pin_id(name) == slot
    assert not arena.detach(slot, NEVER), "pinned"
    arena.unpin(slot)
    assert arena.detach(slot, NEVER)
    info = arena.slot_info(slot)
    assert (info.state, info.owner) == (STATE_DETACHED, arena.proc)
    assert arena.pin_id(name) == -1 and arena.pin_key(b"key") == -1 and not arena.pin_slot(slot)
    assert arena.owned_slots(STATE_DETACHED, arena.proc) == [slot]
    assert [r[5] for r in arena.read(slot)[2]] == [b"kept"]
    arena.append(slot, 6, b"its dump's name", expect=head, critical=True)
    arena.set_dumped(slot)
    with pytest.raises(Gone):
        arena.set_dumped(slot)
    assert arena.owned_slots(STATE_DUMPED, arena.proc) == [slot]
    arena.reap(slot)
    assert arena.slot_info(slot).state == STATE_FREE
    with pytest.raises(Gone):
        arena.reap(slot)
    assert arena.stats()["granules_used"] == 0


def test_a_detached_session_binds_neither_key_nor_pin(arena):
    slot, _ = arena.start(b"task", b"key")
    assert arena.detach(slot, NEVER)
    other, _ = arena.start(b"task", b"key")
    assert other != slot and arena.pin_key(b"key") == other
    arena.set_dumped(slot)
    arena.reap(slot)
    arena.unpin(other)
    assert arena.pin_key(b"key") == other, "reaping the old one leaves the new one's key"
    arena.unpin(other)


def test_detach_next_scans_once(arena):
    slots = {arena.start(b"task", b"")[0] for _ in range(6)}
    pinned = min(slots)
    arena.pin_slot(pinned)
    found, cursor = [], 0
    while True:
        slot, cursor = arena.detach_next(NEVER, cursor)
        if slot < 0:
            break
        found.append(slot)
    assert cursor == 0 and sorted(found) == sorted(slots - {pinned})
    arena.unpin(pinned)


def test_sessions_are_paged(arena):
    slots = sorted(arena.start(b"task", b"")[0] for _ in range(10))
    found, cursor = arena.sessions(0, 4)
    while cursor:
        page, cursor = arena.sessions(cursor, 4)
        assert len(page) <= 4
        found += page
    assert found == slots
    assert arena.stats()["sessions_active"] == 10


def test_words_and_counters(arena):
    assert arena.word(3) == 0
    arena.set_word(3, -7)
    assert arena.add_word(3, 10) == 3
    assert not arena.cas_word(3, 7, 8) and arena.cas_word(3, 3, 8) and arena.word(3) == 8
    arena.count(5)
    arena.count(5, 41)
    assert arena.counters()[5] == 42


def test_a_histogram_counts_each_value_once(arena):
    found = arena.histogram(40, (0, 10, 20))
    for value, beside in ((0, 0), (10, 1), (11, 1), (20, 0), (21, 2), (1 << 40, 2)):
        found.observe(value, beside)
    assert arena.counters()[40:49] == [1, 1, 2, 2, 62 + (1 << 40), 2, 2, 2, 0]
    with pytest.raises(BadArgument):
        arena.histogram(40, (10, 0))
    with pytest.raises(BadArgument):
        arena.histogram(40, range(33))
    with pytest.raises(TypeError):
        type(found)()
    with pytest.raises((BadArgument, AttributeError)):
        type(found).__new__(type(found)).observe(1, 0)
    arena.close()
    with pytest.raises(BadArgument):
        found.observe(1, 0)


def test_processes_come_and_go(arena):
    assert arena.proc_info(arena.proc) == (0, 0, 0)
    assert arena.proc_enter(77) == 1
    arena.heartbeat()
    arena.heartbeat()
    assert arena.proc_info(arena.proc) == (77, 1, 2)
    arena.proc_leave()
    assert arena.proc_info(arena.proc)[0] == 0
    assert arena.proc_enter(78) == 2
    assert arena.lock_owner() == -1
