"""Tool calls: each format's calls, what is plain text, reasoning, and parsers of installed engines."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from areal_fast.engine.tools import FORMATS, ParserMissing, ToolParsing
from areal_fast.engine.tools.values import JsonEnd, new_call_id, typed

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "where": {"type": "object"},
            },
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
PARIS = ("get_weather", {"city": "Paris"})

ONE_CALL = {
    "qwen": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    "hermes": '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call>",
    "llama3": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "glm45": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
    "gpt-oss": "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json"
    '<|message|>{"city": "Paris"}<|call|>',
}

SGLANG_CALLS = Path(__file__).with_name("sglang_calls.jsonl")
"""What SGLang 0.5.10's own parsers say (record_sglang.py). Chosen among more texts: those on which
ours differs on purpose or knowingly (calls cut off or malformed, text behind a call) were left out."""
SAID = [json.loads(line) for line in SGLANG_CALLS.read_text(encoding="utf-8").splitlines()]


def read(
    text: str,
    parser: str = "qwen",
    reasoning: str = "qwen3",
    tools: list[dict[str, Any]] = TOOLS,
    prompt_end: str = "",
) -> tuple[str, list[tuple[str, Any]]]:
    """(content, [(name, arguments)]) of a whole answer."""
    stream = ToolParsing(parser, reasoning).stream(tools, prompt_end=prompt_end)
    content, calls = stream.add(text)
    rest, more = stream.finish()
    assert stream.called == bool(calls + more)
    return content + rest, [(call.name, json.loads(call.arguments)) for call in calls + more]


@pytest.mark.parametrize("parser", ONE_CALL)
def test_calls_are_those_of_sglangs_own_parsers(parser: str) -> None:
    """Tools: parsed as SGLang's function-call parsers do; in a stream, wherever it is cut, the same."""
    said = [line for line in SAID if line["parser"] == parser]
    assert len(said) > 20 and any(line["calls"] for line in said)
    for line in said:
        parsing = ToolParsing(parser, line["reasoning"])
        for pieces in ([line["text"]], list(line["text"])):
            stream = parsing.stream(TOOLS)
            told = [*map(stream.add, pieces), stream.finish()]
            content = "".join(piece for piece, _ in told)
            calls = [[call.name, call.arguments] for _, found in told for call in found]
            assert (content, calls) == (line["content"], line["calls"]), line["text"]


@pytest.mark.parametrize("parser", ONE_CALL)
def test_one_call(parser: str) -> None:
    content, calls = read("Let me check." + ONE_CALL[parser], parser)
    assert (content, calls) == ("Let me check.", [PARIS])


@pytest.mark.parametrize("parser", ONE_CALL)
def test_two_calls_and_text_around_them(parser: str) -> None:
    text = "Both." + ONE_CALL[parser] + "\n" + ONE_CALL[parser].replace("Paris", "Rome") + "\nbye"
    content, calls = read(text, parser)
    assert content == "Both."
    assert calls == [PARIS, ("get_weather", {"city": "Rome"})]


@pytest.mark.parametrize("parser", ONE_CALL)
def test_text_without_a_call_stays_as_it_is(parser: str) -> None:
    text = "  Let's see: 2 < 3, [a], {b}\n<tool_ca <| [TOOL <｜tool▁call\n "
    assert read(text, parser) == (text, [])


@pytest.mark.parametrize("parser", ONE_CALL)
def test_a_call_that_is_cut_off_is_text(parser: str) -> None:
    call = ONE_CALL[parser]
    for end in range(1, call.index("Paris") + 5):
        assert read("So. " + call[:end], parser) == ("So. " + call[:end], [])


@pytest.mark.parametrize("parser", ONE_CALL)
def test_calls_in_reasoning_are_no_calls(parser: str) -> None:
    text = f"<think>maybe {ONE_CALL[parser]} or\n</think>"
    assert read(text, parser) == (text, [])
    content, calls = read(text + "Now:" + ONE_CALL[parser].replace("Paris", "Oslo"), parser)
    assert (content, calls) == (text + "Now:", [("get_weather", {"city": "Oslo"})])
    assert read("<think>unclosed " + ONE_CALL[parser], parser) == (
        "<think>unclosed " + ONE_CALL[parser],
        [],
    )


def test_reasoning_that_the_prompt_began() -> None:
    call = ONE_CALL["qwen"]
    text = f"I could {call}\n</think>\n\n{call}"
    assert read(text, prompt_end="<|im_start|>assistant\n<think>\n") == (f"I could {call}\n</think>", [PARIS])
    assert read(text, reasoning="none", prompt_end="<think>\n") == ("I could", [PARIS, PARIS])


def test_reasoning_tags_by_name() -> None:
    call = ONE_CALL["qwen"]
    hidden = f"◁think▷{call}◁/think▷"
    assert read(hidden, reasoning="kimi") == (hidden, [])
    assert read(hidden, reasoning="qwen3") == ("◁think▷", [PARIS])
    analysis = "<|channel|>analysis<|message|>" + ONE_CALL["gpt-oss"] + "<|end|>"
    content, calls = read(analysis + ONE_CALL["gpt-oss"], "gpt-oss", "gpt-oss")
    assert (content, calls) == (analysis, [PARIS])


def test_white_space_before_a_call_goes_and_stays_without_one() -> None:
    assert read("Hm. \n\n" + ONE_CALL["qwen"])[0] == "Hm."
    assert read("<think>x</think>\n\n" + ONE_CALL["qwen"])[0] == "<think>x</think>"
    assert read("Hm. \n\n<tool_call>{bad}</tool_call>\n")[0] == "Hm. \n\n<tool_call>{bad}</tool_call>\n"


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "unknown_fn", "arguments": {}}',
        '{"name": "get_weather", "arguments": {bad json}',
        '{"name": "get_weather", "arguments": {"city": "\\ud800"}}',
        '{"name": "get_weather", "arguments": {"n": NaN}}',
        '{"name": 5, "arguments": {}}',
        '{"arguments": {}}',
        '"get_weather"',
        "[]",
        "",
        "{" * 5000,
        '{"a":' * 3000 + "1" + "}" * 3000,
    ],
)
def test_what_cannot_be_read_is_text(body: str) -> None:
    text = f"Well.\n<tool_call>\n{body}\n</tool_call>"
    assert read(text) == (text, [])


def test_a_bad_call_before_a_good_one_is_dropped() -> None:
    for bad in ("{bad json}", '{"name": "x}', '{"name": "get_time"'):
        text = f"Go.\n<tool_call>\n{bad}\n</tool_call>\n{ONE_CALL['qwen']}"
        expected = ("Go.", [PARIS]) if bad != '{"name": "get_time"' else (text, [])
        assert read(text) == expected, bad


def test_arguments_are_spelled_as_sglang_does() -> None:
    stream = ToolParsing("qwen", "qwen3").stream(TOOLS)
    text = '<tool_call>\n{"name":"get_weather","arguments":{"city":"M\\u00fcnchen","n":1.50,"l":[1,{}]}}\n'
    _, (call,) = stream.add(text + "</tool_call>")
    assert call.arguments == '{"city": "München", "n": 1.5, "l": [1, {}]}'


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('"arguments": {}', {}),
        ('"arguments": null', {}),
        ('"arguments": ""', {}),
        ('"parameters": {"a": 1}', {"a": 1}),
        ('"arguments": "{\\"a\\": 1}"', {"a": 1}),
        (
            '"arguments": {"a": "</tool_call>", "b": "<tool_call>{\\"}"}',
            {"a": "</tool_call>", "b": '<tool_call>{"}'},
        ),
        ('"arguments": {"a": {"b": [{"c": "}]"}]}}', {"a": {"b": [{"c": "}]"}]}}),
        ('"arguments": {"a": "\\ud83d\\ude00 \\\\"}', {"a": "😀 \\"}),
    ],
)
def test_arguments(written: str, meant: Any) -> None:
    for parser in ("qwen", "hermes"):
        text = f'<tool_call>\n{{"name": "get_time", {written}}}\n</tool_call>'
        assert read(text, parser) == ("", [("get_time", meant)])


def test_hermes_needs_no_closing_tag_and_qwen_does() -> None:
    text = '<tool_call>\n{"name": "get_time", "arguments": {}}'
    assert read(text, "hermes") == ("", [("get_time", {})])
    assert read(text, "qwen") == (text, [])


def test_qwen3_coder_types_values_by_schema() -> None:
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n<parameter=exact>true</parameter>\n<parameter=where>\n{'a': [1, None]}\n</parameter>\n"
        "<parameter=other>null</parameter>\n</function>\n</tool_call>"
    )
    want = {"city": "12", "days": 3, "exact": True, "where": {"a": [1, None]}, "other": None}
    assert read(text, "qwen3_coder") == ("", [("get_weather", want)])
    assert read(text.removesuffix("</tool_call>"), "qwen3_coder") == ("", [("get_weather", want)])
    two = "<tool_call><function=a></function><function=b></function></tool_call>"
    assert read(two, "qwen3_coder") == ("", [("a", {}), ("b", {})])


def test_glm_types_values_and_takes_calls_without_arguments() -> None:
    text = (
        "<tool_call>get_weather\\n<arg_key>city</arg_key>\\n<arg_value>12</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value><arg_key>x</arg_key><arg_value>[1]</arg_value>"
        '<arg_key>y</arg_key><arg_value>"q"</arg_value>'
        "<arg_key>z</arg_key><arg_value>q r</arg_value></tool_call>"
    )
    want = {"city": "12", "days": 3, "x": [1], "y": "q", "z": "q r"}
    assert read(text, "glm45") == ("", [("get_weather", want)])
    assert read("<tool_call>get_time</tool_call>", "glm45") == ("", [("get_time", {})])


def test_typed_values_never_become_what_json_cannot_say() -> None:
    number = {"type": "number"}
    assert typed("1.5", number) == 1.5 and typed("2", number) == 2 and typed("1e3", number) == 1000.0
    for text in ("nan", "inf", "1e999", "x", "9" * 5000):
        assert typed(text, number) == text
    assert typed("{1, 2}", {"type": "array"}) == "{1, 2}"
    assert typed("[" * 9999, {"type": "array"}) == "[" * 9999
    assert typed("5", {"type": ["null", "integer"]}) == 5
    assert typed("5", {"anyOf": [{"type": "integer"}]}) == 5


def test_llama_calls_without_tag_and_several() -> None:
    a, b = '{"name": "get_time", "parameters": {}}', '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert read(a, "llama3") == ("", [("get_time", {})])
    assert read(f"{a}; {b}", "llama3") == ("", [("get_time", {}), PARIS])
    assert read(f"<|python_tag|>{a};{b}<|eom_id|>", "llama3") == ("", [("get_time", {}), PARIS])
    assert read(f"<|python_tag|>{a};", "llama3") == ("", [("get_time", {})])
    assert read(f"Text {a}", "llama3") == (f"Text {a}", [])
    assert read('{"answer": 42}', "llama3") == ('{"answer": 42}', [])


def test_mistral_both_ways() -> None:
    weather = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    two = f'[TOOL_CALLS] [{{"name": "get_time", "arguments": {{}}}}, {weather}]'
    assert read(two, "mistral") == ("", [("get_time", {}), PARIS])
    new = '[TOOL_CALLS]get_time[ARGS]{}[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{"city": "Paris"}'
    assert read(new, "mistral") == ("", [("get_time", {}), PARIS])


def test_gpt_oss_without_call_token_and_other_spellings() -> None:
    first = "<|channel|>analysis<|message|>hm<|end|>"
    for head in (
        "<|start|>assistant<|channel|>commentary to=functions.get_time <|constrain|>json",
        "<|start|>assistant to=functions.get_time<|channel|>commentary json",
        "<|channel|>commentary to=get_time",
    ):
        assert read(f"{first}{head}<|message|>{{}}", "gpt-oss", "gpt-oss") == (first, [("get_time", {})])


def test_tools_in_any_shape_are_survived() -> None:
    strange: list[dict[str, Any]] = [{}, {"type": "function"}, {"function": 5}, {"function": {"name": 5}}]
    assert read(ONE_CALL["qwen"], tools=strange) == (ONE_CALL["qwen"], [])
    odd = [
        {"function": {"name": "get_weather", "parameters": parameters}}
        for parameters in (5, {"properties": 5})
    ]
    for tool in odd:
        assert read(ONE_CALL["qwen3_coder"], "qwen3_coder", tools=[tool]) == ("", [PARIS])


def test_when_to_parse() -> None:
    parsing = ToolParsing("qwen", "qwen3")
    assert (
        parsing.wanted(TOOLS, None) and parsing.wanted(TOOLS, "auto") and parsing.wanted(TOOLS, {"type": "x"})
    )
    assert (
        not parsing.wanted(TOOLS, "none") and not parsing.wanted(None, None) and not parsing.wanted([], None)
    )
    assert not ToolParsing("none", "none").wanted(TOOLS, None)


def test_names() -> None:
    for name in FORMATS:
        assert ToolParsing(name, "none").wanted(TOOLS, None)
    with pytest.raises(ParserMissing, match="no parser 'qwen9'; there are qwen, "):
        ToolParsing("qwen9", "qwen3")
    with pytest.raises(ParserMissing, match="--reasoning-parser: no parser 'x'"):
        ToolParsing("qwen", "x")


def test_an_engine_that_is_not_installed_is_said_in_one_line() -> None:
    with pytest.raises(ParserMissing) as raised:
        ToolParsing("sglang:qwen25", "qwen3")
    assert "cannot load the tool parser sglang:qwen25" in str(raised.value)
    assert "\n" not in str(raised.value)


def _sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of sglang's shape: its parser takes `CALL name` for a call, and fails at `BOOM`."""

    class Parser:
        ToolCallParserEnum = {"qwen25": object}  # noqa: RUF012

        def __init__(self, tools: list[Any], name: str) -> None:
            assert name == "qwen25"
            self.names = [tool.function.name for tool in tools]

        def has_tool_call(self, text: str) -> bool:
            return "CALL" in text

        def parse_non_stream(self, text: str) -> tuple[str, list[Any]]:
            if "BOOM" in text:
                raise RuntimeError("boom")
            before, _, name = text.partition("CALL ")
            return before, [types.SimpleNamespace(name=name, parameters="{}")] if name in self.names else []

    class Typed:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    protocol = types.ModuleType("sglang.srt.entrypoints.openai.protocol")
    protocol.Tool = protocol.Function = Typed  # type: ignore[attr-defined]
    parser = types.ModuleType("sglang.srt.function_call.function_call_parser")
    parser.FunctionCallParser = Parser  # type: ignore[attr-defined]
    for module in (protocol, parser):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for depth in range(1, module.__name__.count(".") + 1):
            name = ".".join(module.__name__.split(".")[:depth])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_an_installed_engines_parser_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _sglang(monkeypatch)
    assert read("<think>CALL x</think>Hm. CALL get_time", "sglang:qwen25") == (
        "<think>CALL x</think>Hm. ",
        [("get_time", {})],
    )
    for text in ("Hm. CALL nobody", "plain", "BOOM CALL get_time"):
        assert read(text, "sglang:qwen25") == (text, [])
    with pytest.raises(ParserMissing, match="sglang has no tool parser 'other'; it has qwen25"):
        ToolParsing("sglang:other", "qwen3")


def test_nothing_heavy_is_imported_unasked() -> None:
    code = (
        "import sys, areal_fast.engine.tools as t; t.ToolParsing('qwen', 'qwen3');"
        "print([m for m in ('torch', 'transformers', 'sglang', 'vllm', 'asyncio') if m in sys.modules])"
    )
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "sglang", "vllm"} & set(json.loads(heavy.replace("'", '"')))


def test_call_ids() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(i) == 29 and i.startswith("call_") for i in ids)


def test_the_end_of_a_json_value() -> None:
    text = '{"a": "}\\"]", "b": [1, {"c": "\\\\"}]} rest'
    for cut in range(1, len(text)):
        end = JsonEnd(0)
        first = end.find(text[:cut])
        assert (first if first is not None else end.find(text)) == text.index(" rest")
    for bad in ("{]", '{"a\nb"}'):
        end = JsonEnd(0)
        assert end.find(bad) is not None and end.failed


def test_hostile_text_costs_little() -> None:
    """The number of steps is bounded by the text, not its square: a watchdog of pytest-timeout, no clock."""
    parts = ['<tool_call>{"', "<tool_call>{", "<tool_call><function=", "<tool_call>a<arg_key>", "<parameter="]
    for parser in ONE_CALL:
        for part in [
            *parts,
            "[TOOL_CALLS] [{",
            "<｜tool▁call▁begin｜>",
            "<|tool_call_begin|>",
            "<|channel|>commentary to=",
        ]:
            text = part * 10_000
            assert read(text, parser) == (text, [])
