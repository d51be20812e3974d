"""The chat turn: what is answered, what is recorded, and that failures leave nothing behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_fast.core import ArenaFull
from areal_fast.engine.errors import EngineError, EngineTimeout, EngineUnreachable
from areal_fast.store.session import Turn
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import FakeExchange


def recorded(service: Service, session_id: str) -> list[str]:
    """Ids of the active interactions, in order."""
    session = service.store.by_id(session_id)
    assert session is not None
    with session:
        interactions = session.state.active.interactions
        return [interactions[ordinal].interaction_id for ordinal in sorted(interactions)]


def pins(service: Service) -> list[int]:
    arena = service.store.arena
    return [arena.slot_info(slot).pins for slot in arena.sessions(0, 1000)[0]]


def test_a_turn_is_answered_and_recorded(service: Service) -> None:
    session_id, key = service.start()
    answer = service.chat(key, "hi", max_tokens=100)
    body = answer.json
    assert answer.status == 200
    assert body["object"] == "chat.completion" and body["model"] == "None"
    assert body["choices"][0]["message"]["content"] == "hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {
        "completion_tokens": 6,
        "prompt_tokens": 8,
        "total_tokens": 14,
        "completion_tokens_details": None,
        "prompt_tokens_details": None,
    }
    assert recorded(service, session_id) == [body["id"]]
    assert pins(service) == [0]


def test_v1_is_the_same(service: Service) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert service.ask("POST", "/v1/chat/completions", body, content_type=None).status == 200


def test_a_stream_is_one_event_a_token_then_the_reason_then_done(service: Service) -> None:
    session_id, key = service.start()
    answer = service.chat(key, stream=True)
    events = answer.events()
    assert answer.answer_headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert events[-1] == "[DONE]" and answer.ended
    chunks = events[:-1]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    texts = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:-1]]
    assert texts == list("hello")
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] == 14
    assert recorded(service, session_id) == [chunks[0]["id"]]


def test_the_record_is_there_before_the_reason_is_sent(service: Service) -> None:
    session_id, key = service.start()
    seen: list[int] = []

    class Watching(FakeExchange):
        def write(self, data: bytes) -> None:
            if b'"finish_reason":"' in data:
                seen.append(len(recorded(service, session_id)))
            super().write(data)

        def respond(self, status: int, body: bytes, *rest: Any, **more: Any) -> None:
            seen.append(len(recorded(service, session_id)))
            super().respond(status, body, *rest, **more)

    for i, stream in enumerate((False, True)):
        body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
        exchange = Watching("POST", "/chat/completions", body, key=key)

        async def turn(exchange: FakeExchange = exchange) -> None:
            await service.chats.serve(exchange)  # type: ignore[arg-type]

        asyncio.run(turn())
        assert seen[i] == i + 1


@pytest.mark.parametrize("key", [None, "unknown", ""])
def test_without_a_known_key_it_is_answered_and_not_recorded(service: Service, key: str | None) -> None:
    assert service.chat(key).status == 200
    assert service.store.sessions_count() == 0


def test_the_admin_key_is_the_persistent_session(service: Service) -> None:
    first, second = service.chat(ADMIN).json["id"], service.chat(ADMIN).json["id"]
    assert recorded(service, "__hitl__") == [first, second]


def test_store_false_is_not_recorded(service: Service) -> None:
    session_id, key = service.start()
    assert service.chat(key, store=False).status == 200
    assert recorded(service, session_id) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(EngineError("says 500"), 502), (EngineUnreachable("refused"), 502), (EngineTimeout("late"), 504)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_leaves_nothing_behind(
    service: Service, error: Exception, status: int, stream: bool
) -> None:
    session_id, key = service.start()
    service.engine.error = error
    answer = service.chat(key, stream=stream)
    assert (answer.status, answer.json) == (status, {"detail": str(error)})
    assert recorded(service, session_id) == []
    assert pins(service) == [0] and service.chats.in_flight == 0
    service.engine.error = None
    assert service.chat(key).status == 200
    assert len(recorded(service, session_id)) == 1


def test_an_engine_failing_in_mid_stream_ends_it_without_done(service: Service) -> None:
    session_id, key = service.start()
    service.engine.error, service.engine.fail_after = EngineError("broke off"), 3
    answer = service.chat(key, stream=True)
    events = answer.events()
    assert answer.status == 200 and answer.ended
    assert "[DONE]" not in events
    assert events[-1]["error"]["message"] == "broke off"
    assert not any(e.get("choices", [{}])[0].get("finish_reason") for e in events)
    assert recorded(service, session_id) == []


@pytest.mark.parametrize("stream", [False, True])
def test_output_that_is_nothing_but_stop_tokens_is_the_engines_error(service: Service, stream: bool) -> None:
    session_id, key = service.start()
    service.engine.text = ""
    answer = service.chat(key, stream=stream)
    assert answer.status == 502 and "All output_tokens are EOS" in answer.json["detail"]
    assert recorded(service, session_id) == []


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"messages": []}, "messages cannot be empty"),
        ({"max_tokens": 0}, "max_new_tokens must be > 0"),
        ({"max_total_tokens": 3}, "len of prompt tokens 8 exceeds max_total_tokens 3"),
        ({"n": 2}, "n != 1 is not supported"),
    ],
)
def test_bad_input_is_400_and_leaves_nothing_behind(service: Service, fields: Any, detail: str) -> None:
    session_id, key = service.start()
    answer = service.chat(key, **fields)
    assert answer.status == 400 and detail in answer.json["detail"]
    assert service.engine.asked == []
    assert recorded(service, session_id) == [] and pins(service) == [0]


def test_an_unreadable_body_is_400(service: Service) -> None:
    answer = service.ask("POST", "/chat/completions", b"{bad")
    assert (answer.status, answer.json) == (400, {"detail": "Invalid JSON body"})


def test_without_an_engine_it_is_503(service: Service) -> None:
    service.engines.current = None
    assert service.chat(None).status == 503


def test_a_full_arena_is_507_before_the_engine_is_asked(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, key = service.start()

    def reserve(self: Turn, tokens: int) -> None:
        raise ArenaFull

    monkeypatch.setattr(Turn, "reserve", reserve)
    assert service.chat(key).status == 507
    assert service.engine.asked == []
    assert recorded(service, session_id) == [] and pins(service) == [0]


def test_a_session_removed_meanwhile_still_gets_its_answer(service: Service) -> None:
    session_id, key = service.start()

    async def scenario() -> FakeExchange:
        service.engine.hold = asyncio.Event()
        exchange = FakeExchange(
            "POST", "/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, key=key
        )
        task = asyncio.ensure_future(service.chats.serve(exchange))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        session = service.store.by_id(session_id)
        assert session is not None
        with session:
            service.store.arena.close_session(session.slot)
        service.engine.hold.set()
        await task
        return exchange

    exchange = asyncio.run(scenario())
    assert exchange.status == 200
    assert service.store.sessions_count() == 0


def test_turns_are_ordered_by_when_they_began(service: Service) -> None:
    session_id, key = service.start()

    async def scenario() -> tuple[str, str]:
        holds = [asyncio.Event(), asyncio.Event()]
        exchanges, tasks = [], []
        for hold in holds:
            service.engine.hold = hold
            body = {"messages": [{"role": "user", "content": "x"}]}
            exchanges.append(FakeExchange("POST", "/chat/completions", body, key=key))
            tasks.append(asyncio.ensure_future(service.chats.serve(exchanges[-1])))  # type: ignore[arg-type]
            await asyncio.sleep(0)
        assert service.chats.in_flight == 2
        holds[1].set()
        await tasks[1]
        holds[0].set()
        await tasks[0]
        return exchanges[0].json["id"], exchanges[1].json["id"]

    first, second = asyncio.run(scenario())
    assert recorded(service, session_id) == [first, second]


def test_a_turn_in_flight_pins_its_session(service: Service) -> None:
    _, key = service.start()

    async def scenario() -> None:
        service.engine.hold = asyncio.Event()
        body = {"messages": [{"role": "user", "content": "x"}]}
        exchange = FakeExchange("POST", "/chat/completions", body, key=key)
        task = asyncio.ensure_future(service.chats.serve(exchange))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert pins(service) != [0]
        report = service.store.cleanup_stale(0.0, None)
        assert report.sessions == 0
        service.engine.hold.set()
        await task
        assert exchange.status == 200

    asyncio.run(scenario())
    assert pins(service) == [0]


def test_template_arguments_reach_the_tokenizer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    tokenizer: Any = service.chats._tokenizer
    real = tokenizer.prompt

    async def prompt(messages: Any, tools: Any, kwargs: Any) -> Any:
        seen.append((tools, kwargs))
        return await real(messages, tools, kwargs)

    monkeypatch.setattr(tokenizer, "prompt", prompt)
    tool = {"type": "function", "function": {"name": "f"}}
    service.chat(
        None, tools=[tool], extra_body={"chat_template_kwargs": {"a": 1}}, chat_template_kwargs={"b": 2}
    )
    assert seen == [([tool], {"a": 1, "b": 2})]
