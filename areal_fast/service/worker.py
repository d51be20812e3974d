"""A worker: one loop that serves requests of any session over the inherited socket.

It keeps no session truth in its heap; whatever it holds in the arena is found and swept if it dies. Its
heartbeat comes from the loop, so a hung loop is a silent one. It imports no torch and no transformers, opens
no device, and never blocks its loop on purpose.

Life: attach, load the tokenizer, take pending messages of the control line, listen, say ready. Then serve
until told to drain: stop accepting, let requests in flight end (those too whose client has gone), exit 0.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections import deque
from typing import Any

import uvloop

from areal_fast.core import CoreError
from areal_fast.engine.sampling import MAX_TOTAL_TOKENS
from areal_fast.engine.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from areal_fast.engine.tools import ParserMissing, ToolParsing
from areal_fast.http import Exchange, Limits, Server
from areal_fast.protocol.records import NO_COURIER
from areal_fast.service import child, openapi
from areal_fast.service.admin import Admin
from areal_fast.service.agents import AgentApis
from areal_fast.service.answers import respond_json
from areal_fast.service.auth import Keys
from areal_fast.service.chat import Chats
from areal_fast.service.child import HEARTBEAT_S, Child
from areal_fast.service.control import Control, Engines, Shared
from areal_fast.service.external import Externals
from areal_fast.service.gpu import GpuShards
from areal_fast.service.health import Health
from areal_fast.service.local import LocalServer
from areal_fast.service.log import RANKS, Log
from areal_fast.service.meters import Metered, Sums
from areal_fast.service.metrics import Metrics
from areal_fast.service.routes import Routes
from areal_fast.service.words import SharedState
from areal_fast.shards import raw
from areal_fast.store import SessionStore
from areal_fast.store.callbacks import courier_of

DRAIN_POLL_S = 0.02
BEATS_PER_SCAN = 4
"""So often all sessions' deadlines are looked at, for those that a dead worker had set."""

BODIES_BYTES = 256 << 20
"""What all request bodies in one worker may hold together, or one largest body if that is more."""
MAX_CONNECTIONS = 16384
OWN_DESCRIPTORS = 64
GC_THRESHOLDS = (2_000, 5, 100)
"""New objects before the youngest are looked at; then so many of each before the next older are."""


def raise_descriptor_limit() -> int:
    """Use as many descriptors as this process may. Returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def room_for_connections(descriptors: int) -> int:
    """Clients at a time, so that descriptors remain for the engine, whose calls need one each, and for
    ourselves: accepting until none is left would fail the requests of those who are in."""
    return max(8, min(MAX_CONNECTIONS, descriptors - max(OWN_DESCRIPTORS, descriptors // 4)))


def settle_garbage_collector() -> None:
    """What exists now lives as long as the process: never look at it again. And look at all that came later
    less often: the folds of sessions are long-lived and hold no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class Worker:
    """Everything a worker is made of. `run` returns when it has drained."""

    def __init__(self, me: Child, tokenizer: Tokenizer | None, tools: ToolParsing | None) -> None:
        settings = me.settings
        self._me = me
        self.state = SharedState(me.arena)
        self.store = SessionStore(
            me.arena,
            finish_timeout_s=settings.set_reward_finish_timeout_s,
            serving_addr=settings.serving_addr,
            note_members=settings.deterministic_sampling,
            courier=courier_of(me.arena) if settings.callback_server_addr else NO_COURIER,
        )
        self.store.ready_events = deque(maxlen=0)  # nobody here reads them
        self._beats = 0
        self.sums = Sums(me.arena)
        self.engines = Engines(settings, self.state, self.sums.watch)
        self.externals = Externals(me.log, settings.request_timeout_s, me.arena.count)
        self.shared = Shared(me.send, self._apply)
        self.gpu = GpuShards(me.send, self.store.shards)
        keys = Keys(settings.admin_api_key)
        self.health = Health(self.store, self.state, self.engines, time.time())
        v2 = settings.areal_dialect == "v2"
        self.chats = Chats(
            self.store,
            keys,
            tokenizer,
            lambda: self.engines.current,
            me.log,
            self.externals,
            engine_max_tokens=settings.engine_max_tokens,
            max_total_tokens=(v2 and settings.engine_max_tokens) or MAX_TOTAL_TOKENS,
            concat=settings.chat_template_type == "concat",
            tools=tools,
            object_arguments=v2,
            deterministic=settings.deterministic_sampling,
        )
        self.store.shards.holder_pid = me.boot.supervisor_pid
        self.local = LocalServer(
            me,
            self.store.shards,
            self.gpu,
            socket.socket(fileno=me.boot.local_fd),
            settings.admin_api_key if settings.data_auth else "",
        )
        metrics = Metrics(
            me.arena, self.state, lambda: self.health.board, time.time(), lambda: self.sums.carry(self.server)
        )
        model = os.path.basename(settings.tokenizer_path.rstrip("/")) if settings.has_engine else ""
        agents = AgentApis(self.chats, self.externals, model, time.time())
        routes = Routes(
            self.store,
            self.store.shards,
            self.chats,
            Control(
                self.state,
                self.engines,
                self.shared,
                keys,
                self.externals,
                admin_registers=v2,
            ),
            self.health,
            keys,
            me.log,
            dialect=settings.areal_dialect,  # type: ignore[arg-type]
            data_auth=settings.data_auth,
            concat=settings.chat_template_type == "concat",
            gpu=self.gpu,
            more={
                **agents.table(),
                "/metrics": {"GET": metrics.serve},
                "/admin/sessions": {"GET": Admin(self.store, keys).sessions},
                "/data/ways": {"GET": self._ways},
                "/openapi.json": {"GET": openapi.serve},
            },
        )
        limits = Limits(
            max_body_bytes=settings.max_body_bytes,
            max_bodies_bytes=max(settings.max_body_bytes, BODIES_BYTES),
            max_connections=room_for_connections(raise_descriptor_limit()),
        )
        self.server = Server(
            Metered(routes, me.arena),
            limits,
            on_error=self._fault,
            sinks=routes.sink,
            streamed=routes.streamed_bytes,
        )
        self._listener = socket.socket(fileno=me.boot.listen_fd)
        self._drained = asyncio.Event()
        self._drain_until = 0.0
        self._draining: asyncio.Task[None] | None = None

    def _ways(self, exchange: Exchange) -> None:
        """GET /data/ways: how shards can travel here. A client on this host finds out so by trying."""
        respond_json(exchange, {"raw": raw.MEDIA_TYPE, "local": self.local.info()})

    def _apply(self, values: dict[str, Any]) -> None:
        if "backend_addr" in values:
            self.engines.use(values["backend_addr"])
        if "external_models" in values:
            self.externals.use(values["external_models"])

    def _fault(self, where: str, error: Exception) -> None:
        self._me.log.error("fault", where=where, error=repr(error))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.engines.use(self._me.settings.backend_addr)
        self.externals.use(self._me.settings.external_models)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._me.note_signal)
        if self._me.settings.callback_server_addr:
            from areal_fast.service.callbacks import Callbacks  # aiohttp, only where it is needed

            settings = self._me.settings
            Callbacks(self.store, self._me.log, settings.callback_server_addr, settings.admin_api_key).start()
        self._hear()
        loop.add_reader(self._me.control.fileno(), self._hear)
        self._beat()
        self.local.start()
        await self.server.serve(self._listener)
        self._me.send({"is": "ready"})
        await self._drained.wait()

    def _beat(self) -> None:
        """Once in HEARTBEAT_S: say that the loop runs, and what is due."""
        self._me.arena.heartbeat()
        self.health.expire()
        self.sums.carry(self.server)
        self.local.hold.flush()
        self._beats += 1
        scan = self.store.finish_timeout_ns > 0 and self._beats % BEATS_PER_SCAN == 0
        try:
            self.store.fire_due(self.store.now_ns(), scan=scan)
        except CoreError as error:
            self._me.log.warning("delayed_reward_waits", error=repr(error))
        asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    def _hear(self) -> None:
        while (message := self._me.receive()) is not None:
            what = message["do"]
            if what == "board":
                self.health.board = message["board"]
                self.health.expire()
            elif what == "held":
                self.local.hold.heard(message)
            elif what == "drain":
                self._drain_until = time.monotonic() + message["seconds"]
                if self._draining is None:
                    self._draining = asyncio.get_running_loop().create_task(self._drain())
            elif what in ("keeper", "keepers"):
                self.gpu.heard(message)
            else:
                self.shared.heard(message)

    async def _drain(self) -> None:
        """Stop accepting, wait for what is in flight until `_drain_until` (which may move closer), end."""
        self.local.stop()
        self.server.stop_accepting()
        self._listener.close()
        waiting = asyncio.get_running_loop().create_task(self._idle())
        while not waiting.done() and (left := self._drain_until - time.monotonic()) > 0:
            await asyncio.wait([waiting], timeout=min(left, 0.1))
        self.sums.carry(self.server)
        self._me.send({"is": "drained", "unfinished": 0 if waiting.done() else max(1, self.chats.in_flight)})
        self._drained.set()

    async def _idle(self) -> None:
        await self.server.drain(3600.0)
        while self.chats.in_flight:
            await asyncio.sleep(DRAIN_POLL_S)


def _tokenizer(me: Child) -> Tokenizer | None:
    settings = me.settings
    if not settings.has_engine:
        return None
    try:
        return load_tokenizer(settings.tokenizer_path, trust_remote_code=settings.trust_remote_code)
    except (TokenizerError, OSError, ValueError) as error:
        line = " ".join(str(error).split())
        me.fatal(f"cannot load the tokenizer {settings.tokenizer_path!r}: {line}")


def _tools(me: Child) -> ToolParsing | None:
    settings = me.settings
    if not settings.has_engine:
        return None
    try:
        return ToolParsing(
            settings.tool_call_parser, settings.reasoning_parser, tokenizer_path=settings.tokenizer_path
        )
    except ParserMissing as error:
        me.fatal(str(error))


class _ToLog(logging.Handler):
    """What the layers below say through `logging`, as lines of our log."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        self._log.emit(level if level in RANKS else "warning", "message", {"text": record.getMessage()})


def main() -> None:
    me = child.start()
    logging.getLogger("areal_fast").addHandler(_ToLog(me.log))
    tokenizer, tools = _tokenizer(me), _tools(me)

    async def live() -> None:
        worker = Worker(me, tokenizer, tools)
        settle_garbage_collector()
        await worker.run()

    uvloop.run(live())
    sys.stderr.flush()
    os._exit(0)  # nothing may keep a drained worker: not a thread, not a connection that nobody reads


if __name__ == "__main__":
    main()
