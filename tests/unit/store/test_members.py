"""Sessions know which of their group they are, where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from areal_fast.core import ArenaFull
from areal_fast.store import SessionStore, folds
from tests.unit.store.turns import export, take


def place(store: SessionStore, key: str) -> int:
    session = store.by_key(key)
    assert session is not None
    with session:
        return session.state.member


def test_members_know_their_place(arena: Any) -> None:
    store, other = SessionStore(arena, note_members=True), SessionStore(arena)
    group = store.start("t", group_size=3)
    assert [place(other, key) for _, key in group.sessions] == [0, 1, 2]
    assert place(other, store.start("t").sessions[0][1]) == -1
    assert [place(other, key) for _, key in other.start("u", group_size=2).sessions] == [-1, -1]


def test_the_place_survives_a_cut(arena: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "COMPACT_MIN_BYTES", 0)
    monkeypatch.setattr(folds, "COMPACT_DEAD_RATIO", 0.0)
    store = SessionStore(arena, note_members=True)
    session_id, key = store.start("t", group_size=2).sessions[1]
    session = store.by_key(key)
    assert session is not None
    with session:
        for k in range(3):
            take(session, [k] * 50, [k])
            session.set_reward(1.0)
            export(store, session_id)
    assert place(SessionStore(arena), key) == 1


def test_a_group_that_cannot_note_its_members_is_no_group(
    arena: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SessionStore(arena, note_members=True)

    def full(*args: Any, **options: Any) -> int:
        raise ArenaFull("full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "arena", _Instead(arena, full))
        with pytest.raises(ArenaFull):
            store.start("t", group_size=2)
    assert store.sessions_count() == 0
    assert store.start("t", group_size=2).sessions[0][0] == "t-0"


class _Instead:
    """An arena whose append is another."""

    def __init__(self, arena: Any, append: Any) -> None:
        self._arena = arena
        self.append = append

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arena, name)
