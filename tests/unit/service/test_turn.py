"""The turn without a task: the engine's answer, or what comes instead, is told in a call. And the ways out of
that, into a coroutine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from areal_fast.core import IndexBusy
from areal_fast.engine.generate import Engine
from areal_fast.http import BrokenReply, ConnectFailed, Timeout
from areal_fast.service import turn as turns
from areal_fast.service.meters import SIZE, STANDALONE_CHATS, TURNS, Metered, base
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import FakeExchange, WordTokenizer

HI = [{"role": "user", "content": "hi"}]


class Asked:
    """One request to the engine, to be ended by the test."""

    def __init__(self, body: bytes, done: Callable[[Any], None]) -> None:
        self.question = json.loads(body)
        self.done = done
        self.error: Exception | None = None
        self.status = 0
        self._body = b""

    def take_body(self) -> bytes:
        return self._body

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done(self)

    def answer(self, body: bytes, status: int = 200) -> None:
        self.status, self._body = status, body
        self.done(self)

    def say(self, text: str, stop: str = "stop") -> None:
        self.answer(said(text, stop))


def said(text: str, stop: str = "stop") -> bytes:
    ids = [*map(ord, text), *([1] if stop == "stop" else [])]
    meta = {
        "finish_reason": {"type": stop},
        "output_token_logprobs": [[-0.5, i, None] for i in ids],
        "completion_tokens": len(ids),
    }
    return json.dumps({"meta_info": meta}).encode()


class Transport:
    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.later: list[Any] = []

    def begin(
        self, method: str, path: str, body: bytes, *, timeout_s: float, done: Callable[[Any], None]
    ) -> Asked:
        self.asked.append(Asked(body, done))
        return self.asked[-1]

    async def request(self, method: str, path: str, body: bytes, *, timeout_s: float) -> Any:
        """What a coroutine asks: answered at once by `later`, in turn."""
        asked = Asked(body, lambda _: None)
        self.asked.append(asked)
        await asyncio.sleep(0)
        asked.answer(self.later.pop(0))
        asked.body = asked.take_body()  # type: ignore[attr-defined]
        return asked


class AtOnce(WordTokenizer):
    def prompt(self, messages: Any, tools: Any, kwargs: Any) -> Any:
        return self.encode_chat(messages, tools, kwargs)


class Exchange(FakeExchange):
    """What a deferred exchange can do besides."""

    def __init__(self, key: str | None, **fields: Any) -> None:
        headers = {"idempotency-key": fields.pop("idempotency")} if "idempotency" in fields else {}
        super().__init__("POST", "/chat/completions", {"messages": HI, **fields}, key=key, headers=headers)
        self.deferred = False
        self.faults: list[Exception] = []
        self.rest: Awaitable[None] | None = None
        self.done: Callable[[], None] = lambda: None

    def defer(self) -> None:
        self.deferred = True

    def go_on(self, pending: Awaitable[None]) -> None:
        assert self.deferred and self.rest is None
        self.rest = pending

    def fault(self, error: Exception) -> None:
        self.faults.append(error)

    def on_done(self, callback: Callable[[], None]) -> None:
        self.done = callback

    @property
    def text(self) -> str:
        assert self.status == 200, self.answer
        return str(self.json["choices"][0]["message"]["content"])


@pytest.fixture
def transport(service: Service) -> Transport:
    transport = Transport()
    service.engines.current = Engine(transport, service.state, request_timeout_s=7.0, address="http://e")
    service.chats._tokenizer = AtOnce()
    return transport


def begin(service: Service, exchange: Exchange) -> Exchange:
    """It has no task: nothing here runs in a loop."""
    assert service.routes(exchange) is None
    assert exchange.deferred or exchange.finished
    return exchange


def finish(pending: Awaitable[None] | None) -> None:
    assert pending is not None

    async def wait() -> None:
        await pending

    asyncio.run(wait())


def recorded(service: Service, session_id: str) -> list[Any]:
    """(ordinal, prompt and output sizes, version runs) of each interaction."""
    assert service.chats.in_flight == 0 and not service.chats.retries._flights
    session = service.store.by_id(session_id)
    assert session is not None
    with session:
        assert service.store.arena.slot_info(session.slot).pins == 1 << service.store.arena.proc
        metas = [i.meta for i in session.state.active.interactions.values()]
    assert not service.store.turns_open
    return [(m.ordinal, m.prompt_len, m.output_len, [tuple(run) for run in m.version_runs]) for m in metas]


def pinned(service: Service, session_id: str) -> bool:
    slot = service.store.arena.pin_id(session_id.encode())
    try:
        return slot in service.store.turns_open
    finally:
        service.store.arena.unpin(slot)


def test_an_ordinary_turn_needs_no_loop(service: Service, transport: Transport) -> None:
    session_id, key = service.start()
    exchange = begin(service, Exchange(key))
    assert service.chats.in_flight == 1 and pinned(service, session_id) and exchange.status == 0
    assert transport.asked[0].question["input_ids"] == [*map(ord, "user:hi\n")]
    transport.asked[0].say("hello")
    assert exchange.text == "hello" and exchange.rest is None
    assert recorded(service, session_id) == [(0, 8, 6, [(0, 6)])]


@pytest.mark.parametrize("key", [None, "nobody's"])
def test_nor_does_one_that_nobody_records(service: Service, transport: Transport, key: str | None) -> None:
    exchange = begin(service, Exchange(key))
    transport.asked[0].say("hello")
    assert exchange.text == "hello" and service.chats.in_flight == 0
    assert service.store.arena.counters()[STANDALONE_CHATS] == 1


def test_the_admins_is_the_persistent_sessions(service: Service, transport: Transport) -> None:
    exchange = begin(service, Exchange(ADMIN))
    transport.asked[0].say("hello")
    assert exchange.text == "hello" and len(recorded(service, "__hitl__")) == 1


def test_many_at_once_end_in_any_order(service: Service, transport: Transport) -> None:
    session_id, key = service.start()
    exchanges = [begin(service, Exchange(key, seed=n)) for n in range(4)]
    for n in (2, 0, 3, 1):
        transport.asked[n].say(f"answer {n}")
    assert [exchange.text for exchange in exchanges] == [f"answer {n}" for n in range(4)]
    assert sorted(row[0] for row in recorded(service, session_id)) == [0, 1, 2, 3]


def test_a_client_that_hung_up_changes_nothing(service: Service, transport: Transport) -> None:
    session_id, key = service.start()
    exchange = begin(service, Exchange(key))
    exchange.gone = True
    transport.asked[0].say("hello")
    exchange.sent(False)
    assert len(recorded(service, session_id)) == 1


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (lambda a: a.fail(Timeout("POST /generate: no")), 504, "did not answer within 7 s"),
        (lambda a: a.fail(ConnectFailed("refused")), 502, "Cannot reach engine http://e: refused"),
        (lambda a: a.fail(BrokenReply("reset")), 502, "Engine http://e broke off: reset"),
        (lambda a: a.fail(KeyError("ours")), 500, "Internal error"),
        (lambda a: a.answer(b"no good", 500), 502, "Engine returned 500: no good"),
        (lambda a: a.answer(b"no JSON"), 502, "Engine"),
        (lambda a: a.answer(said("")), 502, "stop"),
    ],
)
def test_what_fails_leaves_nothing(
    service: Service, transport: Transport, end: Callable[[Asked], None], status: int, text: str
) -> None:
    session_id, key = service.start()
    exchange = begin(service, Exchange(key))
    end(transport.asked[0])
    assert exchange.status == status and text in exchange.json["detail"] and not exchange.faults
    assert recorded(service, session_id) == []


def test_our_own_faults_do_not_reach_the_engines_connection(
    service: Service, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, key = service.start()
    exchange = begin(service, Exchange(key))
    with monkeypatch.context() as patch:
        patch.setattr(turns, "whole_answer", lambda *_: 1 / 0)
        transport.asked[0].say("hello")
    assert exchange.status == 500 and recorded(service, session_id) == []
    twice = begin(service, Exchange(key))
    with monkeypatch.context() as patch:
        patch.setattr(turns, "refuse_chat", lambda *_: 1 / 0)
        transport.asked[1].fail(BrokenReply("reset"))
    assert [type(error) for error in twice.faults] == [ZeroDivisionError]
    assert recorded(service, session_id) == []


def test_what_cannot_be_given_back_keeps_nothing_else(service: Service, transport: Transport) -> None:
    session_id, key = service.start()
    exchange = begin(service, Exchange(key))
    turn: Any = transport.asked[0].done.__self__  # type: ignore[attr-defined]
    turn._routed = SimpleNamespace(abandon=lambda: 1 / 0)
    transport.asked[0].fail(BrokenReply("reset"))
    assert [type(error) for error in exchange.faults] == [ZeroDivisionError]
    assert recorded(service, session_id) == []


def test_a_full_arena_is_507_before_the_engine_is_asked(
    service: Service, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from areal_fast.core import ArenaFull

    session_id, key = service.start()

    def full(*_: Any) -> int:
        raise ArenaFull

    with monkeypatch.context() as patch:
        patch.setattr(service.store.arena, "reserve", full)
        exchange = begin(service, Exchange(key))
    assert exchange.status == 507 and not transport.asked and recorded(service, session_id) == []


def test_a_session_removed_meanwhile_still_gets_its_answer(service: Service, transport: Transport) -> None:
    session_id, key = service.start()
    exchange = begin(service, Exchange(key))
    session = service.store.by_id(session_id)
    assert session is not None
    with session:
        service.store.arena.close_session(session.slot)
    transport.asked[0].say("hello")
    assert exchange.text == "hello" and service.chats.in_flight == 0
    assert service.store.arena.counters()[TURNS] == 0


# -- ways out ------------------------------------------------------------------------------------------


def test_a_paused_engine_is_waited_for(service: Service, transport: Transport) -> None:
    session_id, key = service.start()
    service.state.mark(True)
    exchange = Exchange(key)
    pending = service.routes(exchange)
    assert not transport.asked and pinned(service, session_id)
    service.state.mark(False)
    transport.later = [said("hello")]
    finish(pending)
    assert exchange.text == "hello" and recorded(service, session_id) == [(0, 8, 6, [(0, 6)])]


@pytest.mark.parametrize(("first", "runs"), [("he", [(0, 2), (5, 4)]), ("", [(5, 4)])])
def test_an_interrupted_answer_goes_on(
    service: Service, transport: Transport, first: str, runs: list[tuple[int, int]]
) -> None:
    session_id, key = service.start()
    exchange = begin(service, Exchange(key, max_tokens=9))
    transport.asked[0].say(first, "abort")
    assert exchange.status == 0 and service.chats.in_flight == 1
    service.state.set_version(5)
    transport.later = [said("llo")]
    finish(exchange.rest)
    assert exchange.text == f"{first}llo" and not exchange.faults
    question = transport.asked[1].question
    assert question["input_ids"] == [*map(ord, f"user:hi\n{first}")]
    assert question["sampling_params"]["max_new_tokens"] == 9 - len(first)
    assert recorded(service, session_id) == [(0, 8, len(first) + 4, runs)]


def test_a_busy_index_is_waited_for(
    service: Service, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, key = service.start()
    by_key, tries = service.store.by_key, 0

    def busy(api_key: str) -> Any:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise IndexBusy
        return by_key(api_key)

    monkeypatch.setattr(service.store, "by_key", busy)
    transport.later = [said("hello")]
    exchange = Exchange(key)
    finish(service.routes(exchange))
    assert exchange.text == "hello" and tries == 4 and len(recorded(service, session_id)) == 1


@pytest.mark.parametrize("how", ["gone", "an equal key"])
def test_a_twin_in_flight_is_waited_for(service: Service, transport: Transport, how: str) -> None:
    session_id, key = service.start()
    more = {"idempotency": "a"} if how == "an equal key" else {}
    first, other = begin(service, Exchange(key, **more)), begin(service, Exchange(key, seed=2))
    first.gone = how == "gone"

    respond = first.respond

    def responding(*args: Any, **options: Any) -> None:
        respond(*args, **options)
        first.sent(False)

    first.respond = responding  # type: ignore[method-assign]
    repeat = Exchange(key, **more)
    pending = service.routes(repeat)
    if how == "an equal key":
        other_repeat = service.routes(Exchange(key, idempotency="b"))
        assert other_repeat is None, "another key is another request"

    async def main() -> None:
        assert pending is not None
        waiting = asyncio.ensure_future(pending)
        await asyncio.sleep(0)
        assert not waiting.done()
        for asked in transport.asked:
            asked.say("hello")
        await waiting

    asyncio.run(main())
    assert repeat.json["id"] == first.json["id"] != other.json["id"]
    assert len(recorded(service, session_id)) == len(transport.asked)


def test_a_lost_reply_is_told_again(service: Service, transport: Transport) -> None:
    session_id, key = service.start()
    first = begin(service, Exchange(key))
    transport.asked[0].say("hello")
    first.sent(False)
    again = Exchange(key)
    finish(service.routes(again))
    assert again.json["id"] == first.json["id"] and again.text == "hello"
    assert len(transport.asked) == len(recorded(service, session_id)) == 1


def test_a_deferred_answer_is_counted_when_it_is_given(service: Service, transport: Transport) -> None:
    _, key = service.start()
    arena = service.store.arena
    before = arena.counters()

    def counted() -> list[int]:
        """What the route's counters have gained."""
        first = base("chat")
        gained = [now - then for now, then in zip(arena.counters(), before, strict=True)]
        return gained[first : first + SIZE]

    times = iter([100, 350])
    exchange = Exchange(key)
    assert Metered(service.routes, arena, lambda: next(times))(exchange) is None  # type: ignore[arg-type]
    assert not any(counted())
    transport.asked[0].say("hello")
    exchange.done()
    assert sorted(filter(None, counted())) == [1, 1, 250]
