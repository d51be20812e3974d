"""WIRE "Retries": a chat is answered from its twin's record only if the first reply is known to be lost."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from areal_fast.service import retries
from areal_fast.store import SessionStore
from areal_fast.store.couriers import courier_of
from tests.unit.service.conftest import Service
from tests.unit.service.fakes import FakeExchange, run

BODY = {"messages": [{"role": "user", "content": "hi"}]}


def chat(
    service: Service, key: str, *, arrived: bool | None = True, idempotency: str | None = None, **more: Any
) -> FakeExchange:
    """One chat, and what became of its reply; None: nobody ever heard."""
    headers = {} if idempotency is None else {"Idempotency-Key": idempotency}
    exchange = FakeExchange("POST", "/chat/completions", {**BODY, **more}, key=key, headers=headers)
    run(service.routes(exchange))  # type: ignore[arg-type]
    assert exchange.status == 200
    if arrived is not None:
        exchange.sent(arrived)
    return exchange


def test_equal_bodies_are_two_samples(service: Service) -> None:
    _, key = service.start()
    first, second = chat(service, key), chat(service, key)
    assert first.json["id"] != second.json["id"] and len(service.engine.asked) == 2


def test_an_answer_that_may_still_arrive_is_no_ones_else(service: Service) -> None:
    _, key = service.start()
    first, second = chat(service, key, arrived=None), chat(service, key)
    assert first.json["id"] != second.json["id"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_reply_is_told_again_once(service: Service, stream: bool) -> None:
    _, key = service.start()
    lost = chat(service, key, arrived=False, stream=stream)
    other = chat(service, key, stream=stream, seed=1)
    again = chat(service, key, stream=stream)
    later = chat(service, key, stream=stream)
    ids = [(e.events()[0] if stream else e.json)["id"] for e in (lost, again, other, later)]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert len(service.engine.asked) == 3
    assert text(lost, stream) == text(again, stream) == "hello"
    assert service.ask("POST", "/rl/set_reward", {"reward": 1}, key=key).json["interaction_count"] == 3


def text(exchange: FakeExchange, stream: bool) -> Any:
    if not stream:
        return exchange.json["choices"][0]["message"]["content"]
    events = [e for e in exchange.events() if e != "[DONE]"]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    return "".join(e["choices"][0]["delta"]["content"] or "" for e in events)


def test_a_repeat_that_is_lost_too_is_told_once_more(service: Service) -> None:
    _, key = service.start()
    ids = {chat(service, key, arrived=arrived).json["id"] for arrived in (False, False, True)}
    assert len(ids) == 1 and len(service.engine.asked) == 1


def test_a_client_that_had_closed_is_taken_for_gone(service: Service) -> None:
    _, key = service.start()
    first = chat(service, key, arrived=None)
    first.input_ended = True
    first.sent(True)
    assert chat(service, key).json["id"] == first.json["id"]


def test_an_equal_key_is_the_same_request(service: Service) -> None:
    _, key = service.start()
    first = chat(service, key, idempotency="a")
    assert chat(service, key, idempotency="a").json["id"] == first.json["id"]
    assert chat(service, key, idempotency="b").json["id"] != first.json["id"]


def test_another_key_is_another_request_even_if_the_first_was_lost(service: Service) -> None:
    _, key = service.start()
    lost = chat(service, key, idempotency="a", arrived=False)
    assert chat(service, key, idempotency="b").json["id"] != lost.json["id"]
    assert chat(service, key).json["id"] != lost.json["id"]


def test_another_sessions_chat_is_no_twin(service: Service) -> None:
    _, key = service.start()
    _, other = service.start()
    lost = chat(service, key, arrived=False)
    assert chat(service, other).json["id"] != lost.json["id"]


def test_what_is_not_stored_is_not_told_again(service: Service) -> None:
    _, key = service.start()
    chat(service, key, store=False, arrived=False)
    chat(service, key, store=False)
    assert len(service.engine.asked) == 2


@pytest.mark.parametrize("told", [False, True])
def test_a_dead_workers_reply_is_lost_unless_it_was_going_out(
    service: Service, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`told`: it died after it noted that the reply leaves, which it does before the kernel has a byte."""
    _, key = service.start()
    arena = service.store.arena
    other = type(arena).attach(arena.fileno(), 3)
    other.proc_enter(os.getpid())
    service.chats.retries._process = courier_of(other)
    with monkeypatch.context() as patch:
        if not told:
            patch.setattr(retries, "watch", lambda *_: lambda: None)
        first = chat(service, key, arrived=None)
    service.chats.retries._process = courier_of(arena)
    assert chat(service, key, seed=1).json["id"] != first.json["id"]
    arena.sweep(3)
    assert (chat(service, key).json["id"] == first.json["id"]) is not told


def test_a_repeat_waits_for_the_first_if_its_client_is_gone(service: Service) -> None:
    _, key = service.start()
    exchanges = [FakeExchange("POST", "/chat/completions", BODY, key=key) for _ in range(3)]
    gone, sample, repeat = exchanges

    async def serve() -> None:
        service.engine.hold = asyncio.Event()

        def begin(exchange: FakeExchange) -> asyncio.Future[None]:
            handled = service.routes(exchange)  # type: ignore[arg-type]
            assert handled is not None
            return asyncio.ensure_future(handled)

        tasks = [begin(gone), begin(sample)]
        await asyncio.sleep(0)
        gone.gone = True
        tasks.append(begin(repeat))
        await asyncio.sleep(0)
        assert len(service.engine.asked) == 2
        gone._on_sent.clear()
        respond = gone.respond

        def lost(*args: Any, **more: Any) -> None:
            respond(*args, **more)
            gone.sent(False)

        gone.respond = lost  # type: ignore[method-assign]
        service.engine.hold.set()
        await asyncio.gather(*tasks)

    asyncio.run(serve())
    assert repeat.json["id"] == gone.json["id"] != sample.json["id"]
    assert len(service.engine.asked) == 2


def test_what_is_known_of_replies_survives_a_cut_of_the_log(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from areal_fast.store import folds

    monkeypatch.setattr(folds, "COMPACT_MIN_BYTES", 0)
    monkeypatch.setattr(folds, "COMPACT_DEAD_RATIO", 0.0)
    session_id, key = service.start()
    lost, arrived = chat(service, key, arrived=False), chat(service, key, seed=1)
    session = service.store.by_id(session_id)
    assert session is not None
    with session:
        assert service.store.folds.compact(session.slot)
    service.store.folds.forget(session.slot)
    assert isinstance(service.store, SessionStore)
    assert chat(service, key).json["id"] == lost.json["id"]
    assert chat(service, key, seed=1).json["id"] != arrived.json["id"]
