"""The log of a session: appending under an expectation, reading on, cutting, reserving room."""

from __future__ import annotations

import array

import pytest

from areal_fast.core.codes import LOG_ANY, REC_CHECKPOINT, BadArgument, HeadMoved, Trimmed

SIZES = [0, 1, 15, 16, 17, 4000, 4096, 5000, 70_000, 1_000_000]


@pytest.fixture
def slot(arena):
    slot, _ = arena.start(b"task", b"key")
    assert arena.pin_slot(slot)
    yield slot
    arena.close_session(slot)
    arena.unpin(slot)
    assert arena.stats()["granules_used"] == 0, "what a removed session held is free again"


def metas(arena, slot, since=0):
    return [r[5] for r in arena.read(slot, since)[2]]


def test_an_empty_log(arena, slot):
    head, cut, records = arena.read(slot)
    assert head == arena.head(slot) != LOG_ANY and not cut and records == []


@pytest.mark.parametrize("size", SIZES)
def test_what_is_appended_is_read(arena, slot, size):
    data = bytes(range(256)) * (size // 256 + 1)
    head = arena.append(slot, 7, b"meta" * 3, [data[: size // 2], data[size // 2 : size]], aux=99, flags=2)
    assert arena.head(slot) == head
    seen, cut, [record] = arena.read(slot)
    assert seen == head and not cut
    offset, *rest = record
    assert rest == [7, 2, 99, 0, b"meta" * 3, size]
    assert arena.record_data(slot, head, offset) == data[:size]
    assert (
        arena.record_data(slot, head, offset, size // 3, size // 4) == data[size // 3 : size // 3 + size // 4]
    )
    with pytest.raises(BadArgument):
        arena.record_data(slot, head, offset, 0, size + 1)
    with pytest.raises(BadArgument):
        arena.record_data(slot, head, offset, size + 1)


def test_reading_on_from_a_head(arena, slot):
    heads = [0] + [arena.append(slot, 2, b"%d" % i, [b"x" * 100]) for i in range(50)]
    for n in (0, 1, 7, 49, 50):
        head, cut, records = arena.read(slot, heads[n])
        assert head == heads[-1] and not cut
        assert [r[5] for r in records] == [b"%d" % i for i in range(n, 50)]


def test_the_expectation(arena, slot):
    first = arena.append(slot, 2, b"a", expect=arena.head(slot))
    second = arena.append(slot, 2, b"b", expect=first)
    with pytest.raises(HeadMoved):
        arena.append(slot, 2, b"c", expect=first)
    third = arena.append(slot, 2, b"d")
    assert len({first, second, third}) == 3 and metas(arena, slot) == [b"a", b"b", b"d"]


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda b: array.array("B", b)])
def test_buffers_of_any_kind(arena, slot, make):
    head = arena.append(slot, 2, make(b"meta"), [make(b"one"), make(b""), make(b"two")])
    offset = arena.read(slot)[2][0][0]
    assert arena.record_data(slot, head, offset) == b"onetwo"


def test_compaction_keeps_what_it_is_told(arena, slot):
    for i in range(20):
        arena.append(slot, 2, b"%d" % i, [b"%d" % i * 1000], aux=i)
    old, _, records = arena.read(slot)
    keep = [records[3][0], records[11][0]]
    with pytest.raises(HeadMoved):
        arena.compact(slot, arena.append(slot, 2, b"late") - 1, b"checkpoint", keep)
    old = arena.head(slot)
    new = arena.compact(slot, old, b"checkpoint", keep)
    assert new == arena.head(slot) != old
    head, cut, records = arena.read(slot, old)
    assert head == new and cut
    assert [(r[1], r[3], r[5]) for r in records] == [
        (REC_CHECKPOINT, 0, b"checkpoint"),
        (2, 3, b"3"),
        (2, 11, b"11"),
    ]
    assert arena.record_data(slot, new, records[2][0]) == b"11" * 1000
    with pytest.raises(Trimmed):
        arena.record_data(slot, old, records[2][0])
    with pytest.raises(HeadMoved):
        arena.append(slot, 2, b"on the cut log", expect=old)
    arena.append(slot, 2, b"on", expect=new)
    assert metas(arena, slot, new) == [b"on"]
    assert arena.read(slot, new)[1] is False


def test_compaction_frees(arena, slot):
    for _ in range(5):
        for i in range(20):
            arena.append(slot, 2, b"%d" % i, [bytes(20_000)])
        arena.compact(slot, arena.head(slot), b"", [])
        assert metas(arena, slot) == [b""]
        assert arena.stats()["granules_used"] <= 2


def test_a_reservation_is_used_by_the_append(arena, slot):
    before = arena.stats()["granules_used"]
    reservation = arena.reserve(slot, 100_000)
    assert reservation != 0 and arena.stats()["granules_used"] > before
    head = arena.head(slot)
    with pytest.raises(HeadMoved):
        arena.append(slot, 2, b"", expect=arena.append(slot, 2, b"x") ^ 1 << 60, reservation=reservation)
    head = arena.append(slot, 2, b"m", [bytes(50_000)], reservation=reservation)
    with pytest.raises(BadArgument):
        arena.release(reservation)
    *_, record = arena.read(slot)[2]
    assert arena.record_data(slot, head, record[0]) == bytes(50_000)
    assert arena.stats()["granules_used"] <= before + 15, "the tail went back"


def test_a_reservation_released(arena, slot):
    before = arena.stats()["granules_used"]
    for _ in range(20):
        arena.release(arena.reserve(slot, 10_000))
    assert arena.stats()["granules_used"] == before


def test_a_record_larger_than_its_reservation(arena, slot):
    reservation = arena.reserve(slot, 10)
    head = arena.append(slot, 2, b"", [bytes(100_000)], reservation=reservation)
    assert arena.record_data(slot, head, arena.read(slot)[2][0][0]) == bytes(100_000)


def test_two_processes_write_one_log(arena):
    other = type(arena).attach(arena.fileno(), 1)
    slot, name = arena.start(b"task", b"")
    assert arena.pin_id(name) == other.pin_id(name) == slot
    for i in range(100):
        writer = (arena, other)[i % 3 == 0]
        writer.append(slot, 2, b"%d" % i, [b"%d" % i * 50])
    head, _, records = other.read(slot)
    assert [r[5] for r in records] == [b"%d" % i for i in range(100)]
    assert all(arena.record_data(slot, head, r[0]) == r[5] * 50 for r in records)
    arena.unpin(slot)
    other.close_session(slot)
    other.unpin(slot)
    assert arena.stats()["granules_used"] == 0
    other.close()
