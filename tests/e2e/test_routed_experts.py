"""Routed experts of the embedded engine through the whole proxy: stored, exported, dumped, never sent on."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.running import Proxy, wait_until

ASKED = {"metadata": {"return_routed_experts": True}}
LAYERS, TOP_K = 60, 8


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy(workers=2) as made:
        made.ready().engine(routed_experts=f"{LAYERS}x{TOP_K}")
        yield made


def made_by_engine(rows: int) -> np.ndarray[Any, Any]:
    """What embedded/forms.py answers with."""
    layer = np.arange(rows * LAYERS, dtype=np.int32).reshape(rows, LAYERS, 1) * 7
    return ((layer + np.arange(TOP_K, dtype=np.int32)) % 128).reshape(rows, LAYERS * TOP_K)


def experts_of(proxy: Proxy, session_id: str) -> list[np.ndarray[Any, Any]]:
    exported = proxy.export(session_id)
    assert exported.status == 200, exported.body
    found = []
    for entry in exported.json["interactions"].values():
        reference = entry["tensor_dict"]["routed_experts"]
        tokens = entry["tensor_dict"]["input_ids"]["data"]["data"]["shape"][1]
        shard_id = reference["data"]["shard"]["data"]["shard_id"]
        tensor = proxy.ask("GET", f"/data/{shard_id}").json
        assert tensor["shape"] == reference["data"]["data"]["shape"] == [1, tokens, LAYERS * TOP_K]
        found.append(np.frombuffer(base64.b64decode(tensor["data"]), "<i4").reshape(tokens, -1))
        ids = [r["data"]["shard"]["data"]["shard_id"] for r in entry["tensor_dict"].values()]
        assert proxy.ask("DELETE", "/data/clear", {"shard_ids": ids}).json["cleared_count"] == len(ids)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_they_are_exported_with_their_turn_and_not_sent_to_the_agent(proxy: Proxy, stream: bool) -> None:
    session_id, key = proxy.start("moe")
    answers = [proxy.chat(key, "hello " * 200, stream=stream, **ASKED) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert all(b"routed" not in answer.body and len(answer.body) < 20_000 for answer in answers)
    proxy.reward(key)
    for experts in experts_of(proxy, session_id):
        assert (experts[:-1] == made_by_engine(len(experts) - 1)).all()
        assert not experts[-1].any()


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_and_resubmitted_answer_has_a_row_a_token(proxy: Proxy, stream: bool) -> None:
    session_id, key = proxy.start("aborted")
    before = proxy.engine_stats()["requests"]
    proxy.engine(abort_every=2, abort_after_tokens=5, output_tokens=40)
    answers = [proxy.chat(key, "x" * 500, max_tokens=60, stream=stream, **ASKED) for _ in range(2)]
    proxy.engine(abort_every=0, output_tokens=0)
    assert [answer.status for answer in answers] == [200, 200]
    assert proxy.engine_stats()["requests"] == before + 3
    proxy.reward(key)
    for experts in experts_of(proxy, session_id):
        assert (experts[:-1] == made_by_engine(len(experts) - 1)).all()


def test_an_unrecorded_chat_does_not_ask_for_them(proxy: Proxy) -> None:
    assert proxy.chat(None, **ASKED).status == 200
    session_id, key = proxy.start("plain")
    assert proxy.chat(key).status == 200
    proxy.reward(key)
    (entry,) = proxy.export(session_id).json["interactions"].values()
    assert "routed_experts" not in entry["tensor_dict"]


def test_a_worker_killed_while_they_arrive_leaves_nothing() -> None:
    with Proxy(workers=1) as proxy:
        proxy.ready().engine(routed_experts=f"{LAYERS}x{TOP_K}", token_latency_s=0.02)
        _, key = proxy.start("killed")
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(proxy.chat(key, max_tokens=500, **ASKED))
            except OSError as error:
                answers.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: proxy.engine_stats()["in_flight"], "the engine to be asked")
        (pid,) = proxy.worker_pids()
        os.kill(pid, signal.SIGKILL)
        asking.join()
        proxy.engine(token_latency_s=0)
        wait_until(lambda: proxy.worker_pids() not in ([], [pid]), "another worker")
        assert proxy.chat(key, **ASKED).status == 200
        wait_until(lambda: proxy.health()["arena"]["shards_active"] == 1, "the second turn's experts alone")


def test_a_dump_has_them_inline(tmp_path: Path) -> None:
    with Proxy("--stale-session-dump-path", str(tmp_path), workers=1) as proxy:
        proxy.ready().engine(routed_experts=f"{LAYERS}x{TOP_K}")
        _, key = proxy.start("dumped")
        assert proxy.chat(key, **ASKED).status == 200
        proxy.terminate()
        proxy.wait()
    (name,) = os.listdir(tmp_path)
    (entry,) = json.loads((tmp_path / name).read_text()).values()
    tensor = entry["tensor_dict"]["routed_experts"]
    rows = tensor["shape"][1]
    experts = np.frombuffer(base64.b64decode(tensor["data"]), "<i4").reshape(rows, -1)
    assert (experts[:-1] == made_by_engine(rows - 1)).all()
