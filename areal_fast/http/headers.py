"""Header fields as sent. (Those received are _native.Headers.)

The fixed part of a reply's head is cached by status and content type, the date once a second. No name or
value from a caller reaches the wire unless it is a token or free of CR, LF and NUL, so that no reply can be
split by a header (RFC 9110 5.5, RFC 9112 11.1).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus

import msgspec

HeaderPairs = Iterable[tuple[bytes, bytes]]

JSON = b"application/json"

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection", b"date", b"content-type"})
_MAX_CACHED = 256


def is_token(name: bytes) -> bool:
    return _TOKEN.fullmatch(name) is not None


def is_value(value: bytes) -> bool:
    return _VALUE.fullmatch(value) is not None


def encode_headers(headers: HeaderPairs) -> bytes:
    """`name: value` lines. ValueError for what cannot be a header, or what this layer writes itself."""
    lines = []
    for name, value in headers:
        if not is_token(name) or not is_value(value):
            raise ValueError(f"not a header: {name!r}: {value!r}")
        if name.lower() in _FRAMING:
            raise ValueError(f"{name.decode()} is written by the HTTP layer")
        lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines)


def error_body(detail: str) -> bytes:
    return msgspec.json.encode({"detail": detail})


class ReplyHeads:
    """Builds reply heads up to, and without, the framing fields. One a server."""

    def __init__(self) -> None:
        self._prefixes: dict[tuple[int, bytes], bytes] = {}
        self._second = 0

    def prefix(self, status: int, content_type: bytes) -> bytes:
        """Status line, date and content type. ValueError if the status or the type cannot be sent."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._prefixes.clear()
        known = self._prefixes.get((status, content_type))
        return known if known is not None else self._build(status, content_type)

    def _build(self, status: int, content_type: bytes) -> bytes:
        if not 200 <= status <= 599:
            raise ValueError(f"not a final status: {status}")
        if not is_value(content_type):
            raise ValueError(f"not a content type: {content_type!r}")
        built = b"HTTP/1.1 %d %b\r\ndate: %b\r\n" % (
            status,
            _REASONS.get(status, b"Unknown"),
            formatdate(self._second, usegmt=True).encode(),
        )
        if content_type:
            built += b"content-type: %b\r\n" % content_type
        if len(self._prefixes) < _MAX_CACHED:
            self._prefixes[(status, content_type)] = built
        return built
