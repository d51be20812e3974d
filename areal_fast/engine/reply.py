"""What the client of a chat is sent: `chat.completion` and its chunks, as bytes.

Members, their order and the null ones are those that the original's OpenAI models print (transcripts/03),
`model` being the text "None". Everything but id, time, text and counts is constant, so a reply is written
into one buffer (core/_replies.pyx), and an event is a join around one JSON string.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from areal_fast.core._replies import Form
from areal_fast.engine.answer import ToolCall

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
_HOLE = b"\0"
_form = Form(
    *(
        b'{"id":"\0","choices":[{"finish_reason":"\0","index":0,"logprobs":null,"message":{"content":"\0",'
        b'"refusal":null,"role":"assistant","annotations":null,"audio":null,"function_call":null,"tool_calls":\0}}],'
        b'"created":\0,"model":"None","object":"chat.completion","service_tier":null,"system_fingerprint":null,'
        b'"usage":{"completion_tokens":\0,"prompt_tokens":\0,"total_tokens":\0,'
        b'"completion_tokens_details":null,"prompt_tokens_details":null}}'
    ).split(_HOLE)
)


def new_interaction_id() -> str:
    """`chatcmpl-` and 29 random hex digits (116 bits)."""
    return "chatcmpl-" + os.urandom(15).hex()[:29]


def _usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    return (
        b'{"completion_tokens":%d,"prompt_tokens":%d,"total_tokens":%d,'
        b'"completion_tokens_details":null,"prompt_tokens_details":null}'
    ) % (completion_tokens, prompt_tokens, prompt_tokens + completion_tokens)


def _tool_call(call: ToolCall) -> bytes:
    return b'"id":%b,"function":{"arguments":%b,"name":%b},"type":"function"' % (
        _encode(call.id),
        _encode(call.arguments),
        _encode(call.name),
    )


def completion(
    interaction_id: str,
    created: int,
    content: str,
    finish_reason: str,
    prompt_tokens: int,
    completion_tokens: int,
    tool_calls: Sequence[ToolCall] = (),
) -> bytes:
    """The body of a reply that does not stream. `created`: Unix seconds."""
    calls = b"[%b]" % b",".join(b"{%b}" % _tool_call(call) for call in tool_calls) if tool_calls else b"null"
    return _form.fill(
        interaction_id, finish_reason, content, calls, created, prompt_tokens, completion_tokens
    )


class Chunks:
    """The events of one streamed reply. Each method returns a whole SSE event."""

    def __init__(self, interaction_id: str, created: int) -> None:
        self._head = b'data: {"id":"%b","choices":[{"delta":{"content":' % interaction_id.encode()
        self._tail = (
            b'"created":%d,"model":"None","object":"chat.completion.chunk","service_tier":null,'
            b'"system_fingerprint":null,"usage":'
        ) % created

    def role(self) -> bytes:
        """The first event."""
        return self._event(b'""', b'"assistant"', b"null", b"null", b"null")

    def content(self, text: str) -> bytes:
        return self._event(_encode(text), b"null", b"null", b"null", b"null")

    def tool_call(self, call: ToolCall) -> bytes:
        """A whole call."""
        delta = b'[{"index":%d,%b}]' % (call.position, _tool_call(call))
        return self._event(b"null", b"null", delta, b"null", b"null")

    def finish(self, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The last event before DONE. The interaction must be committed before it is sent."""
        usage = _usage(prompt_tokens, completion_tokens)
        return self._event(b"null", b"null", b"null", b'"%b"' % finish_reason.encode(), usage)

    def _event(
        self, content: bytes, role: bytes, tool_calls: bytes, finish_reason: bytes, usage: bytes
    ) -> bytes:
        return b"".join(
            (
                self._head,
                content,
                b',"function_call":null,"refusal":null,"role":',
                role,
                b',"tool_calls":',
                tool_calls,
                b'},"finish_reason":',
                finish_reason,
                b',"index":0,"logprobs":null}],',
                self._tail,
                usage,
                b"}\n\n",
            )
        )


def error_event(detail: str, status: int) -> bytes:
    """The event that ends a stream which failed; nothing follows it, no DONE. Shaped so that openai's
    client raises."""
    return (
        b"data: " + _encode({"error": {"message": detail, "type": "engine_error", "code": status}}) + b"\n\n"
    )
