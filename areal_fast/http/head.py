"""Heads of messages: bytes up to the empty line → RequestHead or ReplyHead. No I/O, no clock, no state.

llhttp (httptools) reads the syntax in its strict mode: tokens, control characters, obs-fold, blanks before
colons, bare CR and LF, lengths that are not plain digits or stand twice. It is given exactly one head and
then dropped; a fresh one costs 0.3 µs. Requests of the usual form are not shown to it: `read_head` knows
them, and a property test holds the two against each other. What the head says about framing is decided here
and nowhere else, by RFC 9112 section 6 read strictly: wherever two parties could disagree about where a
message ends, the message is refused. A head is immutable, and shared by all requests that had the same.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

import httptools
import msgspec

from areal_fast.http._native import Headers, RequestHead, read_head

CHUNKED = -1
UNTIL_EOF = -2

_ENCODED_BODY = re.compile(rb"\r\ntransfer-encoding:[ \t]*([!-~]+)", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length[ \t]*:", re.IGNORECASE)
_UNKNOWN_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32} [^ \r\n]+ HTTP/1\.[01]\r\n")
_VERSION = re.compile(rb"HTTP/\d\.\d")
_SCHEME = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)


class ProtocolError(Exception):
    """The peer broke HTTP or a limit. `status` is what a server answers; a client calls it a broken reply."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class ReplyHead(msgspec.Struct, gc=False, frozen=True):
    """One reply without its body. body_size is a count, CHUNKED or UNTIL_EOF."""

    status: int
    headers: Headers
    keep_alive: bool
    body_size: int


class _Fields:
    """Receives llhttp's callbacks."""

    __slots__ = ("pairs", "url")

    def __init__(self) -> None:
        self.pairs: list[tuple[bytes, bytes]] = []
        self.url = b""

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        # "Bearer " with nothing behind it is a wrong key to the original, "Bearer" a malformed header
        self.pairs.append((name, value if name == b"authorization" else value.rstrip(b" \t")))


_KNOWN = 512
_KNOWN_BYTES = 1024
_requests: dict[bytes, RequestHead] = {}
_replies: dict[tuple[bytes, str], ReplyHead] = {}


def parse_request_head(block: bytes) -> RequestHead:
    """`block` ends with the first empty line. Raises ProtocolError 400, 417, 501 or 505.

    The last few that were not of the usual form are kept with what they mean, which depends on nothing else:
    a client's heads repeat byte for byte."""
    head = read_head(block) or _requests.get(block)
    if head is None:
        head = _parse_request_head(block)
        if len(block) <= _KNOWN_BYTES:
            if len(_requests) >= _KNOWN:
                _requests.clear()
            _requests[block] = head
    return head


def _parse_request_head(block: bytes) -> RequestHead:
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        pass  # no upgrade is offered here, so the request is answered as if none had been asked for
    except httptools.HttpParserError as error:
        raise _refused(block, error) from None
    end = block.find(b"\r\n")
    version = block[end - 8 : end]
    if version == b"HTTP/1.1":
        http11 = True
    elif version == b"HTTP/1.0":
        http11 = False
    else:
        if _VERSION.fullmatch(version) and version[5] != 48:
            raise ProtocolError(505, "HTTP Version Not Supported")
        raise ProtocolError(400, "Malformed request line")
    headers = Headers(fields.pairs)
    get = headers.get
    method = parser.get_method().decode("ascii")
    if method == "CONNECT":
        raise ProtocolError(501, "CONNECT is not supported")
    if http11 and b"host" not in headers:
        raise ProtocolError(400, "Missing Host header")
    if headers.repeats and len(headers.all(b"host")) > 1:
        raise ProtocolError(400, "More than one Host header")
    expects = False
    expect = get(b"expect")
    if expect is not None and http11:
        if expect.lower() != b"100-continue" or len(headers.all(b"expect")) > 1:
            raise ProtocolError(417, "Expectation Failed")
        expects = True
    body_size = _request_body(headers, http11)
    path, query = _split_target(fields.url)
    connection = get(b"connection")
    if connection is None:
        keep_alive = http11
    elif http11:
        keep_alive = not headers.has_token(b"connection", b"close")
    else:
        keep_alive = headers.has_token(b"connection", b"keep-alive")
    return RequestHead(method, path, query, headers, http11, keep_alive, body_size, expects)


def _request_body(headers: Headers, http11: bool) -> int:
    encoding = headers.get(b"transfer-encoding")
    length = headers.get(b"content-length")
    if encoding is None:
        return int(length) if length is not None else 0  # plain digits, once: llhttp made sure
    if length is not None:
        raise ProtocolError(400, "Both Content-Length and Transfer-Encoding")
    if not http11:
        raise ProtocolError(400, "Transfer-Encoding in an HTTP/1.0 request")
    if encoding.lower() != b"chunked" or len(headers.all(b"transfer-encoding")) > 1:
        raise ProtocolError(501, "Unsupported Transfer-Encoding")
    return CHUNKED


def _refused(block: bytes, error: Exception) -> ProtocolError:
    if isinstance(error, httptools.HttpParserInvalidMethodError) and _UNKNOWN_METHOD.match(block):
        return ProtocolError(501, "Unknown method")
    encoding = _ENCODED_BODY.search(block)
    if encoding is not None and not _LENGTH.search(block) and b"chunked" not in encoding[1].lower():
        return ProtocolError(501, "Unsupported Transfer-Encoding")
    return ProtocolError(400, f"Malformed request: {error}" if str(error) else "Malformed request")


def _split_target(url: bytes) -> tuple[str, str]:
    if url[:1] != b"/" and url != b"*":
        scheme = _SCHEME.match(url)
        if scheme is None:
            raise ProtocolError(400, "Malformed request target")
        url = url[scheme.end() :]
        if url[:1] != b"/":
            url = b"/" + url
    if b"#" in url:
        raise ProtocolError(400, "Malformed request target")
    path, _, query = url.partition(b"?")
    if b"%" in path:
        path = unquote_to_bytes(path)
        try:
            return path.decode("utf-8"), query.decode("ascii")
        except UnicodeDecodeError:
            raise ProtocolError(400, "Path is not UTF-8") from None
    return path.decode("ascii"), query.decode("ascii")


def parse_reply_head(block: bytes, method: str) -> ReplyHead:
    """`block` ends with the first empty line; `method` is the request's. Raises ProtocolError (502). The last
    few are kept, as those of requests."""
    head = _replies.get((block, method))
    if head is None:
        head = _parse_reply_head(block, method)
        if len(block) <= _KNOWN_BYTES:
            if len(_replies) >= _KNOWN:
                _replies.clear()
            _replies[block, method] = head
    return head


def _parse_reply_head(block: bytes, method: str) -> ReplyHead:
    fields = _Fields()
    parser = httptools.HttpResponseParser(fields)
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        raise ProtocolError(502, "Reply switches protocols") from None
    except httptools.HttpParserError as error:
        raise ProtocolError(502, f"Malformed reply: {error}") from None
    version = block[:8]
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise ProtocolError(502, "Reply is not HTTP/1")
    status = parser.get_status_code()
    headers = Headers(fields.pairs)
    encoding = headers.get(b"transfer-encoding")
    length = headers.get(b"content-length")
    if method == "HEAD" or status < 200 or status in (204, 304):
        body_size = 0
    elif encoding is not None:
        if length is not None or len(headers.all(b"transfer-encoding")) > 1 or encoding.lower() != b"chunked":
            raise ProtocolError(502, "Reply's framing is ambiguous or unknown")
        body_size = CHUNKED
    elif length is not None:
        body_size = int(length)
    else:
        body_size = UNTIL_EOF
    if version == b"HTTP/1.1":
        keep_alive = not headers.has_token(b"connection", b"close")
    else:
        keep_alive = headers.has_token(b"connection", b"keep-alive")
    return ReplyHead(status, headers, keep_alive and body_size != UNTIL_EOF, body_size)
