"""The proxy in front of vLLM's API: the same answers as through SGLang's, control calls, weight updates."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.running import ADMIN, WATCHDOG_S, Answer, Proxy, wait_until
from tests.e2e.test_life import ints


@pytest.fixture(scope="module")
def vllm() -> Iterator[Proxy]:
    with Proxy("--backend-type", "vllm") as made:
        yield made


def engine(proxy: Proxy, method: str, path: str, body: Any = None) -> Any:
    """Ask the engine itself."""
    connection = http.client.HTTPConnection(urlsplit(proxy.health()["backend"]).netloc, timeout=WATCHDOG_S)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        reply = connection.getresponse()
        assert reply.status == 200
        return json.loads(reply.read())
    finally:
        connection.close()


def streamed(answer: Answer) -> tuple[str, str]:
    """(content, finish_reason)"""
    assert answer.status == 200
    *events, done = [event for event in answer.body.decode().split("\n\n") if event]
    assert done == "data: [DONE]"
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    return "".join(choice["delta"]["content"] or "" for choice in choices), choices[-1]["finish_reason"]


def test_both_apis_give_the_same_answers(vllm: Proxy) -> None:
    def answers(proxy: Proxy) -> list[Any]:
        _, key = proxy.start("same")
        found: list[Any] = []
        for fields in ({}, {"seed": 5}, {"seed": 6}, {"max_tokens": 3}, {"stop": "e"}, {"temperature": 0}):
            whole = proxy.chat(key, "hello", **{"max_tokens": 200, **fields})
            assert whole.status == 200
            (choice,) = whole.json["choices"]
            content, reason = choice["message"]["content"], choice["finish_reason"]
            assert content
            assert streamed(proxy.chat(key, "hello", **{"max_tokens": 200, **fields}, stream=True)) == (
                content,
                reason,
            )
            found.append((content, reason, whole.json["usage"]["completion_tokens"]))
        return found

    with Proxy(workers=1) as sglang:
        expected = answers(sglang)
    assert answers(vllm) == expected
    assert len({content for content, _, _ in expected[:3]}) == 3, "the seed reaches the engine"


def test_a_turn_is_recorded(vllm: Proxy) -> None:
    session_id, key = vllm.start("recorded")
    chat = vllm.chat(key)
    vllm.reward(key)
    (interaction,) = vllm.export(session_id).json["interactions"].values()
    shape = interaction["tensor_dict"]["input_ids"]["data"]["data"]["shape"]
    assert shape == [1, chat.json["usage"]["total_tokens"]]


def test_a_weight_update_in_mid_answer(vllm: Proxy) -> None:
    """Pausing aborts what runs; after the continue it goes on with tokens of the new version."""
    engine(
        vllm, "POST", "/embedded/configure", {"token_latency_s": 0.02, "output_tokens": 60, "chunk_tokens": 1}
    )
    try:
        session_id, key = vllm.start("update")
        replies: dict[bool, Answer] = {}

        def chat(stream: bool) -> None:
            replies[stream] = vllm.chat(key, "long", max_tokens=100, stream=stream)

        threads = [threading.Thread(target=chat, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine(vllm, "GET", "/embedded/stats")["in_flight"] == 2, "both are generating")
        assert vllm.ask("POST", "/pause_generation").json == {"status": "ok", "paused": True}
        assert engine(vllm, "GET", "/embedded/stats")["paused"]
        assert vllm.ask("POST", "/set_version", {"version": 3}).status == 200
        assert vllm.ask("POST", "/continue_generation").json == {"status": "ok", "paused": False}
        for thread in threads:
            thread.join(WATCHDOG_S)
        assert replies[False].json["usage"]["completion_tokens"] >= 60
        assert streamed(replies[True])[0]
        vllm.reward(key)
        interactions = vllm.export(session_id).json["interactions"].values()
        for interaction in interactions:
            shard = interaction["tensor_dict"]["versions"]["data"]["shard"]["data"]["shard_id"]
            versions = ints(vllm.ask("GET", f"/data/{shard}").json)
            output = versions[versions.count(-1) :]
            assert output == sorted(output) and output[-1] == 3 and set(output) <= {0, 3}
        assert len(interactions) == 2
    finally:
        engine(
            vllm, "POST", "/embedded/configure", {"token_latency_s": 0, "output_tokens": 0, "chunk_tokens": 8}
        )


def test_memory(vllm: Proxy) -> None:
    _, key = vllm.start("memory")
    assert vllm.ask("POST", "/release_memory_occupation", {}).json == {"status": "ok"}
    assert engine(vllm, "GET", "/is_sleeping") == {"is_sleeping": True}
    refused = vllm.chat(key)
    assert refused.status == 502 and "503" in refused.json["detail"]
    assert vllm.ask("POST", "/resume_memory_occupation", {"tags": ["weights"]}).status == 200
    assert engine(vllm, "GET", "/is_sleeping") == {"is_sleeping": False}
    assert vllm.chat(key).status == 200


@pytest.mark.parametrize("mode", ["omit", "minus-9999"])
@pytest.mark.parametrize("stream", [False, True])
def test_missing_log_probabilities_are_an_engine_error(vllm: Proxy, mode: str, stream: bool) -> None:
    engine(vllm, "POST", "/embedded/configure", {"logprobs": mode})
    try:
        _, key = vllm.start("logprobs")
        answer = vllm.chat(key, stream=stream)
        if stream and answer.status == 200:
            assert "log-prob" in answer.body.decode() or "logprobs" in answer.body.decode()
            assert b"[DONE]" not in answer.body
        else:
            assert answer.status == 502 and "ogprob" in answer.json["detail"].replace("-", "")
        assert vllm.reward(key).status == 400, "nothing was recorded"
    finally:
        engine(vllm, "POST", "/embedded/configure", {"logprobs": "send"})


def test_deterministic_sampling_gives_the_same_run_again() -> None:
    def contents() -> list[str]:
        with Proxy("--deterministic-sampling", workers=2) as proxy:
            body = {"task_id": "run", "group_size": 2}
            members = proxy.ask("POST", "/rl/start_session", body, key=ADMIN).json["sessions"]
            return [
                proxy.chat(member["session_api_key"], "same", max_tokens=100).json["choices"][0]["message"][
                    "content"
                ]
                for member in members
                for _ in range(2)
            ]

    first = contents()
    assert len(set(first)) == 4, "members and turns of one prompt are different samples"
    assert contents() == first


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--tool-call-parser", "nope", "no parser 'nope'; there are qwen, "),
        ("--tool-call-parser", "sglang:no_such", "cannot load the tool parser sglang:no_such"),
        ("--reasoning-parser", "nope", "no parser 'nope'; there are qwen3, "),
    ],
)
def test_a_parser_that_is_not_there_is_one_line_and_nothing_runs(flag: str, value: str, said: str) -> None:
    proxy = Proxy(flag, value, workers=1, log_level="warning")
    try:
        assert proxy.wait() == 1
        wait_until(lambda: proxy.log("error: "), "the proxy says why")
        assert [line for line in proxy.lines if said in line] == proxy.lines
    finally:
        proxy.end()
