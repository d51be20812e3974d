"""Calls between tags whose arguments are JSON: hermes, qwen, deepseek, kimi, gpt-oss.

All are one shape: an opener, a header that ends in a tag, a JSON value, perhaps a closing tag. What
differs is where the name stands (in the JSON, or in the header) and whether a call whose closing tag is
missing counts. Closing tags are looked for behind the JSON value, never inside it: arguments may
hold them.

Source: sglang.srt.function_call.{qwen25,hermes,deepseekv3,deepseekv31,kimik2,gpt_oss}_detector (formats); the
chat templates of those models.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from areal_fast.engine.tools.stream import BAD, MORE, Bad, Block, Format, More
from areal_fast.engine.tools.values import Call, JsonEnd, Tools, call_of, calls_of, parse, skip_blank

_MAX_HEADER = 1024


class TaggedJson(Format):
    """The shape that the formats of this file share."""

    header_end: ClassVar[str] = ""
    """What stands between header and JSON; empty: there is no header."""
    closer: ClassVar[str] = ""
    close_needed: ClassVar[bool] = True
    """Is a call without its closing tag none?"""
    sections: ClassVar[tuple[str, ...]] = ()
    """Those openers that surround calls and hold nothing themselves."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._json: JsonEnd | None = None

    def calls(self, header: str, text: str) -> list[Call]:
        """The calls that header and JSON text say. Raises ValueError."""
        raise NotImplementedError

    def moved(self, by: int) -> None:
        if self._json is not None:
            self._json.moved(by)

    def block(self, text: str, start: int, final: bool) -> Block | More | Bad:
        read = self._read(text, start, final)
        if not isinstance(read, More):
            self._json = None
        return read

    def _read(self, text: str, start: int, final: bool) -> Block | More | Bad:
        opener = next(each for each in self.openers if text.startswith(each, start))
        begin = start + len(opener)
        if opener in self.sections:
            return Block([], begin)
        header = ""
        if self.header_end:
            end = text.find(self.header_end, begin, begin + _MAX_HEADER)
            if end < 0:
                return BAD if len(text) > begin + _MAX_HEADER else MORE
            header, begin = text[begin:end], end + len(self.header_end)
            if any(each in header for each in self.openers):
                return BAD
        begin = skip_blank(text, begin)
        if begin == len(text):
            return MORE
        if text[begin] != "{":
            return BAD
        if self._json is None:
            self._json = JsonEnd(begin)
        json_end = self._json.find(text)
        if json_end is None:
            return MORE
        if self._json.failed:
            return Block([], json_end)
        end = skip_blank(text, json_end)
        if text.startswith(self.closer, end):
            end += len(self.closer)
        elif not final and self.closer.startswith(text[end:]):
            return MORE
        elif self.close_needed:
            return Block([], json_end)
        try:
            return Block(self.calls(header, text[begin:json_end]), end)
        except ValueError:
            return Block([], end)


class Qwen(TaggedJson):
    """`<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`, as Qwen 2.5 and 3 write it."""

    openers = ("<tool_call>",)
    closer = "</tool_call>"

    def calls(self, header: str, text: str) -> list[Call]:
        return calls_of(parse(text), self.tools)


class Hermes(Qwen):
    """The same from Hermes models, which may leave out the closing tag."""

    close_needed = False


class DeepSeekV3(TaggedJson):
    """In a section: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{…}\\n```…`."""

    sections = ("<｜tool▁calls▁begin｜>",)
    openers = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
    header_end = "```json"
    closer = "```"

    def calls(self, header: str, text: str) -> list[Call]:
        call = call_of(header.rpartition("<｜tool▁sep｜>")[2].strip(), _object(text), self.tools)
        return [] if call is None else [call]


class DeepSeekV31(DeepSeekV3):
    """In a section: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`."""

    header_end = "<｜tool▁sep｜>"
    closer = "<｜tool▁call▁end｜>"


class KimiK2(TaggedJson):
    """`<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|>` in a section.

    As in SGLang the arguments' text stays as it is, and unknown names pass."""

    sections = ("<|tool_calls_section_begin|>",)
    openers = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    header_end = "<|tool_call_argument_begin|>"
    closer = "<|tool_call_end|>"
    strips = False
    _ID = re.compile(r"(?:functions\.)?([\w.\-]+):\d+")

    def calls(self, header: str, text: str) -> list[Call]:
        found = self._ID.fullmatch(header.strip())
        _object(text)
        return [Call(found[1], text)] if found else []


class GptOss(TaggedJson):
    """`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>` (harmony).

    `<|call|>` ends the answer, so it is often a stop token and not in the text."""

    openers = (
        "<|start|>assistant<|channel|>commentary to=",
        "<|start|>assistant<|channel|>analysis to=",
        "<|start|>assistant to=",
        "<|channel|>commentary to=",
        "<|channel|>analysis to=",
    )
    header_end = "<|message|>"
    closer = "<|call|>"
    close_needed = False
    ends_calls = True
    _NAME = re.compile(r"\s*(?:functions\.)?([\w.\-]+)")

    def calls(self, header: str, text: str) -> list[Call]:
        found = self._NAME.match(header)
        if found is None:
            return []
        name = found[1] if found[1] in self.tools else found[1].rpartition(".")[2]
        call = call_of(name, _object(text), self.tools)
        return [] if call is None else [call]


def _object(text: str) -> dict[str, Any]:
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
