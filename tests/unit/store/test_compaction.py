"""A session that lives for weeks does not grow, and cutting its log changes nothing anyone can see."""

import pytest

from areal_fast.errors import NoInteractions
from areal_fast.store import SessionStore, folds
from tests.unit.store.turns import Clock, ask, commit, export, started, take, tokens


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut whenever anything is dead."""
    monkeypatch.setattr(folds, "COMPACT_MIN_BYTES", 0)
    monkeypatch.setattr(folds, "COMPACT_DEAD_RATIO", 0.0)


def test_a_long_life_of_exports_does_not_grow(store: SessionStore) -> None:
    with store.hitl() as session:
        sizes = []
        for k in range(60):
            for _ in range(3):
                take(session, list(range(k, k + 600)), [k])
            session.set_reward(1.0)
            export(store, "__hitl__")
            store.shards.sweep_expired(store.now_ns() + 10**12)
            sizes.append(store.arena.slot_info(session.slot).nbytes)
        assert max(sizes) < 2 * folds.COMPACT_MIN_BYTES
        take(session, [1], [2])
        assert session.set_reward(1.0).trajectory_id == 60


def test_a_long_life_of_delayed_rewards_does_not_grow(delayed: SessionStore, clock: Clock) -> None:
    with started(delayed) as session:
        iid = take(session, [1], [2])
        for k in range(2000):
            session.set_reward(float(k))
        assert delayed.arena.slot_info(session.slot).nbytes < 100_000
        clock.forward(2.0)
        assert export(delayed, session.session_id)["interactions"][iid]["reward"] == 1999.0


def test_what_is_kept_survives_the_cut(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    with started(store) as session:
        slow = session.begin_turn(reserve_tokens=8)
        for k in range(3):
            take(session, [k] * 50, [k])
            take(session, [*([k] * 50), k, 9], [k, k])
            session.set_reward(float(k))
        live = [take(session, [7] * 40, [1]), take(session, [*([7] * 40), 1, 2], [3])]
        heads = store.arena.read(session.slot)[2]
        export(store, session.session_id, trajectory_id=1)
        assert len(store.arena.read(session.slot)[2]) < len(heads)
        commit(slow, [8], [8])
        reader = SessionStore(store.arena)
        got = export(reader, session.session_id, trajectory_id=2, discount=0.5)["interactions"].values()
        assert [i["reward"] for i in got] == [1.0, 2.0]
        assert [tokens(reader, i) for i in got] == [[2] * 51, [*([2] * 50), 2, 9, 2, 2]]
        first = export(reader, session.session_id, discount=0.5)["interactions"]
        assert next(iter(first)) == slow.interaction_id
        assert session.set_reward(5.0, live[0]).trajectory_id == 3
        assert session.set_reward(6.0, live[0]) == (session.session_id, 2, 3, False)
        with pytest.raises(NoInteractions):
            session.set_reward(6.0, live[1])
        last = export(store, session.session_id)["interactions"]
        assert [tokens(store, i)[-3:] for i in last.values()] == [[7, 7, 1], [1, 2, 3]]


def test_no_cut_while_an_export_is_unsettled(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    with started(store) as session:
        for k in range(3):
            take(session, [k] * 50, [k])
            session.set_reward(float(k))
        open_one = ask(store, session.session_id, trajectory_id=0)
        export(store, session.session_id, trajectory_id=1)
        kinds = [r[1] for r in store.arena.read(session.slot)[2]]
        assert kinds[-2:] == [5, 5]
        open_one.delivered()
        assert len(export(store, session.session_id)["interactions"]) == 1
        assert session.state.is_empty


def test_a_pending_deadline_survives_the_cut(
    delayed: SessionStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    with started(delayed) as session:
        take(session, [1] * 50, [2])
        session.set_reward(1.0)
        clock.forward(2.0)
        iid = take(session, [1] * 50, [3])
        session.set_reward(0.25)
        export(delayed, session.session_id)
        assert session.state.deadline_ns == clock.ns + 2_000_000_000
        clock.forward(2.0)
        assert (
            export(SessionStore(delayed.arena, clock=clock), session.session_id)["interactions"][iid][
                "reward"
            ]
            == 0.25
        )


def test_folds_are_bounded_and_losing_one_loses_nothing(store: SessionStore) -> None:
    small = SessionStore(store.arena, max_fold_bytes=2000)
    sessions = [started(small, f"s{k}") for k in range(5)]
    for _ in range(3):
        for session in sessions:
            take(session, [1] * 30, [2])
    assert small.folds.fold_count < 4 and small.folds.fold_bytes <= 2000
    for session in sessions:
        assert session.set_reward(1.0).interaction_count == 3
        session.release()


def test_memory_of_a_thousand_sessions() -> None:
    """GOALS: 1,000 live sessions of 8 turns growing to 2k tokens in at most 30 MiB of arena."""
    Arena = pytest.importorskip("areal_fast.core._core").Arena
    with Arena.create(64 << 20, proc=0) as arena:
        store = SessionStore(arena)
        before = arena.stats()["granules_used"]
        for n in range(100):
            with started(store, f"m{n}") as session:
                prompt = list(range(n, n + 200))
                for k in range(8):
                    output = list(range(k, k + 64))
                    take(session, prompt, output)
                    prompt = prompt + output + list(range(k, k + 160))
        used = (arena.stats()["granules_used"] - before) * 4096
        assert used * 10 <= 30 << 20


def test_remembered_ids_are_bounded_and_losing_them_loses_nothing(
    store: SessionStore,
) -> None:
    store.folds.max_ids_bytes = 10_000
    want = []
    sessions = [started(store, f"s{k}") for k in range(3)]
    for k in range(12):
        for n, session in enumerate(sessions):
            prompt = [n] * 1000 + list(range(k))
            take(session, prompt, [k, n])
            want.append((n, [*prompt, k, n]))
        assert 0 < store.folds.ids_bytes <= 10_000
    for n, session in enumerate(sessions):
        session.set_reward(1.0)
        assert store.arena.slot_info(session.slot).nbytes < 16_384
        got = export(store, session.session_id)["interactions"].values()
        assert [tokens(store, i) for i in got] == [ids for m, ids in want if m == n]
        session.release()
