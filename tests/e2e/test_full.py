"""A full arena refuses what is new, before the engine is asked, and can always be emptied."""

from __future__ import annotations

import base64
from typing import Any

from tests.e2e.running import ADMIN, Proxy, wait_until
from tests.e2e.test_life import shard_ids


def tensor(nbytes: int) -> dict[str, Any]:
    data = base64.b64encode(bytes(nbytes)).decode()
    return {"type": "tensor", "data": data, "shape": [nbytes], "dtype": "torch.uint8"}


def test_a_full_arena_can_be_emptied(tmp_path: object) -> None:
    flags = ("--arena-max-bytes", "24M", "--stale-session-dump-path", str(tmp_path))
    with Proxy(*flags, workers=1) as proxy:
        session_id, key = proxy.start("t")
        first = proxy.chat(key)
        assert first.status == 200
        stored = []
        for size in (1 << 20, 1 << 14, 1 << 10):
            while (put := proxy.ask("PUT", f"/data/{len(stored)}", tensor(size))).status == 200:
                stored.append(str(len(stored)))
                assert len(stored) < 10_000
            assert put.status == 507 and "memory is full" in put.json["message"]
        asked = proxy.engine_stats()["requests"]
        full = proxy.chat(key, "y" * 20_000)
        assert full.status == 507 and "memory is full" in full.json["detail"]
        assert proxy.engine_stats()["requests"] == asked, "the engine was asked for nothing"

        assert proxy.reward(key).json["interaction_count"] == 1
        exported = proxy.export(session_id)
        assert list(exported.json["interactions"]) == [first.json["id"]]
        ids = shard_ids(exported.json["interactions"][first.json["id"]])
        assert proxy.ask("POST", "/data/batch", {"shard_ids": ids}).status == 200
        cleared = proxy.ask("DELETE", "/data/clear", {"shard_ids": stored + ids})
        assert cleared.json["cleared_count"] == len(stored) + len(ids)
        assert proxy.chat(key, "y" * 20_000).status == 200


def test_a_full_arena_is_emptied_by_the_cleaner(tmp_path: object) -> None:
    flags = ("--arena-max-bytes", "24M", "--stale-session-dump-path", str(tmp_path))
    clocks = ("--session-timeout-seconds", "1", "--stale-session-cleanup-interval-seconds", "0.2")
    with Proxy(*flags, *clocks, "--max-body-bytes", "4M", workers=1) as proxy:
        answers: list[int] = []
        while 507 not in answers:
            answer = proxy.ask("POST", "/rl/start_session", {"task_id": "t"}, key=ADMIN)
            answers.append(answer.status)
            if answer.status == 201:
                answers.append(proxy.chat(answer.json["api_key"], "z" * 30_000).status)
            assert set(answers) <= {200, 201, 507} and len(answers) < 5000
        wait_until(lambda: proxy.health()["sessions"] == 0, "the cleaner has dumped them all")
        _, key = proxy.start("t")
        assert proxy.chat(key, "z" * 30_000).status == 200
