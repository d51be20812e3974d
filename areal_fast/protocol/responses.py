"""OpenAI's Responses API, translated to an OpenAI chat and back.

`chat_of` turns the body of POST /v1/responses into the body of the chat that the same conversation is;
`reply` and `Events` turn that chat's answer into a response and into a stream's events.

Rules. `instructions` and the roles system and developer are system messages. Text parts of one message are
joined with nothing between. An assistant message and the function_call items behind it are one chat message,
as the chat's answer was; a function_call_output is a message of role "tool". Reasoning items are dropped
(ours never holds any: reasoning stays in the text). Tools are the flat function form; `strict` goes along if
it is given. Stateless: previous_response_id, conversation, item references, background and stored prompts are
400, as are tools that are no functions. `store` means another thing here than in a chat (to keep the response
at OpenAI) and is ignored, as the original does; so are include, reasoning and all other unknown members.
Members of our own chat (seed, stop, chat_template_kwargs, max_total_tokens, frequency_penalty) pass through.
The response's id is the interaction's id. An answer cut by its budget is `incomplete`, `max_output_tokens`.

Output: one message item if there is text, or nothing else, then one function_call item a call.

Pure: no I/O; the time is an argument. Source: OpenAI's API reference, "Responses" and "Streaming events"; how
the original converts: areal.experimental.openai.client (AsyncResponsesWithReward).
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
    text_or_parts,
)

_encode = msgspec.json.Encoder().encode
Item = dict[str, Any]

_ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_STATEFUL: Final = ("previous_response_id", "conversation", "prompt")


class _Request(msgspec.Struct, kw_only=True):
    input: str | list[Item] | None = None
    model: str | None = None
    instructions: str | None = None
    tools: list[Item] | None = None
    tool_choice: str | Item | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: Item | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    max_total_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_requests = msgspec.json.Decoder(_Request)


class Asked(msgspec.Struct, frozen=True):
    """A request, translated, and what its answer repeats of it."""

    chat: bytes
    """The body of an OpenAI chat."""
    stream: bool
    fields: dict[str, Any]


def chat_of(body: bytes) -> Asked:
    """The chat that a Responses request asks for. Raises BadChat (400)."""
    request = decode_body(body, _requests)
    for name in _STATEFUL:
        if getattr(request, name) is not None:
            raise BadChat(f"{name} is not supported: nothing is kept between requests, send the whole input")
    if request.background:
        raise BadChat("background is not supported")
    if request.input is None:
        raise BadChat("input is required")
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        for item in request.input:
            _add(messages, item)
    chat: dict[str, Any] = {"messages": messages}
    if request.tools:
        chat["tools"] = [_tool(tool) for tool in request.tools]
    set_given(
        chat,
        model=request.model,
        tool_choice=_choice(request.tool_choice),
        response_format=_format(request.text),
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=request.stop,
        frequency_penalty=request.frequency_penalty,
        max_total_tokens=request.max_total_tokens,
        chat_template_kwargs=request.chat_template_kwargs,
        metadata=request.metadata,
    )
    if request.tools:
        set_given(chat, parallel_tool_calls=request.parallel_tool_calls)
    if request.stream:
        chat["stream"] = True
        chat["stream_options"] = {"include_usage": True}
    return Asked(_encode(chat), bool(request.stream), _fields(request))


def _fields(request: _Request) -> dict[str, Any]:
    """What a response repeats of its request, with the values in force where it named none."""
    return {
        "instructions": request.instructions,
        "metadata": request.metadata or {},
        "model": request.model or "None",
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": request.tools or [],
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "max_output_tokens": request.max_output_tokens,
        "previous_response_id": None,
        "reasoning": None,
        "text": request.text or {"format": {"type": "text"}},
        "truncation": "disabled",
        "store": False,
        "background": False,
        "user": None,
    }


def _add(messages: list[dict[str, Any]], item: Item) -> None:
    """Append what an input item says."""
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        said = item.get("role")
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadChat("input: role must be user, assistant, system or developer")
        messages.append({"role": role, "content": _content(item.get("content"))})
    elif kind == "function_call":
        name, arguments = item.get("name"), item.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise BadChat("input: a function_call needs a name and arguments as text")
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": name, "arguments": arguments}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _content(item.get("output"))
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind != "reasoning":
        raise BadChat(f"input: an item of type {kind!r} is not supported")


def _content(content: Any) -> str | list[Item]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadChat("input: content must be a string or a list of parts")
    return text_or_parts([_part(part) for part in content])


def _part(part: Any) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text", "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise BadChat(f"input: a part of type {kind!r} needs text")
        return {"type": "text", "text": text}
    if kind == "input_image":
        if not isinstance(part.get("image_url"), str):
            raise BadChat("input: an input_image needs an image_url; files are not supported")
        image: Item = {"url": part["image_url"]}
        set_given(image, detail=part.get("detail"))
        return {"type": "image_url", "image_url": image}
    raise BadChat(f"input: a part of type {kind!r} is not supported")


def _tool(tool: Item) -> dict[str, Any]:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise BadChat(f"tools: {tool.get('type')!r} is not supported: only functions with a name are")
    function: dict[str, Any] = {"name": tool["name"]}
    names = ("description", "parameters", "strict")
    set_given(function, **{name: tool.get(name) for name in names})
    return {"type": "function", "function": function}


def _choice(choice: str | Item | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    raise BadChat("tool_choice must be auto, none, required, or a function with a name")


def _format(text: Item | None) -> Any:
    """Of the answer's text, for external models (our engine takes none)."""
    form = text.get("format") if text else None
    if not isinstance(form, dict) or form.get("type") in (None, "text"):
        return None
    if form["type"] != "json_schema":
        return form
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in form.items() if name != "type"},
    }


# -- the way back
# ------------------------------------------------------------------------------------------------


def error(status: int, message: str) -> bytes:
    """The body of a refusal: our own form, and the one that OpenAI's clients read."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    found = {"message": message, "type": kind, "param": None, "code": None}
    return _encode({"detail": message, "error": found})


def reply(completion: Completion, asked: Asked, created: int) -> bytes:
    """The response that a whole chat completion is. `created`: Unix seconds."""
    output: list[Item] = []
    if completion.content or not completion.calls:
        output.append(_message(completion.id, 0, completion.content, "completed"))
    for call in completion.calls:
        output.append(_function_call(completion.id, len(output), call, "completed"))
    return _encode(_ended(completion.id, created, asked, completion.finish_reason, completion.usage, output))


def _ended(
    interaction_id: str, created: int, asked: Asked, reason: str, usage: Usage, output: list[Item]
) -> dict[str, Any]:
    response = _response(interaction_id, created, asked, "completed", output)
    if reason in ("length", "content_filter"):
        cut = "max_output_tokens" if reason == "length" else reason
        response["status"], response["incomplete_details"] = "incomplete", {"reason": cut}
    response["usage"] = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    return response


def _response(
    interaction_id: str, created: int, asked: Asked, status: str, output: list[Item]
) -> dict[str, Any]:
    return {
        "id": interaction_id,
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        **asked.fields,
        "output": output,
        "usage": None,
    }


def _item_id(kind: str, interaction_id: str, index: int) -> str:
    return f"{kind}_{interaction_id.removeprefix('chatcmpl-')}_{index}"


def _message(interaction_id: str, index: int, text: str | None, status: str) -> Item:
    """A message item; text None: without its part."""
    return {
        "id": _item_id("msg", interaction_id, index),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [] if text is None else [_text(text)],
    }


def _text(text: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(interaction_id: str, index: int, call: Call, status: str) -> Item:
    return {
        "id": _item_id("fc", interaction_id, index),
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


class Events:
    """The events of a streamed response (a Teller)."""

    def __init__(self, asked: Asked, created: int) -> None:
        """`created`: Unix seconds."""
        self._asked = asked
        self._created = created
        self._id = ""
        self._number = 0
        self._output: list[Item] = []  # items that are over
        self._item: Item | None = None  # the open one
        self._call: Call | None = None  # of the open item, if it is one
        self._pieces: list[str] = []  # its text or arguments so far

    def begin(self, interaction_id: str) -> bytes:
        self._id = interaction_id
        response = _response(interaction_id, self._created, self._asked, "in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def text(self, piece: str) -> bytes:
        told = b""
        if self._item is None or self._call is not None:
            told = self._close()
            told += self._open(_message(self._id, len(self._output), None, "in_progress"))
            told += self._part("response.content_part.added", part=_text(""))
        self._pieces.append(piece)
        if not piece:
            return told
        return told + self._part("response.output_text.delta", delta=piece, logprobs=[])

    def call(self, call: Call) -> bytes:
        told = self._close()
        self._call = call
        return told + self._open(_function_call(self._id, len(self._output), call, "in_progress"))

    def arguments(self, piece: str) -> bytes:
        self._pieces.append(piece)
        return self._part("response.function_call_arguments.delta", delta=piece)

    def end(self, finish_reason: str, usage: Usage) -> bytes:
        told = b"" if self._item is not None or self._output else self.text("")
        told += self._close()
        response = _ended(self._id, self._created, self._asked, finish_reason, usage, self._output)
        return told + self._event(f"response.{response['status']}", response=response)

    def failed(self, message: str) -> bytes:
        error = {"type": "server_error", "code": "server_error", "message": message, "param": None}
        return self._event("error", code="server_error", message=message, param=None, error=error)

    def _open(self, item: Item) -> bytes:
        self._item, self._pieces = item, []
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _close(self) -> bytes:
        """End the open item, if there is one."""
        if self._item is None:
            return b""
        index, joined = len(self._output), "".join(self._pieces)
        if self._call is None:
            item = _message(self._id, index, joined, "completed")
            told = self._part("response.output_text.done", text=joined, logprobs=[])
            told += self._part("response.content_part.done", part=_text(joined))
        else:
            call = self._call._replace(arguments=joined)
            item = _function_call(self._id, index, call, "completed")
            told = self._part("response.function_call_arguments.done", arguments=joined, name=call.name)
        told += self._event("response.output_item.done", output_index=index, item=item)
        self._output.append(item)
        self._item = self._call = None
        return told

    def _part(self, kind: str, **members: Any) -> bytes:
        """An event about the open item."""
        item_id = self._item["id"] if self._item is not None else ""
        if self._call is None:
            members = {"content_index": 0, **members}
        return self._event(kind, item_id=item_id, output_index=len(self._output), **members)

    def _event(self, kind: str, **members: Any) -> bytes:
        body = _encode({"type": kind, "sequence_number": self._number, **members})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)
