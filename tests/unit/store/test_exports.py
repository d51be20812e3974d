"""WIRE "Export": what is taken, in what order and form, what goes with it, and that it can be taken back."""

import json
from typing import Any

import numpy as np
import pytest

from areal_fast.core import ArenaFull
from areal_fast.errors import (
    EmptySessionList,
    ExportBusy,
    KeyBound,
    NoInteractions,
    NoReadyTrajectories,
    SessionNotFound,
    TrajectoryNotFound,
)
from areal_fast.protocol.export import NAMES
from areal_fast.store import SessionStore
from tests.unit.store.turns import Clock, ask, commit, export, fetch, lives, started, take, tokens


def ready(store: SessionStore, n: int = 1, task: str = "t") -> str:
    """A session with n ready trajectories of one turn each: prompt [k], output [10 + k, 99]."""
    with started(store, task) as session:
        for k in range(n):
            take(session, [k], [10 + k, 99])
            session.set_reward(k + 0.5)
        return session.session_id


def test_pr1268_answer_names_every_interaction_and_tensor(store: SessionStore) -> None:
    sid = ready(store)
    got = export(store, sid)
    assert list(got) == ["interactions"]
    ((iid, item),) = got["interactions"].items()
    assert list(item) == ["tensor_dict", "reward", "interaction_id"]
    assert (item["reward"], item["interaction_id"]) == (0.5, iid)
    assert tuple(item["tensor_dict"]) == NAMES
    values = {name: fetch(store, ref).tolist() for name, ref in item["tensor_dict"].items()}
    assert values == {
        "input_ids": [[0, 10, 99]],
        "loss_mask": [[0, 1, 1]],
        "logprobs": [[0.0, -0.5, -1.5]],
        "versions": [[-1, 0, 0]],
        "attention_mask": [[True, True, True]],
        "rewards": [0.5],
    }


def test_reference_bytes_are_the_originals(store: SessionStore) -> None:
    done = ask(store, ready(store))
    ref = json.loads(done.body)["interactions"].popitem()[1]["tensor_dict"]["input_ids"]
    shard_id = ref["data"]["shard"]["data"]["shard_id"]
    want = (
        '"input_ids":{"type":"dataclass","class_path":"areal.infra.rpc.rtensor.RTensor","data":{"shard":'
        '{"type":"dataclass","class_path":"areal.infra.rpc.rtensor.TensorShardInfo","data":{"shard_id":'
        f'"{shard_id}","node_addr":"127.0.0.1:8082"}}}},"data":{{"type":"tensor","data":null,"shape":[1,3],'
        '"dtype":"torch.int64"}}}'
    )
    assert want.encode() in done.body
    assert len(shard_id) == 36
    done.delivered()


def test_default_is_the_newest_ready_trajectory(store: SessionStore) -> None:
    sid = ready(store, 3)
    firsts = [next(iter(export(store, sid)["interactions"].values()))["reward"] for _ in range(3)]
    assert firsts == [2.5, 1.5, 0.5]
    with pytest.raises(NoReadyTrajectories, match=f"^'No ready trajectories for session {sid}'$") as caught:
        ask(store, sid)
    assert not caught.value.named


def test_a_trajectory_can_be_named_once(store: SessionStore) -> None:
    sid = ready(store, 3)
    assert next(iter(export(store, sid, trajectory_id=1)["interactions"].values()))["reward"] == 1.5
    with pytest.raises(TrajectoryNotFound, match=f"^'Trajectory 1 not found for session {sid}'$"):
        ask(store, sid, trajectory_id=1)
    with pytest.raises(TrajectoryNotFound):
        ask(store, sid, trajectory_id=-1)
    export(store, sid)
    export(store, sid)
    with pytest.raises(NoReadyTrajectories) as caught:
        ask(store, sid, trajectory_id=1)
    assert caught.value.named


def test_unknown_session(store: SessionStore) -> None:
    with pytest.raises(SessionNotFound, match=r"^Session zzz not found$"):
        ask(store, "zzz")


def test_rewards_are_discounted_once_over_the_trajectory(store: SessionStore) -> None:
    with started(store) as session:
        for k in range(3):
            take(session, [k], [k])
        session.set_reward(2.0)
        got = export(store, session.session_id, discount=0.5)["interactions"].values()
        assert [i["reward"] for i in got] == [0.5, 1.0, 2.0]
        assert [fetch(store, i["tensor_dict"]["rewards"]).tolist() for i in got] == [[0.5], [1.0], [2.0]]


def test_shared_prefixes_come_back_whole(store: SessionStore) -> None:
    rng = np.random.default_rng(7)
    want: list[list[int]] = []
    with started(store) as session:
        prompt = rng.integers(0, 150_000, 200).tolist()
        for k in range(8):
            output = rng.integers(0, 150_000, 20).tolist()
            take(session, prompt, output, k)
            want.append(prompt + output)
            prompt = prompt + output + rng.integers(0, 150_000, 10).tolist()
            if k == 4:
                prompt = want[2][:150] + [1, 2, 3]
        session.set_reward(1.0)
        info = store.arena.slot_info(session.slot)
        assert info.nbytes < sum(4 * len(w) for w in want)
    got = export(store, session.session_id)["interactions"].values()
    assert [tokens(store, i) for i in got] == want
    versions = [fetch(store, i["tensor_dict"]["versions"])[0] for i in got]
    assert [v[-20:].tolist() for v in versions] == [[k] * 20 for k in range(8)]


def test_another_process_reads_what_this_one_wrote(store: SessionStore) -> None:
    with started(store) as session:
        take(session, list(range(100)), [1, 2])
        other = SessionStore(store.arena)
        with other.by_id(session.session_id) as same:  # type: ignore[union-attr]
            take(same, [*range(100), 1, 2, 3], [4])
        take(session, [*range(100), 1, 2, 3, 4, 5], [6])
        session.set_reward(1.0)
    got = export(SessionStore(store.arena), session.session_id)["interactions"].values()
    reader = SessionStore(store.arena)
    assert [len(tokens(reader, i)) for i in got] == [102, 104, 106]
    assert store.arena.slot_info(session.slot).nbytes < 8192 + 4096


# -- the later dialects ------------------------------------------------------------------------------------


def test_list_form_merges_sessions_in_request_order_and_skips_the_rest(store: SessionStore) -> None:
    a, b = ready(store, task="a"), ready(store, 2, task="b")
    with started(store, "c") as unready:
        take(unready, [1], [2])
    got = export(store, b, "zzz", a, b, unready.session_id, dialect="main-may")["interactions"]
    assert [i["reward"] for i in got.values()] == [1.5, 0.5]
    assert not any(lives(store, sid) for sid in (a, b, unready.session_id))


def test_list_form_with_nothing_to_export(store: SessionStore) -> None:
    assert export(store, "zzz", dialect="1.0") == {"traj": {}}
    assert export(store, "zzz", dialect="main-may") == {"interactions": {}}
    with pytest.raises(EmptySessionList, match=r"^session_ids must be a non-empty list$"):
        ask(store, dialect="1.0")


def test_without_removal_unready_sessions_stay(store: SessionStore) -> None:
    with started(store) as session:
        take(session, [1], [2])
    assert export(store, session.session_id, dialect="1.0", remove_session=False) == {"traj": {}}
    assert lives(store, session.session_id)


def test_1_0_answers_with_one_padded_batch(store: SessionStore) -> None:
    a, b = ready(store, task="a"), ready(store, task="b")
    with store.by_id(b) as session:  # type: ignore[union-attr]
        take(session, [5, 6, 7], [8])
        take(session, [1], [2])
        session.set_reward(1.0)
    traj = export(store, a, b, dialect="1.0", discount=0.5)["traj"]
    assert tuple(traj) == NAMES
    values = {name: fetch(store, ref).tolist() for name, ref in traj.items()}
    assert values == {
        "input_ids": [[0, 10, 99, 0], [5, 6, 7, 8], [1, 2, 0, 0]],
        "loss_mask": [[0, 1, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]],
        "logprobs": [[0, -0.5, -1.5, 0], [0, 0, 0, -0.5], [0, -0.5, 0, 0]],
        "versions": [[-1, 0, 0, 0], [-1, -1, -1, 0], [-1, 0, 0, 0]],
        "attention_mask": [[True, True, True, False], [True] * 4, [True, True, False, False]],
        "rewards": [0.5, 0.5, 1.0],
    }


def test_same_ordinals_of_different_sessions_do_not_mix(store: SessionStore) -> None:
    sids = []
    for k in range(3):
        with started(store, "m") as session:
            take(session, [k] * 40, [k])
            take(session, [k] * 41 + [7], [8])
            session.set_reward(1.0)
            sids.append(session.session_id)
    got = export(store, *sids, dialect="main-may")["interactions"].values()
    assert [tokens(store, i)[0] for i in got] == [0, 0, 1, 1, 2, 2]
    assert [tokens(store, i)[39] for i in got] == [0, 0, 1, 1, 2, 2]


def test_string_interactions(store: SessionStore) -> None:
    messages = b'[{"role":"user","content":"hi"}]'
    with started(store) as session:
        session.begin_turn(reserve_tokens=0).commit_string(messages, 'a "quoted" ö')
        iid = take(session, [1], [2])
        session.set_reward(0.2)
        got = export(store, session.session_id)["interactions"]
        text, token = got.values()
        assert text == {
            "messages": [{"role": "user", "content": "hi"}],
            "output_message_list": [{"role": "assistant", "content": 'a "quoted" ö'}],
            "reward": 0.2,
            "interaction_id": next(iter(got)),
        }
        assert token["interaction_id"] == iid
        session.begin_turn(reserve_tokens=0).commit_string(messages, "b")
        session.set_reward(0.3)
        assert export(store, session.session_id, dialect="1.0", remove_session=False) == {
            "traj": {
                "interactions": [
                    {"request": [{"role": "user", "content": "hi"}], "response": "b", "reward": 0.3}
                ]
            }
        }


# -- removal ------------------------------------------------------------------------------------------------


def test_removal_takes_the_whole_session_unless_a_trajectory_is_named(store: SessionStore) -> None:
    sid = ready(store, 3)
    export(store, sid, trajectory_id=0, remove_session=True)
    assert lives(store, sid)
    export(store, sid, trajectory_id=1, remove_session=True)
    export(store, sid, trajectory_id=2, remove_session=True)
    assert not lives(store, sid)
    sid = ready(store, 3)
    export(store, sid, remove_session=True)
    assert not lives(store, sid)


def test_named_removal_spares_a_session_that_is_in_use(store: SessionStore) -> None:
    sid = ready(store)
    with store.by_id(sid) as session:  # type: ignore[union-attr]
        turn = session.begin_turn(reserve_tokens=4)
        export(store, sid, trajectory_id=0, remove_session=True)
        commit(turn, [1], [2])
        session.set_reward(1.0)
    assert len(export(store, sid, trajectory_id=1, remove_session=True)["interactions"]) == 1
    assert not lives(store, sid)


def test_refused_export_with_removal_removes_nothing(store: SessionStore) -> None:
    with started(store) as session:
        pass
    with pytest.raises(NoReadyTrajectories):
        ask(store, session.session_id, remove_session=True)
    assert lives(store, session.session_id)


# -- two steps ----------------------------------------------------------------------------------------------


def test_an_export_in_progress_is_waited_for(store: SessionStore) -> None:
    sid = ready(store, 2)
    first = ask(store, sid)
    with pytest.raises(ExportBusy):
        ask(store, sid)
    with pytest.raises(ExportBusy):
        ask(store, sid, trajectory_id=1)
    second = ask(store, sid, trajectory_id=0)
    first.delivered()
    second.delivered()
    with pytest.raises(NoReadyTrajectories):
        ask(store, sid)


def test_whoever_hangs_on_an_export_in_progress_waits_for_its_outcome(store: SessionStore) -> None:
    """Its client may have the reply, and ask another worker, a moment before the outcome is known here."""
    ((sid, key),) = store.start("t").sessions
    for remove in (False, True):
        session = store.by_key(key)
        assert session is not None
        with session:
            take(session, [1], [2])
            session.set_reward(1.0)
            under_way = ask(store, sid, remove_session=remove)
            with pytest.raises(ExportBusy):
                session.set_reward(1.0)
            with pytest.raises(ExportBusy):
                store.start("t", key)
            if remove:
                with pytest.raises(ExportBusy):
                    store.by_key(key)
            under_way.delivered()
            if not remove:
                with pytest.raises(NoInteractions):
                    session.set_reward(1.0)
                with pytest.raises(KeyBound):
                    store.start("t", key)
    assert store.by_key(key) is None
    assert store.start("t", key).sessions == [(sid, key)]


def test_an_undelivered_export_never_was(store: SessionStore) -> None:
    sid = ready(store, 2)
    first = ask(store, sid, remove_session=True)
    body = json.loads(first.body)
    first.undelivered()
    first.delivered()
    ref = next(iter(body["interactions"].values()))["tensor_dict"]["input_ids"]
    assert store.shards.get_json(ref["data"]["shard"]["data"]["shard_id"]) is None
    assert store.shards.totals() == (0, 0)
    again = export(store, sid)
    assert list(again["interactions"]) == list(body["interactions"])


def test_a_lost_reply_is_replayed_to_an_identical_request_alone_and_for_60_s(arena: Any) -> None:
    clock = Clock()
    store = SessionStore(arena, clock=clock)
    with started(store) as session:
        name = session.session_id

        def new(k: int) -> str:
            interaction_id = take(session, [k], [10 + k, 99])
            session.set_reward(k)
            return interaction_id

        def given(**more: Any) -> list[str]:
            return list(export(store, name, **more)["interactions"])

        lost = new(1)
        ask(store, name, discount=0.5).undelivered()
        second, third = new(2), new(3)
        assert given() == [third]  # another request
        assert given(discount=0.5) == [lost]
        assert given(discount=0.5) == [second]  # it did arrive, so now it means the newest

        lost = new(4)
        ask(store, name).undelivered()
        newest = new(5)
        state = store.fold(session.slot, name)
        assert [(index, ns) for _, index, ns in state.checkpoint()[0].lost] == [(3, clock.ns)]
        clock.forward(61)
        assert given() == [newest] and given() == [lost]


def test_a_lost_group_export_is_replayed_session_by_session(store: SessionStore) -> None:
    a, b = ready(store, task="a"), ready(store, task="b")
    lost = ask(store, a, b, dialect="main-may")
    names = list(json.loads(lost.body)["interactions"])
    lost.undelivered()
    with store.by_id(a) as session:  # type: ignore[union-attr]
        take(session, [7], [8, 99])
        session.set_reward(9.0)
    assert list(export(store, a, b, dialect="main-may")["interactions"]) == names
    assert not lives(store, a) and not lives(store, b)


def test_a_dead_exporter_is_taken_back_by_the_sweep(arena: Any) -> None:
    other = type(arena).attach(arena.fileno(), 1)
    store, dying = SessionStore(arena), SessionStore(other)
    a, b = ready(store, task="a"), ready(store, task="b")
    ask(dying, a, b, dialect="1.0")
    with pytest.raises(ExportBusy):
        ask(store, a)
    assert arena.sweep(1)["txns_aborted"] == 1
    assert len(export(store, a, b, dialect="main-may")["interactions"]) == 2
    other.close()


def test_a_turn_that_ends_during_an_export_is_late_or_joins_as_the_export_ends(store: SessionStore) -> None:
    for delivered in (True, False):
        with started(store) as session:
            turn = session.begin_turn(reserve_tokens=100)
            take(session, list(range(50)), [2])
            session.set_reward(1.0)
            done = ask(store, session.session_id)
            commit(turn, list(range(50)), [8])
            if delivered:
                done.delivered()
                assert list(session.state.late) == [turn.ordinal]
                assert session.state.late[turn.ordinal].meta.shared == 0  # type: ignore[union-attr]
            else:
                done.undelivered()
                assert len(export(store, session.session_id)["interactions"]) == 2


def test_failing_half_way_takes_everything_back(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ready(store, task="a"), ready(store, task="b")

    def full(*_: Any, **__: Any) -> None:
        raise ArenaFull

    with monkeypatch.context() as patch:
        patch.setattr(store.shards, "put_bundle", full)
        with pytest.raises(ArenaFull):
            ask(store, a, b, dialect="1.0")
    assert store.shards.totals() == (0, 0)
    assert len(export(store, a, b, dialect="main-may")["interactions"]) == 2


def test_exports_leave_no_pins_and_no_transactions(store: SessionStore) -> None:
    sid = ready(store, 2)
    export(store, sid)
    ask(store, sid).undelivered()
    with pytest.raises(TrajectoryNotFound):
        ask(store, sid, trajectory_id=9)
    session = store.by_id(sid)
    assert session is not None
    session.release()
    assert store.arena.slot_info(session.slot).pins == 0
    assert store.arena.stats()["txns_open"] == 0


def test_many_interactions_are_split_over_bundles(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from areal_fast.store import exporting

    monkeypatch.setattr(exporting, "MAX_BUNDLE_PARTS", 6 * 3)
    want = []
    with started(store) as session:
        prompt = list(range(30))
        for k in range(8):
            take(session, prompt, [k])
            want.append([*prompt, k])
            prompt = [*prompt, k, 5]
        session.set_reward(1.0)
    got = export(store, session.session_id)["interactions"].values()
    assert [tokens(store, i) for i in got] == want
    assert [fetch(store, i["tensor_dict"]["logprobs"])[0, -1] for i in got] == [-0.5] * 8
