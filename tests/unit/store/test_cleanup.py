"""WIRE "Dumps" and DESIGN "Cleanup": what becomes stale, what the files are, and what goes wrong safely."""

import itertools
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from areal_fast.core import STATE_DETACHED, STATE_FREE, ArenaFull
from areal_fast.store import Session, SessionStore, dump
from tests.unit.store.turns import Clock, ask, commit, decode, export, lives, started, take

Json = dict[str, Any]


def read(folder: Path, name: str) -> Json:
    data: Json = json.loads((folder / name).read_bytes())
    return data


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def next_tick(arena: Any) -> None:
    """Wait until the arena's coarse clock has moved."""
    start, watchdog = arena.now_ns(), time.monotonic() + 10
    while arena.now_ns() == start:
        assert time.monotonic() < watchdog
        time.sleep(0.001)


def rewarded(store: SessionStore, task: str = "t") -> str:
    with started(store, task) as session:
        take(session, [1, 2], [3])
        session.set_reward(0.7)
        return session.session_id


def test_ready_trajectories_and_the_rest_get_a_file_each(store: SessionStore, tmp_path: Path) -> None:
    with started(store) as session:
        a = take(session, [1, 2], [3])
        b = take(session, [1, 2, 3], [4, 5])
        session.set_reward(1.0)
        c = take(session, [6], [7])
        session.set_reward(0.5)
        d = take(session, [8], [9])
    report = store.cleanup_stale(0.0, str(tmp_path))
    assert names(tmp_path) == ["t-0-active.json", "t-0-trajectory-0.json", "t-0-trajectory-1.json"]
    assert (report.sessions, report.interactions, report.failures, report.dropped) == (1, 4, [], 0)
    assert sorted(report.files) == names(tmp_path)
    assert report.nbytes == sum((tmp_path / n).stat().st_size for n in names(tmp_path))
    both = read(tmp_path, "t-0-trajectory-0.json")
    assert [(iid, i["reward"]) for iid, i in both.items()] == [(a, 1.0), (b, 1.0)]
    assert decode(both[b]["tensor_dict"]["input_ids"]).tolist() == [[1, 2, 3, 4, 5]]
    assert list(read(tmp_path, "t-0-trajectory-1.json")) == [c]
    active = read(tmp_path, "t-0-active.json")
    assert list(active) == [d]
    assert active[d]["reward"] == 0.0
    assert {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in names(tmp_path)} == {0o600}
    assert not lives(store, "t-0")
    assert store.sessions_count() == 0


def test_file_bytes_are_the_originals(store: SessionStore, tmp_path: Path) -> None:
    with started(store) as session:
        turn = session.begin_turn(reserve_tokens=8)
        turn.commit(
            prompt_ids=[1], output_ids=[2], logprobs=[-0.5], version_runs=[(0, 1)], stop_reason="stop"
        )
        session.set_reward(0.7)
    store.cleanup_stale(0.0, str(tmp_path))
    iid = turn.interaction_id
    assert (tmp_path / "t-0-trajectory-0.json").read_text() == (
        f'{{"{iid}": {{"tensor_dict": {{'
        '"input_ids": {"type": "tensor", "data": "AQAAAAAAAAACAAAAAAAAAA==", "shape": [1, 2], '
        '"dtype": "torch.int64"}, '
        '"loss_mask": {"type": "tensor", "data": "AAAAAAAAAAABAAAAAAAAAA==", "shape": [1, 2], '
        '"dtype": "torch.int64"}, '
        '"logprobs": {"type": "tensor", "data": "AAAAAAAAAL8=", "shape": [1, 2], "dtype": "torch.float32"}, '
        '"versions": {"type": "tensor", "data": "//////////8AAAAAAAAAAA==", "shape": [1, 2], '
        '"dtype": "torch.int64"}, '
        '"attention_mask": {"type": "tensor", "data": "AQE=", "shape": [1, 2], "dtype": "torch.bool"}, '
        '"rewards": {"type": "tensor", "data": "MzMzPw==", "shape": [1], "dtype": "torch.float32"}}, '
        f'"reward": 0.7, "interaction_id": "{iid}"}}}}'
    )


def test_string_interactions_are_dumped_with_their_messages(store: SessionStore, tmp_path: Path) -> None:
    with started(store) as session:
        session.begin_turn(reserve_tokens=0).commit_string(b'[{"role":"user","content":"\xc3\xb6"}]', "ä")
    store.cleanup_stale(0.0, str(tmp_path))
    raw = (tmp_path / "t-0-active.json").read_text()
    (item,) = json.loads(raw).values()
    assert raw == (
        f'{{"{item["interaction_id"]}": {{"messages": [{{"role": "user", "content": "\\u00f6"}}], '
        '"output_message_list": [{"role": "assistant", "content": "\\u00e4"}], "reward": 0.0, '
        f'"interaction_id": "{item["interaction_id"]}"}}}}'
    )


def test_late_interactions_are_dumped_and_take_no_reward(store: SessionStore, tmp_path: Path) -> None:
    with started(store) as session:
        slow = session.begin_turn(reserve_tokens=8)
        take(session, [1], [2])
        session.set_reward(1.0)
        export(store, session.session_id)
        commit(slow, [7], [8])
        active = take(session, [3], [4])
    store.cleanup_stale(0.0, str(tmp_path))
    got = read(tmp_path, "t-0-active.json")
    assert [(iid, i["reward"]) for iid, i in got.items()] == [(slow.interaction_id, 0.0), (active, 0.0)]


def test_nothing_to_write_no_file(store: SessionStore, tmp_path: Path) -> None:
    started(store).release()
    sid = rewarded(store, "x")
    export(store, sid)
    report = store.cleanup_stale(0.0, str(tmp_path))
    assert (report.sessions, report.files) == (2, [])
    assert names(tmp_path) == []


def test_only_what_nobody_used_for_the_timeout_is_stale(arena: Any, tmp_path: Path) -> None:
    store = SessionStore(arena)
    rewarded(store)
    assert store.cleanup_stale(3600.0, str(tmp_path)).sessions == 0
    assert lives(store, "t-0")


def test_turns_and_rewards_are_accesses_and_exports_are_none(store: SessionStore) -> None:
    sid = rewarded(store)

    def counts(use: Callable[[Session], object]) -> bool:
        with store.by_id(sid) as session:  # type: ignore[union-attr]
            before = store.arena.slot_info(session.slot).touched_ns
            next_tick(store.arena)
            use(session)
        return bool(store.arena.slot_info(session.slot).touched_ns > before)

    assert not counts(lambda session: None)
    assert not counts(lambda session: ask(store, sid).undelivered())
    assert counts(lambda session: take(session, [1], [2]))
    assert counts(lambda session: session.set_reward(1.0))


def test_a_session_with_a_request_in_flight_is_not_stale(store: SessionStore, tmp_path: Path) -> None:
    with started(store) as session:
        turn = session.begin_turn(reserve_tokens=8)
        assert store.cleanup_stale(0.0, str(tmp_path)).sessions == 0
        commit(turn, [1], [2])
    assert store.cleanup_stale(0.0, str(tmp_path)).files == ["t-0-active.json"]


def test_without_a_dump_path_stale_sessions_are_dropped(store: SessionStore) -> None:
    rewarded(store)
    started(store).release()
    report = store.cleanup_stale(0.0, None)
    assert (report.sessions, report.dropped, report.files) == (2, 1, [])
    assert store.sessions_count() == 0


def test_or_only_those_that_hold_nothing(store: SessionStore) -> None:
    kept = rewarded(store)
    started(store, "empty").release()
    gone = rewarded(store, "exported")
    export(store, gone)
    report = store.cleanup_stale(0.0, "", drop_without_path=False)
    assert (report.sessions, report.dropped, report.kept) == (2, 0, 1)
    assert lives(store, kept)
    assert not lives(store, gone)


def test_an_existing_file_is_never_overwritten(store: SessionStore, tmp_path: Path) -> None:
    for n in range(3):
        assert rewarded(store, "same") == "same-0"
        assert store.cleanup_stale(0.0, str(tmp_path)).failures == []
        assert len(names(tmp_path)) == n + 1
    assert names(tmp_path) == [f"same-0-trajectory-0.json{s}" for s in ("", ".1", ".2")]
    assert len({(tmp_path / n).read_bytes() for n in names(tmp_path)}) == 3


def test_a_name_taken_between_choice_and_rename_is_left_alone(store: SessionStore, tmp_path: Path) -> None:
    rewarded(store)
    store.cleaner.on_step = lambda step: (
        (tmp_path / "t-0-trajectory-0.json").write_text("someone's") and None if step == "synced" else None
    )
    report = store.cleanup_stale(0.0, str(tmp_path))
    assert report.files == ["t-0-trajectory-0.json.1"]
    assert (tmp_path / "t-0-trajectory-0.json").read_text() == "someone's"
    assert read(tmp_path, "t-0-trajectory-0.json.1")


def test_links_do_where_the_file_system_lacks_the_rename(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "_renameat2", None)
    for _ in range(2):
        rewarded(store, "same")
        assert store.cleanup_stale(0.0, str(tmp_path)).failures == []
    assert names(tmp_path) == ["same-0-trajectory-0.json", "same-0-trajectory-0.json.1"]


@pytest.mark.parametrize(
    "task",
    [
        "../../x",
        "a/b",
        "/etc/passwd",
        ".hidden",
        "..",
        "n\nl\x1b[31m",
        "ö😀你",
        "x" * 1024,
        "ä" * 512,
        "%2e%2e",
        " ",
        "-",
    ],
)
def test_hostile_ids_stay_inside_the_directory(store: SessionStore, tmp_path: Path, task: str) -> None:
    folder = tmp_path / "in" / "dumps"
    rewarded(store, task)
    report = store.cleanup_stale(0.0, str(folder))
    assert report.failures == []
    (name,) = names(folder)
    assert report.files == [name]
    assert names(tmp_path) == ["in"]
    assert names(tmp_path / "in") == ["dumps"]
    assert len(name.encode()) <= 255
    assert not name.startswith(".")


def detached(store: SessionStore) -> list[int]:
    return store.arena.owned_slots(STATE_DETACHED, store.arena.proc)


def test_an_unusable_path_keeps_the_session_and_the_next_try_dumps_it(
    store: SessionStore, tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    rewarded(store, "a")
    rewarded(store, "b")
    report = store.cleanup_stale(0.0, str(blocker))
    assert {f.session_id for f in report.failures} == {"a-0", "b-0"}
    assert all("FileExistsError" in f.reason or "NotADirectory" in f.reason for f in report.failures)
    assert (report.sessions, report.waiting, len(detached(store))) == (0, 2, 2)
    assert not lives(store, "a-0")
    blocker.unlink()
    report = store.cleanup_stale(0.0, str(blocker))
    assert (report.sessions, report.waiting, report.failures) == (2, 0, [])
    assert names(blocker) == ["a-0-trajectory-0.json", "b-0-trajectory-0.json"]


def test_a_session_that_cannot_be_written_stops_no_other(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in ("a", "b", "c"):
        rewarded(store, task)
    write, calls = os.write, []

    def full(fd: int, data: Any) -> int:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(dump.os, "write", full)
    report = store.cleanup_stale(0.0, str(tmp_path))
    assert [(f.session_id, f.reason) for f in report.failures] == [
        ("b-0", "OSError: [Errno 28] No space left on device")
    ]
    assert names(tmp_path) == ["a-0-trajectory-0.json", "c-0-trajectory-0.json"]
    assert len(detached(store)) == 1
    assert store.cleanup_stale(0.0, str(tmp_path)).files == ["b-0-trajectory-0.json"]


def test_failures_are_retried_with_back_off(arena: Any, clock: Clock, tmp_path: Path) -> None:
    store = SessionStore(arena, clock=clock)
    clock.ns = max(clock.ns, arena.now_ns()) + 10**12
    rewarded(store)
    bad = tmp_path / "bad"
    bad.write_text("")
    tries = []
    for _ in range(12):
        report = store.cleanup_stale(0.0, str(bad))
        tries.append(len(report.failures))
        assert report.waiting == 1
        clock.forward(0.5)
    assert tries[:3] == [1, 1, 0]
    assert 3 <= sum(tries) < 8
    clock.forward(400.0)
    bad.unlink()
    assert store.cleanup_stale(0.0, str(bad)).files == ["t-0-trajectory-0.json"]


def test_a_full_arena_can_still_be_emptied(arena: Any, tmp_path: Path) -> None:
    store = SessionStore(arena)
    with started(store) as session:
        take(session, [1], [2])
        with pytest.raises(ArenaFull):
            for k in itertools.count():
                take(session, list(range(k, k + 20_000)), [2])
        session.set_reward(1.0)
    assert store.cleanup_stale(0.0, str(tmp_path)).failures == []
    assert names(tmp_path) == ["t-0-trajectory-0.json"]
    assert len(read(tmp_path, "t-0-trajectory-0.json")) > 1


def test_a_reward_not_yet_final_stays_active(delayed: SessionStore, clock: Clock, tmp_path: Path) -> None:
    clock.ns = max(clock.ns, delayed.arena.now_ns()) + 10**12
    with started(delayed) as session:
        iid = take(session, [1], [2])
        session.set_reward(0.5)
    delayed.cleanup_stale(0.0, str(tmp_path))
    assert names(tmp_path) == ["t-0-active.json"]
    assert read(tmp_path, "t-0-active.json")[iid]["reward"] == 0.5


def test_a_reward_whose_time_has_come_is_ready_in_the_dump(
    delayed: SessionStore, clock: Clock, tmp_path: Path
) -> None:
    clock.ns = max(clock.ns, delayed.arena.now_ns()) + 10**12
    with started(delayed) as session:
        take(session, [1], [2])
        session.set_reward(0.5)
    clock.forward(2.0)
    delayed.cleanup_stale(0.0, str(tmp_path))
    assert names(tmp_path) == ["t-0-trajectory-0.json"]


def test_a_successor_resumes_what_was_detached(arena: Any, tmp_path: Path) -> None:
    store = SessionStore(arena)
    for task in ("a", "b"):
        rewarded(store, task)

    class Killed(BaseException):
        pass

    def die(step: str) -> None:
        if step == "published":
            raise Killed

    store.cleaner.on_step = die
    with pytest.raises(Killed):
        store.cleanup_stale(0.0, str(tmp_path))
    assert len(detached(store)) == 1
    report = SessionStore(arena).cleanup_stale(0.0, str(tmp_path))
    assert (report.sessions, report.failures) == (2, [])
    assert names(tmp_path) == ["a-0-trajectory-0.json", "b-0-trajectory-0.json"]


def test_stop_is_asked_between_sessions(store: SessionStore, tmp_path: Path) -> None:
    for task in ("a", "b", "c"):
        rewarded(store, task)
    report = store.cleanup_stale(0.0, str(tmp_path), stop=lambda: len(names(tmp_path)) >= 2)
    assert (report.sessions, store.sessions_count()) == (2, 1)


def test_dump_all_takes_the_most_valuable_first_and_says_what_is_left(
    store: SessionStore, tmp_path: Path
) -> None:
    with started(store, "active") as session:
        for k in range(5):
            take(session, [k], [k])
    rewarded(store, "one")
    started(store, "empty").release()
    with started(store, "two") as session:
        take(session, [1], [2])
        take(session, [1], [2])
        session.set_reward(1.0)
    report = store.dump_all(str(tmp_path), store.now_ns() + 60_000_000_000)
    assert report.files == ["two-0-trajectory-0.json", "one-0-trajectory-0.json", "active-0-active.json"]
    assert report.left == []
    rewarded(store, "late")
    report = store.dump_all(str(tmp_path), store.now_ns())
    assert report.left == ["late-0"]
    assert lives(store, "late-0")


def test_dump_all_reports_what_is_in_use(store: SessionStore, tmp_path: Path) -> None:
    sid = rewarded(store)
    with store.by_id(sid):  # type: ignore[union-attr]
        report = store.dump_all(str(tmp_path), store.now_ns() + 60_000_000_000)
    assert [f.session_id for f in report.failures] == [sid]


def test_cleanup_of_an_exporting_session_waits_for_the_export(store: SessionStore, tmp_path: Path) -> None:
    sid = rewarded(store)
    done = ask(store, sid)
    assert store.cleanup_stale(0.0, str(tmp_path)).sessions == 0
    done.undelivered()
    assert store.cleanup_stale(0.0, str(tmp_path)).files == [f"{sid}-trajectory-0.json"]


def test_freed_sessions_leave_their_memory_and_name(store: SessionStore, tmp_path: Path) -> None:
    slots = set()
    used = []
    for _ in range(5):
        with started(store) as session:
            take(session, list(range(5000)), [1])
            slots.add(session.slot)
        store.cleanup_stale(0.0, str(tmp_path))
        used.append(store.arena.stats()["granules_used"])
    assert len(set(used)) == 1
    assert all(store.arena.slot_info(slot).state == STATE_FREE for slot in slots)


def test_every_freed_session_is_told_of(store: SessionStore, tmp_path: Path) -> None:
    told: list[tuple[str, int, list[str]]] = []
    store.cleaner.on_freed = lambda *what: told.append(what)
    rewarded(store, "full")
    store.start("empty")
    rewarded(store, "gone")
    assert len(store.cleanup_stale(0.0, str(tmp_path)).files) == 2
    assert sorted(told) == [
        ("empty-0", 0, []),
        ("full-0", 1, ["full-0-trajectory-0.json"]),
        ("gone-0", 1, ["gone-0-trajectory-0.json"]),
    ]
    told.clear()
    rewarded(store, "lost")
    store.cleanup_stale(0.0, None)
    assert told == [("lost-0", 1, [])]
