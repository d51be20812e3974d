"""One worker's worth of service over a model arena."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from areal_fast.engine.tools import ToolParsing
from areal_fast.service.agents import AgentApis
from areal_fast.service.auth import Keys
from areal_fast.service.chat import Chats
from areal_fast.service.control import Control
from areal_fast.service.external import Externals
from areal_fast.service.health import Health
from areal_fast.service.log import Log
from areal_fast.service.routes import Routes
from areal_fast.service.words import SharedState
from areal_fast.store import SessionStore
from tests.unit.service.fakes import FakeEngine, FakeExchange, ModelArena, WordTokenizer, run

ADMIN = "admin-kéy"


class Service(SimpleNamespace):
    """`ask` sends one request and returns the exchange; the rest are the parts."""

    store: SessionStore
    engine: FakeEngine
    ask: Callable[..., FakeExchange]

    def start(self, task: str = "t", **fields: Any) -> tuple[str, str]:
        """A new session: (id, key)."""
        exchange = self.ask("POST", "/rl/start_session", {"task_id": task, **fields}, key=ADMIN)
        assert exchange.status == 201
        return exchange.json["session_id"], exchange.json["api_key"]

    def chat(self, key: str | None, text: str = "hi", **fields: Any) -> FakeExchange:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return self.ask("POST", "/chat/completions", body, key=key)


@pytest.fixture
def service() -> Service:
    arena = ModelArena.create(64 << 20)
    arena.proc_enter(1)
    store = SessionStore(arena, serving_addr="10.0.0.1:8082")
    state = SharedState(arena)
    keys = Keys(ADMIN)
    log = Log("test", "critical")
    engine = FakeEngine()
    engines = SimpleNamespace(current=engine, address=engine.address)
    changes: list[dict[str, Any]] = []

    class Changes:
        confirmed = True

        async def change(self, values: dict[str, Any]) -> bool:
            changes.append(values)
            if self.confirmed and "external_models" in values:
                known.update(values["external_models"])
                externals.use({name: model for name, model in known.items() if model is not None})
            return self.confirmed

    shared = Changes()
    known: dict[str, Any] = {}
    externals = Externals(log, 5.0, arena.count)
    health = Health(store, state, engines, 0.0)  # type: ignore[arg-type]
    chats = Chats(
        store,
        keys,
        WordTokenizer(),
        lambda: engines.current,  # type: ignore[arg-type]
        log,
        externals,
        tools=ToolParsing("qwen", "qwen3"),
    )
    control = Control(state, engines, shared, keys, externals)  # type: ignore[arg-type]
    agents = AgentApis(chats, externals, "a-model", 1.0)
    routes = Routes(store, store.shards, chats, control, health, keys, log, more=agents.table())

    def ask(method: str, path: str, body: Any = b"", **options: Any) -> FakeExchange:
        exchange = FakeExchange(method, path, body, **options)
        run(routes(exchange))  # type: ignore[arg-type]
        assert exchange.status, "no answer"
        return exchange

    return Service(
        store=store,
        state=state,
        engine=engine,
        engines=engines,
        changes=changes,
        externals=externals,
        shared=shared,
        health=health,
        chats=chats,
        routes=routes,
        ask=ask,
    )
