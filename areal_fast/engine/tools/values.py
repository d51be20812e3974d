"""What tool calls are made of: names, arguments as JSON text, JSON values found in running text. Pure.

Arguments leave as JSON text spelled as SGLang spells it (a space after `,` and `:`, no escapes beyond the
needed), whatever spelling the model used. JSON is read strictly (RFC 8259): NaN, raw control characters and
half surrogate pairs make a call that cannot be read.

`JsonEnd` finds where a value ends without parsing it, looking at each character once however the text
comes: brackets are counted outside strings, and a raw line end inside a string shows that it is no JSON.

Source: sglang.srt.function_call.base_format_detector (behaviour).
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

_OUTSIDE: Final = re.compile(r'["{}\[\]]')
_INSIDE: Final = re.compile(r'["\\\x00-\x1f]')
_BLANK: Final = re.compile(r"[ \t\r\n]*")
_MAX_LITERAL: Final = 1 << 16


class Call(NamedTuple):
    """One tool call."""

    name: str
    arguments: str
    """A JSON text, of an object unless the model wrote something else."""


class Tools:
    """The tools of a request: which names there are, and the schemas of their parameters."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools` as in a chat request, or flat as in a Responses request; what has no name is ignored."""
        self._parameters: dict[str, Any] = {}
        for tool in tools:
            function = tool.get("function", tool)
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                self._parameters[function["name"]] = function.get("parameters")

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def schema(self, name: str, parameter: str) -> Mapping[str, Any] | None:
        """The schema of a parameter, or None if it has none."""
        parameters = self._parameters.get(name)
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return schema if isinstance(schema, Mapping) else None


def new_call_id() -> str:
    """`call_` and 24 random hex digits."""
    return "call_" + os.urandom(12).hex()


def parse(text: str) -> Any:
    """The JSON value. Raises ValueError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ValueError(str(error)) from error


def spelled(value: Any) -> str | None:
    """`value` as JSON text; None if it cannot be written."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return None


def call_of(name: Any, arguments: Any, tools: Tools, *, any_name: bool = False) -> Call | None:
    """A call, or None if the name is unknown or the arguments cannot be written."""
    if not isinstance(name, str) or not name or (name not in tools and not any_name):
        return None
    if isinstance(arguments, str):
        try:
            arguments = parse(arguments or "{}")  # an object that was written as a string
        except ValueError:
            pass
    text = spelled({} if arguments is None else arguments)
    return None if text is None else Call(name, text)


def calls_of(value: Any, tools: Tools) -> list[Call]:
    """The calls in what a model wrote as `{"name", "arguments"}` (or "parameters"), or a list of them."""
    found = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            call = call_of(each.get("name"), each.get("parameters") or each.get("arguments"), tools)
            if call is not None:
                found.append(call)
    return found


def skip_blank(text: str, at: int) -> int:
    """The first position from `at` without white space."""
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]


class JsonEnd:
    """The end of the JSON object or array that begins at `start` (a bracket)."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.failed = False
        self._at = start
        self._end: int | None = None
        self._open: list[str] = []
        self._in_string = False

    def find(self, text: str) -> int | None:
        """Where it ends, or where it turned out to be no JSON (`failed`); None: not yet."""
        if self._end is None:
            self._end = self._search(text)
        return self._end

    def _search(self, text: str) -> int | None:
        at = self._at
        while True:
            match = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
            if match is None:
                self._at = len(text)
                return None
            at, found = match.end(), match.group()
            if found == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                if found != "\\":
                    self.failed = True
                    return at
                if at == len(text):
                    self._at = at - 1  # what it escapes is still to come
                    return None
                at += 1
            elif found in "{[":
                self._open.append("}" if found == "{" else "]")
            elif not self._open or self._open.pop() != found:
                self.failed = True
                return at
            elif not self._open:
                return at

    def moved(self, by: int) -> None:
        self.start -= by
        self._at -= by
        if self._end is not None:
            self._end -= by


def literal(text: str) -> Any:
    """A Python literal that is a JSON value too. Raises ValueError."""
    if len(text) > _MAX_LITERAL:
        raise ValueError("too long")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(str(error)) from error
    if spelled(value) is None:
        raise ValueError("not a JSON value")
    return value


def typed(text: str, schema: Mapping[str, Any] | None) -> Any:
    """A parameter that was written as bare text, as its schema wants it; the text where that cannot be."""
    kind = schema.get("type") if schema is not None else "string"
    if isinstance(kind, list):
        kind = next((each for each in kind if each != "null"), "string")
    if not isinstance(kind, str):
        kind = "any" if schema is not None and ("anyOf" in schema or "oneOf" in schema) else "string"
    kind = kind.strip().lower()
    if kind in ("string", "str", "text", "varchar", "char", "enum"):
        return text
    try:
        if kind.startswith(("int", "uint", "long", "short", "unsigned")):
            return int(text)
        if kind.startswith(("num", "float")):
            number = float(text)
            whole = number.is_integer() and "." not in text and "e" not in text.lower()
            return int(text) if whole else number if math.isfinite(number) else text
        if kind in ("boolean", "bool", "binary"):
            return {"true": True, "false": False}.get(text.lower(), text)
        return parse(text)
    except ValueError:
        pass
    try:
        return literal(text)
    except ValueError:
        return text
