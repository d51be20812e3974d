"""The chat body: what is read, and what is said about a bad one (texts recorded from the original)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from areal_fast.protocol.chat import BadChat, decode_chat, with_object_arguments

M = '"messages":[{"role":"user","content":"x"}]'
TOOLS = (
    "Tools should either be a JSON schema, or a callable function with type hints and a docstring "
    "suitable for auto-conversion to a schema."
)
ITERABLE = "TypeError: messages must be provided as an iterable of dictionaries or BaseModel instances."
IMAGE = (
    "image_url content part has an empty or missing URL. "
    "Provide a valid data URI or HTTP(S) URL in image_url.url."
)
SURROGATE = "TypeError: TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ('{"messages":[]}', "messages cannot be empty"),
        (
            "{}",
            "TypeError: AsyncCompletionsWithReward.create() missing 1 required keyword-only argument: "
            "'messages'",
        ),
        ('{"messages":null}', ITERABLE),
        ('{"messages":5}', ITERABLE),
        ('{"messages":"hi"}', "TypeError: messages[0] must be a dict or a BaseModel; got str"),
        ('{"messages":""}', "messages cannot be empty"),
        ('{"messages":{"role":"user"}}', "TypeError: messages[0] must be a dict or a BaseModel; got str"),
        ('{"messages":["hi"]}', "TypeError: messages[0] must be a dict or a BaseModel; got str"),
        ('{"messages":[{},null]}', "TypeError: messages[1] must be a dict or a BaseModel; got NoneType"),
        ("{bad", "Invalid JSON body"),
        ("", "Invalid JSON body"),
        ("[]", "Request body must be a JSON object"),
        ("null", "Request body must be a JSON object"),
        ('{"messages":' + "[" * 5000 + "]" * 5000 + "}", "Invalid JSON body"),
        ("{" + M + ',"temperature":NaN}', "Out of range float values are not JSON compliant"),
        ("{" + M + ',"temperature":-Infinity}', "Out of range float values are not JSON compliant"),
        ('{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":4}', SURROGATE),
        ('{"messages":[{"role":"user","content":"\\ud800"}]}', SURROGATE),
        ("{" + M + ',"n":2}', "NotImplementedError: n != 1 is not supported yet"),
        ("{" + M + ',"n":0}', "NotImplementedError: n != 1 is not supported yet"),
        ("{" + M + ',"tools":"x"}', TOOLS),
        ("{" + M + ',"tools":[5]}', TOOLS),
        ("{" + M + ',"tools":5}', "TypeError: tools must be an iterable of ChatCompletionToolParam"),
        ("{" + M + ',"max_tokens":"8"}', "TypeError: '<' not supported between instances of 'str' and 'int'"),
        ("{" + M + ',"extra_body":"x"}', "AttributeError: 'str' object has no attribute 'get'"),
        ("{" + M + ',"temperature":"hot"}', "TypeError: temperature must be a number, got str"),
        ("{" + M + ',"stream":"yes"}', "TypeError: stream must be a boolean, got str"),
        ("{" + M + ',"stream":1}', "TypeError: stream must be a boolean, got int"),
        ("{" + M + ',"stop":[1]}', "TypeError: stop must be a string or a list of strings, got list"),
        ("{" + M + ',"n":"1"}', "NotImplementedError: n != 1 is not supported yet"),
        ("{" + M + ',"n":[]}', "NotImplementedError: n != 1 is not supported yet"),
        (
            "{" + M + ',"max_tokens":[]}',
            "TypeError: '<' not supported between instances of 'list' and 'int'",
        ),
        (
            "{" + M + ',"max_total_tokens":{}}',
            "TypeError: unsupported operand type(s) for -: 'dict' and 'int'",
        ),
        ("{" + M + ',"metadata":5}', "AttributeError: 'int' object has no attribute 'get'"),
        ("{" + M + ',"model":["a"]}', "TypeError: model must be a string, got list"),
        (
            "{" + M + ',"areal_cache":{}}',
            "TypeError: areal.experimental.openai.client.AsyncCompletionsWithReward.create() got multiple "
            "values for keyword argument 'areal_cache'",
        ),
        (
            '{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":""}}]}]}',
            IMAGE,
        ),
        ('{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}', IMAGE),
        (
            '{"messages":[{"role":"user","content":[{"type":"image_url","image_url":"http://x/y.png"}]}]}',
            IMAGE,
        ),
    ],
)
def test_refusals(body: str, detail: str) -> None:
    with pytest.raises(BadChat) as raised:
        decode_chat(body.encode())
    assert str(raised.value) == detail


def test_bad_utf8_is_refused() -> None:
    with pytest.raises(BadChat, match="Invalid JSON body"):
        decode_chat(b'{"messages":[{"role":"user","content":"\xff"}]}')


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_read(encoding: str) -> None:
    request = decode_chat(("{" + M + ',"max_tokens":4}').encode(encoding))
    assert request.messages == [{"role": "user", "content": "x"}] and request.max_tokens == 4


def test_nulls_are_absent() -> None:
    names = "model tools temperature top_p max_tokens max_total_tokens stop n store metadata seed stream"
    body = (
        "{"
        + M
        + "".join(
            f',"{name}":null'
            for name in [*names.split(), "extra_body", "chat_template_kwargs", "areal_cache"]
        )
    )
    request = decode_chat((body + "}").encode())
    assert not request.wants_stream and request.wants_store and request.template_kwargs == {}


def test_null_members_of_messages_go_at_every_depth() -> None:
    body = (
        b'{"messages":[{"role":"user","content":null,"a":{"b":null,"c":[null,{"d":null}]}}],'
        b'"tools":[{"x":null}]}'
    )
    request = decode_chat(body)
    assert request.messages == [{"role": "user", "a": {"c": [None, {}]}}]
    assert request.tools == [{"x": None}], "tools stay as they are"


def test_messages_nested_too_deeply_are_read_or_refused() -> None:
    """How deep a reader and a walk over what it read can go depends on the interpreter."""
    refused = 0
    for depth in range(300, 1200, 100):
        for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            try:
                decode_chat(f'{{"messages": [{{"role": "user", "content": "a", "x": {value}}}]}}'.encode())
            except BadChat as error:
                refused += 1
                assert str(error) in ("messages are nested too deeply", "Invalid JSON body")
    assert refused


def test_oddities_the_original_accepts() -> None:
    assert decode_chat(("{" + M + ',"tools":{},"store":0,"model":5,"unknown":[1]}').encode()).tools == []
    assert not decode_chat(("{" + M + ',"store":false}').encode()).wants_store
    assert decode_chat(('{"messages":[],' + M + "}").encode()).messages
    assert decode_chat(("{" + M + ',"images":["smuggled"]}').encode()).images is None


def test_tool_call_arguments_become_objects() -> None:
    def message(arguments: Any) -> dict[str, Any]:
        function = {"name": "f", "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"id": "1", "function": function}], "content": ""}

    user = {"role": "user", "content": "x"}
    asked = [user, message('{"a": [1, "é"], "b": null}'), message("{}")]
    before = json.dumps(asked)
    assert with_object_arguments(asked) == [user, message({"a": [1, "é"], "b": None}), message({})]
    assert json.dumps(asked) == before, "what was sent is not changed"
    unreadable = [user, *map(message, ["", "{", "[1]", "5", '"{}"', {"a": 1}, None, 5, '{"a":' * 5000])]
    odd = [{"tool_calls": calls} for calls in (None, 5, [5], [{}], [{"function": 5}], [{"function": {}}])]
    for same in (unreadable, odd, [user]):
        assert with_object_arguments(same) is same


def test_images_become_parts_for_the_template_and_data_for_the_engine() -> None:
    request = decode_chat(
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"see"},'
        b'{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw=="}},'
        b'{"type":"\\u0069mage_url","image_url":{"url":"http://x/y.png","detail":"low"}}]}]}'
    )
    assert request.images == ["iVBORw==", "http://x/y.png"]
    assert request.messages[0]["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image"},
        {"type": "image"},
    ]


def test_template_kwargs_at_both_places() -> None:
    body = (
        "{" + M + ',"chat_template_kwargs":{"a":1,"b":2},"extra_body":{"chat_template_kwargs":{"b":3,"c":4}}}'
    )
    assert decode_chat(body.encode()).template_kwargs == {"a": 1, "b": 2, "c": 4}
