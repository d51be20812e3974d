"""External models: what is forwarded, what is passed back, and what of it is recorded."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from areal_fast.service.external import BadModel, ExternalModel, read_registration
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import FakeExchange
from tests.unit.service.provider import EVENTS, Provider, Scripted

HELLO = b'{"choices":[{"message":{"content":"Hello"},"finish_reason":"stop"}]}'
FIRST = b'data: {"choices":[{"delta":{"content":"Hel"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"delta":{"content":"lo"},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


def register(service: Service, **fields: Any) -> FakeExchange:
    return service.ask("POST", "/register_model", fields, key=ADMIN)


def chat(service: Service, body: Any, key: str | None = None, **options: Any) -> FakeExchange:
    exchange = FakeExchange("POST", "/chat/completions", body, key=key, **options)

    async def serve() -> None:
        handled = service.routes(exchange)
        if handled is not None:
            await handled
        await service.externals.close()

    asyncio.run(serve())
    return exchange


def recorded(service: Service, session_id: str, key: str) -> list[tuple[Any, str]]:
    """(messages, response text) of the session's interactions, by reward and export."""
    service.ask("POST", "/rl/set_reward", {"reward": 1.0}, key=key)
    answer = service.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)
    if answer.status != 200:
        return []
    return [
        (item["messages"], item["output_message_list"][0]["content"])
        for item in answer.json["interactions"].values()
    ]


# -- registration ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "name", "model"),
    [
        ({"name": "a", "url": "http://x/"}, "a", ExternalModel("http://x", "a")),
        ({"model": "m", "url": "https://x/v1"}, "m", ExternalModel("https://x/v1", "m")),
        ({"name": "a", "model": "m", "url": "http://x"}, "a", ExternalModel("http://x", "m")),
        ({"name": "a", "model": None, "url": "http://x"}, "a", ExternalModel("http://x", None)),
        (
            {"name": "a", "url": "http://x", "api_key": "k"},
            "a",
            ExternalModel("http://x", "a", "k"),
        ),
        ({"name": "a"}, "a", None),
        ({"name": "a", "url": None}, "a", None),
        ({"name": "a", "url": ""}, "a", None),
    ],
)
def test_name_or_model_url_model_and_key(
    fields: dict[str, Any], name: str, model: ExternalModel | None
) -> None:
    assert read_registration(fields) == (name, model)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"url": "http://x"},
        {"name": 5, "url": "http://x"},
        {"name": "a", "url": 7},
        {"name": "a", "url": "ftp://x"},
        {"name": "a", "url": "http://"},
        {"name": "a", "url": "http://x:99999"},
        {"name": "a", "url": "http://x", "model": 5},
        {"name": "a", "url": "http://x", "api_key": 5},
        {"name": "a", "url": "http://x", "api_key": "k\r\nx: y"},
    ],
)
def test_a_registration_that_cannot_work_is_refused(service: Service, fields: dict[str, Any]) -> None:
    with pytest.raises(BadModel):
        read_registration(fields)
    assert register(service, **fields).status == 400


def test_a_model_is_known_everywhere_before_the_reply(service: Service) -> None:
    answer = register(service, name="ext", url="http://x/", api_key="k")
    assert answer.json == {"status": "ok", "name": "ext"}
    entry = {"url": "http://x", "model": "ext", "api_key": "k"}
    assert service.changes == [{"external_models": {"ext": entry}}]
    service.shared.confirmed = False
    assert register(service, name="other", url="http://x").status == 503


def test_a_model_without_a_url_is_the_engines_again(service: Service) -> None:
    register(service, name="ext", url="http://127.0.0.1:9")
    assert register(service, name="ext").json == {"status": "ok", "name": "ext"}
    assert service.chat(None, model="ext").status == 200
    assert service.engine.asked


def test_more_models_than_a_message_holds_are_refused(service: Service) -> None:
    assert register(service, name="a" * 40_000, url="http://x", model="m").status == 200
    assert register(service, name="b" * 40_000, url="http://x", model="m").status == 507
    assert register(service, name="b", url="http://x").status == 200


# -- forwarding --------------------------------------------------------------------------------------------
def test_the_body_goes_on_with_its_model_replaced_and_the_providers_key(
    service: Service, provider: Provider
) -> None:
    _, key = service.start()
    register(service, name="ext", url=provider.url + "/", model="prov-model", api_key="prov-key")
    provider.answers.append(Scripted(200, [HELLO]))
    number = "0.30000000000000000001"
    body = b'{"model": "ext", "messages": [{"role":"user","content":"hi"}], "t": %b}' % number.encode()
    headers = {
        "X-Custom": "1",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "Keep-Alive": "5",
        "TE": "trailers",
        "X-Api-Key": key,
        "Cookie": "c=1",
        "Host": "me",
    }
    answer = chat(service, body, key, headers=headers)
    assert (answer.status, answer.answer) == (200, HELLO)
    assert answer.answer_headers[b"content-type"] == b"application/json"
    (sent,) = provider.received
    assert sent.path == "/ext/chat/completions"
    assert number.encode() in sent.body
    assert json.loads(sent.body)["model"] == "prov-model"
    assert sent.headers["authorization"] == "Bearer prov-key"
    assert sent.headers["x-custom"] == "1"
    assert sent.headers["content-type"] == "application/json"
    for gone in ("x-hop", "keep-alive", "te", "x-api-key", "cookie"):
        assert gone not in sent.headers
    assert sent.headers["host"] != "me"
    assert key not in str(sent.headers)


def test_without_a_key_the_provider_gets_none(service: Service, provider: Provider) -> None:
    _, key = service.start()
    register(service, name="ext", url=provider.url)
    chat(service, {"model": "ext", "messages": USER}, key)
    assert "authorization" not in provider.received[0].headers


def test_a_null_model_is_dropped(service: Service, provider: Provider) -> None:
    register(service, name="ext", url=provider.url, model=None)
    chat(service, {"model": "ext", "messages": USER})
    assert json.loads(provider.received[0].body) == {"messages": USER}


@pytest.mark.parametrize("extra", [{}, {"messages": []}, {"messages": None}, {"messages": "odd", "n": 3}])
def test_a_body_that_our_engine_would_refuse_is_forwarded(
    service: Service, provider: Provider, extra: dict[str, Any]
) -> None:
    register(service, name="ext", url=provider.url)
    assert chat(service, {"model": "ext", **extra}).status == 200
    assert json.loads(provider.received[0].body) == {"model": "ext", **extra}


@pytest.mark.parametrize("body", [b'{"model": "ext"', b'{"model": "ext", "messages": [{"x": "\xff"}]}'])
def test_what_is_no_json_is_400_and_not_forwarded(service: Service, provider: Provider, body: bytes) -> None:
    register(service, name="ext", url=provider.url)
    assert chat(service, body).status == 400
    assert provider.received == []


def test_other_models_are_answered_by_the_engine(service: Service, provider: Provider) -> None:
    register(service, name="ext", url=provider.url)
    for model in ("unknown", 5, None):
        assert service.chat(None, model=model).status == 200
    assert provider.received == [] and len(service.engine.asked) == 3


def test_without_an_engine_only_external_models_answer(service: Service, provider: Provider) -> None:
    service.engines.current = None
    register(service, name="ext", url=provider.url)
    assert chat(service, {"model": "ext", "messages": USER}).status == 200
    refused = service.chat(None)
    assert (refused.status, refused.json["detail"]) == (
        503,
        "No inference backend configured (external model mode).",
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 429, 500])
def test_the_providers_refusal_is_passed_on_and_not_recorded(
    service: Service, provider: Provider, status: int, stream: bool
) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    provider.answers.append(Scripted(status, [b'{"error":"no"}'], headers={"Retry-After": "7"}))
    answer = chat(service, {"model": "ext", "messages": USER, "stream": stream}, key)
    assert (answer.status, answer.answer) == (status, b'{"error":"no"}')
    assert answer.answer_headers[b"retry-after"] == b"7"
    assert recorded(service, session_id, key) == []


@pytest.mark.parametrize("stream", [False, True])
def test_an_unreachable_provider_is_502(service: Service, stream: bool) -> None:
    session_id, key = service.start()
    register(service, name="dead", url="http://127.0.0.1:9")
    answer = chat(service, {"model": "dead", "messages": USER, "stream": stream}, key)
    assert answer.status == 502
    assert answer.json["detail"].startswith("External API error: ")
    assert recorded(service, session_id, key) == []


def test_a_redirect_is_not_followed(service: Service, provider: Provider) -> None:
    register(service, name="ext", url=provider.url, api_key="k")
    provider.answers.append(Scripted(307, [b"{}"], headers={"Location": provider.url + "/elsewhere"}))
    assert chat(service, {"model": "ext", "messages": USER}).status == 307
    assert len(provider.received) == 1


def test_a_compressed_answer_is_passed_on_plain(service: Service, provider: Provider) -> None:
    register(service, name="ext", url=provider.url)
    provider.answers.append(Scripted(200, [gzip.compress(HELLO)], headers={"Content-Encoding": "gzip"}))
    assert chat(service, {"model": "ext", "messages": USER}).answer == HELLO


# -- recording ---------------------------------------------------------------------------------------------
def test_messages_and_raw_answer_are_recorded(service: Service, provider: Provider) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    for text in (HELLO, "späte Antwort".encode()):
        provider.answers.append(Scripted(200, [text[:5], text[5:]]))
        chat(service, {"model": "ext", "messages": USER}, key)
    chat(service, {"model": "ext"}, key)
    assert recorded(service, session_id, key) == [
        (USER, HELLO.decode()),
        (USER, "späte Antwort"),
        ([], "{}"),
    ]


def test_store_false_and_standalone_are_not_recorded(service: Service, provider: Provider) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    chat(service, {"model": "ext", "messages": USER, "store": False}, key)
    chat(service, {"model": "ext", "messages": USER})
    assert len(provider.received) == 2
    assert recorded(service, session_id, key) == []


def test_the_admin_keys_chats_belong_to_the_persistent_session(service: Service, provider: Provider) -> None:
    register(service, name="ext", url=provider.url)
    chat(service, {"model": "ext", "messages": USER}, ADMIN)
    assert recorded(service, "__hitl__", ADMIN) == [(USER, "{}")]


def test_an_answer_beyond_what_was_set_aside_is_recorded(service: Service, provider: Provider) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    provider.answers.append(Scripted(200, [b"x" * 100_000] * 3))
    chat(service, {"model": "ext", "messages": USER}, key)
    assert [len(text) for _, text in recorded(service, session_id, key)] == [300_000]


# -- streams -----------------------------------------------------------------------------------------------
def test_a_stream_is_passed_on_and_recorded_as_text(service: Service, provider: Provider) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    whole = FIRST + LAST + DONE
    provider.answers.append(Scripted(200, [whole[i : i + 7] for i in range(0, len(whole), 7)], EVENTS))
    answer = chat(service, {"model": "ext", "messages": USER, "stream": True}, key)
    assert (answer.status, answer.answer, answer.ended) == (200, whole, True)
    assert answer.answer_headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert recorded(service, session_id, key) == [(USER, whole.decode())]


def test_a_stream_is_committed_before_its_finish_reason_leaves(service: Service, provider: Provider) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    gate = threading.Event()
    provider.answers.append(Scripted(200, [FIRST, LAST, DONE], EVENTS, gate=gate))
    exchange = FakeExchange(
        "POST", "/chat/completions", {"model": "ext", "messages": USER, "stream": True}, key=key
    )
    seen: list[tuple[bytes, int]] = []
    write = exchange.write

    def watched(data: bytes) -> None:
        session = service.store.by_id(session_id)
        assert session is not None
        with session:
            seen.append((bytes(data), session.state.interaction_count()))
        write(data)
        gate.set()

    exchange.write = watched  # type: ignore[method-assign]

    async def serve() -> None:
        handled = service.routes(exchange)  # type: ignore[arg-type]
        if handled is not None:
            await handled
        await service.externals.close()

    asyncio.run(serve())
    assert seen == [(FIRST, 0), (LAST + DONE, 1)]


def test_a_stream_that_breaks_off_ends_in_an_error_and_is_not_recorded(
    service: Service, provider: Provider
) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    provider.answers.append(Scripted(200, [FIRST], EVENTS, cut=True))
    answer = chat(service, {"model": "ext", "messages": USER, "stream": True}, key)
    head, error = answer.events()
    assert head["choices"][0]["delta"]["content"] == "Hel"
    assert list(error) == ["error"] and error["error"]
    assert answer.ended
    assert recorded(service, session_id, key) == []


def test_a_mixed_trajectory_is_text_in_the_batch_form(service: Service, provider: Provider) -> None:
    session_id, key = service.start()
    register(service, name="ext", url=provider.url)
    service.chat(key, "one")
    service.chat(key, "two", stream=True)
    chat(service, {"model": "ext", "messages": USER}, key)
    service.ask("POST", "/rl/set_reward", {"reward": 1.0}, key=key)
    body = {"session_ids": [session_id], "discount": 0.5}
    answer = service.ask("POST", "/export_trajectories", body, key=ADMIN)
    assert answer.json == {
        "traj": {
            "interactions": [
                {"request": [{"role": "user", "content": "one"}], "response": "hello", "reward": 0.25},
                {"request": [{"role": "user", "content": "two"}], "response": "hello", "reward": 0.5},
                {"request": USER, "response": "{}", "reward": 1.0},
            ]
        }
    }
