"""OpenAI chat completions as a reader sees them: whole, and put together from the chunks of a stream.

Other agent APIs (anthropic.py, responses.py) are served by translation: their request becomes the body of an
OpenAI chat, the chat is answered as any other, and its answer is translated back. So what the template sees,
what is recorded and when is one and the same by construction, for external models too, whose chunks may cut
a call's arguments anywhere or carry no usage. Here is what those translations share.

Invariant: `StreamReader` hands on every character of content and arguments once, in order; the parts it
names never interleave (a new call ends the one before). Pure: no I/O, no clock.
Source: OpenAI's API reference, "Chat Completions" and "Streaming".
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from areal_fast.protocol.chat import INVALID_JSON, BadChat

T = TypeVar("T")


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(msgspec.Struct):
    """A completion or a chunk."""

    id: str = ""
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Completion)


class Unreadable(ValueError):
    """An answer that is no chat completion (an external model's)."""


class Call(NamedTuple):
    """A tool call, or the beginning of one."""

    id: str
    name: str
    arguments: str
    """JSON text."""


class Completion(NamedTuple):
    """A whole answer."""

    id: str
    content: str
    calls: list[Call]
    finish_reason: str
    usage: Usage


def read_completion(body: bytes) -> Completion:
    """Raises Unreadable."""
    found = _read(body)
    if not found.choices or found.choices[0].message is None:
        raise Unreadable("the answer is no chat completion")
    choice = found.choices[0]
    message = choice.message or _Message()
    calls = [
        Call(call.id or "", call.function.name or "", call.function.arguments or "")
        for call in message.tool_calls or ()
        if call.function is not None
    ]
    content = (message.content or "") + (message.refusal or "")
    reason = _reason(choice.finish_reason or "stop", bool(calls))
    return Completion(found.id, content, calls, reason, found.usage or Usage())


def _reason(finish_reason: str, called: bool) -> str:
    """Some providers end an answer with calls by "stop"."""
    return "tool_calls" if called and finish_reason == "stop" else finish_reason


def _read(body: bytes) -> _Completion:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Unreadable(f"the answer is no chat completion: {error}") from error


class Teller(Protocol):
    """What a StreamReader tells; each returns the bytes that the client is to be sent."""

    def begin(self, interaction_id: str) -> bytes: ...
    def text(self, piece: str) -> bytes: ...
    def call(self, call: Call) -> bytes:
        """A new call; its arguments follow."""
        ...

    def arguments(self, piece: str) -> bytes: ...
    def end(self, finish_reason: str, usage: Usage) -> bytes: ...
    def failed(self, message: str) -> bytes:
        """The stream breaks off."""
        ...


class StreamReader:
    """The events of a streamed chat, told to a Teller. Feed it the data of each event, then `finish`."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self._begun = False
        self._over = False
        self._open: tuple[int, str] | None = None  # index and id of the call whose arguments come
        self._called = False
        self._reason = ""
        self._usage = Usage()

    def feed(self, data: bytes) -> bytes:
        """One event's data. Nothing more is told after a failure."""
        if self._over:
            return b""
        if data.strip() == b"[DONE]":
            return self.finish()
        try:
            chunk = _read(data)
        except Unreadable as error:
            return self._fail(str(error))
        if chunk.error is not None:
            return self._fail(message_of(chunk.error))
        told = self._begin(chunk.id)
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices[:1]:
            if choice.delta is not None:
                told += self._delta(choice.delta)
            self._reason = choice.finish_reason or self._reason
        return told

    def finish(self) -> bytes:
        """The stream has ended; without a finish_reason it broke off."""
        if self._over:
            return b""
        if not self._reason:
            return self._fail("the stream ended before the answer did")
        self._over = True
        return self._teller.end(_reason(self._reason, self._called), self._usage)

    def _begin(self, interaction_id: str) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return self._teller.begin(interaction_id)

    def _delta(self, delta: _Message) -> bytes:
        told = b""
        if delta.content or delta.refusal:
            self._open = None
            told = self._teller.text((delta.content or "") + (delta.refusal or ""))
        for call in delta.tool_calls or ():
            function = call.function or _Function()
            if self._is_new(call):
                self._open, self._called = (call.index, call.id or ""), True
                told += self._teller.call(Call(call.id or "", function.name or "", ""))
            if function.arguments:
                told += self._teller.arguments(function.arguments)
        return told

    def _is_new(self, call: _Call) -> bool:
        """By its index; some providers number all calls 0 and tell them apart by id."""
        return self._open is None or call.index != self._open[0] or (call.id or "") not in ("", self._open[1])

    def _fail(self, message: str) -> bytes:
        told = self._begin("")
        self._over = True
        return told + self._teller.failed(message)


def message_of(error: Any) -> str:
    """The text of an error, in whichever of the usual forms it came."""
    if isinstance(error, dict):
        for name in ("message", "detail", "error"):
            if error.get(name):
                return message_of(error[name])
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False, default=str)


def error_message(body: bytes) -> str:
    """The text of an error reply's body."""
    try:
        return message_of(msgspec.json.decode(body))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return body.decode("utf-8", "replace")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A typed request body. Raises BadChat (400) that says what is wrong and where."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadChat(str(error)) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadChat(INVALID_JSON) from error


def spelled(value: Any) -> str:
    """Tool-call arguments as JSON text, spelled as the parsers of engine/tools spell them: what a client read
    as an object and sends back is the text that it was."""
    return json.dumps(value, ensure_ascii=False)


def text_or_parts(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Content of a chat message: text alone is one string (joined as templates write text parts, with nothing
    between), for many templates take no list; with an image it stays a list of parts."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def set_given(chat: dict[str, Any], **members: Any) -> None:
    """Set the members that are given (not None)."""
    chat.update({name: value for name, value in members.items() if value is not None})
