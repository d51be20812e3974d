"""Tool parsing does not depend on how the text arrives: any cut gives the content and calls of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.engine.tools import FORMATS, CallStream, ToolParsing
from areal_fast.engine.tools.values import Call
from tests.unit.engine.test_tools import ONE_CALL, TOOLS

REASONING = {"gpt-oss": "gpt-oss", "mistral": "mistral"}


def read(parser: str, pieces: list[str], *, inside: bool = False) -> tuple[str, list[Call], bool]:
    parsing = ToolParsing(parser, REASONING.get(parser, "qwen3"))
    assert parsing.reasoning is not None
    stream = parsing.stream(TOOLS, prompt_end=parsing.reasoning[0] if inside else "")
    assert isinstance(stream, CallStream)
    content, calls = "", []
    for piece in pieces:
        text, found = stream.add(piece)
        content += text
        calls += found
    text, found = stream.finish()
    return content + text, calls + found, stream.called


def fragments(parser: str) -> st.SearchStrategy[str]:
    """Texts made of what matters to the parser: calls, pieces of calls, tags, spaces, letters."""
    form = FORMATS[parser]
    call = ONE_CALL[parser]
    hostile = call.replace("Paris", 'a</tool_call>\\"}')
    whole = st.sampled_from([call, hostile, call.replace("get_weather", "other")])
    piece = st.builds(lambda a, b: call[min(a, b) : max(a, b)], *[st.integers(0, len(call))] * 2)
    tags = st.sampled_from(
        [*form.openers, "<think>", "</think>", "[THINK]", "[/THINK]", "<|end|>",
         "<|channel|>analysis<|message|>", "</tool_call>", " ", "\n\n", ";", "{", "}", '"', "\\", "x", "é"]
    )  # fmt: skip
    return st.lists(st.one_of(whole, piece, tags), max_size=8).map("".join)


@pytest.mark.parametrize("parser", sorted(ONE_CALL))
@given(data=st.data())
def test_any_cut_gives_the_same(parser: str, data: st.DataObject) -> None:
    text = data.draw(fragments(parser))
    inside = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(parser, [text], inside=inside)
    assert read(parser, pieces, inside=inside) == whole
    assert read(parser, list(text), inside=inside) == whole
    content, calls, called = whole
    assert called == bool(calls)
    if not calls:
        assert content == text


@pytest.mark.parametrize("parser", sorted(ONE_CALL))
def test_every_single_cut(parser: str) -> None:
    call = ONE_CALL[parser]
    start, end = ("[THINK]", "[/THINK]") if parser == "mistral" else ("<think>", "</think>")
    if parser == "gpt-oss":
        start, end = "<|channel|>analysis<|message|>", "<|end|>"
    text = f"{start}or {call}?{end}\n\nSo:\n{call}\n{call.replace('Paris', 'Rome')}\n"
    whole = read(parser, [text])
    assert len(whole[1]) == 2
    for cut in range(len(text)):
        assert read(parser, [text[:cut], text[cut:]]) == whole


def test_long_texts_are_forgotten_on_the_way() -> None:
    parsing = ToolParsing("qwen", "qwen3")
    stream = parsing.stream(TOOLS)
    assert isinstance(stream, CallStream)
    calls = []
    pieces = ["word " * 10] * 1000 + [ONE_CALL["qwen"]] * 300
    for piece in pieces:
        calls += stream.add(piece)[1]
        assert len(stream._text) < 10_000
    assert len(calls) == 300
