"""Workers killed with SIGKILL in the middle of a turn, a reward, a group start, an export.

Each child attaches to the arena as process 1, does its work and dies where it is told. After the sweep the
other process must find everything that was acknowledged, and nothing half done.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from areal_fast.core import Arena
from areal_fast.store import SessionStore
from tests.unit.store.turns import ask, export, lives, started, take, tokens


@pytest.fixture
def store() -> Iterator[SessionStore]:
    with Arena.create(8 << 20, proc=0) as arena:
        yield SessionStore(arena)
        assert arena.consistency() == ""


def killed(store: SessionStore, work: Callable[[SessionStore], object]) -> None:
    """Run `work` in another process that dies right after it, and sweep that process."""
    fd = store.arena.fileno()
    pid = os.fork()
    if pid == 0:
        try:
            arena = Arena.attach(fd, 1)
            arena.proc_enter(os.getpid())
            work(SessionStore(arena))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    store.arena.sweep(1)


def ready(store: SessionStore, task: str = "t") -> str:
    with started(store, task) as session:
        take(session, [1, 2], [3])
        session.set_reward(1.0)
        return session.session_id


def open_turn(store: SessionStore) -> None:
    session = store.by_id("t-0")
    assert session is not None
    session.begin_turn(reserve_tokens=4000)


def test_a_turn_in_flight_dies_with_its_worker_and_holds_nothing(store: SessionStore) -> None:
    store.start("t")
    used = store.arena.stats()["granules_used"]
    killed(store, open_turn)
    assert store.arena.stats()["granules_used"] == used
    with store.by_id("t-0") as session:  # type: ignore[union-attr]
        take(session, [1], [2])
        assert session.set_reward(1.0).interaction_count == 1


def test_what_was_committed_survives(store: SessionStore) -> None:
    def work(other: SessionStore) -> None:
        with other.by_id("t-0") as session:  # type: ignore[union-attr]
            take(session, [1] * 50, [2])
            take(session, [*([1] * 50), 2], [3])
            session.set_reward(0.5)

    store.start("t")
    killed(store, work)
    got = export(store, "t-0")["interactions"].values()
    assert [len(tokens(store, i)) for i in got] == [51, 52]


def test_an_undelivered_export_is_ready_again(store: SessionStore) -> None:
    sid = ready(store)
    killed(store, lambda other: ask(other, sid, remove_session=True))
    assert lives(store, sid)
    assert len(export(store, sid)["interactions"]) == 1


def test_an_export_committed_but_not_finished_is_done_once(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ready(store, "a"), ready(store, "b")

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work(other: SessionStore) -> None:
        monkeypatch.setattr(other, "settle_txn", die)
        ask(other, a, b, dialect="1.0").delivered()

    killed(store, work)
    assert not lives(store, a)
    assert not lives(store, b)
    assert export(store, a, b, dialect="main-may") == {"interactions": {}}
    assert store.arena.stats()["txns_open"] == 0


def test_a_group_half_started_never_was(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(other: SessionStore) -> None:
        calls = []
        start = other.arena.start

        class Dying:
            def __getattr__(self, name: str) -> object:
                return getattr(arena, name)

            def start(self, *args: object, **kwargs: object) -> object:
                calls.append(args)
                if len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return start(*args, **kwargs)  # type: ignore[arg-type]

        arena = other.arena
        monkeypatch.setattr(other, "arena", Dying())
        other.start("g", "key", 4)

    killed(store, work)
    assert store.sessions_count() == 0
    assert store.by_key("key") is None
    assert [sid for sid, _ in store.start("g", "key", 2).sessions] == ["g-0", "g-1"]
