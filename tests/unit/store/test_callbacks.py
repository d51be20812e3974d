"""Who tells the callback server: one courier a trajectory, a dead one's work is taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from areal_fast.protocol.records import UNCLAIMED
from areal_fast.store import SessionStore, folds
from areal_fast.store.callbacks import adopt, courier_of, delivered, look
from areal_fast.store.store import Told
from tests.unit.store.turns import Clock, ask, export, started, take


class Worker:
    """A process with a store that delivers, and what it was told became ready."""

    def __init__(self, arena: Any, pid: int, clock: Clock, finish_timeout_s: float = 0.0) -> None:
        arena.proc_enter(pid)
        self.store = SessionStore(
            arena, courier=courier_of(arena), clock=clock, finish_timeout_s=finish_timeout_s
        )
        self.told: list[Told] = []
        self.store.on_ready = self.told.append


@pytest.fixture
def workers(arena: Any, clock: Clock) -> Callable[..., Worker]:
    """workers(proc): a worker under that process number; an earlier one of that number is dead and swept."""
    first: list[Worker] = []

    def make(proc: int, **more: Any) -> Worker:
        if proc == arena.proc:
            if not first:
                arena.proc_leave()
                first.append(Worker(arena, 1000, clock, **more))
            return first[0]
        other = type(arena).attach(arena.fileno(), proc)
        if other.proc_info(proc)[0]:
            arena.sweep(proc)
        return Worker(other, 2000 + proc, clock, **more)

    return make


def make_ready(worker: Worker, task: str = "t") -> Told:
    with started(worker.store, task) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
    return worker.told[-1]


def test_who_makes_ready_tells_once(workers: Callable[..., Worker], clock: Clock) -> None:
    a, b = workers(0), workers(1)
    told = make_ready(a)
    assert told[:2] == ("t-0", 0)
    clock.forward(1.0)
    assert adopt(b.store) == []
    assert adopt(a.store) == [told]
    assert (look(a.store, told), look(b.store, told)) == ("tell", "over")
    delivered(a.store, told)
    assert look(a.store, told) == "over"
    assert adopt(a.store) == adopt(b.store) == []
    assert a.store.arena.deadline(told.slot) == 0


def test_a_dead_couriers_work_is_taken_over_by_one(workers: Callable[..., Worker], clock: Clock) -> None:
    a, b, c = workers(0), workers(1), workers(2)
    told = make_ready(b)
    clock.forward(1.0)
    assert adopt(a.store) == []
    a.store.arena.sweep(1)
    assert [adopt(w.store) for w in (a, c)] == [[told], []]
    assert (look(a.store, told), look(c.store, told)) == ("tell", "over")
    delivered(a.store, told)
    assert adopt(c.store) == []


def test_a_successor_of_the_same_number_is_another(workers: Callable[..., Worker], clock: Clock) -> None:
    a, b = workers(0), workers(1)
    told = make_ready(b)
    clock.forward(1.0)
    successor = workers(1)
    assert look(successor.store, told) == "over"
    assert adopt(successor.store) == [told]
    assert look(successor.store, told) == "tell"
    assert adopt(a.store) == []


def test_a_later_reward_does_not_hide_what_is_untold(workers: Callable[..., Worker], clock: Clock) -> None:
    a, b = workers(0, finish_timeout_s=5.0), workers(1, finish_timeout_s=5.0)
    with started(b.store) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
        assert b.told == []
        clock.forward(5.0)
        assert b.store.fire_due(clock.ns) == 1
        take(session, [1], [2])
        session.set_reward(1.0)
    a.store.arena.sweep(1)
    clock.forward(1.0)
    assert [told.trajectory_id for told in adopt(a.store)] == [0]
    clock.forward(5.0)
    assert [told.trajectory_id for told in adopt(a.store)] == [0, 1]


def test_what_nobody_claimed_is_taken_over(workers: Callable[..., Worker], clock: Clock) -> None:
    a = workers(0)
    other = type(a.store.arena).attach(a.store.arena.fileno(), 3)
    other.proc_enter(5)
    cleaner = SessionStore(other, courier=UNCLAIMED, clock=clock, finish_timeout_s=1.0)
    with started(cleaner) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
    clock.forward(1.0)
    assert cleaner.fire_due(clock.ns, scan=True) == 1
    clock.forward(1.0)
    assert cleaner.fire_due(clock.ns, scan=True) == 0
    assert [told[:2] for told in adopt(a.store)] == [("t-0", 0)]


def test_an_export_under_way_is_waited_for(workers: Callable[..., Worker]) -> None:
    a = workers(0)
    told = make_ready(a)
    first = ask(a.store, "t-0")
    assert look(a.store, told) == "wait"
    first.undelivered()
    assert look(a.store, told) == "tell"
    export(a.store, "t-0")
    assert look(a.store, told) == "over"
    assert a.store.arena.deadline(told.slot) == 0


@pytest.mark.parametrize("how", ["removed", "dumped"])
def test_a_session_that_is_gone_is_not_told_of(
    workers: Callable[..., Worker], clock: Clock, tmp_path: Any, how: str
) -> None:
    a = workers(0)
    told = make_ready(a)
    if how == "removed":
        export(a.store, "t-0", remove_session=True)
    else:
        clock.forward(10.0)
        assert a.store.cleanup_stale(0.0, str(tmp_path)).sessions == 1
    assert look(a.store, told) == "over"
    while a.store.arena.now_ns() <= told.created_ns:
        pass  # for the next tick of the coarse clock: sessions of one id differ by it
    again = make_ready(a)
    assert again.session_id == told.session_id
    assert (look(a.store, told), look(a.store, again)) == ("over", "tell")
    delivered(a.store, told)
    assert look(a.store, again) == "tell"


def test_what_is_told_is_remembered_when_the_log_is_cut(
    workers: Callable[..., Worker], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folds, "COMPACT_MIN_BYTES", 0)
    monkeypatch.setattr(folds, "COMPACT_DEAD_RATIO", 0.0)
    a, b = workers(0), workers(1)
    with started(b.store) as session:
        for _ in range(3):
            take(session, [1], [2])
            session.set_reward(1.0)
    first, second, third = b.told
    delivered(b.store, second)
    export(a.store, "t-0", trajectory_id=0)
    assert a.store.folds.compact(first.slot) or len(a.store.arena.read(first.slot)[2]) <= 4
    assert [look(b.store, told) for told in (first, second, third)] == ["over", "over", "tell"]
    a.store.arena.sweep(1)
    clock.forward(1.0)
    assert adopt(a.store) == [third]
