"""Replies are the recorded ones, byte for byte, and the openai client reads them."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from areal_fast.core import BadArgument
from areal_fast.core._replies import Form
from areal_fast.engine.answer import ToolCall
from areal_fast.engine.reply import DONE, Chunks, completion, error_event, new_interaction_id

ID = "chatcmpl-45363099366b46cb8d459821b9449"
# transcripts/03_chat, steps 2 and 14, as the original wrote them
RECORDED = (
    '{"id":"chatcmpl-45363099366b46cb8d459821b9449","choices":[{"finish_reason":"length","index":0,"logprobs":null,'
    '"message":{"content":" interval dut mental rain","refusal":null,"role":"assistant","annotations":null,'
    '"audio":null,"function_call":null,"tool_calls":null}}],"created":1795395116,"model":"None",'
    '"object":"chat.completion","service_tier":null,"system_fingerprint":null,"usage":{"completion_tokens":8,'
    '"prompt_tokens":18,"total_tokens":26,"completion_tokens_details":null,"prompt_tokens_details":null}}'
)
RECORDED_STREAM = (
    'data: {"id":"chatcmpl-45363099366b46cb8d459821b9449","choices":[{"delta":{"content":"",'
    '"function_call":null,'
    '"refusal":null,"role":"assistant","tool_calls":null},"finish_reason":null,"index":0,"logprobs":null}],'
    '"created":1795395117,"model":"None","object":"chat.completion.chunk","service_tier":null,'
    '"system_fingerprint":null,"usage":null}\n\n'
    'data: {"id":"chatcmpl-45363099366b46cb8d459821b9449","choices":[{"delta":{"content":" interval dut",'
    '"function_call":null,"refusal":null,"role":null,"tool_calls":null},"finish_reason":null,"index":0,'
    '"logprobs":null}],"created":1795395117,"model":"None","object":"chat.completion.chunk","service_tier":null,'
    '"system_fingerprint":null,"usage":null}\n\n'
    'data: {"id":"chatcmpl-45363099366b46cb8d459821b9449","choices":[{"delta":{"content":null,'
    '"function_call":null,'
    '"refusal":null,"role":null,"tool_calls":null},"finish_reason":"length","index":0,"logprobs":null}],'
    '"created":1795395117,"model":"None","object":"chat.completion.chunk","service_tier":null,'
    '"system_fingerprint":null,"usage":{"completion_tokens":8,"prompt_tokens":18,"total_tokens":26,'
    '"completion_tokens_details":null,"prompt_tokens_details":null}}\n\n'
    "data: [DONE]\n\n"
)
HARD_TEXT = 'a "quoted" \\ line\n\ttab \x00\x1f\x7f é 你 👩\u200d👧 \u2028 </script> %s {0}'


def test_completion() -> None:
    assert completion(ID, 1795395116, " interval dut mental rain", "length", 18, 8).decode() == RECORDED


def test_stream() -> None:
    chunks = Chunks(ID, 1795395117)
    events = (chunks.role(), chunks.content(" interval dut"), chunks.finish("length", 18, 8), DONE)
    assert b"".join(events).decode() == RECORDED_STREAM


def test_text_survives() -> None:
    reply = json.loads(completion(ID, 1, HARD_TEXT, "stop", 1, 1))
    assert reply["choices"][0]["message"]["content"] == HARD_TEXT
    event = Chunks(ID, 1).content(HARD_TEXT)
    assert event.count(b"\n\n") == 1 and event.endswith(b"\n\n"), "text must not end the event early"
    assert json.loads(event[6:])["choices"][0]["delta"]["content"] == HARD_TEXT


@given(st.text() | st.text(st.characters(max_codepoint=127)))
@example("".join(map(chr, range(256))))
def test_text_is_escaped_as_msgspec_escapes_it(text: str) -> None:
    body = completion(ID, 0, text, "stop", 0, 2**40)
    message = b'"message":{"content":%b,"refusal":null,' % msgspec.json.encode(text)
    usage = b'"completion_tokens":%d,"prompt_tokens":0,"total_tokens":%d,' % (2**40, 2**40)
    assert message in body and usage in body and b'"created":0,' in body


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        completion(ID, 0, "\ud800", "stop", 0, 0)
    with pytest.raises(OverflowError):
        completion(ID, 0, "", "stop", -1, 0)
    for pieces in ([b""] * 8, [*[b""] * 8, "text"]):
        with pytest.raises(BadArgument):
            Form(*pieces)  # type: ignore[arg-type]


def test_the_openai_client_reads_them() -> None:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    calls = [ToolCall(0, "call_0", "f", '{"a": "é\\n"}'), ToolCall(1, "call_1", "g", "{}")]
    body = completion(ID, 1, "x", "tool_calls", 1, 2, calls)
    reply = ChatCompletion.model_validate_json(body)
    assert reply.choices[0].message.tool_calls is not None and reply.usage is not None
    assert [(c.id, c.type) for c in reply.choices[0].message.tool_calls] == [
        ("call_0", "function"),
        ("call_1", "function"),
    ]
    for call in reply.choices[0].message.tool_calls:
        assert call.model_dump_json().encode() in body, "members and their order are the original's"
    chunks = Chunks(ID, 1)
    for event in (chunks.role(), chunks.tool_call(calls[0]), chunks.tool_call(calls[1])):
        (choice,) = ChatCompletionChunk.model_validate_json(event[6:]).choices
        for delta in choice.delta.tool_calls or []:
            assert delta.model_dump_json().encode() in event, "members and their order are the original's"
    ChatCompletionChunk.model_validate_json(chunks.finish("stop", 1, 2)[6:])


def test_ids() -> None:
    ids = {new_interaction_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(re.fullmatch(r"chatcmpl-[0-9a-f]{29}", i) for i in ids)


def test_error_event() -> None:
    event = error_event('engine said "no"\n\n', 502)
    assert event.startswith(b'data: {"error":') and event.count(b"\n\n") == 1
    assert msgspec.json.decode(event[6:])["error"]["message"] == 'engine said "no"\n\n'
