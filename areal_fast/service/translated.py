"""A chat asked in another API's words: an exchange that a chat is served on, and that answers in that API.

The chat turn (chat.py) and external models see an Exchange whose body is an OpenAI chat and whose
Authorization may come from x-api-key; what they answer with, whole or as a stream, is translated on its way.
Nothing is held back beyond what an event needs, and nothing leaves earlier than it is written; so what is
committed before which byte stays as it is for a chat.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from areal_fast.engine.sse import EventSplitter, EventTooLong
from areal_fast.protocol.completions import (
    Completion,
    StreamReader,
    Teller,
    Unreadable,
    error_message,
    read_completion,
)

if TYPE_CHECKING:
    from areal_fast.http import Exchange

EVENT_STREAM = b"text/event-stream; charset=utf-8"
API_KEY = b"x-api-key"
AUTHORIZATION = b"authorization"


class Language(Protocol):
    """How one request's answers are said."""

    def whole(self, completion: Completion) -> bytes: ...
    def stream(self) -> Teller: ...
    def refusal(self, status: int, message: str) -> bytes: ...


class KeyHeaders:
    """A request's headers, x-api-key standing for a missing Authorization. Headers of the other API do not go
    on to an external model."""

    def __init__(self, exchange: Exchange) -> None:
        self._headers = exchange.headers
        key = exchange.headers.get(API_KEY)
        self._authorization = exchange.headers.get(AUTHORIZATION) or (
            None if key is None else b"Bearer " + key
        )

    def get(self, name: bytes) -> bytes | None:
        return self._authorization if name == AUTHORIZATION else self._headers.get(name)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return (pair for pair in self._headers if not pair[0].startswith(b"anthropic-"))


class Translated:
    """The part of an Exchange that serving a chat needs."""

    def __init__(self, exchange: Exchange, body: bytes, language: Language) -> None:
        self._exchange = exchange
        self._language = language
        self._reader: StreamReader | None = None
        self._splitter = EventSplitter()
        self.body = body
        self.headers = KeyHeaders(exchange)
        self.method = exchange.method
        self.path = exchange.path
        self.query = exchange.query
        self.peer = exchange.peer

    @property
    def started(self) -> bool:
        return self._exchange.started

    @property
    def finished(self) -> bool:
        return self._exchange.finished

    @property
    def gone(self) -> bool:
        return self._exchange.gone

    @property
    def input_ended(self) -> bool:
        return self._exchange.input_ended

    def defer(self) -> None:
        self._exchange.defer()

    def go_on(self, pending: Awaitable[None]) -> None:
        self._exchange.go_on(pending)

    def fault(self, error: Exception) -> None:
        self._exchange.fault(error)

    def on_sent(self, callback: Callable[[bool], None]) -> None:
        self._exchange.on_sent(callback)

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: bytes = b"application/json",
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        if 200 <= status < 300:
            try:
                answer = self._language.whole(read_completion(body))
            except Unreadable as error:
                status, answer = 502, self._language.refusal(502, str(error))
        else:
            answer = self._language.refusal(status, error_message(body))
        self._exchange.respond(status, answer, headers=headers)

    def start(self, status: int, content_type: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._reader = StreamReader(self._language.stream())
        self._exchange.start(status, EVENT_STREAM, headers)

    def write(self, data: bytes) -> None:
        assert self._reader is not None
        try:
            events = self._splitter.feed(data)
        except EventTooLong as error:
            events = [b'{"error":"%b"}' % str(error).encode()]
        told = b"".join(map(self._reader.feed, events))
        if told:
            self._exchange.write(told)

    async def drain(self) -> None:
        await self._exchange.drain()

    def finish(self) -> None:
        assert self._reader is not None
        told = b"".join(map(self._reader.feed, self._splitter.finish())) + self._reader.finish()
        if told:
            self._exchange.write(told)
        self._exchange.finish()

    def fail(self) -> None:
        self._exchange.fail()
