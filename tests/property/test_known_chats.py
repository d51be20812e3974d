"""Chats taken by their bytes (engine/known.py) against the general way: the same request, the same ids,
whatever the bodies and the caches hold; and what is no chat of this kind is left alone. The rules of
skeletons one by one."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_fast.core import BadArgument
from areal_fast.core._messages import Context, KnownMessages, Message, Plan, Rest, digest, fingerprint
from areal_fast.engine.known import KnownChats, _none_within_another
from areal_fast.engine.skeletons import Tracer, plain
from areal_fast.engine.templates import ChatTemplate, TemplateFailed
from areal_fast.engine.tokenizer import HfTokenizer
from areal_fast.protocol.chat import BadChat, decode_chat, with_object_arguments
from tests import token_folders
from tests.property.test_tokens import FOLDERS, ours, text, tool

SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def plans_at_first_sight() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("areal_fast.engine.known._PLANS_ON_TRUST", 1 << 40)
        yield


QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') +
                '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501
QWEN3_CALLS = QWEN3.replace(
    """        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}""",
    r"""        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}""",
)
assert QWEN3_CALLS != QWEN3
GLUED = (
    "{% for m in messages %}<|im_start|>{{ m.content }}{{ m.role }}<|im_{{ m.content }}<|im_end|>{% endfor %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content | trim }}<|im_end|>"
    "{% if m.content %}!{% endif %}{% endfor %}"
)
# tight: a content may join with what is next to it to a special token
TIGHT = "{% for m in messages %}{{ m.role }}<{{ m.content }}|im_end|><|im_end|>{% endfor %}"
# every member of a call, whatever it is
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.name or '' }}{{ m.content or 'none' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content | trim }}</think>{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.id | tojson }}{{ c.function.name }}:"
    "{% if c.function.arguments is mapping or c.function.arguments is not string %}"
    "object {{ c.function.arguments | tojson }}{% else %}{{ c.function.arguments }}{% endif %}</tool_call>"
    "{% endfor %}{% if m.tool_call_id %}{{ m.tool_call_id }}{% endif %}<|im_end|>{% endfor %}"
)

# a content that is written as JSON
QUOTED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content | tojson }}"
    "{% if '<' in (m.content or '') %}!{% endif %}<|im_end|>{% endfor %}"
)


@functools.cache
def with_template(
    source: str, limit_bytes: int, objects: bool = False
) -> tuple[KnownChats, ChatTemplate, HfTokenizer]:
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    template = ChatTemplate(source, {"bos_token": "<|endoftext|>"})
    known = KnownChats(template, tokenizer.segments, 1 << 20, limit_bytes=limit_bytes)
    known.object_arguments = objects
    return known, template, tokenizer


def check(known: KnownChats, template: ChatTemplate, tokenizer: HfTokenizer, body: bytes) -> bool:
    """Was it taken, and rightly?"""
    taken = known.take(body)
    if taken is None:
        return False
    request, prompt = taken
    general = decode_chat(body)
    assert request.messages == [{}]
    messages = with_object_arguments(general.messages) if known.object_arguments else general.messages
    expected = tokenizer.encode(template.render(messages, general.tools, general.template_kwargs))
    assert prompt.data == expected.data, (general.messages, prompt.ids(), expected.ids())
    general.messages = request.messages
    assert request == general
    return True


message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": text}
    ),
    st.fixed_dictionaries(
        {
            "content": text
            | st.sampled_from(["<tool_response>a</tool_response>", "<think>\na\n</think>\n\nb", ""])
        },
        optional={"name": st.none()},
    ).map(lambda fields: {**fields, "role": "assistant"}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.none() | text, "name": text}),
)
arguments = st.one_of(
    text,
    st.dictionaries(text, st.none() | text | st.floats() | st.integers(0, 9) | st.lists(text, max_size=2),
        max_size=2).map(json.dumps),
    st.sampled_from(['{"a":1}', '{"a": "é\\u00e9"}', "{}", "[1]", "{", '{"a":1e400}', '{"a":' * 2000]),
)  # fmt: skip
call = st.fixed_dictionaries(
    {
        "id": text,
        "type": st.sampled_from(["function", "function", "other"]),
        "function": st.fixed_dictionaries({"name": text, "arguments": arguments}),
    },
    optional={"index": st.none() | st.just(0)},
)
calling = st.fixed_dictionaries(
    {
        "role": st.just("assistant"),
        "content": st.none() | st.just("") | text,
        "tool_calls": st.none() | st.lists(call, max_size=3),
    },
    optional={"refusal": st.none(), "reasoning_content": text | st.none(), "name": text},
)
result = st.fixed_dictionaries(
    {"role": st.just("tool"), "tool_call_id": text, "content": text}, optional={"name": text}
)
message = st.one_of(message, message, calling, result)
members = st.dictionaries(
    st.sampled_from(["temperature", "max_tokens", "stream", "model", "x", "metadata",
    "extra_body"]), st.sampled_from([None, 1, True, "a\\\"]}", {"messages": [{"a": "]"}]},
    [["]"]]]), max_size=3,
)  # fmt: skip

kwargs = st.none() | st.dictionaries(
    st.sampled_from(["enable_thinking", "tools", "documents", "x"]),
    st.sampled_from([None, True, False, 1, "x", [{"title": "t"}]]),
    max_size=2,
)


@st.composite
def bodies(draw: st.DrawFn, messages: st.SearchStrategy[Any] = message) -> bytes:
    fields = [*draw(members).items(), ("messages", draw(st.lists(messages, min_size=1, max_size=6)))]
    if draw(st.booleans()):
        fields.append(("tools", draw(st.none() | st.lists(tool, max_size=2))))
    if draw(st.booleans()):
        fields.append(("chat_template_kwargs", draw(kwargs)))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")]))
    ordered = dict(draw(st.permutations(fields)))
    return json.dumps(ordered, ensure_ascii=draw(st.booleans()), separators=separators).encode()


@pytest.mark.parametrize("source", [QWEN3_CALLS, GLUED, TRIMMED, TIGHT, "qwen2.5", CALLS, QUOTED])
@pytest.mark.parametrize("limit_bytes", [1 << 20, 3000])
@pytest.mark.parametrize("objects", [False, True])
@SETTINGS
@given(several=st.lists(bodies(), min_size=1, max_size=3))
def test_what_is_taken_is_what_the_general_way_makes(
    source: str, limit_bytes: int, objects: bool, several: list[bytes]
) -> None:
    if source == "qwen2.5":
        source = token_folders.qwen_folder.CHAT_TEMPLATE
    chats = with_template(source, limit_bytes, objects)
    for body in several * 2:
        check(*chats, body)


@pytest.mark.parametrize("family", sorted(FOLDERS))
@settings(SETTINGS, max_examples=30)
@given(body=bodies())
def test_other_families(family: str, body: bytes) -> None:
    tokenizer = ours(FOLDERS[family](), 1 << 20)
    for _ in range(2):
        check(tokenizer.known, tokenizer.template, tokenizer, body)


@pytest.mark.parametrize("source", [QWEN3, token_folders.qwen_folder.CHAT_TEMPLATE, QUOTED])
def test_a_growing_conversation_is_taken(source: str) -> None:
    chats = with_template(source, 1 << 20)
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(5):
        messages.append({"role": "user", "content": f"What is {turn} + {turn}?"})
        body = json.dumps({"messages": messages, "max_tokens": 5}).encode()
        assert check(*chats, body) and check(*chats, body)
        messages.append({"role": "assistant", "content": f"It is {2 * turn}."})


@pytest.mark.parametrize("source", [QWEN3_CALLS, "qwen2.5", CALLS])
@pytest.mark.parametrize("objects", [False, True])
def test_an_agents_conversation_is_taken(source: str, objects: bool) -> None:
    if source == "qwen2.5":
        source = token_folders.qwen_folder.CHAT_TEMPLATE
    chats = with_template(source, 1 << 20, objects)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is there?"},
    ]
    for turn in range(5):
        body = json.dumps({"messages": messages, "tools": tools}).encode()
        assert check(*chats, body) and check(*chats, body)
        call = {"name": f"look{turn % 2}", "arguments": json.dumps({"at": turn, "é": [None, "ü"]})}
        messages.append(
            {
                "role": "assistant",
                "content": [None, "", "Let me see."][turn % 3],
                "refusal": None,
                "tool_calls": [{"id": f"call_{turn}", "type": "function", "function": call}],
            }
        )
        messages.append({"role": "tool", "tool_call_id": f"call_{turn}", "content": f"Nothing at {turn}."})


@SETTINGS
@given(bodies(), st.data())
def test_damaged_bodies(body: bytes, data: st.DataObject) -> None:
    chats = with_template(token_folders.qwen_folder.CHAT_TEMPLATE, 1 << 20)
    chats[0].take(body)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        if data.draw(st.booleans()):
            damaged[at] = data.draw(st.sampled_from(list(b'[]{},:"\\ m0\xff\x00')))
        else:
            damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(
                st.sampled_from([b"", b'"', b'"messages":[{}],', b"\\", b"}", b"]", b',"messages":1'])
            )
    try:
        check(*chats, bytes(damaged))
    except (BadChat, TemplateFailed) as error:
        pytest.fail(f"taken, and refused in the general way: {error}")


class Reading:
    """A Maker that only looks on."""

    def __init__(self) -> None:
        self.read_here: list[bytes] = []
        self.contents: list[str] = []
        self.names: list[str] = []
        self.rests: list[tuple[bytes, bytes]] = []

    def rest(self, before: bytes, after: bytes) -> Rest | None:
        self.rests.append((before, after))
        return Rest(None, {})

    def read(self, text: bytes) -> tuple[str, str] | None:
        self.read_here.append(text)
        return None

    def answer(self, message: Message, content: Any) -> None:
        self.contents.append(content)

    def plan(self, rest: Rest, forms: bytes, names: list[Any], contents: list[Any]) -> Plan | None:
        assert contents == self.contents[-len(contents) :]
        self.names = names
        return None

    def is_cut(self, segment: str, until: str) -> bool:
        raise AssertionError

    encode: Any = None
    encode_parts: Any = None


def read(body: bytes) -> Reading:
    reading = Reading()
    assert KnownMessages(1000, reading, "").take(body, 1) is None
    return reading


@given(st.binary(max_size=80))
def test_any_bytes(body: bytes) -> None:
    read(body)


strings = st.lists(
    st.one_of(
        st.text(max_size=4).map(lambda t: json.dumps(t)[1:-1]),
        st.text(max_size=4).map(lambda t: json.dumps(t, ensure_ascii=False)[1:-1]),
        st.sampled_from(
            [
                "\\u00e9",
                "\\uD83D\\ude00",
                "\\ud83d",
                "\\ude00",
                "\\u0000",
                "\\ud83d\\u0041",
                "\\/",
                "\\x",
                "\\u12",
                "\t",
            ]
        ),
        st.text(st.characters(max_codepoint=127), max_size=3),
    ),
    max_size=4,
).map("".join)
blanks = st.sampled_from(["", "", "", " ", "\n\t"])


def test_a_maker_that_makes_nonsense_is_refused() -> None:
    here = Context("", "", "", False)
    body = b'{"messages":[{"role":"user","content":"a"}]}'

    class Making(Reading):
        made: Any = Plan((here,), (b"", b""))
        ids: Any = b"\1\0\0\0"

        def plan(self, *_asked: Any) -> Any:
            return self.made

        def encode(self, segment: str, work: int) -> Any:
            assert (segment, work) == ("a", 7)
            return self.ids, 1

    assert KnownMessages(1000, Making(), "").take(body, 7) == (None, b"\1\0\0\0")
    for plan, ids in ((Plan((), (b"",)), b""), (Making.made, None), (Making.made, "a")):
        maker = Making()
        maker.made, maker.ids = plan, ids
        with pytest.raises(BadArgument):
            KnownMessages(1000, maker, "").take(body, 7)
        maker.rest = lambda *_, p=plan: Rest(None, {b"\0": [p]})  # type: ignore[method-assign,misc]
        with pytest.raises(BadArgument):
            KnownMessages(1000, maker, "").take(body, 7)


@SETTINGS
@given(strings, st.data())
def test_a_plain_message_is_read_as_json(content: str, data: st.DataObject) -> None:
    """Or not at all; whatever is in its text."""
    members = [
        f'"role"{data.draw(blanks)}:{data.draw(blanks)}"user"',
        f'"content":"{content}"{data.draw(blanks)}',
    ]
    text = f"{{{data.draw(blanks)}{','.join(data.draw(st.permutations(members)))}}}".encode()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.binary(max_size=2)) + text[at + data.draw(st.integers(0, 2)) :]
    reading = read(b'{"messages":[%b]}' % text)
    if reading.names:
        fields = msgspec.json.decode(text)
        assert fields == {"role": reading.names[0], "content": reading.contents[0]}
    else:
        try:
            fields = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        plain = set(fields) == {"role", "content"} and all(isinstance(v, str) for v in fields.values())
        assert not plain or reading.read_here or not reading.rests


def test_the_longest_texts_are_read_alike() -> None:
    for size in (1023, 1024, 1025, 100_000):
        for end in ("", "\\n", "\\u00e9"):
            text = '{"role":"user","content":"' + "é" * (size // 2) + end + '"}'
            assert read(b'{"messages":[%b]}' % text.encode()).contents == [json.loads(text)["content"]]


def test_the_rest_is_asked_for_once() -> None:
    reading = Reading()
    known = KnownMessages(1 << 20, reading, "")
    plain = b'{"role":"user","content":"%d"}'
    for i in range(3):
        known.take(b'{"a":[1], "messages": [%b] ,"b":2}' % (plain % i), 1)
    assert reading.rests == [(b'{"a":[1], "messages": ', b' ,"b":2}')]
    known.take(b'{"a":[1], "messages": [%b],"b":2}' % (plain % 1), 1)
    assert len(reading.rests) == 2
    known.forget_rests()
    known.take(b'{"a":[1], "messages": [%b],"b":2}' % (plain % 1), 1)
    assert len(reading.rests) == 3
    for i in range(2000):
        known.take(b'{"messages":[%b],"n":%d}' % (plain % 1, i), 1)
    known.take(b'{"a":[1], "messages": [%b],"b":2}' % (plain % 1), 1)
    assert len(reading.rests) == 2004, "bounded: the oldest had to go"


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"role":"user","content":"a"}],"messages":[{"role":"user","content":"b"}]}',
        b'{"messages":[{"role":"user","content":"a"}],"m\\u0065ssages":[{"role":"user","content":"b"}]}',
        b'{"messages":[{"role":"user","content":"a"}]} x',
        b'{"messages":[{"role":"user","content":"a"},]}',
        b'{"messages":[]}',
        b'{"messages":[{"role":"user","content":"a"}],}',
        b'{"messages":[{"role":"user","content":"a","content":null}]}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"a","x":1}]}',
        b'{"messages":[{"role":"user","content":"a"}],"n":2}',
        b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"tools":[]}}',
        b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"documents":1}}',
        b'{"messages":[{"role":"user","content":"say <|im_end|>"}]}',
        b'[{"messages":[{"role":"user","content":"a"}]}]',
    ],
)
def test_what_is_left_to_the_general_way(body: bytes) -> None:
    known, _, _ = with_template(token_folders.qwen_folder.CHAT_TEMPLATE, 1 << 20)
    assert known.take(b'{"messages":[{"role":"user","content":"a"}]}') is not None
    assert known.take(body) is None


def test_long_new_text_is_left_to_the_general_way() -> None:
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    known = KnownChats(tokenizer.template, tokenizer.segments, 50, limit_bytes=1 << 20)
    long = json.dumps({"messages": [{"role": "user", "content": "word " * 200}]}).encode()
    assert known.take(long) is None
    tokenizer.encode(tokenizer.template.render(decode_chat(long).messages))
    assert check(known, tokenizer.template, tokenizer, long), "its segments are known now"


@pytest.mark.parametrize(
    "source",
    [
        "{{ m.content | length }}",
        "{{ m.content.upper() }}",
        "{{ m.content[0] }}",
        "{{ m.content | tojson(indent=1) }}",
        "{{ m.content | trim | tojson }}",
        "{{ m.content | tojson | tojson }}",
        "{{ m.content | tojson | length }}",
        "{{ [m.content] | tojson }}",
        "{{ m | tojson }}",
        "{{ m }}",
        "{% if m.content == 'a' %}{% endif %}",
        "{{ m.content in ['a'] }}",
        "{{ m.content < 'b' }}",
        "{{ {m.content: 1} | length }}{{ m.content }}",
        "{{ m.content * 2 }}",
        "{{ m.content % 3 }}",
        "{{ '%5s' % m.content }}",
        "{{ '{:>9}'.format(m.content) }}",
        "{% for c in m.content %}{% endfor %}",
        "{{ [m.content] | join('-') }}",
        "{{ [m.content] | unique | list }}",
        "{{ m.content | default('x') | reverse }}",
        "{{ m.content is sameas 'a' }}",
        "{{ m.content is upper }}",
        "{{ m.content is in 'abc' }}",
        "{{ ('a' ~ m.content) | length }}",
        "{{ ('a' + m.content)[0] }}",
        "{% if 'a' + m.content %}{% endif %}",
        "{{ m.content + 1 }}",
        "{{ messages | map(attribute='content') | sort }}",
        "{{ messages | selectattr('content', 'equalto', 'x') | list | length }}{{ m.content }}",
        "{{ messages | groupby('content') | length }}{{ m.content }}",
        "{{ strftime_now('%Y') }}{{ m.content }}",
        "{{ ['a', 'b'] | random }}{{ m.content }}",
        "{{ raise_exception('no') }}{{ m.content }}",
        "{{ m.content.replace('a', 'b') }}",
        "{{ m.content.__class__ }}",
        "{{ m.content.startswith }}",
        "{{ m.content | trim | length }}",
        "{{ m.content | trim('x') }}",
        "{{ m.content }}{{ m.content }}",
        "none",
        "{% if m.content | trim %}{% endif %}{{ m.content }}",
        "{{ m.content.strip().upper() }}",
        "{% set x = namespace(n=0) %}{% if loop.changed(m.content) %}a{% endif %}{{ m.content }}",
        "{{ m.content | string | length }}",
        "{{ m.content | e }}",
        "{{ m.content | safe }}",
    ],
)
def test_templates_that_look_at_contents_have_no_skeleton(source: str) -> None:
    template = ChatTemplate("{% for m in messages %}" + source + "{% endfor %}", {})
    forms = [plain("user"), plain("user")]
    assert Tracer(template).trace(forms, [("a",), ("b",)], None) is None


@pytest.mark.parametrize(
    ("source", "guards"),
    [
        ("{{ m.role }}: {{ m.content }}", 0), ("{{ m.role + ':' + m.content + '.' }}", 0),
        ("{{ m['role'] ~ m['content'] }}", 0), ("{{ m.content | trim }}", 0), ("{{ m.content.strip() }}", 0),
        ("{% set c = m.content %}{{ c }}", 0), ("{{ m.content | tojson }}", 0),
        ("{{ m.content.strip() | trim }}", 0), ("{% set c %}<{{ m.content }}>{% endset %}{{ c }}", 0),
        ("{% if m.content is string and m.content is not none %}{{ m.content }}{% endif %}", 0),
        ("{% if m.content is defined and m.content is not mapping %}{{ m.content }}{% endif %}", 0),
        ("{{ m.content | default('x') }}{{ messages | length }}", 0), ("{{ loop.index }}{{ m.content }}", 0),
        ("{% if 'a' in m.content %}A{% endif %}{{ m.content }}", 2), ("{{ m.content or '-' }}", 2),
        ("{% if m.content.endswith('b') %}B{% endif %}{{ m.content }}", 2),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(m.content) }}", 0),
    ],
)  # fmt: skip
def test_skeletons_and_their_conditions(source: str, guards: int) -> None:
    template = ChatTemplate("<{% for m in messages %}" + source + "{% endfor %}>", {})
    forms = [plain("system"), plain("user")]
    skeleton = Tracer(template).trace(forms, [(" a ",), ("b",)], None)
    assert skeleton is not None and len(skeleton.guards) == guards
    for contents in ((" a ", "b"), (" aa\n", "bb")):
        texts = [(content,) for content in contents]
        said = [form.said(each) for form, each in zip(forms, texts, strict=True)]
        assert said == [{"role": "system", "content": contents[0]}, {"role": "user", "content": contents[1]}]
        assert skeleton.text(texts) == template.render(said)


def bodies_of_many_shapes(count: int) -> list[bytes]:
    return [
        json.dumps(
            {"messages": [{"role": f"{i:b}"[j], "content": "a"} for j in range(len(f"{i:b}"))]}
        ).encode()
        for i in range(1, count + 1)
    ]


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_fast.engine.known._MAX_PLAN_BYTES", 2000)
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    source = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    template = ChatTemplate(source, {})
    known = KnownChats(template, tokenizer.segments, 8192, limit_bytes=1 << 20)
    for body in bodies_of_many_shapes(100) * 2:
        assert check(known, template, tokenizer, body)
        assert sum(map(len, known._plans.values())) < 30
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 1000}}]
    body = json.dumps({"messages": [{"role": "1", "content": "a"}], "tools": tools}).encode()
    assert check(known, template, tokenizer, body) and len(known._plans) <= 1


def test_shapes_that_never_come_again_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_fast.engine.known._PLANS_ON_TRUST", 8)
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    source = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    template = ChatTemplate(source, {})
    known = KnownChats(template, tokenizer.segments, 8192, limit_bytes=1 << 20)
    bodies = bodies_of_many_shapes(40)

    def taken(some: list[bytes]) -> int:
        return sum(check(known, template, tokenizer, body) for body in some)

    assert taken(bodies) == 8, "on trust"
    assert taken(bodies[:20]) == 20 and known._plans_made == 20, "a second time"
    assert taken(bodies[:10] * 4) == 40
    assert taken(bodies_of_many_shapes(50)[40:]) == 4, "used 48 times, they may be 24 now"


def test_literals_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_fast.engine.known._MAX_PLAN_BYTES", 200_000)
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    source = "{{ tools | tojson }}{% for m in messages %}<think>{{ m.role }}</think>{{ m.content }}<|im_end|>"
    template = ChatTemplate(source + "{% endfor %}", {})
    known = KnownChats(template, tokenizer.segments, 1 << 20, limit_bytes=1 << 20)
    tools = [{"type": "function", "function": {"name": "f", "description": "d " * 4000}}]
    for i in range(30):
        body = json.dumps({"messages": [{"role": f"r{i}", "content": "a"}], "tools": tools}).encode()
        assert check(known, template, tokenizer, body)
        assert sum(len(text) + len(ids) for text, ids in known._literals.items()) < 200_000


def test_questions_are_bounded() -> None:
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    source = (
        "{% for m in messages %}<|im_start|>{{ 'A' if x in m.content else 'B' }}{{ m.content }}<|im_end|>"
    )
    template = ChatTemplate(source + "{% endfor %}", {})
    known = KnownChats(template, tokenizer.segments, 1 << 20, limit_bytes=1 << 20)
    for size in (1, 1024, 1025, 50_000):
        said = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": "a" * size}}
        assert check(known, template, tokenizer, json.dumps(said).encode()) == (size <= 1024)


@pytest.mark.parametrize(
    ("tokens", "none"),
    [
        ([], True), (["a"], True), (["a", "b", "ab"], False), (["ab", "abc"], False), (["bc", "abc"], False),
        (["<ab>", "b"], False), (["abc", "cde"], True), ([f"<unused{i}>" for i in range(6000)], True),
    ],
)  # fmt: skip
def test_tokens_within_another(tokens: list[str], none: bool) -> None:
    assert _none_within_another(tokens) == none


def test_a_template_without_skeletons_is_given_up() -> None:
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    template = ChatTemplate("{% for m in messages %}{{ m.content | length }}{% endfor %}", {})
    known = KnownChats(template, tokenizer.segments, 8192, limit_bytes=1 << 20)
    assert not any(map(known.take, bodies_of_many_shapes(64)))
    assert known._cut is None


def test_a_form_without_skeletons_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}"
        "{% if m.role == 'tool' %}{{ m.content | length }}{% endif %}<|im_end|>{% endfor %}"
    )
    template = ChatTemplate(source, {})
    known = KnownChats(template, tokenizer.segments, 8192, limit_bytes=1 << 20)
    traced: list[int] = []
    trace = known._tracer.trace
    monkeypatch.setattr(known._tracer, "trace", lambda *a: traced.append(1) or trace(*a))
    user, tool = {"role": "user", "content": "a"}, {"role": "tool", "content": "b"}
    for n in range(1, 40):
        assert check(known, template, tokenizer, json.dumps({"messages": [user] * n}).encode())
        assert not check(known, template, tokenizer, json.dumps({"messages": [*[user] * n, tool]}).encode())
    assert len(traced) == 39 + 16


def test_a_long_chat_without_a_skeleton_counts_once() -> None:
    tokenizer = ours(token_folders.qwen(), 1 << 20)
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}<|im_end|>{% endfor %}"
    )
    template = ChatTemplate(source, {})
    known = KnownChats(template, tokenizer.segments, 8192, limit_bytes=1 << 20)
    user, tool = {"role": "user", "content": "a"}, {"role": "tool", "content": "b"}
    assert known.take(json.dumps({"messages": [*[user] * 40, tool]}).encode()) is None
    assert check(known, template, tokenizer, json.dumps({"messages": [user]}).encode())


def test_texts_that_a_template_looks_into_leave_others_alone() -> None:
    chats = with_template(QWEN3, 1 << 20)

    def body(content: str) -> bytes:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
        return json.dumps({"messages": [*said, *said[:1]]}).encode()

    assert check(*chats, body("b"))
    for i in range(20):
        assert not check(*chats, body(f"<think>x</think>{i}"))
    assert check(*chats, body("c"))


def test_plans_refuse_what_makes_no_sense() -> None:
    here = Context("", "", "", False)
    with pytest.raises(BadArgument):
        Plan((here,), (b"",))
    with pytest.raises(BadArgument):
        Plan(("c",), (b"", b""))  # type: ignore[arg-type]
    with pytest.raises(BadArgument):
        Plan((), ("",))  # type: ignore[arg-type]
    for guard in ((1, 1, 1), (-1, 1, 1), (0, 1, 2)):
        with pytest.raises(BadArgument):
            Plan((here,), (b"", b""), (guard,))
    for form in (-1, 256):
        with pytest.raises(BadArgument):
            Message(form)


def test_a_message_at_two_places_in_other_surroundings() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{% if loop.last %}last{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    chats = with_template(source, 1 << 20)
    body = b'{"messages":[{"role":"user","content":"a"},{"role":"user","content":"a"}]}'
    for _ in range(3):
        assert check(*chats, body)
        chats[2].encode("<|im_start|>a<|im_end|><|im_start|>lasta<|im_end|>")  # costs nothing from now on


SEED = bytes(range(100, 116))


@given(st.binary(max_size=200), st.data())
def test_digests_tell_texts_apart(data: bytes, draw: st.DataObject) -> None:
    other = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 2))):
        at = draw.draw(st.integers(0, len(other)))
        other[at : at + draw.draw(st.integers(0, 2))] = draw.draw(
            st.sampled_from([b"", b"\0", b"a", b"\0\0"])
        )
    for tell in (fingerprint, functools.partial(digest, SEED)):
        assert (tell(bytes(other)) == tell(data)) == (bytes(other) == data)
        assert len(tell(data)) == 16


def test_a_digest_is_the_polynomial_that_it_claims_to_be() -> None:
    prime = 2**61 - 1
    points = [int.from_bytes(SEED[i : i + 8], "little") & prime for i in (0, 8)]
    for size in (0, 1, 6, 7, 8, 27, 28, 29, 57, 1000):
        data = bytes((7 * i + size) % 256 for i in range(size))
        padded = data.ljust(28 * max(1, -(-size // 28)), b"\0")
        expected = []
        for r in points:
            h = 0
            for at in range(0, len(padded), 7):
                h = (h + int.from_bytes(padded[at : at + 7], "little")) * r % prime
            expected.append(((h + size) * r % prime).to_bytes(8, "little"))
        assert digest(SEED, data) == b"".join(expected)
    with pytest.raises(BadArgument):
        digest(b"short", b"")
