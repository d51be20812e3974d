"""One server over real sockets: order, bodies, replies, faults of handlers, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from areal_fast.http import Exchange, Limits
from tests.unit.http.serving import chunked, echo, get, post, serving, until

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def later(exchange: Exchange) -> Awaitable[None]:
    async def answer() -> None:
        await asyncio.sleep(0)
        echo(exchange)

    return answer()


@pytest.mark.parametrize("handler", [echo, later])
def test_keep_alive_and_bodies(run: Run, handler: Any) -> None:
    async def main() -> None:
        async with serving(handler) as served:
            raw = await served.connect()
            for data, seen in [
                (get("/a?b"), b"GET /a b 0\n"),
                (post(b"hello"), b"POST /  5\nhello"),
                (chunked(b"hel", b"lo", trailers=b"X: y\r\n"), b"POST /  5\nhello"),
                (post(b"x" * 3_000_000), b"POST /  3000000\n" + b"x" * 3_000_000),
                (get("/z"), b"GET /z  0\n"),
            ]:
                await raw.send(data)
                reply = await raw.reply()
                assert (reply.status, reply.body) == (200, seen)
                assert b"connection" not in reply.headers
            assert served.server.accepted == 1

    run(main())


def test_replies_carry_date_type_and_length(run: Run) -> None:
    async def main() -> None:
        async with serving(lambda ex: ex.respond(201, b"{}", headers=[(b"allow", b"GET")])) as served:
            reply = await served.ask(get())
            assert reply.status == 201
            assert reply.headers[b"content-type"] == b"application/json"
            assert reply.headers[b"content-length"] == b"2"
            assert reply.headers[b"allow"] == b"GET"
            assert reply.headers[b"date"].endswith(b"GMT")

    run(main())


@pytest.mark.parametrize(
    "body", [b"", b"ab", bytearray(b"ab"), memoryview(b"ab"), [b"a", memoryview(b"b")], [], [b"x" * 200_000]]
)
def test_kinds_of_body(run: Run, body: Any) -> None:
    whole = b"".join(body) if isinstance(body, list) else bytes(body)

    async def main() -> None:
        async with serving(lambda ex: ex.respond(200, body)) as served:
            assert (await served.ask(get())).body == whole

    run(main())


def test_pipelined_requests_are_answered_in_order(run: Run) -> None:
    running = 0

    def handler(exchange: Exchange) -> Awaitable[None] | None:
        number = int(exchange.path[1:])
        if number % 3 == 0:
            echo(exchange)
            return None

        async def answer() -> None:
            nonlocal running
            running += 1
            assert running == 1, "a pipelined request was begun before the one ahead of it was answered"
            for _ in range(number % 5):
                await asyncio.sleep(0)
            running -= 1
            echo(exchange)

        return answer()

    async def main() -> None:
        async with serving(handler, Limits(max_pipelined_bytes=2000)) as served:
            raw = await served.connect()
            sent = asyncio.create_task(
                raw.send(b"".join(post(b"%d" % n, f"/{n}") if n % 2 else get(f"/{n}") for n in range(500)))
            )
            for number in range(500):
                assert (await raw.reply()).body.split()[1] == b"/%d" % number
            await sent

    run(main())


def test_reading_pauses_behind_a_running_request(run: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()
        begun = asyncio.Event()

        async def handler(exchange: Exchange) -> None:
            begun.set()
            await go.wait()
            exchange.respond(200, b"")

        async with serving(handler, Limits(max_pipelined_bytes=10_000)) as served:
            raw = await served.connect()
            await raw.send(get())
            await begun.wait()
            connection = next(iter(served.server._connections))
            flood = asyncio.create_task(raw.send(get() * 1_000_000))
            await until(lambda: not connection._transport.is_reading())
            assert connection.parser.buffered < 10_000 + 262_144 + 1
            assert not flood.done()
            go.set()
            for _ in range(1000):
                assert (await raw.reply()).status == 200
            flood.cancel()

    run(main())


def test_head_gets_no_body(run: Run) -> None:
    async def handler(exchange: Exchange) -> None:
        if exchange.path == "/stream":
            exchange.start(200, b"text/plain")
            exchange.write(b"x")
            exchange.finish()
        else:
            exchange.respond(200, b"four")

    async def main() -> None:
        async with serving(handler) as served:
            raw = await served.connect()
            await raw.send(
                b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\nHEAD /stream HTTP/1.1\r\nHost: a\r\n\r\n" + get()
            )
            assert (await raw.reply(head_only=True)).headers[b"content-length"] == b"4"
            assert (await raw.reply(head_only=True)).status == 200
            assert (await raw.reply()).body == b"four"

    run(main())


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_a_body(run: Run, status: int) -> None:
    async def main() -> None:
        async with serving(lambda ex: ex.respond(status, b"", b"")) as served:
            raw = await served.connect()
            await raw.send(get() * 2)
            for _ in range(2):
                reply = await raw.reply()
                assert reply.status == status
                assert b"content-length" not in reply.headers and b"content-type" not in reply.headers

    run(main())


def test_http_10(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            await raw.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert (await raw.reply()).headers[b"connection"] == b"keep-alive"
            await raw.send(b"GET / HTTP/1.0\r\n\r\n")
            assert (await raw.reply()).headers[b"connection"] == b"close"
            assert await raw.ended() == b""

    run(main())


def test_close_is_honoured_and_what_follows_is_ignored(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            await raw.send(get("/", "Connection: close") + get("/never"))
            assert (await raw.reply()).headers[b"connection"] == b"close"
            assert await raw.ended() == b""

    run(main())


class TestExpect:
    def test_continue_is_sent_when_the_body_is_wanted(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo) as served:
                raw = await served.connect()
                head, body = post(b"hello", "/", "Expect: 100-Continue").split(b"\r\n\r\n")
                await raw.send(head + b"\r\n\r\n")
                assert (await raw.reply()).status == 100
                await raw.send(body)
                assert (await raw.reply()).body.endswith(b"hello")

        run(main())

    def test_continue_is_not_sent_when_the_body_is_here_or_there_is_none(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo) as served:
                raw = await served.connect()
                await raw.send(post(b"hello", "/", "Expect: 100-continue"))
                assert (await raw.reply()).status == 200
                await raw.send(get("/", "Expect: 100-continue"))
                assert (await raw.reply()).status == 200

        run(main())

    def test_a_body_too_large_is_refused_instead(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo, Limits(max_body_bytes=10)) as served:
                raw = await served.connect()
                await raw.send(
                    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n"
                )
                assert (await raw.reply()).status == 413
                assert await raw.ended() == b""

        run(main())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\0", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"x" * 20000, 414),
        (get("/", "X: " + "y" * 70000), 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: br\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400),
    ],
)
def test_refusals_are_json_and_end_the_connection(run: Run, data: bytes, status: int) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            await raw.send(get() + data)
            assert (await raw.reply()).status == 200
            reply = await raw.reply()
            assert reply.status == status
            assert reply.headers[b"content-type"] == b"application/json"
            assert reply.headers[b"connection"] == b"close"
            assert reply.body.startswith(b'{"detail":"')
            assert await raw.ended() == b""

    run(main())


@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_client_that_goes_on_sending_sees_413(run: Run, in_chunks: bool) -> None:
    """The answer comes before the body is read, and the rest is drained: closing at once would reset it
    away."""

    async def main() -> None:
        async with serving(echo, Limits(max_body_bytes=100_000, linger_bytes=1 << 30)) as served:
            raw = await served.connect()
            framing = b"Transfer-Encoding: chunked" if in_chunks else b"Content-Length: 3000000"
            await raw.send(b"POST / HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % framing)
            for _ in range(30):
                await raw.send((b"186a0\r\n%b\r\n" if in_chunks else b"%b") % (b"x" * 100_000))
            raw.writer.write_eof()
            assert (await raw.reply()).status == 413
            assert await raw.ended() == b""

    run(main())


def test_a_client_that_never_stops_sending_is_cut(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, Limits(max_body_bytes=10, linger_bytes=500_000)) as served:
            raw = await served.connect()
            await raw.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n")
            with pytest.raises(ConnectionError):
                while True:
                    await raw.send(b"x" * 100_000)
            await until(lambda: served.server.connections == 0)

    run(main())


class TestFaults:
    def test_an_exception_is_500_and_the_connection_lives(self, run: Run) -> None:
        def handler(exchange: Exchange) -> Awaitable[None] | None:
            if exchange.path == "/now":
                raise ValueError("secret")
            if exchange.path == "/nothing":
                return None

            async def fail() -> None:
                await asyncio.sleep(0)
                if exchange.path == "/later":
                    raise ValueError("secret")

            return fail()

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                for path in ["/now", "/later", "/nothing", "/nothing-later"]:
                    await raw.send(get(path))
                    reply = await raw.reply()
                    assert (reply.status, reply.body) == (500, b'{"detail":"Internal Server Error"}')
                assert served.server.accepted == 1
                assert [where for where, _ in served.errors] == [
                    *("GET /now", "GET /later", "GET /nothing", "GET /nothing-later")
                ]

        run(main())

    def test_an_exception_after_the_reply_is_only_reported(self, run: Run) -> None:
        def handler(exchange: Exchange) -> None:
            exchange.respond(200, b"")
            raise ValueError

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                await raw.send(get() * 2)
                assert [(await raw.reply()).status for _ in range(2)] == [200, 200]
                assert len(served.errors) == 2

        run(main())

    def test_an_exception_in_a_stream_breaks_the_reply(self, run: Run) -> None:
        async def handler(exchange: Exchange) -> None:
            exchange.start(200, b"text/plain")
            exchange.write(b"abc")
            raise ValueError

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                await raw.send(get())
                got = await raw.ended()
                assert got.endswith(b"3\r\nabc\r\n"), "no final chunk"
                assert len(served.errors) == 1

        run(main())

    def test_a_second_answer_is_refused(self, run: Run) -> None:
        caught: list[str] = []

        def handler(exchange: Exchange) -> None:
            exchange.respond(200, b"")
            for again in (
                lambda: exchange.respond(200, b""),
                lambda: exchange.start(200, b""),
                lambda: exchange.write(b"x"),
                exchange.finish,
            ):
                with pytest.raises(RuntimeError) as error:
                    again()
                caught.append(str(error.value))

        async def main() -> None:
            async with serving(handler) as served:
                assert (await served.ask(get())).status == 200
                assert len(caught) == 4

        run(main())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            (b"x", b"a\r\nset-cookie: b"),
            (b"x", b"a\nb"),
            (b"x", b"a\0"),
            (b"x: y\r\nz", b""),
            (b"", b""),
            (b"x y", b""),
            (b"Content-Length", b"0"),
            (b"transfer-encoding", b"chunked"),
        ],
    )
    def test_no_header_can_be_injected(self, run: Run, name: bytes, value: bytes) -> None:
        async def main() -> None:
            async with serving(lambda ex: ex.respond(200, b"", headers=[(name, value)])) as served:
                assert (await served.ask(get())).status == 500
                assert isinstance(served.errors[0][1], ValueError)

        run(main())

    def test_nor_by_the_content_type_or_status(self, run: Run) -> None:
        def handler(exchange: Exchange) -> None:
            if exchange.path == "/type":
                exchange.respond(200, b"", b"a\r\nb: c")
            exchange.respond(100, b"")

        async def main() -> None:
            async with serving(handler) as served:
                assert (await served.ask(get("/type"))).status == 500
                assert (await served.ask(get("/status"))).status == 500

        run(main())


class TestStreams:
    def test_chunks(self, run: Run) -> None:
        async def handler(exchange: Exchange) -> None:
            exchange.start(200, b"text/event-stream", [(b"cache-control", b"no-cache")])
            for piece in (b"a", b"", b"b" * 20_000, bytearray(b"c"), memoryview(b"d")):
                exchange.write(piece)
                await exchange.drain()
            exchange.finish()

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                for _ in range(2):
                    await raw.send(get())
                    reply = await raw.reply()
                    assert reply.headers[b"transfer-encoding"] == b"chunked"
                    assert reply.headers[b"cache-control"] == b"no-cache"
                    assert reply.body == b"a" + b"b" * 20_000 + b"cd"

        run(main())

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    def test_a_size_known_beforehand_is_announced(self, run: Run, version: str) -> None:
        async def handler(exchange: Exchange) -> None:
            exchange.start(200, b"text/plain", size=300_003)
            for piece in (b"a" * 100_001, b"", bytearray(b"b" * 200_002)):
                exchange.write(piece)
                await exchange.drain()
            exchange.finish()

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                for method in ("GET", "GET", "HEAD"):
                    await raw.send(
                        f"{method} / HTTP/{version}\r\nHost: x\r\nConnection: keep-alive\r\n\r\n".encode()
                    )
                    reply = await raw.reply(head_only=method == "HEAD")
                    assert reply.headers[b"content-length"] == b"300003"
                    assert b"transfer-encoding" not in reply.headers
                    assert reply.body == (b"" if method == "HEAD" else b"a" * 100_001 + b"b" * 200_002)

        run(main())

    @pytest.mark.parametrize("written", [b"a" * 9, b"a" * 11])
    def test_a_size_that_is_not_kept_breaks_the_reply(self, run: Run, written: bytes) -> None:
        async def handler(exchange: Exchange) -> None:
            exchange.start(200, b"text/plain", size=10)
            exchange.write(written)
            exchange.finish()

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                await raw.send(get())
                rest = await raw.ended()
                assert b"content-length: 10" in rest
                assert len(rest.partition(b"\r\n\r\n")[2]) < 10
                assert len(served.errors) == 1

        run(main())

    def test_http_10_streams_to_the_end_of_the_connection(self, run: Run) -> None:
        async def handler(exchange: Exchange) -> None:
            exchange.start(200, b"text/plain")
            exchange.write(b"abc")
            if exchange.path == "/fail":
                exchange.fail()
            else:
                exchange.finish()

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                await raw.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                assert (await raw.reply()).body == b"abc"
                raw = await served.connect()
                await raw.send(b"GET /fail HTTP/1.0\r\n\r\n")
                with pytest.raises(ConnectionResetError):
                    await raw.ended()

        run(main())

    def test_drain_waits_for_a_slow_reader(self, run: Run) -> None:
        async def main() -> None:
            waited = asyncio.Event()
            produced = 0

            async def handler(exchange: Exchange) -> None:
                nonlocal produced
                exchange.start(200, b"text/plain")
                while produced < 30_000_000:
                    exchange.write(b"x" * 100_000)
                    produced += 100_000
                    drained = asyncio.ensure_future(exchange.drain())
                    await asyncio.sleep(0)
                    if not drained.done():
                        waited.set()
                    await drained
                exchange.finish()

            async with serving(handler, Limits(write_high_water=200_000)) as served:
                raw = await served.connect(rcvbuf=4096)
                raw.writer.transport.pause_reading()
                await raw.send(get())
                await waited.wait()
                assert produced < 30_000_000, "all was taken into this process's memory"
                raw.writer.transport.resume_reading()
                assert len((await raw.reply()).body) == 30_000_000

        run(main())
