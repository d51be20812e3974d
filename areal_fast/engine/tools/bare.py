"""Calls that are JSON without closing tags: llama3 and mistral.

Llama writes objects one after the other, separated by `;`, behind `<|python_tag|>` or at the very
beginning of the answer. Mistral writes `[TOOL_CALLS]` and a list of objects, or, in newer models, a name,
`[ARGS]` and an object for each call. Nothing but the JSON says where a call ends.

Source: sglang.srt.function_call.{llama32,mistral}_detector (formats).
"""

from __future__ import annotations

from typing import Any

from areal_fast.engine.tools.stream import BAD, MORE, Bad, Block, Format, More
from areal_fast.engine.tools.values import Call, JsonEnd, Tools, call_of, calls_of, parse, skip_blank


class _Bare(Format):
    """Reads JSON values one after the other."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._json: JsonEnd | None = None

    def moved(self, by: int) -> None:
        if self._json is not None:
            self._json.moved(by)

    def _value(self, text: str, start: int) -> tuple[Any, int] | More:
        """(the JSON value at `start`, its end); the value is None where there is none."""
        if self._json is None:
            self._json = JsonEnd(start)
        end, failed = self._json.find(text), self._json.failed
        if end is None:
            return MORE
        self._json = None
        if failed:
            return None, end
        try:
            return parse(text[start:end]), end
        except ValueError:
            return None, end


class Llama3(_Bare):
    """`<|python_tag|>{"name": …, "parameters": {…}}; {…}`, the tag optional at the beginning."""

    openers = ("<|python_tag|>",)
    strips = False
    ends_calls = True  # <|eom_id|>

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._calls: list[Call] = []
        self._end = 0  # of the last value read in this block

    def opens_at_start(self, first: str) -> bool:
        return first == "{"

    def moved(self, by: int) -> None:
        super().moved(by)
        self._end -= by

    def block(self, text: str, start: int, final: bool) -> Block | More | Bad:
        read = self._read(text, start)
        if isinstance(read, More):
            if not final or not self._calls:
                return MORE
            read = Block([], self._end)
        calls, self._calls = self._calls, []
        return Block(calls, read.end) if isinstance(read, Block) else read

    def _read(self, text: str, start: int) -> Block | More | Bad:
        """Reads values into `_calls` until something else than `;` follows one."""
        while True:
            if self._calls:
                at = skip_blank(text, self._end)
                if at < len(text) and text[at] != ";":
                    return Block([], self._end)
                at = skip_blank(text, at + 1)
            else:
                tag = self.openers[0]
                at = skip_blank(text, start + (len(tag) if text.startswith(tag, start) else 0))
            if at >= len(text):
                return MORE
            if text[at] not in "{[":
                return Block([], self._end) if self._calls else BAD
            read = self._value(text, at)
            if isinstance(read, More):
                return MORE
            value, end = read
            calls = calls_of(value, self.tools)
            if not calls:
                return Block([], end)
            self._calls += calls
            self._end = end


class Mistral(_Bare):
    """`[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]` or `[TOOL_CALLS]NAME[ARGS]{…}`."""

    openers = ("[TOOL_CALLS]",)
    _MAX_NAME = 256

    def block(self, text: str, start: int, final: bool) -> Block | More | Bad:
        begin = skip_blank(text, start + len(self.openers[0]))
        if begin == len(text):
            return MORE
        name = ""
        if text[begin] != "[":
            end = text.find("[ARGS]", begin, begin + self._MAX_NAME)
            if end < 0:
                return BAD if len(text) > begin + self._MAX_NAME else MORE
            # some put a call's id between name and arguments
            name = text[begin:end].partition("[CALL_ID]")[0].strip()
            begin = skip_blank(text, end + len("[ARGS]"))
            if begin == len(text):
                return MORE
            if text[begin] != "{":
                return BAD
        read = self._value(text, begin)
        if isinstance(read, More):
            return MORE
        value, end = read
        if not name:
            return Block(calls_of(value, self.tools), end)
        call = call_of(name, value, self.tools) if isinstance(value, dict) else None
        return Block([] if call is None else [call], end)
