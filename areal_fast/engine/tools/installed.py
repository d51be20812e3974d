"""SGLang's or vLLM's own tool parsers, where they are installed and asked for (`sglang:NAME`, `vllm:NAME`).

They import torch, so nothing here is touched unless a flag names it, and then each worker that serves pays
for the import once, at its start: what is missing is said there, in one line. These parsers want the whole
text, so a stream with tools shows its content at the end.

Source: areal.experimental.openai.tool_call_parser (how they are called).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from areal_fast.engine.tools.values import Call

_log = logging.getLogger(__name__)


class ParserMissing(Exception):
    """The parser that a flag names cannot be had. str() is one clear line."""


class Whole(Protocol):
    """Parses whole texts."""

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[Call]]:
        """(content before the calls, calls). May raise anything."""
        ...


def load(kind: str, name: str, tokenizer_path: str) -> Whole:
    """Import the parser. Raises ParserMissing. Takes seconds, and the memory of an inference engine."""
    try:
        return _SGLang(name) if kind == "sglang" else _VLLM(name, tokenizer_path)
    except ParserMissing:
        raise
    except Exception as error:  # whatever a foreign package raises while it loads
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ParserMissing(f"cannot load the tool parser {kind}:{name}: {reason}") from error


class _SGLang:
    def __init__(self, name: str) -> None:
        protocol = importlib.import_module("sglang.srt.entrypoints.openai.protocol")
        parser = importlib.import_module("sglang.srt.function_call.function_call_parser")
        self._name = name
        self._tool, self._function = protocol.Tool, protocol.Function
        self._parser = parser.FunctionCallParser
        known = getattr(self._parser, "ToolCallParserEnum", None)
        if isinstance(known, Mapping) and name not in known:
            raise ParserMissing(f"sglang has no tool parser {name!r}; it has {', '.join(sorted(known))}")

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[Call]]:
        typed = [self._tool(type=tool["type"], function=self._function(**tool["function"])) for tool in tools]
        parser = self._parser(typed, self._name)
        if not parser.has_tool_call(text):
            return text, []
        content, items = parser.parse_non_stream(text)
        return content, [Call(item.name, item.parameters) for item in items]


class _VLLM:
    def __init__(self, name: str, tokenizer_path: str) -> None:
        manager = importlib.import_module("vllm.tool_parsers").ToolParserManager
        transformers = importlib.import_module("transformers")
        try:
            parser = manager.get_tool_parser(name)
        except KeyError as error:
            raise ParserMissing(f"vllm has no tool parser {name!r}") from error
        self._parser = parser
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[Call]]:
        request = SimpleNamespace(tools=list(tools), tool_choice=None, skip_special_tokens=True)
        found = self._parser(self._tokenizer).extract_tool_calls(text, request)
        if not found.tools_called:
            return text, []
        calls = [Call(call.function.name, call.function.arguments) for call in found.tool_calls]
        return found.content or "", calls


class WholeStream:
    """An answer's text for a parser that wants all of it. The same face as stream.CallStream."""

    def __init__(
        self,
        whole: Whole,
        tools: Sequence[Mapping[str, Any]],
        reasoning: tuple[str, str] | None,
        *,
        starts_inside: bool,
    ) -> None:
        self._whole = whole
        self._tools = tools
        self._reasoning = reasoning
        self._starts_inside = starts_inside
        self._parts: list[str] = []
        self.called = False

    def add(self, text: str) -> tuple[str, list[Call]]:
        self._parts.append(text)
        return "", []

    def finish(self) -> tuple[str, list[Call]]:
        text = "".join(self._parts)
        hidden = self._hidden(text)
        try:
            content, calls = self._whole.parse(text[hidden:], self._tools)
        except Exception as error:  # a parse failure is the plain text, never an error
            _log.warning("the tool parser failed: %r", error)
            return text, []
        self.called = bool(calls)
        return (text[:hidden] + content, calls) if calls else (text, [])

    def _hidden(self, text: str) -> int:
        """Length of the reasoning at the beginning."""
        if self._reasoning is None or not (self._starts_inside or self._reasoning[0] in text):
            return 0
        at = text.find(self._reasoning[1])
        return len(text) if at < 0 else at + len(self._reasoning[1])
