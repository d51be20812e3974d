"""WIRE "Rewards": what a reward falls on, readiness at once and delayed, repeats, interactions in flight."""

import pytest

from areal_fast.core import Gone
from areal_fast.errors import InteractionNotFound, NoInteractions
from areal_fast.store import SessionStore
from tests.unit.store.turns import Clock, commit, export, lives, started, take, tokens


def test_no_interactions(store: SessionStore) -> None:
    with started(store) as session, pytest.raises(NoInteractions, match=r"^No interactions in session$"):
        session.set_reward(1.0)


def test_unknown_interaction_is_named(store: SessionStore) -> None:
    with started(store) as session:
        take(session, [1], [2])
        with pytest.raises(InteractionNotFound, match=r"^Interaction chatcmpl-nope not found$"):
            session.set_reward(1.0, "chatcmpl-nope")


def test_reward_without_id_falls_on_the_newest_and_makes_ready_at_once(store: SessionStore) -> None:
    with started(store) as session:
        first, last = take(session, [1], [2]), take(session, [1], [3])
        result = session.set_reward(0.5, "")
        assert result == (session.session_id, 2, 0, True)
        assert result.trajectory_ready
        got = export(store, session.session_id, discount=0.0)["interactions"]
        assert {iid: item["reward"] for iid, item in got.items()} == {first: 0.0, last: 0.5}


def test_newest_is_by_start_not_by_end(store: SessionStore) -> None:
    with started(store) as session:
        early = session.begin_turn(reserve_tokens=8)
        late = session.begin_turn(reserve_tokens=8)
        commit(late, [5], [6])
        commit(early, [1], [2])
        session.set_reward(1.0)
        got = export(store, session.session_id, discount=0.5)["interactions"]
        assert list(got) == [early.interaction_id, late.interaction_id]
        assert [i["reward"] for i in got.values()] == [0.5, 1.0]


def test_repeat_is_idempotent(store: SessionStore) -> None:
    with started(store) as session:
        iid = take(session, [1], [2])
        session.set_reward(0.75)
        assert session.set_reward(0.1) == (session.session_id, 1, 0, False)
        assert session.set_reward(0.1, iid) == (session.session_id, 1, 0, False)
        with pytest.raises(NoInteractions):
            session.set_reward(0.1, "nope")
        assert export(store, session.session_id)["interactions"][iid]["reward"] == 0.75
        with pytest.raises(NoInteractions):
            session.set_reward(1.0)


def test_repeat_means_the_newest_ready_trajectory(store: SessionStore) -> None:
    with started(store) as session:
        old = take(session, [1], [2])
        session.set_reward(1.0)
        take(session, [3], [4])
        with pytest.raises(InteractionNotFound):
            session.set_reward(1.0, old)
        assert session.set_reward(2.0).trajectory_id == 1
        export(store, session.session_id)
        assert session.set_reward(9.0) == (session.session_id, 1, 0, False)
        assert session.set_reward(9.0, old).trajectory_id == 0


def test_reward_on_a_middle_turn_is_what_a_repeat_must_name(store: SessionStore) -> None:
    with started(store) as session:
        first, middle, _ = (take(session, [1], [n]) for n in (2, 3, 4))
        session.set_reward(0.5, middle)
        with pytest.raises(NoInteractions):
            session.set_reward(0.9, first)
        assert not session.set_reward(0.9, middle).ready_transition


def test_failed_or_unstored_turns_count_for_nothing(store: SessionStore) -> None:
    with started(store) as session:
        with session.begin_turn(reserve_tokens=10):
            pass
        commit(session.begin_turn(reserve_tokens=10, store=False), [1], [2])
        with pytest.raises(NoInteractions):
            session.set_reward(1.0)


def test_in_flight_turn_joins_the_trajectory_it_started_in(store: SessionStore) -> None:
    with started(store) as session:
        slow = session.begin_turn(reserve_tokens=8)
        quick = take(session, [1], [2])
        assert session.set_reward(1.0) == (session.session_id, 1, 0, True)
        commit(slow, [7], [8])
        with pytest.raises(NoInteractions):
            session.set_reward(2.0, slow.interaction_id)
        got = export(store, session.session_id, discount=0.5)["interactions"]
        assert list(got) == [slow.interaction_id, quick]
        assert [i["reward"] for i in got.values()] == [0.5, 1.0]


def test_in_flight_turn_of_an_exported_trajectory_is_late_and_never_exported(store: SessionStore) -> None:
    with started(store) as session:
        slow = session.begin_turn(reserve_tokens=8)
        take(session, [1], [2])
        session.set_reward(1.0)
        export(store, session.session_id)
        commit(slow, [7], [8])
        with pytest.raises(NoInteractions):
            session.set_reward(2.0)
        nxt = take(session, [1], [3])
        assert session.set_reward(3.0) == (session.session_id, 1, 1, True)
        assert list(export(store, session.session_id)["interactions"]) == [nxt]
        assert list(session.state.late) == [slow.ordinal]


def test_reward_after_removal_is_gone(store: SessionStore) -> None:
    with started(store) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
        take(session, [1], [2])
        export(store, session.session_id, remove_session=True)
        with pytest.raises(Gone):
            session.set_reward(1.0)
        with pytest.raises(Gone):
            take(session, [1], [2])
    assert not lives(store, session.session_id)


# -- delayed ---------------------------------------------------------------------------------------------


def test_with_a_finish_timeout_the_trajectory_is_ready_after_it(delayed: SessionStore, clock: Clock) -> None:
    with started(delayed) as session:
        first, second = take(session, [1], [2]), take(session, [1], [3])
        assert session.set_reward(1.0) == (session.session_id, 2, None, False)
        clock.forward(1.5)
        assert session.set_reward(0.5, first) == (session.session_id, 2, None, False)
        clock.forward(1.5)
        assert not session.state.has_ready
        clock.forward(0.5)
        assert session.state.has_ready
        assert list(delayed.ready_events) == [(session.session_id, 0)]
        got = export(delayed, session.session_id, discount=0.0)["interactions"]
        assert {iid: i["reward"] for iid, i in got.items()} == {first: 0.5, second: 1.0}


def test_a_turn_begun_after_the_deadline_belongs_to_the_next_trajectory(
    delayed: SessionStore, clock: Clock
) -> None:
    with started(delayed) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
        before = session.begin_turn(reserve_tokens=8)
        clock.forward(2.0)
        after = session.begin_turn(reserve_tokens=8)
        assert (before.trajectory, after.trajectory) == (0, 1)
        commit(before, [3], [4])
        commit(after, [5], [6])
        got = export(delayed, session.session_id)["interactions"]
        assert [tokens(delayed, i) for i in got.values()] == [[1, 2], [3, 4]]


def test_a_timer_fires_what_nobody_touches(delayed: SessionStore, clock: Clock) -> None:
    with started(delayed) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
    assert delayed.next_deadline_ns() == clock.ns + 2_000_000_000
    assert delayed.fire_due(clock.ns) == 0
    clock.forward(2.0)
    assert delayed.fire_due(clock.ns) == 1
    assert delayed.fire_due(clock.ns) == 0
    assert delayed.next_deadline_ns() == 0
    assert len(export(delayed, session.session_id)["interactions"]) == 1


def test_a_scan_fires_deadlines_another_process_set(delayed: SessionStore, clock: Clock) -> None:
    with started(delayed) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
    other = SessionStore(delayed.arena, finish_timeout_s=2.0, clock=clock)
    clock.forward(2.0)
    assert other.fire_due(clock.ns) == 0
    assert other.fire_due(clock.ns, scan=True) == 1
    assert other.fire_due(clock.ns, scan=True) == 0
    assert delayed.fire_due(clock.ns) == 0


def test_delayed_reward_does_not_free_the_key(delayed: SessionStore, clock: Clock) -> None:
    from areal_fast.errors import KeyBound

    delayed.start("k", "mine")
    with delayed.by_key("mine") as session:  # type: ignore[union-attr]
        take(session, [1], [2])
        session.set_reward(1.0)
    with pytest.raises(KeyBound):
        delayed.start("k", "mine")
    clock.forward(2.0)
    assert delayed.start("k", "mine").sessions == [("k-1", "mine")]
