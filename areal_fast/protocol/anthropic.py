"""Anthropic's Messages API, translated to an OpenAI chat and back.

`chat_of` turns the body of POST /v1/messages into the body of the chat that an OpenAI client would have sent
for the same conversation; `reply` and `Events` turn that chat's answer into a message and into a stream's
events. What an agent got as blocks and sends back becomes the chat message that it was: text and tool_use of
one turn are one assistant message, arguments are spelled as before, so the template sees the same text.

Rules. Text blocks of one message are joined with nothing between. A tool_result is a message of role "tool";
those of one user message come before its text, in order; `is_error` has no counterpart and is left out.
Thinking blocks are dropped (ours never holds any: reasoning stays in the text). Unknown members are
ignored, top_k and cache_control among them; members of our own chat (seed, store, chat_template_kwargs,
max_total_tokens, frequency_penalty) pass through. Server tools, documents and other blocks that cannot be
told to a chat are 400. `max_tokens` is required, as by Anthropic. The message's id is the interaction's id.

stop_reason: stop is end_turn, or stop_sequence if the text holds one that was asked for (the text is not cut:
it is what was recorded); length is max_tokens, tool_calls is tool_use. A stream knows the prompt's size only
at its end: message_start says 0 input tokens, message_delta the truth.

Pure: no I/O, no clock. Source: Anthropic's API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from areal_fast.protocol.chat import BadChat
from areal_fast.protocol.completions import (
    Call,
    Completion,
    Usage,
    decode_body,
    set_given,
    spelled,
    text_or_parts,
)

_encode = msgspec.json.Encoder().encode
Block = dict[str, Any]

_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_ERRORS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


class _Message(msgspec.Struct):
    role: str
    content: str | list[Block]


class _Tool(msgspec.Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str | None = None


class _Counted(msgspec.Struct, kw_only=True):
    """What a request for the number of tokens holds."""

    messages: list[_Message]
    model: str = ""
    system: str | list[Block] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Request(_Counted, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    seed: int | None = None
    store: bool | None = None
    frequency_penalty: float | None = None
    max_total_tokens: int | None = None


_requests = msgspec.json.Decoder(_Request)
_counted = msgspec.json.Decoder(_Counted)


class Asked(msgspec.Struct, frozen=True):
    """A request, translated, and what its answer needs to know of it."""

    chat: bytes
    """The body of an OpenAI chat."""
    model: str
    stream: bool
    stops: tuple[str, ...]


def chat_of(body: bytes) -> Asked:
    """The chat that a Messages request asks for. Raises BadChat (400)."""
    request = decode_body(body, _requests)
    chat = _conversation(request)
    chat["max_tokens"] = request.max_tokens
    set_given(
        chat,
        temperature=request.temperature,
        top_p=request.top_p,
        stop=request.stop_sequences or None,
        seed=request.seed,
        store=request.store,
        frequency_penalty=request.frequency_penalty,
        max_total_tokens=request.max_total_tokens,
    )
    if request.stream:
        chat["stream"] = True
        chat["stream_options"] = {"include_usage": True}
    return Asked(_encode(chat), request.model, bool(request.stream), tuple(request.stop_sequences or ()))


def chat_to_count(body: bytes) -> bytes:
    """The chat whose prompt's tokens a count_tokens request asks for. Raises BadChat (400)."""
    return _encode(_conversation(decode_body(body, _counted)))


def _conversation(request: _Counted) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system, "system")})
    for message in request.messages:
        messages += _messages(message)
    chat: dict[str, Any] = {"model": request.model, "messages": messages}
    if request.tools:
        chat["tools"] = [_tool(tool) for tool in request.tools]
    choice = request.tool_choice
    if choice is not None:
        if choice.type == "tool" and choice.name:
            chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice.type in _CHOICES:
            chat["tool_choice"] = _CHOICES[choice.type]
        else:
            raise BadChat("tool_choice.type must be auto, any, none, or tool with a name")
    set_given(chat, chat_template_kwargs=request.chat_template_kwargs)
    return chat


def _tool(tool: _Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise BadChat(f"tools: {tool.name!r} is not supported: only tools with an input_schema are")
    function: dict[str, Any] = {"name": tool.name}
    set_given(function, description=tool.description)
    function["parameters"] = tool.input_schema
    return {"type": "function", "function": function}


def _messages(message: _Message) -> list[dict[str, Any]]:
    if message.role == "assistant":
        return [_assistant(message.content)]
    if message.role == "system":
        return [{"role": "system", "content": _text(message.content, "messages")}]
    if message.role != "user":
        raise BadChat("messages: role must be user or assistant")
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    results, parts = [], []
    for block in message.content:
        if block.get("type") == "tool_result":
            results.append(_result(block))
        else:
            parts.append(_part(block))
    if parts or not results:
        results.append({"role": "user", "content": text_or_parts(parts)})
    return results


def _assistant(content: str | list[Block]) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    text, calls = "", []
    for block in content:
        kind = block.get("type")
        if kind == "tool_use":
            name, arguments = block.get("name"), block.get("input")
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise BadChat("messages: a tool_use block needs a name and an input object")
            function = {"name": name, "arguments": spelled(arguments)}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):
            text += _text([block], "messages")
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    return message


def _result(block: Block) -> dict[str, Any]:
    content = block.get("content")
    if content is None:
        content = ""
    if isinstance(content, list):
        content = text_or_parts([_part(part) for part in content])
    if not isinstance(content, (str, list)):
        raise BadChat("messages: a tool_result's content must be a string or a list of blocks")
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _part(block: Any) -> Block:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return {"type": "text", "text": _text([block], "messages")}
    source = block.get("source") if kind == "image" else None
    if not isinstance(source, dict):
        raise BadChat(f"messages: a block of type {kind!r} is not supported here")
    url = source.get("url")
    if source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    text = ""
    for block in content:
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise BadChat(f"{where}: a block of type {block.get('type')!r} is not supported here")
        text += block["text"]
    return text


# -- the way back
# ------------------------------------------------------------------------------------------------


def error(status: int, message: str) -> bytes:
    """The body of a refusal."""
    kind = _ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return _encode({"type": "error", "error": {"type": kind, "message": message}})


def reply(completion: Completion, asked: Asked) -> bytes:
    """The message that a whole chat completion is."""
    blocks: list[Block] = []
    if completion.content:
        blocks.append({"type": "text", "text": completion.content})
    for call in completion.calls:
        arguments = _object(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    reason, stop = _stop(completion.finish_reason, completion.content, asked.stops)
    message = _blank(completion.id, asked.model)
    message.update(content=blocks, stop_reason=reason, stop_sequence=stop, usage=_usage(completion.usage))
    return _encode(message)


def _blank(interaction_id: str, model: str) -> dict[str, Any]:
    return {
        "id": interaction_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def _object(arguments: str) -> Any:
    """Arguments as an object. Those that are none (a model may write anything) under one name."""
    try:
        value = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        value = arguments
    return msgspec.Raw(arguments.encode() or b"{}") if isinstance(value, dict) else {"arguments": value}


def _stop(reason: str, text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    if reason == "stop" and (stop := _found(text, stops)) is not None:
        return "stop_sequence", stop
    return _REASONS.get(reason, "end_turn"), None


def _found(text: str, stops: tuple[str, ...]) -> str | None:
    """The stop sequence that begins first in the text."""
    return min((stop for stop in stops if stop and stop in text), key=text.find, default=None)


class Events:
    """The events of a streamed message (a Teller)."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._index = -1
        self._open = ""
        self._tail = ""  # the last text, as far as it can hold a stop sequence
        self._longest = max(map(len, asked.stops), default=0)
        self._stop: str | None = None

    def begin(self, interaction_id: str) -> bytes:
        return _event("message_start", message=_blank(interaction_id, self._asked.model))

    def text(self, piece: str) -> bytes:
        if self._longest:
            self._tail += piece
            self._stop = self._stop or _found(self._tail, self._asked.stops)
            self._tail = self._tail[-self._longest :]
        opened = self._block("text", {"type": "text", "text": ""}) if self._open != "text" else b""
        return opened + self._delta({"type": "text_delta", "text": piece})

    def call(self, call: Call) -> bytes:
        return self._block("call", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})

    def arguments(self, piece: str) -> bytes:
        return self._delta({"type": "input_json_delta", "partial_json": piece})

    def end(self, finish_reason: str, usage: Usage) -> bytes:
        reason, stop = _REASONS.get(finish_reason, "end_turn"), None
        if finish_reason == "stop" and self._stop is not None:
            reason, stop = "stop_sequence", self._stop
        delta = {"stop_reason": reason, "stop_sequence": stop}
        last = _event("message_delta", delta=delta, usage=_usage(usage))
        return self._close() + last + _event("message_stop")

    def failed(self, message: str) -> bytes:
        return _event("error", error={"type": "api_error", "message": message})

    def _block(self, kind: str, block: Block) -> bytes:
        closed = self._close()
        self._index += 1
        self._open = kind
        return closed + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: Block) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open = ""
        return _event("content_block_stop", index=self._index)


def _event(kind: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **members}))
