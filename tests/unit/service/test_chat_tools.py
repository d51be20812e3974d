"""Chats with tools: whole and streamed answers say the same, and only requests with tools are parsed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from areal_fast.engine.tokenizer import HfTokenizer, load_tokenizer
from areal_fast.service.auth import Keys
from areal_fast.service.chat import Chats
from areal_fast.service.log import Log
from tests import token_folders
from tests.unit.service.conftest import Service
from tests.unit.service.fakes import WordTokenizer

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "n": 1.50}}\n</tool_call>'
)
ARGUMENTS = ['{"city": "Paris"}', '{"city": "Rome", "n": 1.5}']


def streamed(events: list[Any]) -> tuple[str, list[dict[str, Any]], str]:
    """(content, tool calls, finish_reason) of the joined deltas."""
    content, calls, reason = "", [], ""
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        (choice,) = event["choices"]
        content += choice["delta"]["content"] or ""
        for call in choice["delta"]["tool_calls"] or []:
            assert call.pop("index") == len(calls) and not reason
            calls.append(call)
        reason = choice["finish_reason"] or reason
    return content, calls, reason


def ask(service: Service, text: str, **fields: Any) -> tuple[str, list[dict[str, Any]], str]:
    """Ask twice, whole and streamed; both must say the same."""
    service.engine.text = text
    _, key = service.start()
    (choice,) = service.chat(key, max_tokens=500, **fields).json["choices"]
    message = choice["message"]
    whole = message["content"], message["tool_calls"], choice["finish_reason"]
    stream = streamed(service.chat(key, max_tokens=500, stream=True, **fields).events())
    for call in [*(whole[1] or []), *stream[1]]:
        assert re.fullmatch("call_[0-9a-f]{24}", call.pop("id"))
    assert stream == (whole[0], whole[1] or [], whole[2])
    return stream


@pytest.mark.parametrize("before", ["", "Let me check.", "<think>hm</think>Let me check."])
def test_calls(service: Service, before: str) -> None:
    content, calls, reason = ask(service, f"{before}\n{CALLS}", tools=TOOLS)
    assert content == before and reason == "tool_calls"
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": arguments} for arguments in ARGUMENTS
    ]
    assert all(call["type"] == "function" for call in calls)


@pytest.mark.parametrize(
    "fields", [{}, {"tools": []}, {"tools": None}, {"tools": TOOLS, "tool_choice": "none"}]
)
def test_not_parsed(service: Service, fields: dict[str, Any]) -> None:
    assert ask(service, CALLS, **fields) == (CALLS, [], "stop")


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "x"}}, None]
)
def test_any_other_tool_choice_is_parsed(service: Service, choice: Any) -> None:
    assert ask(service, CALLS, tools=TOOLS, tool_choice=choice)[2] == "tool_calls"


@pytest.mark.parametrize("text", ["{bad json}", '{"name": "unknown_fn", "arguments": {}}', '{"name": "get_w'])
def test_what_cannot_be_read_is_plain_text(service: Service, text: str) -> None:
    text = f"So:\n<tool_call>\n{text}\n</tool_call>"
    assert ask(service, text, tools=TOOLS) == (text, [], "stop")


def test_a_cut_answer_ends_by_length(service: Service) -> None:
    service.engine.text = CALLS
    _, key = service.start()
    cut = CALLS.index("</tool_call>") + len("</tool_call>") + 20
    (choice,) = service.chat(key, max_tokens=cut, tools=TOOLS).json["choices"]
    assert choice["finish_reason"] == "length" and len(choice["message"]["tool_calls"]) == 1


def test_no_call_leaves_in_pieces_and_content_leaves_early(service: Service) -> None:
    service.engine.text = "Hi you\n" + CALLS
    _, key = service.start()
    events = service.chat(key, max_tokens=500, stream=True, tools=TOOLS).events()[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [delta["content"] for delta in deltas if delta["content"]] == ["H", "i", " y", "o", "u"]
    calls = [call for delta in deltas for call in delta["tool_calls"] or []]
    assert [json.loads(call["function"]["arguments"])["city"] for call in calls] == ["Paris", "Rome"]


@pytest.mark.parametrize("objects", [False, True])
def test_arguments_reach_the_template_as_the_dialect_says(
    service: Service, monkeypatch: pytest.MonkeyPatch, objects: bool
) -> None:
    monkeypatch.setattr(service.chats, "_object_arguments", objects)
    seen: list[Any] = []
    encode_chat = WordTokenizer.encode_chat

    def spy(self: WordTokenizer, messages: list[dict[str, Any]], tools: Any, kwargs: Any) -> Any:
        seen.extend(messages)
        return encode_chat(self, messages, tools, kwargs)

    monkeypatch.setattr(WordTokenizer, "encode_chat", spy)
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert service.ask("POST", "/chat/completions", {"messages": messages}).status == 200
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == ({"a": 1} if objects else '{"a": 1}')


@pytest.mark.parametrize("objects", [False, True])
def test_known_chats_have_arguments_as_the_dialect_says(service: Service, objects: bool) -> None:
    tokenizer = load_tokenizer(str(token_folders.qwen()))
    assert isinstance(tokenizer, HfTokenizer)
    Chats(
        service.store,
        Keys("admin"),
        tokenizer,
        lambda: None,
        Log("test", "critical"),
        service.externals,
        object_arguments=objects,
    )
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    taken = tokenizer.known.take(json.dumps({"messages": messages}).encode())
    assert taken is not None
    assert ('"arguments": {"a": 1}' in tokenizer.decode(taken[1].ids())) is objects
