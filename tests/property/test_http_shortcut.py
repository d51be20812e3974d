"""The short way of a request (_native.pyx) against the long one: same heads, same replies, same state.

`read_head` may decline anything; what it takes must mean what llhttp and head.py make of it. A connection
that gets its input in one piece, and so may take the short way, must answer as one that gets it byte by byte,
which never does.
"""

from __future__ import annotations

import asyncio
import random
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from areal_fast.http import Client, Exchange, Limits, Server
from areal_fast.http._client import Link, Pool, Request
from areal_fast.http._native import WORTH_FILLING, RequestHead, read_head, read_reply
from areal_fast.http.client_connection import EngineConnection
from areal_fast.http.connection import Connection
from areal_fast.http.head import _parse_reply_head, _parse_request_head
from areal_fast.http.parser import END, ReplyParser
from tests.unit.http.serving import chunked, get, post
from tests.unit.http.test_parser import SMUGGLING

names = st.sampled_from(
    [
        "Host",
        "host",
        "Content-Length",
        "Connection",
        "Authorization",
        "Accept",
        "Accept-Encoding",
        "User-Agent",
    ]
    + ["Content-Type", "Transfer-Encoding", "Expect", "Upgrade", "Proxy-Connection", "Idempotency-Key", "X_y"]
    + ["X Y", "", "X:", "Hos t", "content-lengt", "h\x00st", "é"]
)
values = st.one_of(
    st.sampled_from(["a", "0", "5", "005", "+5", "5 ", "5,5", " a ", "", "\t", "a\tb", "close", "Keep-Alive"])
    | st.sampled_from(
        ["keep-alive, close", "chunked", "100-continue", "Bearer ", "Bearer  x ", "9" * 20, "é"]
    )
    | st.sampled_from(["a\rb", "a\nb", "a\x00", "a\x7fb", "a\r\n b"]),
    st.text(max_size=6),
)
targets = st.one_of(
    st.sampled_from(
        ["/", "/a/b", "/a?b=c&d", "/a?b?c", "/%41", "/a#b", "*", "http://h/p", "//x", "a", "/é", "/a b"]
    )
    | st.sampled_from(
        ["/rl/start_session", "/v1/chat/completions", "/~a;b,c='(d)'", '/"', "/a\\b", "/?", "/|"]
    ),
    st.text(max_size=5).map(lambda text: "/" + text),
)
methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "get", "POSTS", "P"])
versions = st.sampled_from(["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/2.0", "http/1.1", "HTTP/1.10", ""])
ends = st.sampled_from(["\r\n"] * 12 + ["\n", "\r", "\r\r\n"])


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """One head, usual or not, that ends with its first empty line."""
    lines = [f"{draw(methods)} {draw(targets)} {draw(versions)}"]
    fields = draw(
        st.lists(st.tuples(names, st.sampled_from([":", ": ", ":  ", " :", ":\t"]), values), max_size=6)
    )
    if draw(st.integers(0, 4)):
        fields.insert(0, ("Host", ": ", "a"))
    lines += ["".join(field) for field in fields]
    text = "".join(line + draw(ends) for line in lines) + "\r\n"
    block = text.encode("utf-8", "surrogatepass")
    return block[: block.find(b"\r\n\r\n") + 4] if b"\r\n\r\n" in block else block + b"\r\n\r\n"


def plain(head: RequestHead) -> tuple[Any, ...]:
    return (
        (head.method, head.path, head.query, list(head.headers), head.http11)
        + (head.keep_alive, head.body_size, head.expects_continue)
        + tuple(head.headers.get(name) for name, _ in head.headers)
    )


@settings(max_examples=500, deadline=None)
@given(heads())
@example(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 005\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\nConnection: Close\r\n\r\n")
def test_what_is_taken_means_the_same_to_llhttp(block: bytes) -> None:
    head = read_head(block)
    if head is not None:
        assert plain(head) == plain(_parse_request_head(block))


@pytest.mark.parametrize("name", sorted(SMUGGLING))
def test_no_attack_is_taken(name: str) -> None:
    data = SMUGGLING[name]
    end = data.find(b"\r\n\r\n") + 4
    head = read_head(data[:end])
    if head is not None:
        assert plain(head) == plain(_parse_request_head(data[:end]))


def test_usual_heads_are_taken_and_cut_ones_are_not() -> None:
    block = (
        b"POST /rl/set_reward?a=b HTTP/1.1\r\nhost: 127.0.0.1:8082\r\nAccept: */*\r\nUser-Agent: x/1 (y)\r\n"
        b"Content-Type: application/json\r\nauthorization: Bearer abc-_=\r\nAccept-Encoding: gzip, br\r\n"
        b"X-Request-Id: 7\r\nConnection: keep-alive\r\ncontent-length:17\r\n\r\n"
    )
    head = read_head(block)
    assert head is not None and plain(head) == plain(_parse_request_head(block))
    assert all(read_head(block[:size]) is None for size in range(len(block)))
    assert read_head(block + b"x") is None
    assert read_head(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 40 + b"\r\n") is None


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    """A reply, usual or not, with a body that may be shorter or longer than it says."""
    odd = ["200", "200 ", "503 No\tway", "204 X", "304 X", "100 X", "20 X", "2000 X"]
    status = draw(st.sampled_from(["200 OK"] * 4 + odd))
    body = draw(st.binary(max_size=8))
    fields = draw(st.lists(st.tuples(names, st.sampled_from([":", ": ", " :"]), values), max_size=4))
    if draw(st.integers(0, 4)):
        fields.insert(0, ("Content-Length", ": ", str(len(body))))
    lines = [f"{draw(versions)} {status}", *("".join(field) for field in fields)]
    text = "".join(line + draw(ends) for line in lines) + "\r\n"
    return text.encode("utf-8", "surrogatepass") + body


@settings(max_examples=500, deadline=None)
@given(replies())
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
@example(b"HTTP/1.1 500 Oh no\r\nServer: x\r\nContent-Length: 0\r\n\r\n")
def test_a_reply_that_is_taken_means_the_same_to_the_parser(data: bytes) -> None:
    found = read_reply(data, 4096)
    if found is None:
        return
    status, headers, keep_alive, body = found
    parser = ReplyParser(1000, 4096)
    parser.feed(data)
    head = parser.next()
    assert head == _parse_reply_head(data[: data.find(b"\r\n\r\n") + 4], "GET")
    assert (status, list(headers), keep_alive, len(body)) == (
        (head.status, list(head.headers), head.keep_alive, head.body_size)  # type: ignore[union-attr]
    )
    if body:
        assert parser.next() == body
    assert parser.next() is END and parser.buffered == 0


def test_usual_replies_are_taken_and_cut_ones_are_not() -> None:
    reply = b"HTTP/1.1 200 OK\r\ndate: x\r\nserver: uvicorn\r\ncontent-length: 2\r\nX-Y: a/b\r\n\r\n{}"
    found = read_reply(reply, 4096)
    assert found is not None and (found[0], found[2], found[3]) == (200, True, b"{}")
    assert all(read_reply(reply[:size], 4096) is None for size in range(len(reply)))
    assert read_reply(reply + b"H", 4096) is None
    assert read_reply(reply, len(reply) - 3) is None and read_reply(reply, len(reply) - 2) is not None


def told(pieces: list[bytes], most: int) -> tuple[Any, ...]:
    """What a request learns of a reply that comes in these pieces, and whether its connection is kept."""

    async def ask() -> tuple[Any, ...]:
        client, ended = Client("http://h"), []
        connection = EngineConnection(client, most, 4096)
        connection.connection_made(Sink())
        client._released(connection, True)
        client.begin("POST", "/", b"{}", timeout_s=60, done=ended.append)
        for piece in pieces:
            if not connection.closed:
                connection.data_received(piece)
        kept = connection in client._idle
        connection.eof_received()
        client.close()
        (request,) = ended
        if request.error is not None:
            return kept, type(request.error)
        head = request.head
        return kept, request.status, head.status, list(head.headers), head.keep_alive, request.take_body()

    return asyncio.run(ask())


@settings(max_examples=300, deadline=None)
@given(replies(), st.sampled_from([1000, 4]))
@example(b"HTTP/1.1 200 OK\r\nset-cookie: a\r\nset-cookie: b\r\ncontent-length: 2\r\n\r\n{}", 1000)
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{   }", 4)
@example(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", 1000)
@example(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}", 1000)
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}H", 1000)
@example(b"HTTP/1.1 200 OK\r\n\r\nto the end", 1000)
def test_a_reply_in_one_piece_is_told_as_one_byte_by_byte(data: bytes, most: int) -> None:
    """The one by _client.pyx where that takes it, the other never."""
    bytewise = [data[i : i + 1] for i in range(len(data))]
    assert told([data], most) == told(bytewise, most)


class Sink(asyncio.Transport):
    """Takes what is written. Never full."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False
        self.high: int | None = None

    def write(self, data: Any) -> None:
        self.written += data

    def writelines(self, pieces: Iterable[Any]) -> None:
        for piece in pieces:
            self.written += piece

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self.closed:
            raise RuntimeError("unable to perform operation; the handler is closed")  # as uvloop does
        self.high = high

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def write_eof(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


LIMITS = Limits(
    max_body_bytes=200, max_header_bytes=300, max_request_line_bytes=100, max_headers=8, small_body_bytes=50
)
Handler = Callable[[Exchange], Awaitable[None] | None]


def at_once(exchange: Exchange) -> None:
    seen = [exchange.method, exchange.path, exchange.query, list(exchange.headers), exchange.body]
    exchange.respond(200, repr(seen).encode())


async def _later(exchange: Exchange) -> None:
    await asyncio.sleep(0)
    at_once(exchange)


def later(exchange: Exchange) -> Awaitable[None]:
    return _later(exchange)


async def answers(handler: Handler, pieces: list[bytes]) -> tuple[bytes, tuple[Any, ...]]:
    """What is written for `pieces` (without dates), and the state it ends in."""
    server = Server(handler, LIMITS)
    server._loop = asyncio.get_running_loop()
    connection, sink = Connection(server, ("127.0.0.1", 1)), Sink()
    connection.connection_made(sink)
    for piece in pieces:
        connection.data_received(piece)
        while connection._exchange is not None:
            await asyncio.sleep(0)
    rest = connection._clean or connection._state != 0
    state = (connection.idle, rest, connection.due > 0, connection._state, server.body_bytes, server.refused)
    server.wheel.stop()
    return re.sub(rb"date: [^\r]*", b"date:", bytes(sink.written)), state


body = st.binary(max_size=60)
requests = st.one_of(
    st.builds(get, st.sampled_from(["/", "/a?b", "/%41"]), st.sampled_from(["X: y", "Connection: close"])),
    st.builds(post, body),
    st.builds(post, st.binary(min_size=180, max_size=220)),
    st.builds(lambda n: get("/" + "t" * n), st.integers(80, 100)),
    st.builds(lambda n: get("/", "X: " + "v" * n), st.integers(240, 280)),
    st.builds(lambda n: get("/", *[f"X{i}: y" for i in range(n)]), st.integers(5, 9)),
    st.just(b"\r\n"),
    st.builds(chunked, body.filter(bool)),
    st.sampled_from(sorted(SMUGGLING.values())),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(requests, min_size=1, max_size=4), st.sampled_from([at_once, later]))
def test_one_piece_is_answered_as_many_are(messages: list[bytes], handler: Handler) -> None:
    async def both() -> None:
        whole = await answers(handler, messages)
        cut = await answers(handler, [bytes([byte]) for message in messages for byte in message])
        assert whole == cut

    asyncio.run(both())


def test_usual_requests_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    long: list[bytes] = []
    whole = Connection._received
    monkeypatch.setattr(Connection, "_received", lambda self, data: (long.append(data), whole(self, data))[1])
    usual = [get("/health"), get("/health"), post(b"{}", "/rl/start_session"), post(b"x" * 60), get("/a?b")]
    for handler in (at_once, later):
        written, state = asyncio.run(answers(handler, usual))
        assert written.count(b"HTTP/1.1 200 OK") == len(usual) and state == (True, True, True, 0, 0, 0)
    assert long == []
    asyncio.run(answers(at_once, [get() + get(), get(), post(b"x" * 201)]))
    assert len(long) == 2


class Rewired(Sink):
    """One that knows its protocol, as Fill and Intake change it."""

    protocol: asyncio.BaseProtocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def carry(self, data: bytes) -> None:
        while data:
            if isinstance(self.protocol, asyncio.BufferedProtocol):
                view = memoryview(self.protocol.get_buffer(len(data)))  # type: ignore[arg-type]
                took = min(len(view), len(data))
                view[:took] = data[:took]
                view.release()
                self.protocol.buffer_updated(took)
            else:
                assert isinstance(self.protocol, asyncio.Protocol)
                took = len(data)
                self.protocol.data_received(data)
            data = data[took:]


class Summing:
    """A sink of bodies: their length and last byte."""

    waiting = False
    when_ready = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.seen = bytearray()
        self._room = memoryview(bytearray(40_000))

    def feed(self, data: bytes | memoryview) -> None:
        self.seen += data

    def buffer(self) -> memoryview:
        return self._room

    def took(self, nbytes: int) -> None:
        self.seen += self._room[:nbytes]

    def drop(self) -> None: ...


async def carried(pieces: list[bytes], limits: Limits, *, to_sinks: bool) -> tuple[bytes, tuple[Any, ...]]:
    """As `answers`, of bodies large enough to be read past the parser; and how many began past it, too."""

    def handler(exchange: Exchange) -> None:
        body = exchange.sink.seen if isinstance(exchange.sink, Summing) else exchange.body
        exchange.respond(200, b"%s %d %d" % (exchange.path.encode(), len(body), zlib.crc32(body)))

    server = Server(handler, limits, sinks=(lambda head: Summing()) if to_sinks else None)
    server._loop = asyncio.get_running_loop()
    connection, sink = Connection(server, ("127.0.0.1", 1)), Rewired()
    sink.protocol = connection
    connection.connection_made(sink)
    for piece in pieces:
        sink.carry(piece)
    rest = connection._clean or connection._state != 0
    state = (connection.idle, rest, connection.due > 0, connection._state, server.body_bytes, server.refused)
    server.wheel.stop()
    return re.sub(rb"date: [^\r]*", b"date:", bytes(sink.written)), state


@settings(max_examples=60, deadline=None)
@given(
    st.integers(WORTH_FILLING, 3 * WORTH_FILLING),
    st.integers(0, 3 * WORTH_FILLING),
    st.integers(1, 3 * WORTH_FILLING),
    st.sampled_from([1 << 20, 2 * WORTH_FILLING]),
    st.sampled_from([1 << 20, 2 * WORTH_FILLING]),
    st.booleans(),
)
def test_a_large_body_is_the_same_however_it_begins(
    size: int, start: int, more: int, most: int, together: int, to_sinks: bool
) -> None:
    limits = Limits(max_body_bytes=most, max_bodies_bytes=together)
    message = post(random.Random(size).randbytes(size))
    head = message.index(b"\r\n\r\n") + 4
    begun: list[int] = []
    whole = Connection._begun

    def noted(self: Connection, head: RequestHead, start: memoryview) -> None:
        begun.append(len(start))
        whole(self, head, start)

    def cut(*places: int) -> list[bytes]:
        cuts = [0, *(place for place in places if place < len(message)), len(message)]
        return [*(message[a:b] for a, b in pairwise(cuts)), get("/next")]

    async def both() -> None:
        by_parser = await carried(cut(5, head), limits, to_sinks=to_sinks)
        assert not begun
        assert await carried(cut(head + start, head + start + more), limits, to_sinks=to_sinks) == by_parser
        assert bool(begun) == (size <= most and size - start > WORTH_FILLING)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "_begun", noted)
        asyncio.run(both())


@pytest.mark.parametrize("lost", [False, True])
def test_whether_an_awaited_reply_was_sent_is_told(lost: bool) -> None:
    async def serve() -> None:
        asked: list[Exchange] = []
        told: list[bool] = []
        release = asyncio.Event()

        async def answer(exchange: Exchange) -> None:
            asked.append(exchange)
            exchange.on_sent(told.append)
            await release.wait()
            exchange.respond(200, b"{}")

        errors: list[Exception] = []
        server = Server(answer, LIMITS, on_error=lambda what, error: errors.append(error))
        server._loop = asyncio.get_running_loop()
        connection, sink = Connection(server, ("127.0.0.1", 1)), Sink()
        connection.connection_made(sink)
        connection.data_received(get())
        while not asked:
            await asyncio.sleep(0)
        if lost:
            sink.closed = True
            connection.connection_lost(None)
        release.set()
        while not asked[0].finished:
            await asyncio.sleep(0)
        assert told == [not lost] and errors == [] and connection._exchange is None
        assert sink.high == LIMITS.write_high_water
        assert (connection._clean and connection.due > 0) or lost
        server.wheel.stop()

    asyncio.run(serve())


def test_an_exchange_of_no_connection_is_an_error_and_no_crash() -> None:
    with pytest.raises(AttributeError):
        Exchange().method


def test_a_request_of_no_client_is_an_error_and_no_crash() -> None:
    request = Request()
    assert request.head is None and request.connection is None
    request.cancel()
    for call in (request.take_body, lambda: Pool().begin("GET", "/", timeout_s=1, done=print)):
        with pytest.raises((AttributeError, TypeError)):
            call()
    link = Link.__new__(Link)
    for act in (link.close, lambda: link.send(request, "GET", b""), lambda: link.data_received(b"x")):
        with pytest.raises((AttributeError, TypeError)):
            act()
