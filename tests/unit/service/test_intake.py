"""Raw shards taken as they arrive: however the bytes come, what is stored is the file or nothing."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from typing import Any

import pytest

from areal_fast.core import ArenaFull, Gone, IndexBusy
from areal_fast.errors import ShardRejected
from areal_fast.service.intake import BOUNCE_BYTES, RawIntake
from areal_fast.shards import ShardStore, raw
from areal_fast.shards.description import describe
from tests.model_arena import ModelArena
from tests.unit.shards.test_raw import LIES

SIZES = (0, 1, 7, 1000, 65_535, 65_536, 300_000, 0)


@pytest.fixture
def store() -> ShardStore:
    arena = ModelArena.create(8 << 20)
    arena.proc_enter(1)
    return ShardStore(arena)


def file_of(sizes: tuple[int, ...], seed: int = 1) -> tuple[bytes, dict[str, bytes]]:
    chance = random.Random(seed)
    tensors = {f"t{i}": chance.randbytes(size) for i, size in enumerate(sizes)}
    layout = raw.lay_out([(name, describe("uint8", (len(data),))) for name, data in tensors.items()])
    return layout.header + b"".join(list(tensors.values())[i] for i in layout.order), tensors


async def send(intake: RawIntake, file: bytes, chance: random.Random) -> None:
    """As a connection does: in pieces of any size, by feed or into the buffer, and never while it waits."""
    at = 0
    while at < len(file):
        if intake.waiting:
            ready = asyncio.get_running_loop().create_future()
            intake.when_ready = lambda ready=ready: ready.set_result(None)  # type: ignore[misc]
            await ready
        size = chance.choice((1, 3, 8, 100, 5000, 70_000, 1 << 20))
        if chance.random() < 0.3:
            intake.feed(file[at : at + size])
            at += len(file[at : at + size])
            continue
        room = intake.buffer()
        assert len(room) > 0
        piece = file[at : at + min(size, len(room))]
        room[: len(piece)] = piece
        intake.took(len(piece))
        at += len(piece)


def stored(store: ShardStore, shard_id: str) -> bytes | None:
    try:
        return bytes(store.find([shard_id])[0].content())
    except Exception:
        return None


def nothing_left(store: ShardStore) -> bool:
    stats = store.arena.stats()
    return stats["granules_used"] == 0 and stats["shards_active"] == 0 and store.totals() == (0, 0)


@pytest.mark.parametrize("round_", range(20))
def test_any_split_stores_the_same(store: ShardStore, seed: int, round_: int) -> None:
    chance = random.Random(seed + round_)
    file, tensors = file_of(tuple(chance.sample(SIZES, len(SIZES))), round_)

    async def main() -> None:
        intake = RawIntake(store, None, len(file))
        await send(intake, file, chance)
        assert store.totals() == (0, 0), "nothing is seen before all is there"
        assert sorted(await intake.store()) == sorted(tensors)
        intake.drop()

    asyncio.run(main())
    assert {name: stored(store, name) for name in tensors} == tensors
    assert store.totals() == (len(tensors), sum(SIZES))
    store.clear(list(tensors))
    assert nothing_left(store)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_leaves_nothing_and_is_told_at_the_end(store: ShardStore, lie: str) -> None:
    async def main() -> None:
        for seed in range(3):
            intake = RawIntake(store, None if seed else "a", len(LIES[lie]))
            await send(intake, LIES[lie], random.Random(seed))
            with pytest.raises(ShardRejected):
                await intake.store()
            intake.drop()
            assert nothing_left(store)

    asyncio.run(main())


def test_a_cut_anywhere_leaves_nothing(store: ShardStore) -> None:
    file, _ = file_of((10, 100_000, 0, 70_000))

    async def main() -> None:
        chance = random.Random(3)
        for cut in [0, 1, 8, 9, *(chance.randrange(len(file)) for _ in range(40)), len(file)]:
            intake = RawIntake(store, None, len(file))
            await send(intake, file[:cut], chance)
            intake.drop()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert nothing_left(store), cut

    asyncio.run(main())


def test_what_does_not_fit_is_refused_as_a_whole_and_read_to_the_end(store: ShardStore) -> None:
    file, tensors = file_of((1000, 5 << 20, 4 << 20))

    async def main() -> None:
        intake = RawIntake(store, None, len(file))
        await send(intake, file, random.Random(1))
        with pytest.raises(ArenaFull):
            await intake.store()
        assert len(intake.buffer()) == BOUNCE_BYTES, "what is still to come goes nowhere"
        intake.drop()

    asyncio.run(main())
    assert nothing_left(store) and not any(stored(store, name) for name in tensors)


def test_one_id_takes_one_tensor_of_any_name(store: ShardStore) -> None:
    for sizes, fine in (((300_000,), True), ((), False), ((1, 300_000), False)):
        file, _ = file_of(sizes)

        async def main(file: bytes = file, fine: bool = fine) -> None:
            intake = RawIntake(store, "given", len(file))
            await send(intake, file, random.Random(1))
            if fine:
                assert await intake.store() == ["given"]
            else:
                with pytest.raises(ShardRejected, match="tensors; one is stored under one id"):
                    await intake.store()
            intake.drop()

        asyncio.run(main())
    assert store.totals() == (1, 300_000)


def test_a_huge_header_is_refused_by_its_length(store: ShardStore) -> None:
    async def main() -> None:
        intake = RawIntake(store, "x", 1 << 40)
        intake.feed(struct.pack("<Q", 1 << 30))
        for _ in range(100):
            intake.took(len(intake.buffer()))
        with pytest.raises(ShardRejected, match="may have"):
            await intake.store()

    asyncio.run(main())


def test_a_busy_index_delays_and_loses_nothing(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tensors = file_of((10, 300_000))
    publish = store.arena.shard_publish
    tries: list[int] = []

    def busy(slot: int) -> None:
        tries.append(slot)
        if len(tries) % 3:
            raise IndexBusy
        publish(slot)

    monkeypatch.setattr(store.arena, "shard_publish", busy)

    async def main() -> None:
        intake = RawIntake(store, None, len(file))
        await send(intake, file, random.Random(1))
        await intake.store()
        intake.drop()

    asyncio.run(main())
    assert len(tries) == 6 and {name: stored(store, name) for name in tensors} == tensors


def test_a_killed_process_leaves_what_the_sweep_frees(store: ShardStore) -> None:
    file, _ = file_of((10, 300_000, 200_000))

    async def main() -> Any:
        intake = RawIntake(store, None, len(file))
        await send(intake, file[:-5], random.Random(1))
        return intake

    intake = asyncio.run(main())
    assert store.arena.stats()["granules_used"] > 100
    other = store.arena.attach(store.arena.fileno(), 2)  # type: ignore[attr-defined]
    other.proc_enter(2)
    assert other.sweep(store.arena.proc)["inits"] == 3
    assert other.stats()["granules_used"] == 0
    with pytest.raises(Gone):
        store.arena.shard_publish(intake._rooms[1].slot)
    intake._rooms.clear()


def test_names_and_header_are_judged_before_any_room_is_taken(store: ShardStore) -> None:
    header = json.dumps(
        {"x" * 1025: {"dtype": "U8", "shape": [300_000], "data_offsets": [0, 300_000]}}
    ).encode()
    file = struct.pack("<Q", len(header)) + header + bytes(300_000)

    async def main() -> None:
        intake = RawIntake(store, None, len(file))
        intake.feed(file[: len(header) + 8])
        assert not intake.waiting and nothing_left(store)
        with pytest.raises(ShardRejected, match="1 to 1024 bytes"):
            await intake.store()

    asyncio.run(main())
