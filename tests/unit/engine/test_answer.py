"""Whole and streamed answers: what ends them, and which calls have a stop token of their own."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest

from areal_fast.engine.answer import StreamedAnswer, whole_answer
from areal_fast.engine.detokenize import OutputRejected
from areal_fast.engine.generate import Generation, VersionRun
from areal_fast.engine.sampling import Sampling
from areal_fast.engine.segments import Prompt
from areal_fast.engine.tools import ToolParsing
from areal_fast.protocol.chat import decode_chat
from tests.unit.engine.test_tools import ONE_CALL, TOOLS
from tests.unit.service.fakes import WordTokenizer

EOS = 1
SAMPLING = Sampling(max_new_tokens=1000, stop_token_ids=(EOS,))
TOKENIZER: Any = WordTokenizer()


def answers(
    text: str, parser: str, stop: str = "stop", *, end: list[int], tools: Any = TOOLS, prompt: str = "x"
) -> tuple[str, list[tuple[str, str]], str]:
    """(content, calls, finish_reason) of the whole answer; the streamed one must be the same."""
    ids = [*map(ord, text), *end]
    parsing = ToolParsing(parser, "qwen3")
    chat = decode_chat(json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": tools}).encode())
    generation = Generation(
        output_ids=array("i", ids),
        logprobs=array("f", [0.0] * len(ids)),
        version_runs=[VersionRun(0, len(ids))],
        stop_reason=stop,
        attempts=1,
    )
    asked = Prompt.of(map(ord, prompt))
    whole = whole_answer(generation, chat, asked, SAMPLING, TOKENIZER, parsing)
    stream = StreamedAnswer(chat, asked, SAMPLING, TOKENIZER, parsing)
    pieces = [stream.add([i]) for i in ids]
    rest, reason = stream.finish(generation)
    pieces.append(rest)
    calls = [call for piece in pieces for call in piece.calls]
    assert "".join(piece.content for piece in pieces) == whole.content and reason == whole.finish_reason
    assert [call[2:] for call in calls] == [call[2:] for call in whole.calls]
    assert [call.position for call in calls] == [call.position for call in whole.calls]
    return whole.content, [(call.name, call.arguments) for call in whole.calls], whole.finish_reason


CITY = [("get_weather", '{"city": "Paris"}')]


@pytest.mark.parametrize("parser", ONE_CALL)
def test_a_call_ends_the_answer(parser: str) -> None:
    assert answers("Hm." + ONE_CALL[parser], parser, end=[EOS]) == ("Hm.", CITY, "tool_calls")
    assert answers("Hm." + ONE_CALL[parser], parser, "length", end=[]) == ("Hm.", CITY, "length")


@pytest.mark.parametrize(("parser", "end"), [("gpt-oss", ""), ("llama3", "<|eom_id|>")])
def test_calls_with_a_stop_token_of_their_own(parser: str, end: str) -> None:
    """The engine stops at <|call|> or <|eom_id|>, which is neither the tokenizer's eos nor its pad."""
    assert answers(ONE_CALL[parser] + end, parser, end=[]) == ("", CITY, "tool_calls")
    with pytest.raises(OutputRejected, match="does not end with eos or pad"):
        answers(ONE_CALL[parser] + end, parser, end=[], tools=None)
    with pytest.raises(OutputRejected, match="does not end with eos or pad"):
        answers(ONE_CALL["qwen"], "qwen", end=[])


def test_the_prompts_end_says_whether_the_answer_begins_in_reasoning() -> None:
    text = f"maybe {ONE_CALL['qwen']}</think>\n{ONE_CALL['qwen']}"
    content = f"maybe {ONE_CALL['qwen']}</think>"
    assert answers(text, "qwen", end=[EOS], prompt="a longer prompt: <think>\n") == (
        content,
        CITY,
        "tool_calls",
    )
    assert answers(text, "qwen", end=[EOS], prompt="no <think> at the end") == (
        "maybe",
        CITY * 2,
        "tool_calls",
    )
