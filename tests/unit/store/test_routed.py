"""Routed experts: received in pieces, kept with their turn, exported as a tensor, dumped, never leaked."""

import asyncio
import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_fast.core import Arena, ArenaFull
from areal_fast.protocol import records as rec
from areal_fast.protocol.messages import ExportRequest
from areal_fast.shards.routed import WORD_ROUTED, RoutedIntake, is_routed
from areal_fast.store import SessionStore

WIDTH = 6
PROMPT = list(range(100, 140))
OUTPUT = [7, 8, 9]
TOKENS = len(PROMPT) + len(OUTPUT)


@pytest.fixture
def store() -> Iterator[SessionStore]:
    opened = SessionStore.open(8 << 20, serving_addr="127.0.0.1:1")
    yield opened
    assert opened.arena.consistency() == ""
    opened.close()


def experts(rows: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 1 << 30, (rows, WIDTH), np.int32)


async def receive(intake: RoutedIntake, rows: np.ndarray[Any, Any], cut: int = 0, known: bool = True) -> None:
    text = memoryview(base64.b64encode(rows.tobytes()))
    await intake.attempt(len(text) if known else 0)
    step = cut or len(text)
    for at in range(0, len(text), step):
        await intake.add(text[at : at + step])


def record(
    store: SessionStore, rows: np.ndarray[Any, Any] | None, task: str = "t", output: list[int] = OUTPUT
) -> str:
    """A session of one rewarded turn; its id."""
    ((session_id, key),) = store.start(task).sessions
    session = store.by_key(key)
    assert session is not None
    with session, session.begin_turn(reserve_tokens=100) as turn:
        intake = turn.routed_intake()
        assert intake is not None
        result = None
        if rows is not None:
            asyncio.run(receive(intake, rows, 1000))
            asyncio.run(intake.end(len(PROMPT), len(output)))
            result = asyncio.run(intake.finish(len(PROMPT) + len(output)))
            intake.publish()
        turn.commit(
            prompt_ids=PROMPT,
            output_ids=output,
            logprobs=[-1.0] * len(output),
            version_runs=[(1, len(output))],
            stop_reason="stop",
            routed=result,
        )
        intake.kept()
        intake.abandon()
        session.set_reward(1.0)
    return session_id


def routed_shards(store: SessionStore) -> int:
    slots, _ = store.arena.expired_shards(1 << 62, 0, 1000)
    return sum(is_routed(store.arena.slot_info(slot).id) for slot in slots)


def exported(store: SessionStore, ids: list[str], dialect: Any = "1.0", **more: Any) -> Any:
    export = store.begin_export(ExportRequest(session_ids=ids, dialect=dialect, **more))
    export.delivered()
    return json.loads(export.body)


def fetch(store: SessionStore, reference: Any) -> np.ndarray[Any, Any]:
    found = store.shards.get_json(reference["data"]["shard"]["data"]["shard_id"])
    assert found is not None
    tensor = json.loads(found.whole())
    assert (tensor["dtype"], tensor["shape"]) == ("torch.int32", reference["data"]["data"]["shape"])
    return np.frombuffer(base64.b64decode(tensor["data"]), "<i4").reshape(tensor["shape"])


def whole(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate((rows, np.zeros((1, WIDTH), np.int32)))


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 333, 0])
@pytest.mark.parametrize("known", [True, False])
def test_any_cut_gives_the_same_tensor(store: SessionStore, cut: int, known: bool) -> None:
    rows = experts(60_001 if not known and not cut else 500)
    ((_, key),) = store.start("t").sessions
    session = store.by_key(key)
    assert session is not None
    with session:
        intake = RoutedIntake(store.arena, session.slot)

        async def main() -> None:
            await receive(intake, rows, cut, known)
            await intake.end(100, len(rows) - 99)
            found = await intake.finish(len(rows) + 1)
            assert found is not None and found.width == WIDTH

        asyncio.run(main())
        assert intake._kept is not None
        assert bytes(intake._kept.view[: 4 * WIDTH * (len(rows) + 1)]) == whole(rows).tobytes()
        intake.abandon()
        assert store.arena.stats()["shards_init"] == 0


def test_a_resubmitted_attempt_keeps_the_rows_that_sampled_its_tokens(store: SessionStore) -> None:
    ((_, key),) = store.start("t").sessions
    session = store.by_key(key)
    assert session is not None
    first, dropped, second = experts(42, 1), experts(42, 2), experts(50, 3)
    with session:
        intake = RoutedIntake(store.arena, session.slot)

        async def main() -> None:
            await receive(intake, first)
            await intake.end(40, 3)
            await receive(intake, dropped, 100)  # broke off: no end
            await receive(intake, second, 100)
            await intake.end(43, 8)
            assert await intake.finish(51) is not None

        asyncio.run(main())
        assert intake._kept is not None
        want = whole(np.concatenate((first, second[42:])))
        assert bytes(intake._kept.view[: want.nbytes]) == want.tobytes()
        intake.abandon()
    assert store.arena.stats()["shards_init"] == 0


@pytest.mark.parametrize("text", [b"AAA", b"AA=A", b"AAAA", b"!!!!" * 40, b"AA==AAAA" * 20])
def test_what_is_no_tensor_is_refused_and_freed(store: SessionStore, text: bytes) -> None:
    ((_, key),) = store.start("t").sessions
    session = store.by_key(key)
    assert session is not None
    with session:
        intake = RoutedIntake(store.arena, session.slot)

        async def main() -> None:
            await intake.attempt(len(text))
            await intake.add(memoryview(text))
            await intake.end(3, 3)

        with pytest.raises(ValueError):
            asyncio.run(main())
        intake.abandon()
        with pytest.raises(ArenaFull):
            asyncio.run(intake.attempt(1 << 30))
        intake.abandon()
    assert store.arena.stats()["shards_init"] == 0


@pytest.mark.parametrize("dialect", ["1.0", "v2"])
def test_a_batch_has_one_padded_tensor(store: SessionStore, dialect: str) -> None:
    rows, shorter = experts(TOKENS - 1, 1), experts(TOKENS - 3, 2)
    ids = [
        record(store, rows, "a"),
        record(store, None, "b"),
        record(store, shorter, "c", OUTPUT[:1]),
    ]
    references = exported(store, ids, dialect)["traj"]
    assert references["routed_experts"]["data"]["data"]["shape"] == [3, TOKENS, WIDTH]
    got = fetch(store, references["routed_experts"])
    assert (got[0] == whole(rows)).all()
    assert not got[1].any()
    assert (got[2, : TOKENS - 2] == whole(shorter)).all() and not got[2, TOKENS - 2 :].any()
    for _ in range(3):
        assert store.routed_garbage.look() == 0  # the bundle refers to them
    shard_ids = [r["data"]["shard"]["data"]["shard_id"] for r in references.values()]
    assert store.shards.totals()[0] == len(shard_ids)
    assert store.shards.clear(shard_ids) == (len(shard_ids), 0, 0)
    assert routed_shards(store) == 0


def test_each_interaction_has_its_own(store: SessionStore) -> None:
    rows = experts(TOKENS - 1)
    ids = [record(store, None, "a"), record(store, rows, "b")]
    found = exported(store, ids, "main-may")["interactions"]
    bare, full = (entry["tensor_dict"] for entry in found.values())
    assert "routed_experts" not in bare
    assert (fetch(store, full["routed_experts"])[0] == whole(rows)).all()
    assert full["routed_experts"]["data"]["data"]["shape"] == [1, TOKENS, WIDTH]


def test_an_export_that_did_not_arrive_takes_nothing(store: SessionStore) -> None:
    rows = experts(TOKENS - 1)
    session_id = record(store, rows)
    request = ExportRequest(session_ids=[session_id], dialect="1.0")
    store.begin_export(request).undelivered()
    for _ in range(3):
        assert store.routed_garbage.look() == 0  # the log refers to them
    assert (fetch(store, exported(store, [session_id])["traj"]["routed_experts"])[0] == whole(rows)).all()


def test_a_removed_session_leaves_garbage_that_two_looks_free(store: SessionStore) -> None:
    ((session_id, key),) = store.start("x").sessions
    kept = record(store, experts(TOKENS - 1), "kept")
    gone = record(store, experts(TOKENS - 1), "gone")
    session = store.by_id(gone)
    assert session is not None
    store.arena.close_session(session.slot)
    session.release()
    assert routed_shards(store) == 2
    assert (store.routed_garbage.look(), store.routed_garbage.look()) == (0, 1)
    assert routed_shards(store) == 1
    assert exported(store, [kept])["traj"]["routed_experts"]
    assert session_id and key


def test_nothing_is_looked_through_while_there_are_none(store: SessionStore) -> None:
    session_id = record(store, experts(TOKENS - 1))
    assert store.arena.word(WORD_ROUTED) > 0
    references = exported(store, [session_id])["traj"].values()
    store.shards.clear([r["data"]["shard"]["data"]["shard_id"] for r in references])
    store.routed_garbage.look()
    assert store.arena.word(WORD_ROUTED) == 0
    record(store, experts(TOKENS - 1), "u")
    assert store.arena.word(WORD_ROUTED) > 0


def test_expiry_leaves_them_alone(store: SessionStore) -> None:
    record(store, experts(TOKENS - 1))
    assert store.shards.sweep_expired(1 << 62) == 0
    assert routed_shards(store) == 1


def test_a_dump_has_them_inline_and_frees_them(store: SessionStore, tmp_path: Path) -> None:
    rows = experts(TOKENS - 1)
    record(store, rows)
    report = store.cleanup_stale(0.0, str(tmp_path))
    assert not report.failures
    (entry,) = json.loads((tmp_path / report.files[0]).read_text()).values()
    tensor = entry["tensor_dict"]["routed_experts"]
    assert (tensor["shape"], tensor["dtype"]) == ([1, TOKENS, WIDTH], "torch.int32")
    assert base64.b64decode(tensor["data"]) == whole(rows).tobytes()
    assert routed_shards(store) == 0
    assert store.arena.stats()["granules_used"] == 0


def test_a_kill_between_publish_and_append_leaves_garbage(store: SessionStore) -> None:
    ((_, key),) = store.start("t").sessions
    session = store.by_key(key)
    assert session is not None
    fd = store.arena.fileno()
    pid = os.fork()
    if pid == 0:
        with Arena.attach(fd, 3) as arena:
            arena.proc_enter(os.getpid())
            intake = RoutedIntake(arena, session.slot)
            asyncio.run(receive(intake, experts(TOKENS - 1)))
            asyncio.run(intake.end(len(PROMPT), len(OUTPUT)))
            asyncio.run(intake.finish(TOKENS))
            half = RoutedIntake(arena, session.slot)
            asyncio.run(half.attempt(1000))  # and one that was still arriving
            intake.publish()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    store.arena.sweep(3)
    assert store.arena.stats()["shards_init"] == 0
    assert routed_shards(store) == 1
    assert (store.routed_garbage.look(), store.routed_garbage.look()) == (0, 1)
    assert routed_shards(store) == 0
    session.release()


def test_a_killed_cleaner_leaves_garbage(store: SessionStore, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def step(name: str) -> None:
        if name == "dumped":
            raise Killed

    record(store, experts(TOKENS - 1))
    store.cleaner.on_step = step
    with pytest.raises(Killed):
        store.cleanup_stale(0.0, str(tmp_path))
    store.cleaner.on_step = lambda name: None
    assert store.routed_garbage.look() == 0  # the session is still there
    store.cleanup_stale(0.0, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    for _ in range(2):
        store.routed_garbage.look()
    assert routed_shards(store) == 0


def test_compaction_keeps_them(store: SessionStore) -> None:
    rows = experts(TOKENS - 1)
    session_id = record(store, rows)
    session = store.by_id(session_id)
    assert session is not None
    with session:
        state = store.folds.refresh(session.slot)
        checkpoint, keep = state.checkpoint()
        store.arena.compact(session.slot, state.head, rec.pack(checkpoint), keep)
    for _ in range(3):
        assert store.routed_garbage.look() == 0
    assert (fetch(store, exported(store, [session_id])["traj"]["routed_experts"])[0] == whole(rows)).all()
