"""Calls written as elements: qwen3_coder (functions and parameters) and glm45 (keys and values).

Values are bare text, so the parameter's schema decides what they become (values.typed). The block ends at its
closing tag; a call cut off before it is not taken for one.

Source: sglang.srt.function_call.{qwen3_coder,glm4_moe,glm47_moe}_detector (formats); the chat templates of
those models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from areal_fast.engine.tools.stream import MORE, Bad, Block, Format, More
from areal_fast.engine.tools.values import Call, Tools, call_of, parse, typed


class Element(Format):
    """A block between `<tool_call>` and `</tool_call>`."""

    openers = ("<tool_call>",)
    closer: ClassVar[str] = "</tool_call>"

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._searched = 0

    def calls(self, body: str) -> list[Call]:
        raise NotImplementedError

    def moved(self, by: int) -> None:
        self._searched = max(0, self._searched - by)

    def block(self, text: str, start: int, final: bool) -> Block | More | Bad:
        begin = start + len(self.openers[0])
        end = text.find(self.closer, max(begin, self._searched))
        if end < 0:
            self._searched = len(text) - len(self.closer)
            return Block(self.unclosed(text[begin:]), len(text)) if final else MORE
        self._searched = 0
        return Block(self.calls(text[begin:end]), end + len(self.closer))

    def unclosed(self, body: str) -> list[Call]:
        """The calls of a block whose closing tag never came."""
        return []


class Qwen3Coder(Element):
    """`<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>`, any number of functions.

    As in SGLang unknown names pass, the closing tag of the block may be missing, and `null` is null."""

    strips = False
    _PARAMETER = re.compile(r"<parameter=([^>]*)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)

    def unclosed(self, body: str) -> list[Call]:
        return self.calls(body)

    def calls(self, body: str) -> list[Call]:
        found = []
        for function in body.split("<function=")[1:]:
            head, closing_tag, _ = function.partition("</function>")
            name, mark, parameters = head.partition(">")
            if not closing_tag or not mark:
                continue
            arguments: dict[str, Any] = {}
            for key, value in self._PARAMETER.findall(parameters):
                value = value.removeprefix("\n").removesuffix("\n")
                schema = self.tools.schema(name, key)
                arguments[key] = None if value.lower() == "null" else typed(value, schema)
            call = call_of(name, arguments, self.tools, any_name=True)
            if call is not None:
                found.append(call)
        return found


class Glm45(Element):
    """`NAME\\n<arg_key>KEY</arg_key>\\n<arg_value>VALUE</arg_value>\\n`; newer ones without line ends, and
    some with `\\n` in two characters."""

    _BLANK = re.compile(r"(?:\\n|\s)*")

    def calls(self, body: str) -> list[Call]:
        head, *pairs = body.split("<arg_key>")
        name = head.replace("\\n", " ").strip()
        arguments: dict[str, Any] = {}
        for pair in pairs:
            key, _, rest = pair.partition("</arg_key>")
            rest = rest[self._BLANK.match(rest).end() :]  # type: ignore[union-attr]
            value, closing_tag, _ = rest.removeprefix("<arg_value>").partition("</arg_value>")
            if closing_tag and rest.startswith("<arg_value>"):
                arguments[key.strip()] = _glm_value(value, self.tools.schema(name, key.strip()))
        call = call_of(name, arguments, self.tools)
        return [] if call is None else [call]


def _glm_value(text: str, schema: Mapping[str, Any] | None) -> Any:
    """A value as its schema wants it; without one, as the JSON it is, else as text."""
    value = typed(text, schema if schema is not None else {"type": "any"})
    if value == text and len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return parse(text)  # a string that was written with its quotes
        except ValueError:
            pass
    return value
