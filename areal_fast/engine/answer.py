"""From the engine's token ids to what the client reads: content, tool calls, the reason it ended.

Whole or streamed it is the same: ids to text (detokenize.py), text to content and calls (tools). The joined
pieces of a StreamedAnswer are the whole answer. Requests without tools are not parsed at all.

The reason is the engine's, but "stop" becomes "tool_calls" when there were calls.
Source: the wire page, "Chat" and "Tools".
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from areal_fast.engine.detokenize import ContentStream, visible_output
from areal_fast.engine.generate import Generation
from areal_fast.engine.sampling import Sampling
from areal_fast.engine.segments import Prompt
from areal_fast.engine.tokenizer import Tokenizer
from areal_fast.engine.tools import Call, CallStream, ToolParsing, WholeStream, new_call_id
from areal_fast.protocol.chat import ChatRequest

_PROMPT_END = 16
"""How many tokens of the prompt are looked at for an opened reasoning tag."""


class ToolCall(NamedTuple):
    """One call as it is told to the client."""

    position: int
    id: str
    name: str
    arguments: str
    """JSON text."""


class Piece(NamedTuple):
    """A piece of an answer: the content comes before the calls."""

    content: str
    calls: list[ToolCall]


class Answer(NamedTuple):
    """A whole answer."""

    content: str
    calls: list[ToolCall]
    finish_reason: str
    """stop, length or tool_calls."""


class StreamedAnswer:
    """One answer as its tokens come."""

    def __init__(
        self,
        chat: ChatRequest,
        prompt: Prompt,
        sampling: Sampling,
        tokenizer: Tokenizer,
        parsing: ToolParsing | None,
    ) -> None:
        self._parser = _parser(chat, prompt, tokenizer, parsing)
        self._content = ContentStream(
            tokenizer.incremental(),
            sampling.stop_token_ids,
            stop_strings=_may_end_otherwise(sampling, self._parser, parsing),
        )
        self._calls = 0

    def add(self, ids: Sequence[int]) -> Piece:
        """What is certain now that `ids` have come."""
        text = self._content.add(ids)
        if self._parser is None or not text:
            return Piece(text, [])
        return self._piece(*self._parser.add(text))

    def finish(self, generation: Generation) -> tuple[Piece, str]:
        """The rest, and the finish_reason. Raises OutputRejected (502)."""
        text = self._content.finish(generation.stop_reason)
        if self._parser is None:
            return Piece(text, []), generation.stop_reason
        content, calls = self._parser.add(text)
        rest, more = self._parser.finish()
        return self._piece(content + rest, calls + more), _reason(generation, self._parser)

    def _piece(self, content: str, calls: list[Call]) -> Piece:
        found = _identified(calls, self._calls)
        self._calls += len(found)
        return Piece(content, found)


def whole_answer(
    generation: Generation,
    chat: ChatRequest,
    prompt: Prompt,
    sampling: Sampling,
    tokenizer: Tokenizer,
    parsing: ToolParsing | None,
) -> Answer:
    """What a generation says. Raises OutputRejected (502)."""
    parser = _parser(chat, prompt, tokenizer, parsing)
    visible = visible_output(
        generation.output_ids,
        generation.stop_reason,
        sampling.stop_token_ids,
        stop_strings=_may_end_otherwise(sampling, parser, parsing),
    )
    text = tokenizer.decode(visible)
    if parser is None:
        return Answer(text, [], generation.stop_reason)
    content, calls = parser.add(text)
    rest, more = parser.finish()
    return Answer(content + rest, _identified(calls + more, 0), _reason(generation, parser))


def _parser(
    chat: ChatRequest, prompt: Prompt, tokenizer: Tokenizer, parsing: ToolParsing | None
) -> CallStream | WholeStream | None:
    if parsing is None or not chat.tools or not parsing.wanted(chat.tools, chat.tool_choice):
        return None
    last = array("i")
    last.frombytes(prompt.data[-4 * _PROMPT_END :])
    return parsing.stream(chat.tools, prompt_end=tokenizer.decode(last))


def _may_end_otherwise(
    sampling: Sampling, parser: CallStream | WholeStream | None, parsing: ToolParsing | None
) -> bool:
    """May an answer that stopped end without a stop token? With stop strings; and with tools, for models that
    close a call by a token of its own."""
    return bool(sampling.stop) or (parser is not None and parsing is not None and parsing.ends_calls)


def _reason(generation: Generation, parser: CallStream | WholeStream) -> str:
    return "tool_calls" if parser.called and generation.stop_reason == "stop" else generation.stop_reason


def _identified(calls: list[Call], first: int) -> list[ToolCall]:
    return [ToolCall(first + i, new_call_id(), call.name, call.arguments) for i, call in enumerate(calls)]
