"""External models: chats that somebody else's API answers.

A chat whose `model` names a registered external model is forwarded to that provider and its answer passed
through. What is forwarded is the client's body, byte for byte but for `model`, which is replaced by the
registered one or dropped if that is null; it need not be a chat that our engine would take. Headers go along
but for those that belong to one connection or carry a key: the provider gets its own key, never the client's.

The answer's status, content type and content are the provider's (event streams always name their charset,
which can only be UTF-8, as the original's do). A 2xx answer becomes a string-only
interaction (messages as sent, answer as text), committed before the end of the reply leaves: for an event
stream, before the event that carries a finish_reason. A provider that cannot be reached is 502, one that
breaks off in mid-stream an error event without [DONE], and then nothing is recorded. A client that hangs up
changes nothing.

The provider is reached through aiohttp (TLS, proxies of the environment, compression), by one client session
a worker, made when first needed; it follows no redirects, which could carry a key elsewhere.

Bounded: connections, seconds of silence, bytes of one answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from areal_fast.core import ArenaFull, Gone
from areal_fast.service.answers import ARENA_FULL, refuse
from areal_fast.service.meters import ORPHANED_CHATS, STANDALONE_CHATS, TURNS

if TYPE_CHECKING:
    import aiohttp

    from areal_fast.http import Exchange
    from areal_fast.service.log import Log
    from areal_fast.store import Session, Turn

MAX_CONNECTIONS: Final = 1024
CONNECT_TIMEOUT_S: Final = 30.0
MAX_MODELS_BYTES: Final = 48 << 10
MAX_ANSWER_BYTES: Final = 64 << 20
EXPECTED_ANSWER_BYTES: Final = 64 << 10
BYTES_PER_TOKEN: Final = 8

# Belongs to one connection (RFC 9110 7.6.1), is written anew, or is a key or what could be taken for one.
NOT_FORWARDED: Final = frozenset(
    b"host content-length content-type content-encoding transfer-encoding connection keep-alive te trailer "
    b"upgrade expect proxy-connection proxy-authenticate proxy-authorization accept-encoding "
    b"authorization cookie x-api-key api-key x-goog-api-key".split()
)
PASSED_BACK: Final = ("retry-after",)
EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
STREAM_HEADERS: Final = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
_FINISHES = re.compile(rb'"finish_reason"\s*:\s*"')
_EVENT_END = re.compile(rb"\r?\n\r?\n")


class ExternalModel(msgspec.Struct, frozen=True):
    """Where a registered name leads. model None: the provider is told none."""

    url: str
    model: str | None = None
    api_key: str | None = None


class BadModel(ValueError):
    """400: the registration cannot be used. str() is the detail."""


def read_registration(fields: dict[str, Any]) -> tuple[str, ExternalModel | None]:
    """(name, external model) of a register_model body; None: a model of the engine's, nothing to remember.

    The name is `name` or else `model`; a missing `model` is the name, a null one means none. BadModel."""
    name = fields.get("name") or fields.get("model")
    if not name or not isinstance(name, str):
        raise BadModel("model name is required")
    url, model, api_key = fields.get("url"), fields.get("model", name), fields.get("api_key")
    if not url:
        return name, None
    if not isinstance(url, str) or not _is_url(url):
        raise BadModel("url must be an http:// or https:// URL")
    if model is not None and not isinstance(model, str):
        raise BadModel("model must be a string or null")
    if api_key is not None and (not isinstance(api_key, str) or not api_key.isprintable()):
        raise BadModel("api_key must be a string of printable characters")
    return name, ExternalModel(url.rstrip("/"), model, api_key or None)


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


class ExternalCall(msgspec.Struct):
    """A chat for an external model: what is sent, and what is recorded of it."""

    model: ExternalModel
    body: bytes
    messages: bytes
    store: bool


class _Named(msgspec.Struct):
    model: Any = None


class Externals:
    """The external models known now, and the way to them."""

    def __init__(
        self, log: Log, request_timeout_s: float, count: Callable[[int], None] = lambda counter: None
    ) -> None:
        """`count` adds one to a counter of the arena."""
        self._log = log
        self._count = count
        self._timeout_s = request_timeout_s
        self._models: dict[str, ExternalModel] = {}
        self._client: aiohttp.ClientSession | None = None

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def use(self, models: Mapping[str, Mapping[str, str | None]]) -> None:
        """From now on these are the models, in the form `plain` gives."""
        self._models = {name: msgspec.convert(model, ExternalModel) for name, model in models.items()}

    def room_for(self, name: str, model: ExternalModel) -> bool:
        """Whether all of them, this one included, still fit into one message between processes."""
        everything = {**{n: plain(m) for n, m in self._models.items()}, name: plain(model)}
        return len(msgspec.json.encode(everything)) <= MAX_MODELS_BYTES

    def call_in(self, body: bytes) -> ExternalCall | None:
        """What to forward if `body` names an external model. None if it does not, or cannot be read: then
        reading it as a chat says what is wrong."""
        if not self._models:
            return None
        try:
            name = _named.decode(body).model
            model = self._models.get(name) if isinstance(name, str) else None
            if model is None:
                return None
            fields = _fields.decode(body)
            body.decode()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if model.model is None:
            del fields["model"]
        else:
            fields["model"] = msgspec.Raw(msgspec.json.encode(model.model))
        messages = bytes(fields.get("messages", b"[]"))
        return ExternalCall(
            model,
            msgspec.json.encode(fields),
            b"[]" if messages == b"null" else messages,
            bytes(fields.get("store", b"")) != b"false",
        )

    async def forward(self, exchange: Exchange, call: ExternalCall, session: Session | None) -> None:
        """Answer `exchange` with the provider's answer. ArenaFull (507) before the provider is asked."""
        import aiohttp

        turn = None if session is None else session.begin_turn(reserve_tokens=0, store=call.store)
        try:
            if turn is not None:
                turn.reserve((len(call.messages) + EXPECTED_ANSWER_BYTES) // BYTES_PER_TOKEN)
            try:
                async with self._connect().post(
                    f"{call.model.url}/chat/completions",
                    data=call.body,
                    headers=_headers(exchange, call.model),
                    allow_redirects=False,
                ) as answer:
                    await self._pass_on(exchange, call, turn, answer)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                self._broken(exchange, call, error)
        finally:
            if turn is not None:
                turn.abandon()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _connect(self) -> aiohttp.ClientSession:
        if self._client is None:
            import aiohttp

            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=min(CONNECT_TIMEOUT_S, self._timeout_s),
                    sock_read=self._timeout_s,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=True,
            )
        return self._client

    async def _pass_on(
        self, exchange: Exchange, call: ExternalCall, turn: Turn | None, answer: aiohttp.ClientResponse
    ) -> None:
        kind = _value(answer.headers.get("content-type", "application/json"))
        good = 200 <= answer.status < 300
        if good and kind.lower().startswith(b"text/event-stream"):
            await self._pass_on_stream(exchange, call, turn, answer)
            return
        content = bytearray()
        async for chunk in answer.content.iter_any():
            content += chunk
            _check_size(len(content))
        if good:
            self._commit(turn, call, _text(bytes(content), answer))
        else:
            self._log.warning("external_model_refused", url=call.model.url, status=answer.status)
        back = [(n.encode(), _value(answer.headers[n])) for n in PASSED_BACK if n in answer.headers]
        exchange.respond(answer.status, bytes(content), kind, back)

    async def _pass_on_stream(
        self,
        exchange: Exchange,
        call: ExternalCall,
        turn: Turn | None,
        answer: aiohttp.ClientResponse,
    ) -> None:
        """Whole events as they come; from the one that says how it ended on, only after the commit."""
        content, passed, holding = bytearray(), 0, False
        exchange.start(answer.status, EVENT_STREAM, STREAM_HEADERS)
        async for chunk in answer.content.iter_any():
            searched = max(len(content) - 3, passed)
            content += chunk
            _check_size(len(content))
            for event in _EVENT_END.finditer(content, searched):
                end = event.end()
                holding = holding or _FINISHES.search(content, passed, end) is not None
                if holding:
                    break
                exchange.write(bytes(memoryview(content)[passed:end]))
                passed = end
            await exchange.drain()
        try:
            self._commit(turn, call, _text(bytes(content), answer))
        except ArenaFull:
            exchange.write(_error_event(ARENA_FULL))
        else:
            exchange.write(bytes(memoryview(content)[passed:]))
        exchange.finish()

    def _commit(self, turn: Turn | None, call: ExternalCall, text: str) -> None:
        """COMMIT POINT of an external chat."""
        if turn is None:
            self._count(STANDALONE_CHATS)
            return
        try:
            turn.commit_string(call.messages, text)
        except Gone:
            self._count(ORPHANED_CHATS)
            self._log.info(
                "session_gone_during_chat", session=turn.session_id, interaction=turn.interaction_id
            )
        else:
            self._count(TURNS if turn.ordinal >= 0 else STANDALONE_CHATS)

    def _broken(self, exchange: Exchange, call: ExternalCall, error: Exception) -> None:
        text = str(error) or type(error).__name__
        self._log.warning("external_model_failed", url=call.model.url, error=text)
        if not exchange.started:
            refuse(exchange, 502, f"External API error: {text}")
        elif not exchange.finished:
            exchange.write(_error_event(text))
            exchange.finish()


_named = msgspec.json.Decoder(_Named)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def plain(model: ExternalModel) -> dict[str, str | None]:
    """As it travels to the other workers."""
    return {"url": model.url, "model": model.model, "api_key": model.api_key}


def _headers(exchange: Exchange, model: ExternalModel) -> list[tuple[str, str]]:
    named = {
        name.strip().lower() for name in (exchange.headers.get(b"connection") or b"").split(b",") if name
    }
    sent = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in exchange.headers
        if name not in NOT_FORWARDED and name not in named
    ]
    sent.append(("content-type", "application/json"))
    sent.append(("accept-encoding", "gzip, deflate"))
    if model.api_key is not None:
        sent.append(("authorization", f"Bearer {model.api_key}"))
    return sent


def _value(text: str) -> bytes:
    """A header's value as aiohttp read it, as bytes again."""
    return text.encode("utf-8", "surrogateescape")


def _check_size(nbytes: int) -> None:
    if nbytes > MAX_ANSWER_BYTES:
        raise ValueError(f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")


def _text(content: bytes, answer: aiohttp.ClientResponse) -> str:
    try:
        return content.decode(answer.charset or "utf-8", "replace")
    except LookupError:
        return content.decode("utf-8", "replace")


def _error_event(text: str) -> bytes:
    return b"data: " + msgspec.json.encode({"error": text}) + b"\n\n"
