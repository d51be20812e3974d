"""WIRE "Sessions": ids, keys, rebinding, groups, the persistent session."""

import re
from typing import Any, cast

import pytest

from areal_fast.core import ArenaFull, IndexBusy
from areal_fast.errors import KeyBound
from areal_fast.store import SessionStore
from tests.unit.store.turns import export, lives, started, take


def ids(group: Any) -> list[str]:
    return [session_id for session_id, _ in group.sessions]


def test_session_id_is_task_and_smallest_free_number(store: SessionStore) -> None:
    assert [ids(store.start("t")) for _ in range(3)] == [["t-0"], ["t-1"], ["t-2"]]
    with store.by_id("t-1") as session:  # type: ignore[union-attr]
        take(session, [1], [2])
        session.set_reward(1.0)
    export(store, "t-1", remove_session=True)
    assert not lives(store, "t-1")
    assert ids(store.start("t")) == ["t-1"]
    assert ids(store.start("t")) == ["t-3"]
    assert ids(store.start("")) == ["-0"]
    assert ids(store.start("t-0")) == ["t-0-0"]


def test_keys_are_32_random_bytes_or_the_given_one(store: SessionStore) -> None:
    (_, key), (_, other) = (store.start("t").sessions[0] for _ in range(2))
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", key)
    assert key != other
    assert store.start("t", "mine").sessions == [("t-2", "mine")]
    assert len(store.start("t", "").sessions[0][1]) == 43
    with store.by_key("mine") as session:  # type: ignore[union-attr]
        assert session.session_id == "t-2"
    assert store.by_key("nobody's") is None
    assert store.by_key("caf\ud800") is None
    assert not lives(store, "x" * 5000)


def test_key_of_a_live_session_without_ready_trajectory_is_refused(store: SessionStore) -> None:
    store.start("k", "mine")
    with pytest.raises(KeyBound, match=r"API key is already bound to active session k-0\."):
        store.start("k", "mine")
    with store.by_key("mine") as session:  # type: ignore[union-attr]
        take(session, [1], [2])
    with pytest.raises(KeyBound):
        store.start("k", "mine")
    assert store.sessions_count() == 1


def test_key_of_a_session_with_ready_trajectory_moves(store: SessionStore) -> None:
    store.start("k", "mine")
    with store.by_key("mine") as session:  # type: ignore[union-attr]
        take(session, [1], [2])
        session.set_reward(1.0)
    assert store.start("k", "mine").sessions == [("k-1", "mine")]
    with store.by_key("mine") as session:  # type: ignore[union-attr]
        assert session.session_id == "k-1"
    assert len(export(store, "k-0")["interactions"]) == 1
    with pytest.raises(KeyBound, match="k-1"):
        store.start("k", "mine")


def test_group_members_start_together_and_the_first_takes_the_key(store: SessionStore) -> None:
    group = store.start("g", "mine", 3)
    assert re.fullmatch(r"grp-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", group.group_id)
    assert ids(group) == ["g-0", "g-1", "g-2"]
    assert group.sessions[0][1] == "mine"
    assert len({key for _, key in group.sessions}) == 3
    assert ids(store.start("g", group_size=0)) == ["g-3"]
    assert ids(store.start("g", group_size=-5)) == ["g-4"]
    with pytest.raises(KeyBound):
        store.start("g", "mine", 2)
    assert store.sessions_count() == 5


def test_a_group_starts_whole_or_not_at_all(store: SessionStore) -> None:
    before = store.sessions_count()
    fits = 0
    with pytest.raises(ArenaFull):
        while True:
            store.start("big", group_size=300)
            fits += 1
    assert fits > 0
    assert store.sessions_count() == before + 300 * fits
    assert not lives(store, f"big-{300 * fits}")


class BusyArena:
    """An arena whose index is taken: for the second member of a group, then for `aborts` tries to undo it."""

    def __init__(self, arena: Any, aborts: int) -> None:
        self._arena = arena
        self._starts = 0
        self._aborts = aborts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arena, name)

    def start(self, *args: Any, **options: Any) -> Any:
        self._starts += 1
        if self._starts == 2:
            raise IndexBusy
        return self._arena.start(*args, **options)

    def txn_abort(self, txn: int, slots: list[int]) -> None:
        self._aborts -= 1
        if self._aborts >= 0:
            raise IndexBusy
        self._arena.txn_abort(txn, slots)


def test_a_group_tried_again_gets_the_ids_of_the_try_that_was_given_up(store: SessionStore) -> None:
    store.arena = cast(Any, BusyArena(store.arena, aborts=12))
    with pytest.raises(IndexBusy):
        store.start("g", "mine", 3)
    tries = 0
    while True:
        try:
            group = store.start("g", "mine", 3)
            break
        except IndexBusy:
            tries += 1
            assert tries < 10
    assert ids(group) == ["g-0", "g-1", "g-2"]
    assert store.sessions_count() == 3


def test_hitl_is_made_when_first_needed_and_stays(store: SessionStore) -> None:
    assert not lives(store, "__hitl__")
    with store.hitl() as session:
        assert session.session_id == "__hitl__"
        take(session, [1], [2])
    with store.hitl() as session:
        assert session.set_reward(1.0).trajectory_id == 0


def test_released_sessions_are_unpinned_and_touched(store: SessionStore) -> None:
    session = started(store)
    before = store.arena.slot_info(session.slot)
    assert before.pins
    session.release()
    session.release()
    after = store.arena.slot_info(session.slot)
    assert after.pins == 0
    assert after.touched_ns >= before.touched_ns
