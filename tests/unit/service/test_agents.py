"""Anthropic's messages and OpenAI's responses over the chat turn: the same prompt and record as a chat."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from areal_fast.engine.errors import EngineUnreachable
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import FakeExchange, run
from tests.unit.service.provider import EVENTS, Provider, Scripted
from tests.unit.service.test_chat import recorded
from tests.unit.service.test_chat_tools import CALLS, TOOLS

TOOL: Any = TOOLS[0]["function"]
MESSAGES = {"max_tokens": 500, "messages": [{"role": "user", "content": "hi"}]}
RESPONSES = {"max_output_tokens": 500, "input": "hi"}
APIS = [("/v1/messages", MESSAGES), ("/v1/responses", RESPONSES), ("/responses", RESPONSES)]


def events(exchange: FakeExchange) -> list[Any]:
    assert exchange.ended
    lines = exchange.answer.decode().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize(("path", "body"), APIS)
@pytest.mark.parametrize("stream", [False, True])
def test_asked_and_recorded_as_the_chat_that_it_is(
    service: Service, path: str, body: Any, stream: bool
) -> None:
    session_id, key = service.start()
    chat = service.chat(key, max_tokens=500, stream=stream)
    answer = service.ask("POST", path, {**body, "stream": stream}, key=key)
    assert chat.status == answer.status == 200
    first, second = service.engine.asked
    assert first == second
    found = events(answer)[0] if stream else answer.json
    interaction_id = (found.get("message") or found.get("response") or found)["id"]
    reward = {"reward": 1.0, "interaction_id": interaction_id}
    assert service.ask("POST", "/rl/set_reward", reward, key=key).json["interaction_count"] == 2
    exported = service.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN).json
    assert list(exported["interactions"])[1] == interaction_id


@pytest.mark.parametrize("stream", [False, True])
def test_tools(service: Service, stream: bool) -> None:
    service.engine.text = "Let me see.\n" + CALLS
    tool = {"name": TOOL["name"], "input_schema": TOOL["parameters"]}
    answer = service.ask("POST", "/v1/messages", {**MESSAGES, "tools": [tool], "stream": stream})
    if not stream:
        assert [block["type"] for block in answer.json["content"]] == ["text", "tool_use", "tool_use"]
        assert answer.json["content"][1]["input"] == {"city": "Paris"}
        assert answer.json["stop_reason"] == "tool_use"
    else:
        *_, last, _ = events(answer)
        assert last["delta"]["stop_reason"] == "tool_use"
        assert last["usage"]["output_tokens"] == len(service.engine.text) + 1
    tool = {"type": "function", "name": TOOL["name"], "parameters": TOOL["parameters"]}
    answer = service.ask("POST", "/v1/responses", {**RESPONSES, "tools": [tool], "stream": stream})
    response = events(answer)[-1]["response"] if stream else answer.json
    assert [item["type"] for item in response["output"]] == ["message", "function_call", "function_call"]
    assert response["output"][1]["arguments"] == '{"city": "Paris"}'
    assert response["tools"] == [tool]


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [(*APIS[0], b"message_delta"), (*APIS[1], b"response.completed")],
)
def test_the_record_is_there_before_the_last_event(
    service: Service, path: str, body: Any, last: bytes
) -> None:
    session_id, key = service.start()
    seen: list[int] = []

    class Watching(FakeExchange):
        def write(self, data: bytes) -> None:
            if last in data:
                seen.append(len(recorded(service, session_id)))
            super().write(data)

    exchange = Watching("POST", path, {**body, "stream": True}, key=key)
    run(service.routes(exchange))
    assert seen == [1]


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_either_form_of_the_key(service: Service, header: str) -> None:
    session_id, key = service.start()
    value = key if header == "x-api-key" else f"Bearer {key}"
    assert service.ask("POST", "/v1/messages", MESSAGES, headers={header: value}).status == 200
    assert len(recorded(service, session_id)) == 1


@pytest.mark.parametrize(("path", "body"), APIS[:2])
def test_an_engine_that_fails(service: Service, path: str, body: Any) -> None:
    service.engine.error = EngineUnreachable("no engine there")
    session_id, key = service.start()
    answer = service.ask("POST", path, body, key=key)
    assert answer.status == 502 and answer.json["error"]["message"] == "no engine there"
    service.engine.fail_after = 2
    answer = service.ask("POST", path, {**body, "stream": True}, key=key)
    last = events(answer)[-1]
    assert last["type"] == "error" and last["error"]["message"] == "no engine there"
    assert recorded(service, session_id) == []


def test_refusals_have_the_apis_form(service: Service) -> None:
    answer = service.ask("POST", "/v1/messages", {"messages": []})
    assert answer.status == 400 and answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error"
    answer = service.ask("POST", "/v1/messages", {"max_tokens": 1, "messages": []})
    assert (answer.status, answer.json["error"]["message"]) == (400, "messages cannot be empty")
    answer = service.ask("POST", "/v1/responses", {"input": "x", "previous_response_id": "r"})
    assert answer.status == 400 and "previous_response_id" in answer.json["detail"]
    assert answer.json["error"]["message"] == answer.json["detail"]
    service.engines.current = None
    answer = service.ask("POST", "/v1/messages", MESSAGES)
    assert answer.status == 503 and answer.json["error"]["type"] == "overloaded_error"


def test_counting_tokens_asks_and_records_nothing(service: Service) -> None:
    session_id, key = service.start()
    answer = service.ask("POST", "/v1/messages", MESSAGES, key=key)
    counted = service.ask("POST", "/v1/messages/count_tokens", {"messages": MESSAGES["messages"]}, key=key)
    assert counted.json == {"input_tokens": answer.json["usage"]["input_tokens"]}
    assert len(service.engine.asked) == len(recorded(service, session_id)) == 1
    assert service.ask("POST", "/v1/messages/count_tokens", {}).json["type"] == "error"


@pytest.mark.parametrize(("path", "body"), APIS[:2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_never_arrived_is_sent_again(
    service: Service, path: str, body: Any, stream: bool
) -> None:
    session_id, key = service.start()
    service.engine.text = CALLS
    asked = {**body, "stream": stream, "tools": [TOOL | {"input_schema": {}, "type": "custom"}]}
    if path == "/v1/responses":
        asked["tools"] = [TOOL | {"type": "function"}]
    first = service.ask("POST", path, asked, key=key)
    first.sent(False)
    again = service.ask("POST", path, asked, key=key)
    assert len(service.engine.asked) == len(recorded(service, session_id)) == 1
    ids = [re.findall('"id":"(chatcmpl-[0-9a-f]+)"', each.answer.decode())[0] for each in (first, again)]
    assert ids[0] == ids[1]


def ask_external(service: Service, path: str, body: Any, headers: dict[str, str]) -> FakeExchange:
    exchange = FakeExchange("POST", path, {**body, "model": "ext"}, headers=headers)

    async def serve() -> None:
        pending = service.routes(exchange)
        assert pending is not None
        await pending
        await service.externals.close()

    asyncio.run(serve())
    return exchange


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"id": "x", **fields}).encode() + b"\n\n"


def chunk(reason: str | None = None, **delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": reason}])


@pytest.mark.parametrize("stream", [False, True])
def test_an_external_model_answers_in_the_api_it_was_asked_in(service: Service, stream: bool) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}
    rest = {"index": 0, "function": {"arguments": " 1}"}}
    first = {**call, "function": {"name": "f", "arguments": '{"a": 1}'}}
    choice = {"message": {"content": "Hi", "tool_calls": [first]}, "finish_reason": "tool_calls"}
    said = [chunk(content="H"), chunk(content="i"), chunk(tool_calls=[call]), chunk(tool_calls=[rest])]
    said += [chunk("tool_calls"), event(choices=[], usage={"prompt_tokens": 7}), b"data: [DONE]\n\n"]
    whole = [json.dumps({"id": "x", "choices": [choice], "usage": {"prompt_tokens": 7}}).encode()]
    joined = b"".join(said)
    pieces = [joined[i : i + 50] for i in range(0, len(joined), 50)]
    with Provider() as provider:
        service.externals.use({"ext": {"url": provider.url, "model": "m", "api_key": "k"}})
        session_id, key = service.start()
        for path, body in APIS[:2]:
            answered = Scripted(200, pieces, EVENTS) if stream else Scripted(200, whole)
            provider.answers.append(answered)
            headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
            answer = ask_external(service, path, {**body, "stream": stream}, headers)
            assert answer.status == 200, answer.answer
            sent = provider.received[-1]
            assert sent.headers["authorization"] == "Bearer k"
            assert not {"x-api-key", "anthropic-version"} & set(sent.headers)
            assert json.loads(sent.body)["messages"] == [{"role": "user", "content": "hi"}]
            if not stream:
                text = answer.answer.decode()
            else:
                text = json.dumps(events(answer)[-4:])
            assert "tool_use" in text or '"arguments"' in text
            assert '"input_tokens":7' in text.replace(" ", "")
        assert len(recorded(service, session_id)) == 2


def test_an_external_models_refusal_and_nonsense(service: Service) -> None:
    with Provider() as provider:
        service.externals.use({"ext": {"url": provider.url, "model": "m", "api_key": "k"}})
        provider.answers += [Scripted(429, [b'{"error":{"message":"slow down"}}']), Scripted(200, [b"{}"])]
        answer = ask_external(service, "/v1/messages", MESSAGES, {})
        assert answer.status == 429
        assert answer.json["error"] == {"type": "rate_limit_error", "message": "slow down"}
        answer = ask_external(service, "/v1/responses", RESPONSES, {})
        assert answer.status == 502 and answer.json["error"]["type"] == "server_error"


def test_models(service: Service) -> None:
    service.externals.use({"ext": {"url": "http://x", "model": None, "api_key": None}})
    for path in ("/models", "/v1/models"):
        listed = service.ask("GET", path).json
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["a-model", "ext"]
    listed = service.ask("GET", "/v1/models", headers={"anthropic-version": "2023-06-01"}).json
    assert [(model["id"], model["type"]) for model in listed["data"]] == [
        ("a-model", "model"),
        ("ext", "model"),
    ]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("a-model", "ext", False)


def test_one_model(service: Service) -> None:
    service.externals.use({"org/ext é": {"url": "http://x", "model": None, "api_key": None}})
    anthropic_form = {"anthropic-version": "2023-06-01"}
    for path in ("/models/a-model", "/v1/models/a-model"):
        assert service.ask("GET", path).json["object"] == "model"
    path = "/v1/models/org/ext é"
    assert service.ask("GET", path).json["id"] == "org/ext é"
    assert service.ask("GET", path, headers=anthropic_form).json["type"] == "model"
    missing = service.ask("GET", "/v1/models/b")
    assert missing.status == 404 and missing.json["error"]["type"] == "invalid_request_error"
    missing = service.ask("GET", "/v1/models/b", headers=anthropic_form)
    assert missing.status == 404 and missing.json["error"]["type"] == "not_found_error"
    assert service.ask("POST", "/v1/models/a-model").status == 405
    for path in ("/v1/models/", "/models/", "/v1/models/a/"):
        assert service.ask("GET", path).json == {"detail": "Not Found"}
