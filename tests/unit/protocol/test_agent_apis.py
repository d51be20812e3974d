"""Other agent APIs in terms of an OpenAI chat: what the template is given, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from areal_fast.protocol import anthropic, responses
from areal_fast.protocol.chat import BadChat, decode_chat
from areal_fast.protocol.completions import StreamReader, Unreadable, error_message, read_completion

PNG = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "n": 1}'},
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": ""},
    {"role": "user", "content": "And now?"},
]
FUNCTION = {"name": "get_weather", "description": "d", "parameters": SCHEMA}


def as_messages(**fields: Any) -> dict[str, Any]:
    use = {"type": "tool_use", "name": "get_weather", "input": {"city": "Zürich", "n": 1}}
    conversation = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "Let me "},
                {"type": "text", "text": "see."},
                {**use, "id": "call_1"},
                {**use, "id": "call_2"},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "call_1",
                    "content": [{"type": "text", "text": "rain"}],
                },
                {"type": "tool_result", "tool_use_id": "call_2", "is_error": True},
                {"type": "text", "text": "And "},
                {"type": "text", "text": "now?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    return {"max_tokens": 9, "model": "m", "system": system, "messages": conversation, **fields}


def as_items(**fields: Any) -> dict[str, Any]:
    call = {"type": "function_call", "name": "get_weather", "arguments": CALL["function"]["arguments"]}
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
        },
        {**call, "id": "fc_1", "call_id": "call_1"},
        {**call, "call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {"type": "function_call_output", "call_id": "call_2", "output": []},
        {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("And ", "now?")]},
    ]
    return {"input": items, **fields}


def messages_chat(body: Any) -> Any:
    return json.loads(anthropic.chat_of(json.dumps(body).encode()).chat)


def responses_chat(body: Any) -> Any:
    return json.loads(responses.chat_of(json.dumps(body).encode()).chat)


# -- requests
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [messages_chat(as_messages()), responses_chat(as_items())])
def test_a_conversation_is_the_chat_that_it_is(chat: Any) -> None:
    assert chat["messages"] == CHAT
    decode_chat(json.dumps(chat).encode())


def test_members_of_a_messages_request() -> None:
    tool = {"name": "get_weather", "input_schema": SCHEMA, "description": "d", "cache_control": {}}
    chat = messages_chat(
        as_messages(
            tools=[tool],
            stop_sequences=["X"],
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            stream=True,
            chat_template_kwargs={"enable_thinking": False},
            store=False,
            thinking={"type": "disabled"},
        )
    )
    del chat["messages"]
    assert chat == {
        "model": "m",
        "tools": [{"type": "function", "function": FUNCTION}],
        "max_tokens": 9,
        "stop": ["X"],
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
        "store": False,
    }
    assert list(chat["tools"][0]["function"]) == list(FUNCTION)


def test_members_of_a_responses_request() -> None:
    tool = {"type": "function", "strict": True, **FUNCTION}
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    chat = responses_chat(
        {
            "input": "hi",
            "instructions": "Be brief.",
            "tools": [tool],
            "max_output_tokens": 7,
            "temperature": 0,
            "store": False,
            "text": {"format": form},
            "include": ["reasoning.encrypted_content"],
            "parallel_tool_calls": False,
        }
    )
    assert chat == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}],
        "max_tokens": 7,
        "temperature": 0.0,
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any", "disable_parallel_tool_use": True}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tool_choice_of_messages(theirs: Any, ours: Any) -> None:
    assert messages_chat(as_messages(tool_choice=theirs))["tool_choice"] == ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tool_choice_of_responses(theirs: Any, ours: Any) -> None:
    assert responses_chat({"input": "x", "tool_choice": theirs})["tool_choice"] == ours


def test_images_stay_parts() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    blocks = [{"type": "text", "text": "this?"}, {"type": "image", "source": source}]
    parts = [{"type": "input_text", "text": "this?"}]
    parts += [{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}]
    for chat in (
        messages_chat({"max_tokens": 1, "messages": [{"role": "user", "content": blocks}]}),
        responses_chat({"input": [{"role": "user", "content": parts}]}),
    ):
        read = decode_chat(json.dumps(chat).encode())
        assert read.images == [PNG]
        assert read.messages[0]["content"] == [{"type": "text", "text": "this?"}, {"type": "image"}]


USER = [{"role": "user", "content": "x"}]


def blocks(role: str, *content: Any) -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [{"role": role, "content": list(content)}]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": USER}, "max_tokens"),
        ({"max_tokens": 1}, "messages"),
        ({"max_tokens": "1", "messages": USER}, "max_tokens"),
        ({"max_tokens": 1, "messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"max_tokens": 1, "messages": USER, "tool_choice": {"type": "tool"}}, "tool_choice"),
        (
            {"max_tokens": 1, "messages": USER, "tools": [{"name": "w", "type": "web_search_1"}]},
            "input_schema",
        ),
        ({"max_tokens": 1, "messages": USER, "system": [{"type": "image"}]}, "image"),
        (blocks("user", {"type": "document"}), "document"),
        (blocks("user", {"type": "text"}), "text"),
        (blocks("user", {"type": "tool_result", "content": 5}), "tool_result"),
        (blocks("user", {"type": "tool_result", "content": ["x"]}), "not supported"),
        (blocks("assistant", {"type": "tool_use", "name": "f", "input": "x"}), "tool_use"),
        (blocks("assistant", {"type": "image"}), "image"),
    ],
)
def test_what_no_chat_can_say_is_refused_by_messages(body: Any, says: str) -> None:
    with pytest.raises(BadChat, match=says):
        messages_chat(body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "input is required"),
        ({"input": 5}, "input"),
        ({"input": "x", "previous_response_id": "r"}, "previous_response_id"),
        ({"input": "x", "conversation": {"id": "c"}}, "conversation"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "web_search"),
        ({"input": "x", "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "item_reference"),
        ({"input": [{"role": "robot", "content": "x"}]}, "role"),
        ({"input": [{"role": "user"}]}, "content"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "image_url"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "function_call"),
        ({"input": [{}]}, "None"),
    ],
)
def test_what_no_chat_can_say_is_refused_by_responses(body: Any, says: str) -> None:
    with pytest.raises(BadChat, match=says):
        responses_chat(body)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "type",
                    "text",
                    "input",
                    "output",
                    "name",
                    "arguments",
                    "source",
                    "url",
                    "tools",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KINDS = [
    "text",
    "image",
    "tool_use",
    "tool_result",
    "function_call",
    "function_call_output",
    "message",
    "input_text",
    "x",
]
ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(KINDS) | ANY_JSON,
            "role": st.sampled_from(["user", "assistant", "system"]) | ANY_JSON,
            "content": ANY_JSON | st.lists(st.fixed_dictionaries({"type": st.sampled_from(KINDS)})),
            "output": ANY_JSON,
            "name": ANY_JSON,
            "input": ANY_JSON,
        },
    )
)


@example([{"role": ["user"]}], {})
@given(
    ITEMS | ANY_JSON,
    st.dictionaries(st.sampled_from(["system", "tools", "tool_choice", "text", "stop"]), ITEMS | ANY_JSON),
)
def test_any_body_is_a_chat_or_refused(items: Any, more: dict[str, Any]) -> None:
    body = {"max_tokens": 1, "messages": items, "input": items, **more}
    for read in (anthropic.chat_of, responses.chat_of, anthropic.chat_to_count):
        try:
            asked = read(json.dumps(body).encode())
            decode_chat(asked if isinstance(asked, bytes) else asked.chat)
        except BadChat:
            continue


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"5", b'{"input":"\\ud800"}', b"[" * 5000])
def test_any_bytes_are_refused(body: bytes) -> None:
    for read in (anthropic.chat_of, responses.chat_of):
        with pytest.raises(BadChat):
            read(body)


# -- answers
# ------------------------------------------------------------------------------------------------


def completion(content: str | None, calls: Any = None, reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return json.dumps({"id": "chatcmpl-1", "choices": [choice], "usage": usage}).encode()


def chunks(content: str, calls: list[Any], reason: str | None, cut: int = 3) -> list[bytes]:
    """A provider's stream: text and arguments in pieces, the usage in a chunk without choices."""

    def chunk(delta: Any, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return json.dumps({"id": "chatcmpl-1", "choices": [choice]}).encode()

    said = [chunk({"role": "assistant", "content": ""})]
    said += [chunk({"content": content[i : i + cut]}) for i in range(0, len(content), cut)]
    for index, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        first = {"index": index, "id": call["id"], "function": {"name": name, "arguments": ""}}
        said.append(chunk({"tool_calls": [first]}))
        for i in range(0, len(arguments), cut):
            piece = {"index": index, "function": {"arguments": arguments[i : i + cut]}}
            said.append(chunk({"tool_calls": [piece]}))
    if reason is not None:
        said.append(chunk({}, reason))
        said.append(b'{"id":"chatcmpl-1","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}')
        said.append(b"[DONE]")
    return said


def told(data: bytes) -> list[Any]:
    events = []
    for event in data.decode().split("\n\n")[:-1]:
        name, _, rest = event.partition("\n")
        assert rest.startswith("data: ")
        events.append(json.loads(rest[6:]))
        assert name == f"event: {events[-1]['type']}"
    return events


ASKED = anthropic.Asked(b"", "m", True, ("END", "Z"))
ASKED_RESPONSE = responses.Asked(b"", True, {"model": "m", "tools": []})


def stream(teller: Any, said: list[bytes]) -> list[Any]:
    reader = StreamReader(teller)
    return told(b"".join(map(reader.feed, said)) + reader.finish())


def message_from(events: list[Any]) -> Any:
    """What a client puts together."""
    message = events[0]["message"]
    for event in events[1:]:
        kind = event["type"]
        if kind == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"]})
            pieces: list[str] = []
        elif kind == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1
            pieces.append(event["delta"].get("text", event["delta"].get("partial_json")))
        elif kind == "content_block_stop":
            block = message["content"][-1]
            if block["type"] == "text":
                block["text"] = "".join(pieces)
            else:
                block["input"] = json.loads("".join(pieces) or "{}")
        elif kind == "message_delta":
            message.update(event["delta"], usage=event["usage"])
    assert events[-1]["type"] == "message_stop"
    return message


TEXTS = ["", "hello", "a Zoo", "the END", "…"]


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_a_streamed_answer_is_the_whole_one(content: str, count: int, reason: str) -> None:
    calls = [{**CALL, "id": f"call_{i}"} for i in range(count)]
    whole = read_completion(completion(content, calls, reason))
    for cut in (1, 3, 100):
        said = chunks(content, calls, reason, cut)
        message = message_from(stream(anthropic.Events(ASKED), said))
        assert message == json.loads(anthropic.reply(whole, ASKED))
        events = stream(responses.Events(ASKED_RESPONSE, 7), said)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"] == json.loads(responses.reply(whole, ASKED_RESPONSE, 7))
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == events[-1]["response"]["output"]


def test_a_message() -> None:
    message = json.loads(anthropic.reply(read_completion(completion("Hi", [CALL], "tool_calls")), ASKED))
    assert message == {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "text", "text": "Hi"},
            {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Zürich", "n": 1}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 3},
    }


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("x", "stop", ("end_turn", None)),
        ("the END", "stop", ("stop_sequence", "END")),
        ("the END", "length", ("max_tokens", None)),
        (None, "content_filter", ("refusal", None)),
    ],
)
def test_stop_reasons(text: str | None, reason: str, expected: Any) -> None:
    message = json.loads(anthropic.reply(read_completion(completion(text, None, reason)), ASKED))
    assert (message["stop_reason"], message["stop_sequence"]) == expected


@pytest.mark.parametrize(
    ("arguments", "given"),
    [("", {}), ("[1]", {"arguments": [1]}), ("{oops", {"arguments": "{oops"}), ('{"n":1.0}', {"n": 1.0})],
)
def test_arguments_are_always_an_object(arguments: str, given: Any) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    message = json.loads(anthropic.reply(read_completion(completion("", [call])), ASKED))
    assert message["content"][0]["input"] == given


def test_a_response_cut_by_its_budget_is_incomplete() -> None:
    whole = read_completion(completion("Hi", None, "length"))
    response = json.loads(responses.reply(whole, ASKED_RESPONSE, 7))
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["total_tokens"] == 8 and response["created_at"] == 7


@pytest.mark.parametrize(
    "broken", [b'{"error":{"message":"engine died"}}', b'{"error":"engine died"}', b"not json", None]
)
def test_a_stream_that_breaks_off_ends_with_an_error(broken: bytes | None) -> None:
    said = [*chunks("Hi", [], None), *([broken] if broken else [])]
    for teller in (anthropic.Events(ASKED), responses.Events(ASKED_RESPONSE, 7)):
        *_, last = stream(teller, said)
        assert last["type"] == "error"
        assert broken in (None, b"not json") or last["error"]["message"] == "engine died"


def test_calls_that_all_have_index_0_are_told_apart_by_id() -> None:
    said = [json.loads(each) for each in chunks("", [CALL, {**CALL, "id": "call_2"}], "stop")[:-1]]
    for chunk in said:
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls", ()):
                call["index"] = 0
    events = stream(anthropic.Events(ASKED), [json.dumps(chunk).encode() for chunk in said])
    message = message_from(events)
    assert [block["id"] for block in message["content"]] == ["call_1", "call_2"]
    assert [block["input"]["n"] for block in message["content"]] == [1, 1]
    assert message["stop_reason"] == "tool_use"


CHUNKS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "choices": st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "finish_reason": st.sampled_from([None, "stop", "length", "tool_calls", "x"]),
                        "delta": st.fixed_dictionaries(
                            {},
                            optional={
                                "content": st.none() | st.text(),
                                "tool_calls": st.lists(
                                    st.fixed_dictionaries(
                                        {"index": st.integers(-1, 2)},
                                        optional={
                                            "id": st.sampled_from(["a", "b", None]),
                                            "function": st.fixed_dictionaries(
                                                {"arguments": st.text() | st.none()}
                                            ),
                                        },
                                    ),
                                    max_size=2,
                                ),
                            },
                        ),
                    },
                ),
                max_size=2,
            ),
            "usage": st.none() | st.just({"prompt_tokens": 1}),
        },
    )
)


@given(CHUNKS)
def test_any_stream_ends_once_and_tells_all_text(said: list[Any]) -> None:
    data = [json.dumps(chunk).encode() for chunk in said]
    text = "".join(
        choice.get("delta", {}).get("content") or ""
        for chunk in said
        for choice in chunk.get("choices", [])[:1]
    )
    found = stream(anthropic.Events(ASKED), data)
    pieces = [event["delta"].get("text", "") for event in found if event["type"] == "content_block_delta"]
    assert "".join(pieces) == text
    assert [event["type"] in ("message_stop", "error") for event in found].count(True) == 1
    starts = [event["index"] for event in found if event["type"] == "content_block_start"]
    assert starts == list(range(len(starts)))
    found = stream(responses.Events(ASKED_RESPONSE, 7), data)
    last = {"response.completed", "response.incomplete", "error"}
    assert [event["type"] in last for event in found].count(True) == 1
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"choices":[{}]}', b'{"choices":5}'])
def test_an_answer_that_is_no_completion(body: bytes) -> None:
    with pytest.raises(Unreadable):
        read_completion(body)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"detail":"no"}', "no"),
        (b'{"error":{"message":"no","type":"x"}}', "no"),
        (b'{"error":"no"}', "no"),
        (b"no", "no"),
        (b'{"detail":[{"type":"x"}]}', '[{"type": "x"}]'),
    ],
)
def test_the_text_of_an_error(body: bytes, text: str) -> None:
    assert error_message(body) == text
    assert msgspec.json.decode(anthropic.error(400, text))["error"]["type"] == "invalid_request_error"
