"""A session's whole life over real sockets, through one worker and through several."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import qwen_folder
from tests.e2e.running import ADMIN, WATCHDOG_S, Proxy, descendants, wait_until

ADMIN_BODY = {"task_id": "t"}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 worker", "2 workers"])
def proxy(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    with Proxy(workers=request.param) as made:
        yield made


def ints(tensor: dict[str, Any]) -> list[int]:
    data = base64.b64decode(tensor["data"])
    return [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]


def shard_ids(interaction: dict[str, Any]) -> list[str]:
    tensors = interaction["tensor_dict"].values()
    return [tensor["data"]["shard"]["data"]["shard_id"] for tensor in tensors]


def test_a_whole_life(proxy: Proxy) -> None:
    session_id, key = proxy.start("life")
    chats = [proxy.chat(key, f"turn {i}") for i in range(3)]
    assert [c.status for c in chats] == [200] * 3
    ids = [c.json["id"] for c in chats]
    assert all(c.json["choices"][0]["message"]["content"] for c in chats)

    reward = proxy.reward(key, 2.0)
    assert reward.json["interaction_count"] == 3 and reward.json["trajectory_ready"]
    exported = proxy.export(session_id)
    assert exported.status == 200
    interactions = exported.json["interactions"]
    assert list(interactions) == ids
    assert [i["reward"] for i in interactions.values()] == [2.0] * 3

    for interaction, chat in zip(interactions.values(), chats, strict=True):
        names = list(interaction["tensor_dict"])
        batch = proxy.ask("POST", "/data/batch", {"shard_ids": shard_ids(interaction)})
        assert batch.status == 200
        tensors = dict(zip(names, batch.json, strict=True))
        usage = chat.json["usage"]
        assert tensors["input_ids"]["shape"] == [1, usage["total_tokens"]]
        assert ints(tensors["loss_mask"]) == [0] * usage["prompt_tokens"] + [1] * usage["completion_tokens"]
        assert ints(tensors["versions"])[-1] == proxy.ask("GET", "/get_version").json["version"]

    everything = [shard for interaction in interactions.values() for shard in shard_ids(interaction)]
    assert proxy.ask("GET", f"/data/{everything[0]}").status == 200
    cleared = proxy.ask("DELETE", "/data/clear", {"shard_ids": everything})
    assert cleared.json["cleared_count"] == len(everything)
    assert proxy.ask("GET", f"/data/{everything[0]}").status == 404
    assert proxy.export(session_id).status == 409


def test_a_session_is_the_same_in_every_worker(proxy: Proxy) -> None:
    with proxy.each_worker() as workers:
        connections = list(workers.values())
        session_id, key = proxy.start("shared")
        ids = [
            proxy.chat(key, f"turn {i}", over=connections[i % len(connections)]).json["id"] for i in range(6)
        ]
        first, last = connections[0], connections[-1]
        assert proxy.ask("POST", "/rl/set_reward", {"reward": 1}, key=key, over=last).json[
            "interaction_count"
        ] == len(ids)
        body = {"session_id": session_id, "remove_session": True}
        exported = proxy.ask("POST", "/export_trajectories", body, key=ADMIN, over=first)
        assert list(exported.json["interactions"]) == ids
        shard = shard_ids(next(iter(exported.json["interactions"].values())))[0]
        assert {proxy.ask("GET", f"/data/{shard}", over=c).status for c in connections} == {200}
        for connection in connections:
            gone = proxy.ask("POST", "/rl/set_reward", {"reward": 1}, key=key, over=connection)
            assert gone.status == 401


def test_version_and_pause_are_in_force_everywhere_before_the_reply(proxy: Proxy) -> None:
    with proxy.each_worker() as workers:
        connections = list(workers.values())
        for version, connection in enumerate(connections, 7):
            assert proxy.ask("POST", "/set_version", {"version": version}, over=connection).status == 200
            for other in connections:
                assert proxy.ask("GET", "/get_version", over=other).json == {"version": version}
        assert proxy.ask("POST", "/pause_generation", over=connections[0]).json["paused"] is True
        assert all(proxy.ask("GET", "/health", over=c).json["paused"] for c in connections)
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(proxy.chat(None, "while paused").status))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not answers, "answered while paused"
        assert proxy.ask("POST", "/continue_generation", over=connections[-1]).json["paused"] is False
        waiting.join(WATCHDOG_S)
        assert answers == [200]
        assert not any(proxy.ask("GET", "/health", over=c).json["paused"] for c in connections)


def test_a_new_backend_is_known_everywhere_before_the_reply(proxy: Proxy) -> None:
    real = proxy.health()["backend"]
    with proxy.each_worker() as workers:
        for connection in workers.values():
            changed = proxy.ask(
                "POST",
                "/configure_backend",
                {"backend_addr": "http://127.0.0.1:1/"},
                key=ADMIN,
                over=connection,
            )
            assert changed.json == {"status": "ok", "backend_addr": "http://127.0.0.1:1/"}
            for other in workers.values():
                assert proxy.ask("GET", "/health", over=other).json["backend"] == "http://127.0.0.1:1"
                assert proxy.chat(None, over=other).status == 502
            back = proxy.ask("POST", "/configure_backend", {"backend_addr": real}, key=ADMIN, over=connection)
            assert back.status == 200
            assert {proxy.chat(None, over=other).status for other in workers.values()} == {200}


def test_a_group_starts_whole(proxy: Proxy) -> None:
    answer = proxy.ask("POST", "/rl/start_session", {"task_id": "g", "group_size": 4}, key=ADMIN)
    sessions = answer.json["sessions"]
    assert [s["session_id"] for s in sessions] == [f"g-{i}" for i in range(4)]
    assert {proxy.chat(s["session_api_key"]).status for s in sessions} == {200}


def test_a_stream_comes_piece_by_piece(proxy: Proxy) -> None:
    """The first text is here while the engine is still at work, which it would be for hours."""
    _, key = proxy.start("stream")
    proxy.engine(token_latency_s=0.02, chunk_tokens=1)
    try:
        connection = proxy.connection()
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200_000, "stream": True}
        headers = {"Authorization": f"Bearer {key}"}
        connection.request("POST", "/chat/completions", json.dumps(body).encode(), headers)
        reply = connection.getresponse()
        assert reply.getheader("content-type") == "text/event-stream; charset=utf-8"
        got = b""
        while got.count(b"data: ") < 4:
            got += reply.read1(65536)
        assert proxy.engine_stats()["in_flight"] == 1, "it came all at once"
        proxy.engine(token_latency_s=0.0, chunk_tokens=4096)
        got += reply.read()
        connection.close()
    finally:
        proxy.engine(token_latency_s=0.0, chunk_tokens=8)
    assert got.endswith(b"data: [DONE]\n\n")
    assert proxy.reward(key).json["interaction_count"] == 1


def test_a_client_that_hangs_up_does_not_lose_its_turn(proxy: Proxy) -> None:
    _, key = proxy.start("gone")
    proxy.engine(request_latency_s=3600)
    try:
        connection = proxy.connection()
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}).encode()
        connection.request("POST", "/chat/completions", body, {"Authorization": f"Bearer {key}"})
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 1, "the engine has the request")
        connection.close()
        assert proxy.reward(key).status == 400, "nothing is recorded yet"
    finally:
        proxy.engine(request_latency_s=0.0)

    def rewarded() -> bool:
        return proxy.reward(key).json.get("interaction_count") == 1

    wait_until(rewarded, "the answer was recorded although nobody waited")


def test_health_tells_about_the_processes(proxy: Proxy) -> None:
    health = wait_until(
        lambda: (h := proxy.health())["workers"] and all(w["state"] == "ready" for w in h["workers"]) and h,
        "the board has come",
    )
    assert list(health)[:5] == ["status", "backend", "sessions", "paused", "version"]
    assert health["pid"] in [w["pid"] for w in health["workers"]]
    assert health["cleaner"]["state"] == "ready"
    wait_until(  # the arena's numbers are some tenths of a second old
        lambda: (h := proxy.health())["arena"]["sessions_active"] == h["sessions"], "the numbers agree"
    )


def test_no_process_has_torch_or_transformers(proxy: Proxy) -> None:
    for pid in descendants(proxy.pid):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps and "transformers" not in maps


def test_a_real_vocabulary_without_torch_or_transformers(tmp_path: Path) -> None:
    """Qwen's tokenizer folder: exact counts, a process without the large libraries, and without GPU."""
    folder = qwen_folder.build(tmp_path / "qwen")
    with Proxy("--tokenizer-path", str(folder)) as proxy:
        session_id, key = proxy.start("qwen")
        answer = proxy.chat(key, "你好 😀 <|im_end|> naïve", max_tokens=8)
        assert answer.status == 200 and answer.json["usage"]["completion_tokens"] == 8
        assert proxy.reward(key).status == 200
        exported = proxy.export(session_id)
        (interaction,) = exported.json["interactions"].values()
        first = proxy.ask("GET", f"/data/{shard_ids(interaction)[0]}").json
        assert ints(first)[0] == qwen_folder.FIRST_SPECIAL_ID + 1, "it begins with <|im_start|>"
        assert len(ints(first)) == answer.json["usage"]["total_tokens"]
        for pid in descendants(proxy.pid):
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert not any(name in maps for name in ("torch", "transformers", "libcuda"))
