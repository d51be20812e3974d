"""The supervisor's table of shard files, with the worker dead at each step of a put."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from areal_fast.service.holder import Holder
from areal_fast.shards import ShardStore, sealed
from areal_fast.shards.store import FILE_BYTES, FileMeta
from tests.model_arena import ModelArena

SIZE = 300_000


class Worker:
    """A worker's line to the holder. `said`: what it heard back."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.said.append(message)


@pytest.fixture
def world() -> Any:
    arena = ModelArena.create(64 << 20)
    arena.proc_enter(1)
    return SimpleNamespace(arena=arena, shards=ShardStore(arena), holder=Holder(arena), worker=Worker())


def sealed_file(nbytes: int = SIZE) -> int:
    fd = sealed.create(nbytes)
    sealed.seal(fd)
    return fd


def hold(world: Any, fd: int) -> dict[str, Any]:
    world.holder.heard(world.worker, {"is": "hold", "token": 1, "fd": fd})
    answer: dict[str, Any] = world.worker.said.pop()
    return answer


def publish(world: Any, held: dict[str, Any], name: str = "x") -> int:
    meta = FileMeta("uint8", [SIZE], "own", SIZE, held["fd"], held["inode"])
    slot: int = world.shards.put_file(name, name.encode(), meta)
    return slot


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def settled(world: Any) -> tuple[int, int]:
    """(files, bytes) after ticks enough to see everything."""
    for _ in range(3):
        world.holder.reconcile()
    assert world.arena.word(FILE_BYTES) == world.holder.nbytes
    return len(world.holder), world.holder.nbytes


def test_a_file_is_kept_while_its_record_is_there(world: Any) -> None:
    held = hold(world, sealed_file())
    slot = publish(world, held)
    world.holder.heard(world.worker, {"is": "placed", "fd": held["fd"], "slot": slot})
    assert settled(world) == (1, SIZE)
    assert world.shards.clear(["x"])[0] == 1
    assert settled(world) == (0, 0)
    assert not is_open(held["fd"])


def test_a_replaced_file_is_let_go(world: Any) -> None:
    for _ in range(2):
        held = hold(world, sealed_file())
        world.holder.heard(world.worker, {"is": "placed", "fd": held["fd"], "slot": publish(world, held)})
    assert settled(world) == (1, SIZE)
    assert world.shards.totals() == (1, SIZE)


def test_death_before_the_record_lets_the_file_go(world: Any) -> None:
    held = hold(world, sealed_file())
    assert settled(world) == (1, SIZE), "in flight: it waits"
    world.holder.died(world.worker)
    assert settled(world) == (0, 0)
    assert not is_open(held["fd"])


def test_death_between_the_record_and_its_word_loses_nothing(world: Any) -> None:
    held = hold(world, sealed_file())
    publish(world, held)
    world.holder.died(world.worker)
    assert settled(world) == (1, SIZE)
    world.shards.clear(["x"])
    assert settled(world) == (0, 0)


def test_what_could_not_be_published_is_dropped(world: Any) -> None:
    held = hold(world, sealed_file())
    world.holder.heard(Worker(), {"is": "dropped", "fd": held["fd"]})
    assert settled(world) == (1, SIZE), "not its own"
    world.holder.heard(world.worker, {"is": "dropped", "fd": held["fd"]})
    assert settled(world) == (0, 0)


def test_what_is_no_sealed_file_is_not_taken(world: Any) -> None:
    unsealed = sealed.create(SIZE)
    answer = hold(world, unsealed)
    assert "not sealed" in answer["why"]
    read_end, write_end = os.pipe()
    os.close(write_end)
    assert "no memory file" in hold(world, read_end)["why"]
    assert not is_open(unsealed)
    assert not is_open(read_end)
    assert settled(world) == (0, 0)


def test_the_budget_counts_files(world: Any) -> None:
    first = hold(world, sealed_file(40 << 20))
    assert "fd" in first
    fd = sealed_file(30 << 20)
    assert hold(world, fd)["why"] == "full"
    assert not is_open(fd)
    world.holder.heard(world.worker, {"is": "dropped", "fd": first["fd"]})
    again = sealed_file(30 << 20)
    assert "fd" in hold(world, again)


def test_the_end_closes_everything(world: Any) -> None:
    held = hold(world, sealed_file())
    world.holder.close()
    assert not is_open(held["fd"])
    assert world.arena.word(FILE_BYTES) == 0


def test_recounting_makes_totals_exact(world: Any) -> None:
    publish(world, hold(world, sealed_file()))
    world.arena.add_word(62, 7)
    world.arena.add_word(63, -11)
    assert world.shards.recount(lambda: None)
    assert world.shards.totals() == (1, SIZE)
    assert not world.shards.recount(lambda: world.shards.clear(["x"])), "shards went meanwhile"
    assert world.shards.totals() == (0, 0)
