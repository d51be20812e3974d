"""Heads and bodies: what is understood, what is refused and how."""

from __future__ import annotations

import pytest

from areal_fast.http import head
from areal_fast.http._native import RequestHead
from areal_fast.http.head import CHUNKED, UNTIL_EOF, ProtocolError, ReplyHead
from areal_fast.http.parser import END, ReplyParser, RequestParser
from tests.unit.http.serving import chunked, get, post


def parser(**bounds: int) -> RequestParser:
    limits = {
        "max_body_bytes": 1000,
        "max_header_bytes": 2000,
        "max_request_line_bytes": 300,
        "max_headers": 10,
    }
    return RequestParser(**(limits | bounds))


def events(parsed: RequestParser | ReplyParser, data: bytes) -> list[object]:
    parsed.feed(data)
    found: list[object] = []
    while (event := parsed.next()) is not None:
        found.append(event)
    return found


def head_of(data: bytes) -> RequestHead:
    head = events(parser(), data)[0]
    assert isinstance(head, RequestHead)
    return head


def refusal(data: bytes, **bounds: int) -> int:
    with pytest.raises(ProtocolError) as caught:
        events(parser(**bounds), data)
    return caught.value.status


def test_a_request_is_understood() -> None:
    head, end = events(
        parser(), b"GET /a%20b/%C3%A9?x=%20 HTTP/1.1\r\nHOST: h\r\nX-Y:  v w \t\r\nx-y: 2\r\n\r\n"
    )
    assert end is END
    assert isinstance(head, RequestHead)
    assert (head.method, head.path, head.query) == ("GET", "/a b/é", "x=%20")
    assert list(head.headers) == [(b"host", b"h"), (b"x-y", b"v w"), (b"x-y", b"2")]
    assert head.headers.get(b"x-y") == b"v w"
    assert head.headers.all(b"x-y") == [b"v w", b"2"]
    assert head.http11 and head.keep_alive and head.body_size == 0 and not head.expects_continue


@pytest.mark.parametrize(
    ("version", "connection", "keep"),
    [
        ("1.1", "", True),
        ("1.1", "close", False),
        ("1.1", "Keep-Alive, CLOSE", False),
        ("1.1", "keep-alive", True),
        ("1.0", "", False),
        ("1.0", "Keep-Alive", True),
    ],
)
def test_keep_alive(version: str, connection: str, keep: bool) -> None:
    line = f"Connection: {connection}\r\n" if connection else ""
    assert head_of(f"GET / HTTP/{version}\r\nHost: a\r\n{line}\r\n".encode()).keep_alive is keep


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/a?b?c", "/a", "b?c"),
        ("http://host:1/p?q", "/p", "q"),
        ("http://host", "/", ""),
        ("http://host?q", "/", "q"),
        ("*", "*", ""),
        ("//x/y", "//x/y", ""),
        ("/a%2Fb", "/a/b", ""),
        ("/100%", "/100%", ""),
    ],
)
def test_targets(target: str, path: str, query: str) -> None:
    head = head_of(f"OPTIONS {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert (head.path, head.query) == (path, query)


HOST = b"Host: a\r\n"
SMUGGLING = {
    "both framings": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "other order": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    "lengths differ": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
    "lengths in a list": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 4\r\n\r\n",
    "length signed": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\n",
    "length negative": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\n",
    "length hex": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\n",
    "length underscore": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\n",
    "length empty": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n",
    "length 2**64": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551616\r\n\r\n",
    "chunked twice": b"POST / HTTP/1.1\r\nHost: a\r\n" + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n",
    "chunked not last": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    "framing by fold": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n",
    "chunked in 1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "vertical tab": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
    "blank before colon": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\n\r\n",
    "blank before name": b"POST / HTTP/1.1\r\nHost: a\r\n Content-Length: 3\r\n\r\n",
    "blank before first name": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "obs-fold": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
    "NUL in value": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n",
    "NUL in name": b"GET / HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n",
    "CR in value": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n",
    "LF in value": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\nY: c\r\n\r\n",
    "LF ends line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "LF alone": b"GET / HTTP/1.1\n\n",
    "CR before request": b"\rGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
    "empty name": b"GET / HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n",
    "name with blank": b"GET / HTTP/1.1\r\nHost: a\r\nX Y: z\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "version 1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "another protocol": b"DESCRIBE / RTSP/1.0\r\nHost: a\r\n\r\n",
    "version in lower case": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "blank after version": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "blank in target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "target not ASCII": b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
    "target not UTF-8": b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without slash": b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "garbage": b"\0\0\0\0",
    "blank lines without end": b"\r\n" * 20,
}


@pytest.mark.parametrize("data", SMUGGLING.values(), ids=SMUGGLING.keys())
def test_what_could_be_read_in_two_ways_is_refused(data: bytes) -> None:
    assert refusal(data) == 400


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (417, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 200-ok\r\n\r\n"),
        (501, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"),
        (501, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
        (501, b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n"),
        (501, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"),
        (505, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (413, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n"),
        (413, chunked(b"x" * 1001)),
        (413, chunked(b"x" * 900, b"y" * 101)),
    ],
)
def test_other_refusals(status: int, data: bytes) -> None:
    assert refusal(data) == status


def test_an_offered_upgrade_is_ignored() -> None:
    data = (
        b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nhi"
        + get()
    )
    assert [type(event) for event in events(parser(), data)] == [
        RequestHead,
        bytes,
        type(END),
        RequestHead,
        type(END),
    ]


class TestSizes:
    def request(self, target: int, header: int, count: int = 1) -> bytes:
        lines = b"".join(b"X%d: %b\r\n" % (n, b"v" * header) for n in range(count))
        return b"GET /%b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (b"t" * target, lines)

    def test_the_request_line(self) -> None:
        overhead = len("GET / HTTP/1.1")
        assert len(events(parser(), self.request(300 - overhead, 1))) == 2
        assert refusal(self.request(301 - overhead, 1)) == 414
        assert refusal(b"GET /" + b"t" * 300) == 414
        assert refusal(b"GET /" + b"t" * 5000) == 414

    def test_the_head(self) -> None:
        size = len(self.request(1, 1000))
        assert len(events(parser(max_header_bytes=size), self.request(1, 1000))) == 2
        assert refusal(self.request(1, 1000), max_header_bytes=size - 1) == 431
        assert refusal(self.request(1, 1000)[:-4], max_header_bytes=size - 5) == 431

    def test_the_number_of_headers(self) -> None:
        assert len(events(parser(), self.request(1, 1, 9))) == 2
        assert refusal(self.request(1, 1, 10)) == 431

    def test_a_count_body_at_the_limit(self) -> None:
        assert events(parser(), post(b"x" * 1000))[1] == b"x" * 1000
        assert refusal(post(b"x" * 1001)) == 413

    def test_trailers(self) -> None:
        assert refusal(chunked(b"x", trailers=b"A: b\r\n" * 400)) == 431
        assert refusal(chunked(b"x", trailers=b"A: " + b"b" * 3000 + b"\r\n")) == 431


class TestChunks:
    def body(self, framed: bytes) -> bytes:
        head, *rest = events(
            parser(), b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n" + framed
        )
        assert isinstance(head, RequestHead) and head.body_size == CHUNKED
        assert rest.pop() is END
        return b"".join(rest)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("framed", "body"),
        [
            (b"0\r\n\r\n", b""),
            (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
            (b"003\r\nabc\r\n00\r\n\r\n", b"abc"),
            (b"A\r\n0123456789\r\n1\r\nx\r\n0\r\n\r\n", b"0123456789x"),
            (b'3;a=b;c="d"\r\nabc\r\n0;last\r\n\r\n', b"abc"),
            (b"3\r\nabc\r\n0\r\nA: b\r\nC:d\r\n\r\n", b"abc"),
        ],
    )
    def test_good(self, framed: bytes, body: bytes) -> None:
        assert self.body(framed) == body

    @pytest.mark.parametrize(
        "framed",
        [
            b"\r\n",
            b"x\r\n",
            b"-1\r\n",
            b"+1\r\na",
            b"0x1\r\na",
            b"1_0\r\n",
            b" 1\r\na\r\n",
            b"1 \r\na\r\n",
            b"1 ;x\r\na\r\n",
            b"1\na\r\n",
            b"1\r\nab\r\n",
            b"1\r\na\n0\r\n\r\n",
            b"1;\0\r\na\r\n",
            b"1;a\rb\r\na\r\n",
            b"00000000000000001\r\na",
            b"1;" + b"e" * 2000,
            (b"1;" + b"e" * 1000 + b"\r\na\r\n") * 20,
            b"0\r\nA b: c\r\n\r\n",
            b"0\r\nA\r\n\r\n",
            b"0\r\nA: b\n\r\n",
            b"0\r\n A: b\r\n\r\n",
        ],
    )
    def test_bad(self, framed: bytes) -> None:
        assert refusal(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + framed) == 400

    def test_a_huge_size_is_too_large_before_it_comes(self) -> None:
        assert (
            refusal(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n")
            == 413
        )


def test_a_dead_parser_stays_dead() -> None:
    dead = parser()
    with pytest.raises(ProtocolError):
        events(dead, b"\0")
    assert events(dead, get()) == []


def test_a_few_blank_lines_may_come_first() -> None:
    assert len(events(parser(), b"\r\n\r\n" + get() + b"\r\n" + get())) == 4


def test_nothing_is_read_past_a_message() -> None:
    parsed = parser()
    parsed.feed(get() + b"\0garbage")
    assert isinstance(parsed.next(), RequestHead)
    assert parsed.next() is END
    assert parsed.buffered == 8


class TestReplies:
    def parse(self, data: bytes, method: str = "GET", *, eof: bool = False, body: int = 1000) -> list[object]:
        parsed = ReplyParser(body, 2000)
        parsed.expect(method)
        found = events(parsed, data)
        if eof:
            parsed.feed_eof()
            found += events(parsed, b"")
        return found

    def test_counted(self) -> None:
        head, body, end = self.parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        assert isinstance(head, ReplyHead)
        assert (head.status, head.body_size, head.keep_alive, body, end) == (200, 2, True, b"hi", END)

    def test_chunked(self) -> None:
        found = self.parse(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"
        )
        assert found[1:] == [b"abc", END]

    def test_until_eof(self) -> None:
        head, *rest = self.parse(b"HTTP/1.0 200 OK\r\n\r\nhi", eof=True)
        assert isinstance(head, ReplyHead)
        assert (head.body_size, head.keep_alive, rest) == (UNTIL_EOF, False, [b"hi", END])

    def test_interim_replies_are_skipped(self) -> None:
        found = self.parse(b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 204 No\r\n\r\n")
        assert [getattr(found[0], "status", None), found[1]] == [204, END]

    @pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
    def test_without_body(self, status: bytes) -> None:
        assert self.parse(b"HTTP/1.1 %b\r\nContent-Length: 5\r\n\r\n" % status)[1:] == [END]

    def test_head_has_no_body(self) -> None:
        assert self.parse(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD")[1:] == [END]

    @pytest.mark.parametrize(
        "data",
        [
            b"SSH-2.0-x\r\n",
            b"HTTP/2 200\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" * 17,
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2000,
            b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ],
    )
    def test_broken(self, data: bytes) -> None:
        with pytest.raises(ProtocolError) as caught:
            self.parse(data)
        assert caught.value.status == 502

    @pytest.mark.parametrize(
        "data",
        [
            b"HTTP/1.1 20",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nh",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
        ],
    )
    def test_broken_off(self, data: bytes) -> None:
        with pytest.raises(ProtocolError):
            self.parse(data, eof=True)


def test_heads_are_kept_in_bounds_and_mean_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_requests", {})
    monkeypatch.setattr(head, "_replies", {})
    for n in range(3 * head._KNOWN):
        block = b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % n
        first = head.parse_request_head(block)
        assert head.parse_request_head(block) == first == head._parse_request_head(block)
        reply = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % n
        assert head.parse_reply_head(reply, "GET").body_size == n
        assert head.parse_reply_head(reply, "HEAD").body_size == 0, "what a head means hangs on the method"
        assert len(head._requests) <= head._KNOWN and len(head._replies) <= head._KNOWN
    head.parse_request_head(b"GET / HTTP/1.1\r\nhost: a\r\nx: %b\r\n\r\n" % (b"y" * head._KNOWN_BYTES))
    assert all(len(block) <= head._KNOWN_BYTES for block in head._requests)
    broken = b"GET / HTTP/1.1\r\n\r\n"
    for _ in range(2):
        with pytest.raises(ProtocolError):
            head.parse_request_head(broken)
    with pytest.raises(AttributeError):
        first.path = "/other"
