"""The cache of folds: which ones stay, and that losing any loses nothing. Ids of interactions."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import OrderedDict

import pytest

from areal_fast.errors import InteractionNotFound
from areal_fast.protocol.messages import ExportRequest
from areal_fast.protocol.retries import LOST, Asked
from areal_fast.store import Session, SessionStore
from areal_fast.store.folds import FoldCache
from tests.unit.store.turns import commit, started, take


def test_the_least_recently_used_folds_go(store: SessionStore) -> None:
    """Against an ordered dict of what each fold takes."""
    chance = random.Random(1)
    sessions = [started(store, f"s{k}") for k in range(12)]
    for k, session in enumerate(sessions):
        for n in range(k % 4):
            take(session, list(range(40 + n)), [n] * 5)
    cache, want = FoldCache(store.arena, 4000), OrderedDict[int, int]()
    evictions = 0
    for _ in range(400):
        session = chance.choice(sessions)
        slot, what = session.slot, chance.random()
        if what < 0.1:
            cache.forget(slot)
            want.pop(slot, None)
        else:
            if what < 0.2:
                take(session, list(range(50)), [1] * 5)
            fold = cache.refresh(slot)
            assert fold.head == store.arena.head(slot) and fold.interaction_count() == session.state.seq
            want[slot] = fold.size_bytes
            want.move_to_end(slot)
            while sum(want.values()) > 4000 and len(want) > 1:
                want.popitem(last=False)
                evictions += 1
        assert (cache.fold_count, cache.fold_bytes) == (len(want), sum(want.values()))
    assert evictions > 50
    for session in sessions:
        session.release()


def test_a_fold_that_cannot_be_read_is_no_fold(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(store) as session:
        iid = take(session, [1, 2], [3])
        cache = FoldCache(store.arena)

        class Broken:
            def read(self, slot: int, since: int) -> tuple[int, bool, list[object]]:
                head, cut, records = store.arena.read(slot, since)
                return head, cut, [*records, (*records[0][:5], b"short", 0)]

        broken = FoldCache(Broken())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="cut short"):
            broken.refresh(session.slot)
        assert (broken.fold_count, broken.fold_bytes) == (0, 0)
        assert list(cache.refresh(session.slot).interactions(0)) == [0]
        assert cache.refresh(session.slot).named(iid) == 0


def test_a_note_of_ones_own_is_not_read_back(store: SessionStore) -> None:
    """And a note between others' records is in the fold as well."""
    other = SessionStore(store.arena)
    with started(store) as session:
        for theirs in (False, True):
            take(session, [1, 2], [3])
            turn_at = session.state.active_index, session.state.newest
            if theirs:
                store.arena.append(session.slot, 99, b"")
            session.fate(turn_at)(True)
            mine, read = session.state, other.folds.refresh(session.slot)
            assert [i.fate for i in mine.all_interactions()] == [i.fate for i in read.all_interactions()]
            assert (mine.head, mine.dead_bytes) == (read.head, read.dead_bytes)


def test_what_is_wrong_with_a_commit_ends_its_turn(store: SessionStore) -> None:
    with started(store) as session:
        used = store.arena.stats()["granules_used"]
        turn = session.begin_turn(reserve_tokens=10_000)
        with pytest.raises(ValueError, match="cover exactly the output"):
            turn.commit(
                prompt_ids=[1], output_ids=[2], logprobs=[0.5], version_runs=[(0, 2)], stop_reason="stop"
            )
        assert not turn.open and store.turns_open == {}
        assert store.arena.stats()["granules_used"] == used and session.state.is_empty


def ids(session: Session, count: int) -> list[str]:
    turns = [session.begin_turn(reserve_tokens=0) for _ in range(count)]
    for turn in turns:
        turn.abandon()
    return [turn.interaction_id for turn in turns]


def test_ids_are_random(store: SessionStore) -> None:
    with started(store) as session:
        mine = ids(session, 1000)
        assert all(re.fullmatch(r"chatcmpl-[0-9a-f]{29}", one) for one in mine) and len({*mine}) == 1000
        for place in range(9, 38):
            assert {one[place] for one in mine} == {*"0123456789abcdef"}


FORKING = """
import os
from areal_fast.store import SessionStore

def ids(count):
    store = SessionStore.open(16 << 20)
    with store.by_key(store.start("t").sessions[0][1]) as session:
        for _ in range(count):
            with session.begin_turn(reserve_tokens=0) as turn:
                os.write(1, turn.interaction_id.encode() + b"\\n")

ids(10)
child = os.fork()
ids(600)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forks_ids_are_others() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120)
    given = done.stdout.split()
    assert done.returncode == 0 and len(given) == len({*given}) == 1210, done.stderr


def test_what_cannot_be_an_id_is_nobodys(store: SessionStore) -> None:
    with started(store) as session:
        take(session, [1, 2], [3])
        with pytest.raises(InteractionNotFound):
            session.set_reward(1.0, "\ud800")
        with pytest.raises(IndexError):
            store.folds.refresh(-1)


def test_an_arena_that_gives_less_than_asked_for_is_not_read_beyond(store: SessionStore) -> None:
    with started(store) as session:
        take(session, [1, 2], [3])

        class Short:
            read, head = store.arena.read, store.arena.head

            def record_data(self, *where: int) -> bytes:
                return store.arena.record_data(*where)[:-1]

        cache = FoldCache(Short())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="asked for"):
            cache.full_ids(session.slot, cache.refresh(session.slot), 0)


def test_who_is_asked_for_a_twins_process_may_change_the_fold(store: SessionStore) -> None:
    with started(store) as session:
        turn = session.begin_turn(reserve_tokens=0)
        turn.commit(
            prompt_ids=[1],
            output_ids=[2],
            logprobs=[0.5],
            version_runs=[(0, 1)],
            stop_reason="stop",
            body_hash=Asked(b"b" * 16).pack(7),
        )
        fold = FoldCache(store.arena).refresh(session.slot)
        records = store.arena.read(session.slot)[2]

        def lives(process: int) -> bool:
            fold.apply(records * 1000)  # moves all that it has
            return process != 7

        assert fold.twin_of(b"b" * 16, b"", lives) == 0


def test_a_session_that_cannot_be_read_is_not_held(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.hitl().release()
    slot = store.arena.open_named(b"__hitl__")
    monkeypatch.setattr(store.folds, "refresh", lambda _: 1 / 0)
    before = store.arena.slot_info(slot).pins
    store.arena.unpin(slot)
    with pytest.raises(ZeroDivisionError):
        store.hitl()
    assert before and not store.arena.slot_info(slot).pins


def test_a_fold_does_not_depend_on_when_it_was_read(store: SessionStore) -> None:
    """A note about a turn that came while its trajectory was exported: read before and after the outcome."""
    with started(store) as session:
        late = session.begin_turn(reserve_tokens=0)
        take(session, [1, 2], [3])
        session.set_reward(1.0)
        export = store.begin_export(ExportRequest(session_ids=[session.session_id]))
        commit(late, [1], [2])
        session.fate((late.trajectory, late.ordinal))(False)
        read_on = session.state
        export.delivered()
        for state in (session.state, FoldCache(store.arena).refresh(session.slot)):
            assert [(i.ordinal, i.fate) for i in state.late.values()] == [(late.ordinal, LOST)]
        assert read_on is session.state
