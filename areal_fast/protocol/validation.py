"""Lax conversions and 422 details as the original's validation library words them.

The hot path never comes here: bodies are decoded by msgspec in one pass (messages.py). Only when that
refuses a body is it parsed again, converted field by field with the conversions below (the original accepts
"0.75" for a float, true for 1.0, "2" for an int), and, if that fails too, explained: one error a field, in
the order the fields are declared, with the exact `type` and `msg` texts clients have seen so far.

Differs from the original, on purpose: floats must be finite; text must be valid Unicode and may be bounded.
A converter takes (value, loc) and returns the converted value or raises Invalid.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from areal_fast.errors import InvalidBody, UnreadableBody

Loc = tuple[str | int, ...]
Converter = Callable[[Any, Loc], Any]

_INT_TEXT = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*(?:\.0+)?")
_MAX_INT_DIGITS = 4300
_TOO_BIG = "Unable to parse input string as an integer, exceeded maximum size"
_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE = frozenset({"0", "off", "f", "false", "n", "no"})


class Invalid(Exception):
    """One or more errors of one value."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(errors)
        self.errors = errors


def error(kind: str, loc: Loc, msg: str, value: Any, **ctx: Any) -> dict[str, Any]:
    """One entry of the `detail` list."""
    entry: dict[str, Any] = {"type": kind, "loc": list(loc), "msg": msg, "input": value}
    if ctx:
        entry["ctx"] = ctx
    return entry


def _fail(kind: str, loc: Loc, msg: str, value: Any, **ctx: Any) -> Invalid:
    return Invalid([error(kind, loc, msg, value, **ctx)])


def text(value: Any, loc: Loc, *, max_bytes: int = 0, forbid_nul: bool = False) -> str:
    """A str that is valid Unicode; with `max_bytes`, at most so long in UTF-8."""
    if not isinstance(value, str):
        raise _fail("string_type", loc, "Input should be a valid string", value)
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise _fail(
            "string_unicode",
            loc,
            "Input should be a valid string, unable to parse raw data as a unicode string",
            value,
        ) from None
    if max_bytes and size > max_bytes:
        raise _fail(
            "string_too_long",
            loc,
            f"String should have at most {max_bytes} characters",
            value,
            max_length=max_bytes,
        )
    if forbid_nul and "\0" in value:
        reason = "text must not contain NUL"
        raise _fail("value_error", loc, f"Value error, {reason}", value, error=reason)
    return value


def integer(value: Any, loc: Loc, *, at_most: int | None = None) -> int:
    """An int, or what the original takes for one: bool, a float without fraction, decimal text."""
    result: int
    if isinstance(value, int):
        result = int(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _fail("finite_number", loc, "Input should be a finite number", value)
        if not value.is_integer():
            raise _fail(
                "int_from_float",
                loc,
                "Input should be a valid integer, got a number with a fractional part",
                value,
            )
        if not -(2.0**63) < value < 2.0**63:
            raise _fail("int_parsing_size", loc, _TOO_BIG, value)
        result = int(value)
    elif isinstance(value, str):
        stripped = value.strip()
        if not _INT_TEXT.fullmatch(stripped):
            raise _fail(
                "int_parsing",
                loc,
                "Input should be a valid integer, unable to parse string as an integer",
                value,
            )
        digits = stripped.partition(".")[0]
        if len(digits) > _MAX_INT_DIGITS:
            raise _fail("int_parsing_size", loc, _TOO_BIG, value)
        result = int(digits)
    else:
        raise _fail("int_type", loc, "Input should be a valid integer", value)
    if at_most is not None and result > at_most:
        raise _fail(
            "less_than_equal",
            loc,
            f"Input should be less than or equal to {at_most}",
            value,
            le=at_most,
        )
    return result


def number(value: Any, loc: Loc) -> float:
    """A finite float, or what the original takes for one: int, bool, text."""
    if isinstance(value, (int, float)):
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
    elif isinstance(value, str):
        try:
            result = float(_plain_digits(value))
        except ValueError:
            raise _fail(
                "float_parsing",
                loc,
                "Input should be a valid number, unable to parse string as a number",
                value,
            ) from None
    else:
        raise _fail("float_type", loc, "Input should be a valid number", value)
    if not math.isfinite(result):
        raise _fail("finite_number", loc, "Input should be a finite number", value)
    return result


def _plain_digits(value: str) -> str:
    """Text that Python's float reads exactly if the original reads `value`: blanks around a number, or single
    underscores inside it, but not both, and no digits but 0 to 9."""
    if not value.strip().isascii():
        return ""
    if "_" not in value:
        return value.strip()
    if value != value.strip() or value.startswith("_") or value.endswith("_") or "__" in value:
        return ""
    return value.replace("_", "")


def boolean(value: Any, loc: Loc) -> bool:
    """A bool, 0 or 1, or one of the usual words."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and -(2**63) <= value < 2**63 and value == int(value):
        if value in (0, 1):
            return bool(value)
    elif isinstance(value, str):
        word = value.lower()
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    else:
        raise _fail("bool_type", loc, "Input should be a valid boolean", value)
    raise _fail("bool_parsing", loc, "Input should be a valid boolean, unable to interpret input", value)


def texts(value: Any, loc: Loc) -> list[str]:
    """A list of str."""
    if not isinstance(value, list):
        raise _fail("list_type", loc, "Input should be a valid list", value)
    out: list[str] = []
    errors: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        try:
            out.append(text(item, (*loc, i)))
        except Invalid as exc:
            errors += exc.errors
    if errors:
        raise Invalid(errors)
    return out


def optional(convert: Converter) -> Converter:
    """null passes through."""
    return lambda value, loc: None if value is None else convert(value, loc)


_REQUIRED = object()


class Field(NamedTuple):
    """One declared field of a body."""

    name: str
    convert: Converter
    default: Any = _REQUIRED


def parse_json(body: bytes) -> Any:
    """The body as the original's JSON reader sees it (NaN and Infinity literals pass here). InvalidBody where
    it is not JSON; UnreadableBody where the reader itself fails."""
    try:
        return json.loads(body)
    except json.JSONDecodeError as exc:
        raise InvalidBody(
            [error("json_invalid", ("body", exc.pos), "JSON decode error", {}, error=exc.msg)]
        ) from None
    except (ValueError, RecursionError):
        # No Unicode, nested deeper than the interpreter's stack, a number longer than it converts.
        raise UnreadableBody from None


def convert_body(value: Any, fields: Sequence[Field]) -> dict[str, Any]:
    """All fields of a parsed body. Raises InvalidBody naming every field that is wrong, in order."""
    if value is None:
        raise InvalidBody([error("missing", ("body",), "Field required", None)])
    if not isinstance(value, dict):
        raise InvalidBody(
            [
                error(
                    "model_attributes_type",
                    ("body",),
                    "Input should be a valid dictionary or object to extract fields from",
                    value,
                )
            ]
        )
    out: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    for name, convert, default in fields:
        loc = ("body", name)
        if name not in value:
            if default is _REQUIRED:
                errors.append(error("missing", loc, "Field required", value))
            else:
                out[name] = default
            continue
        try:
            out[name] = convert(value[name], loc)
        except Invalid as exc:
            errors += exc.errors
    if errors:
        raise InvalidBody(errors)
    return out


def detail_json(errors: list[dict[str, Any]]) -> bytes:
    """`{"detail": […]}` as compact JSON. Numbers JSON has no word for become null, lone surrogates escapes,
    and an `input` that is nested too deeply to be written back null."""
    try:
        return _detail_json(errors)
    except RecursionError:
        return _detail_json([{**entry, "input": None} for entry in errors])


def _detail_json(errors: list[dict[str, Any]]) -> bytes:
    body = {"detail": _printable(errors)}
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def _printable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _printable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_printable(v) for v in value]
    return value
