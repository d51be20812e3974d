"""Shards: immutable, replaced atomically, in use until the last reader lets go."""

from __future__ import annotations

import pytest

from areal_fast.core.codes import STATE_ACTIVE, STATE_FREE, STATE_INIT, ArenaFull, BadArgument, Gone


def content(arena, shard_id):
    """(meta, data) of a shard by id, or None."""
    slot = arena.pin_shard(shard_id)
    if slot < 0:
        return None
    meta, view = arena.shard_view(slot)
    with view:
        result = meta, bytes(view)
    arena.unpin(slot)
    return result


@pytest.mark.parametrize("size", [0, 1, 4096, 1_000_003])
def test_put_and_view(arena, size):
    data = bytes(i * 7 % 256 for i in range(size))
    slot = arena.shard_put(b"id", b"meta", [data[:10], data[10:]])
    assert slot >= arena.session_slots
    assert content(arena, b"id") == (b"meta", data)
    assert content(arena, b"other") is None
    stats = arena.stats()
    assert stats["shards_active"] == 1 and stats["shard_bytes"] >= size
    arena.pin_slot(slot)
    arena.shard_close(slot)
    arena.unpin(slot)
    assert arena.stats()["shard_bytes"] == 0


def test_shards_and_sessions_have_names_of_their_own(arena):
    session, name = arena.start(b"task", b"key")
    arena.shard_put(name, b"", [b"shard"])
    arena.shard_put(b"key", b"", [b"shard"])
    assert arena.pin_id(name) == session == arena.pin_key(b"key")
    assert content(arena, name) == (b"", b"shard")
    arena.unpin(session)
    arena.unpin(session)


def test_replacing_is_atomic_and_keeps_readers(arena):
    old = arena.shard_put(b"id", b"old", [b"o" * 5000])
    assert arena.pin_shard(b"id") == old
    meta, view = arena.shard_view(old)
    new = arena.shard_put(b"id", b"new", [b"n" * 5000])
    assert new != old
    assert content(arena, b"id") == (b"new", b"n" * 5000)
    assert (meta, bytes(view)) == (b"old", b"o" * 5000)
    view.release()
    arena.unpin(old)
    assert arena.slot_info(old).state == STATE_FREE
    assert arena.stats()["shards_active"] == 1


def test_reserve_fill_publish(arena):
    slot, view = arena.shard_reserve(b"id", b"m", 10_000)
    assert arena.slot_info(slot).state == STATE_INIT and content(arena, b"id") is None
    view[:5] = b"hello"
    view[5:] = bytes(9_995)
    view.release()
    arena.shard_publish(slot)
    assert arena.slot_info(slot).state == STATE_ACTIVE
    assert content(arena, b"id") == (b"m", b"hello" + bytes(9_995))
    with pytest.raises(Gone):
        arena.shard_publish(slot)


def test_reserve_and_abandon(arena):
    used = arena.stats()["granules_used"]
    slot, view = arena.shard_reserve(b"id", b"", 100_000)
    view.release()
    arena.shard_abandon(slot)
    assert content(arena, b"id") is None and arena.slot_info(slot).state == STATE_FREE
    assert arena.stats()["granules_used"] == used


def test_bits_are_cleared_one_by_one(arena):
    slot = arena.shard_put(b"bundle", b"", [b"x"], bits=70)
    arena.pin_shard(b"bundle")
    order = [64, 0, 69, *(i for i in range(70) if i not in (0, 64, 69))]
    for n, bit in enumerate(order):
        assert arena.shard_bit(slot, bit)
        assert arena.shard_clear_bit(slot, bit) == (True, n == 69)
        assert not arena.shard_bit(slot, bit)
        assert arena.shard_clear_bit(slot, bit) == (False, n == 69)
    with pytest.raises(BadArgument):
        arena.shard_clear_bit(slot, 70)
    arena.shard_close(slot)
    arena.unpin(slot)
    assert arena.slot_info(slot).state == STATE_FREE and arena.stats()["granules_used"] == 0


def test_close_hides_at_once(arena):
    slot = arena.shard_put(b"id", b"", [b"x"])
    assert arena.pin_shard(b"id") == slot
    _, view = arena.shard_view(slot)
    arena.shard_close(slot)
    with pytest.raises(Gone):
        arena.shard_close(slot)
    assert arena.pin_shard(b"id") == -1 and bytes(view) == b"x"
    view.release()
    arena.unpin(slot)
    assert arena.slot_info(slot).state == STATE_FREE


def test_expired_shards_are_paged(arena):
    slots = sorted(arena.shard_put(b"id%d" % i, b"", [b"x"]) for i in range(7))
    assert arena.expired_shards(1, 0, 100) == ([], 0)
    found, cursor = arena.expired_shards(2**62, 0, 3)
    while cursor:
        page, cursor = arena.expired_shards(2**62, cursor, 3)
        found += page
    assert found == slots


def test_the_sweep_removes_unpublished_shards(arena):
    dead = type(arena).attach(arena.fileno(), 5)
    slot, view = dead.shard_reserve(b"id", b"", 5000)
    view.release()
    done = arena.sweep(5)
    assert done["inits"] == 1 and arena.slot_info(slot).state == STATE_FREE
    assert arena.stats()["granules_used"] == 0
    dead.close()


def successor(arena, data):
    slot, view = arena.shard_reserve(b"id", b"new", len(data))
    view[:] = data
    view.release()
    return slot


def test_a_successor_takes_the_place_of_the_very_shard_it_was_made_of(arena):
    old = arena.shard_put(b"id", b"old", [b"data"])
    assert arena.pin_shard(b"id") == old
    _, held = arena.shard_view(old)
    created = arena.slot_info(old).created_ns
    new = successor(arena, b"data")
    arena.shard_succeed(new, old)
    assert content(arena, b"id") == (b"new", b"data") and bytes(held) == b"data"
    assert arena.slot_info(new).created_ns == created, "its time to live goes on"
    held.release()
    arena.unpin(old)
    assert arena.slot_info(old).state == STATE_FREE
    assert arena.stats()["shards_active"] == 1


@pytest.mark.parametrize("cleared", [True, False])
def test_a_successor_of_a_shard_that_was_cleared_or_replaced_is_none(arena, cleared):
    old = arena.shard_put(b"id", b"old", [b"data"])
    arena.pin_shard(b"id")
    new = successor(arena, b"data")
    if cleared:
        arena.shard_close(old)
    else:
        arena.shard_put(b"id", b"other", [b"x"])
    with pytest.raises(Gone):
        arena.shard_succeed(new, old)
    arena.shard_abandon(new)
    arena.unpin(old)
    assert content(arena, b"id") == (None if cleared else (b"other", b"x"))
    assert arena.stats()["granules_used"] == (0 if cleared else 1)


def test_memory_beside_the_arena_counts_with_it(arena):
    """Both ways, up to the reserve, and what is given back is there again."""
    stats = arena.stats()
    granule = stats["bytes_max"] // stats["granules"]
    room = (stats["granules"] - stats["granules_keep"]) * granule
    with pytest.raises(ArenaFull):
        arena.outside_take(room + 1)
    with pytest.raises(ArenaFull):
        arena.outside_take(2**63)
    arena.outside_take(room - 3 * granule)
    arena.outside_take(1)
    assert arena.stats()["granules_outside"] == room // granule - 2
    with pytest.raises(ArenaFull):
        arena.shard_put(b"id", b"", [bytes(2 * granule)])
    slot = arena.shard_put(b"id", b"", [bytes(granule)])
    with pytest.raises(ArenaFull):
        arena.outside_take(1)
    assert arena.shard_put(b"reserve", b"", [bytes(granule)], critical=True) != slot
    arena.outside_give(1)
    arena.outside_give(room - 3 * granule)
    assert arena.stats()["granules_outside"] == 0
    arena.shard_put(b"large", b"", [bytes(room // 2)])
