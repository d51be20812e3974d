"""The control plane: pause, continue, weight version, engine memory, which engine. Effective in every worker.

Version and pause flag are words of the arena: once written, every worker sees them, so the reply may be sent.
A pause marks first (nobody sends a new attempt), then tells the engine (it aborts what runs); if the engine
fails, the mark is taken back and the client gets 502. Continuing is the reverse: the engine first.

The engine's address is text, so it cannot be a word: it goes over the control line to the supervisor, which
hands it to every worker and says so when the last one has taken it (`Shared.change`). New requests use it
from then on, running ones finish on the old engine. External models travel the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from areal_fast.config import is_loopback
from areal_fast.engine.errors import EngineFault
from areal_fast.engine.generate import Engine, adapter_for
from areal_fast.http import Client, parse_base_url
from areal_fast.service.answers import NO_ENGINE, refuse, respond_json
from areal_fast.service.external import BadModel, plain, read_registration

if TYPE_CHECKING:
    from areal_fast.config import Settings
    from areal_fast.http import Exchange
    from areal_fast.service.auth import Keys
    from areal_fast.service.external import Externals
    from areal_fast.service.words import SharedState

MAX_ENGINE_CONNECTIONS = 4096
CONNECT_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 15.0
INT64 = range(-(2**63), 2**63)


class Engines:
    """The engine in force. Replaced as a whole; who has the old one finishes with it."""

    def __init__(
        self, settings: Settings, state: SharedState, watch: Callable[[Client], None] | None = None
    ) -> None:
        """`watch` is told of every client made (who counts its calls)."""
        self._settings = settings
        self._state = state
        self._watch = watch
        self.address = ""
        self.current: Engine | None = None

    def use(self, address: str) -> None:
        """From now on new requests go to `address` ("" for none)."""
        if address == self.address:
            return
        self.address = address
        if not address:
            self.current = None
            return
        client = Client(address, max_connections=MAX_ENGINE_CONNECTIONS, connect_timeout_s=CONNECT_TIMEOUT_S)
        if self._watch is not None:
            self._watch(client)
        self.current = Engine(
            client,
            self._state,
            adapter=adapter_for(self._settings.backend_type),
            request_timeout_s=self._settings.request_timeout_s,
            address=address,
        )


class Shared:
    """Settings that may change while the proxy runs, the same in every worker: the supervisor keeps them.

    `send` puts a message on the control line. A change is done when the supervisor says that every worker
    has it."""

    def __init__(
        self, send: Callable[[dict[str, Any]], bool], apply: Callable[[dict[str, Any]], None]
    ) -> None:
        self._send = send
        self._apply = apply
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._token = 0

    async def change(self, values: dict[str, Any]) -> bool:
        """Make `values` known to every worker; False if that could not be confirmed."""
        self._token += 1
        token, done = self._token, asyncio.get_running_loop().create_future()
        self._waiting[token] = done
        try:
            if not self._send({"is": "change", "token": token, "values": values}):
                return False
            await asyncio.wait_for(done, CHANGE_TIMEOUT_S)
            return True
        except TimeoutError:
            return False
        finally:
            del self._waiting[token]

    def heard(self, message: dict[str, Any]) -> None:
        """{"do": "shared", …}: take the values and say so. {"do": "changed", "token": n}: all have them."""
        if message["do"] == "shared":
            self._apply(message["values"])
            self._send({"is": "applied", "revision": message["revision"]})
        else:
            done = self._waiting.get(message["token"])
            if done is not None and not done.done():
                done.set_result(None)


class Control:
    """The handlers of the control plane's endpoints. admin_registers: register_model wants the admin key from
    everybody (v2), not only from other hosts."""

    def __init__(
        self,
        state: SharedState,
        engines: Engines,
        shared: Shared,
        keys: Keys,
        externals: Externals,
        *,
        admin_registers: bool = False,
    ) -> None:
        self._admin_registers = admin_registers
        self._state = state
        self._engines = engines
        self._shared = shared
        self._keys = keys
        self._externals = externals

    async def pause(self, exchange: Exchange) -> None:
        engine = self._engine_or_503(exchange)
        if engine is None:
            return
        change = self._state.mark(True)
        try:
            await engine.pause()
        except EngineFault as error:
            self._state.take_back(change)
            refuse(exchange, 502, str(error))
            return
        respond_json(exchange, {"status": "ok", "paused": True})

    async def resume(self, exchange: Exchange) -> None:
        engine = self._engine_or_503(exchange)
        if engine is None:
            return
        try:
            await engine.resume()
        except EngineFault as error:
            refuse(exchange, 502, str(error))
            return
        self._state.mark(False)
        respond_json(exchange, {"status": "ok", "paused": False})

    async def release_memory(self, exchange: Exchange) -> None:
        engine = self._engine_or_503(exchange)
        if engine is None:
            return
        try:
            await engine.release_memory()
        except EngineFault as error:
            refuse(exchange, 502, str(error))
            return
        respond_json(exchange, {"status": "ok"})

    async def resume_memory(self, exchange: Exchange) -> None:
        engine = self._engine_or_503(exchange)
        if engine is None:
            return
        tags = None
        if exchange.body:
            fields = _object(exchange.body)
            tags = None if fields is None else fields.get("tags")
            texts = isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)
            if fields is None or not (tags is None or texts):
                refuse(exchange, 400, "Expected a JSON object with an optional list of strings 'tags'")
                return
        try:
            await engine.resume_memory(tags)
        except EngineFault as error:
            refuse(exchange, 502, str(error))
            return
        respond_json(exchange, {"status": "ok"})

    def set_version(self, exchange: Exchange) -> None:
        fields = _object(exchange.body)
        version = None if fields is None else fields.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version not in INT64:
            refuse(exchange, 400, "'version' (int) is required")
            return
        self._state.set_version(version)
        respond_json(exchange, {"status": "ok", "version": version})

    def get_version(self, exchange: Exchange) -> None:
        respond_json(exchange, {"version": self._state.version()})

    async def configure_backend(self, exchange: Exchange) -> None:
        self._keys.require_admin(exchange.headers.get(b"authorization"))
        fields = _object(exchange.body)
        address = None if fields is None else fields.get("backend_addr")
        if not address:
            refuse(exchange, 400, "backend_addr is required")
            return
        if not isinstance(address, str) or not _is_http_url(address):
            refuse(exchange, 400, "backend_addr must be an http:// URL")
            return
        if self._engines.current is None:
            refuse(exchange, 503, NO_ENGINE)
            return
        if not await self._shared.change({"backend_addr": address.rstrip("/")}):
            refuse(exchange, 503, "Not every worker has taken the new backend yet. Try again.")
            return
        respond_json(exchange, {"status": "ok", "backend_addr": address})

    async def register_model(self, exchange: Exchange) -> None:
        """With a URL: an external model, known to every worker before the reply. Without: one of the
        engine's, of which there is nothing to remember, since a chat's `model` is then ignored."""
        authorization = exchange.headers.get(b"authorization")
        everybody = self._admin_registers or not is_loopback(str(exchange.peer[0]))
        if authorization is not None or everybody:
            self._keys.require_admin(authorization)
        fields = _object(exchange.body)
        if fields is None:
            refuse(exchange, 400, "Expected a JSON object")
            return
        try:
            name, model = read_registration(fields)
        except BadModel as error:
            refuse(exchange, 400, str(error))
            return
        if model is not None or name in self._externals.names:
            if model is not None and not self._externals.room_for(name, model):
                refuse(exchange, 507, "There is no room for more external models.")
                return
            if not await self._shared.change({"external_models": {name: model and plain(model)}}):
                refuse(exchange, 503, "Not every worker knows the model yet. Try again.")
                return
        respond_json(exchange, {"status": "ok", "name": name})

    def _engine_or_503(self, exchange: Exchange) -> Engine | None:
        if self._engines.current is None:
            refuse(exchange, 503, NO_ENGINE)
        return self._engines.current


def _object(body: bytes) -> dict[str, Any] | None:
    """The body as a JSON object, or None. Integers beyond 64 bits come as floats and so are no integers."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_http_url(text: str) -> bool:
    """Whether the workers' client can use it: an address that it refuses must not reach them."""
    try:
        parse_base_url(text.rstrip("/"))
    except ValueError:
        return False
    return True
