"""The client: pool, waiting in line, retry of stale connections, streams, time-outs, broken engines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

from areal_fast.http import (
    BrokenReply,
    Client,
    ConnectFailed,
    Exchange,
    PoolFull,
    Timeout,
    parse_base_url,
)
from tests.unit.http.serving import echo, serving, until

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.asynccontextmanager
async def engine(script: Script) -> AsyncIterator[str]:
    """A server that does what `script(reader, writer, number of the connection)` says."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        try:
            await script(reader, writer, count)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length: "):
            return head + await reader.readexactly(int(line[16:]))
    return head


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class TestBaseUrl:
    @pytest.mark.parametrize(
        ("url", "host", "port", "prefix", "header"),
        [
            ("http://h", "h", 80, "", "h"),
            ("http://h:80/", "h", 80, "", "h"),
            ("HTTP://h:8000/a/b/", "h", 8000, "/a/b", "h:8000"),
            ("http://[::1]:9", "::1", 9, "", "[::1]:9"),
            ("http://10.0.0.1:9/x", "10.0.0.1", 9, "/x", "10.0.0.1:9"),
        ],
    )
    def test_good(self, url: str, host: str, port: int, prefix: str, header: str) -> None:
        parsed = parse_base_url(url)
        assert (parsed.host, parsed.port, parsed.prefix, parsed.host_header) == (host, port, prefix, header)

    @pytest.mark.parametrize(
        "url",
        [
            *(
                "",
                "h:80",
                "//h",
                "http://",
                "ftp://h",
                "http://h:0",
                "http://h:99999",
                "http://h:x",
                "http://[::1",
            ),
            *(
                "http://u:p@h",
                "http://h/?q",
                "http://h/#f",
                "http://h/a b",
                "http://h/a\r\nb: c",
                "http://h\r\n/",
            ),
        ],
    )
    def test_bad(self, url: str) -> None:
        with pytest.raises(ValueError, match="URL"):
            parse_base_url(url) if "\r" not in url else _strict(url)

    def test_https_says_where_to_go(self) -> None:
        with pytest.raises(ValueError, match="maintained client"):
            Client("https://h")


def _strict(url: str) -> None:
    """urlsplit drops line breaks; what is left must not carry them."""
    parsed = parse_base_url(url)
    assert "\r" not in parsed.host_header + parsed.prefix and "\n" not in parsed.host_header + parsed.prefix
    raise ValueError("URL without line breaks")


def test_requests_reuse_a_connection(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            client = Client(served.url + "/base/")
            reply = await client.request("POST", "/p%20q?x=1", b"hi", timeout_s=60, headers=[(b"x-a", b"b")])
            assert (reply.status, reply.body) == (200, b"POST /base/p q x=1 2\nhi")
            assert reply.headers.get(b"content-type") == b"text/plain"
            assert (await client.request("GET", "/", timeout_s=60)).body == b"GET /base/  0\n"
            assert (await client.request("HEAD", "/", timeout_s=60)).body == b""
            big = b"z" * 5_000_000
            assert (await client.request("PUT", "/", big, timeout_s=60)).body.endswith(big)
            assert (client.stats.requests, client.stats.connects, client.stats.reused) == (4, 1, 3)
            assert served.server.accepted == 1
            client.close()

    run(main())


def test_what_is_sent(run: Run) -> None:
    async def main() -> None:
        seen: list[bytes] = []

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            while True:
                seen.append(await read_request(reader))
                writer.write(OK)

        async with engine(script) as url:
            client = Client(url)
            await client.request("POST", "/a", b"{}", timeout_s=60)
            await client.request("GET", "/b", timeout_s=60)
            await client.request("POST", "/c", timeout_s=60, headers=[(b"Content-Type", b"text/plain")])
            host = client.url.host_header.encode()
            typed = b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
            assert seen == [
                b"POST /a HTTP/1.1\r\nhost: %b\r\n%b" % (host, typed),
                b"GET /b HTTP/1.1\r\nhost: %b\r\n\r\n" % host,
                b"POST /c HTTP/1.1\r\nhost: %b\r\ncontent-type: text/plain\r\ncontent-length: 0\r\n\r\n"
                % host,
            ]
            for bad in [
                ("GET", "a"),
                ("GET", "/a b"),
                ("GET", "/\r\n"),
                ("G T", "/"),
                ("get", "/"),
                ("GET", "/é"),
            ]:
                with pytest.raises(ValueError, match="not a"):
                    await client.request(*bad, timeout_s=60)
            with pytest.raises(ValueError, match="not a header"):
                await client.request("GET", "/", timeout_s=60, headers=[(b"x", b"a\r\nb: c")])
            assert len(seen) == 3
            client.close()

    run(main())


def test_ipv6(run: Run) -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(OK)
            writer.close()

        try:
            server = await asyncio.start_server(serve, "::1", 0)
        except OSError:
            pytest.skip("no IPv6 here")
        client = Client(f"http://[::1]:{server.sockets[0].getsockname()[1]}")
        assert (await client.request("GET", "/", timeout_s=60)).body == b"ok"
        client.close()
        server.close()

    run(main())


class TestPool:
    def test_it_is_bounded_and_first_come_first_served(self, run: Run) -> None:
        order: list[str] = []
        at_once = 0

        async def handler(exchange: Exchange) -> None:
            nonlocal at_once
            at_once += 1
            assert at_once <= 2
            order.append(exchange.path)
            await asyncio.sleep(0.002)
            at_once -= 1
            exchange.respond(200, b"")

        async def main() -> None:
            async with serving(handler) as served:
                client = Client(served.url, max_connections=2)
                tasks = []
                for n in range(20):
                    tasks.append(asyncio.create_task(client.request("GET", f"/{n:02}", timeout_s=60)))
                    await asyncio.sleep(0)
                await until(lambda: client.waiting > 0)
                replies = await asyncio.gather(*tasks)
                assert served.server.accepted == 2
                assert order[2:] == sorted(order[2:])
                assert replies[19].waited_s > replies[2].waited_s
                assert client.stats.engine_s < sum(reply.waited_s + reply.engine_s for reply in replies)
                assert client.waiting == 0
                client.close()

        run(main())

    def test_the_line_is_bounded(self, run: Run) -> None:
        async def main() -> None:
            go = asyncio.Event()

            async def handler(exchange: Exchange) -> None:
                await go.wait()
                exchange.respond(200, b"")

            async with serving(handler) as served:
                client = Client(served.url, max_connections=1, max_waiting=1)
                first = asyncio.create_task(client.request("GET", "/", timeout_s=60))
                await asyncio.sleep(0)
                second = asyncio.create_task(client.request("GET", "/", timeout_s=60))
                await until(lambda: client.waiting == 1)
                with pytest.raises(PoolFull):
                    await client.request("GET", "/", timeout_s=60)
                go.set()
                assert [(await first).status, (await second).status] == [200, 200]
                client.close()

        run(main())

    def test_who_gives_up_in_line_costs_no_place(self, run: Run) -> None:
        async def main() -> None:
            go = asyncio.Event()

            async def handler(exchange: Exchange) -> None:
                await go.wait()
                exchange.respond(200, b"")

            async with serving(handler) as served:
                client = Client(served.url, max_connections=1)
                tasks = [asyncio.create_task(client.request("GET", "/", timeout_s=60)) for _ in range(6)]
                await until(lambda: client.waiting == 5)
                tasks[1].cancel()
                tasks[3].cancel()
                with pytest.raises(Timeout):
                    await client.request("GET", "/", timeout_s=0.02)
                go.set()
                for n in (0, 2, 4, 5):
                    assert (await tasks[n]).status == 200
                assert served.server.accepted == 1
                client.close()

        run(main())

    def test_cancelling_at_any_moment_leaks_nothing(self, run: Run) -> None:
        async def handler(exchange: Exchange) -> None:
            await asyncio.sleep(0.001)
            exchange.respond(200, b"x")

        async def main() -> None:
            async with serving(handler) as served:
                client = Client(served.url, max_connections=2)
                for turns in range(40):
                    tasks = [asyncio.create_task(client.request("GET", "/", timeout_s=60)) for _ in range(6)]
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    for task in tasks[::2]:
                        task.cancel()
                    for reply in await asyncio.gather(*tasks, return_exceptions=True):
                        assert isinstance(reply, asyncio.CancelledError) or reply.status == 200  # type: ignore[union-attr]
                    assert client.connections <= 2 and client.waiting == 0 and not client._handed
                await until(lambda: client._connecting == 0)
                assert set(client._idle) == client._open
                assert (await client.request("GET", "/", timeout_s=60)).status == 200
                client.close()

        run(main())

    def test_idle_connections_are_closed_in_the_end(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo) as served:
                client = Client(served.url, idle_timeout_s=0.05)
                await client.request("GET", "/", timeout_s=60)
                await until(lambda: client.connections == 0)
                await until(lambda: served.server.connections == 0)
                assert (await client.request("GET", "/", timeout_s=60)).status == 200
                client.close()

        run(main())

    def test_a_closed_client_refuses(self, run: Run) -> None:
        async def main() -> None:
            async with serving(lambda exchange: asyncio.sleep(10)) as served:
                client = Client(served.url, max_connections=1)
                tasks = [asyncio.create_task(client.request("GET", "/", timeout_s=60)) for _ in range(2)]
                await until(lambda: served.server.connections == 1 and client.waiting == 1)
                await until(lambda: bool(client._open))
                client.close()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert [type(result) for result in results] == [BrokenReply, ConnectFailed]
                with pytest.raises(ConnectFailed):
                    await client.request("GET", "/", timeout_s=60)
                served.server._tasks and [task.cancel() for task in served.server._tasks]

        run(main())


class TestStale:
    """A kept connection that the engine has closed."""

    def test_one_closed_while_idle_is_not_used(self, run: Run) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(OK)

            async with engine(script) as url:
                client = Client(url)
                for _ in range(3):
                    assert (await client.request("GET", "/", timeout_s=60)).body == b"ok"
                    await until(lambda: client.connections == 0)
                assert (client.stats.connects, client.stats.retries) == (3, 0)
                client.close()

        run(main())

    @pytest.mark.parametrize("how", ["eof", "reset"])
    def test_one_closed_as_the_request_goes_out_is_retried_once(self, run: Run, how: str) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(OK)
                if number == 1:
                    await read_request(reader)
                    if how == "reset":
                        reset(writer)
                    return
                await reader.read()

            async with engine(script) as url:
                client = Client(url)
                for _ in range(2):
                    assert (await client.request("POST", "/", b"{}", timeout_s=60)).body == b"ok"
                assert (client.stats.connects, client.stats.retries) == (2, 1)
                client.close()

        run(main())

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("first", "kept", "why"),
        [
            (b"", False, "not on a fresh connection"),
            (b"H", True, "not after a byte of reply"),
        ],
    )
    def test_nothing_else_is(self, run: Run, first: bytes, kept: bool, why: str, stream: bool) -> None:
        async def main() -> None:
            requests = 0

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                nonlocal requests
                if kept:
                    await read_request(reader)
                    writer.write(OK)
                await read_request(reader)
                requests += 1
                writer.write(first)

            async with engine(script) as url:
                client = Client(url)
                if kept:
                    await client.request("GET", "/", timeout_s=60)
                with pytest.raises(BrokenReply):
                    await (client.stream if stream else client.request)("POST", "/", b"{}", timeout_s=60)
                assert requests == 1, why
                assert client.stats.retries == 0
                client.close()

        run(main())

    def test_twice_is_enough(self, run: Run) -> None:
        async def main() -> None:
            requests = 0

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                nonlocal requests
                if number == 1:
                    await read_request(reader)
                    writer.write(OK)
                await read_request(reader)
                requests += 1

            async with engine(script) as url:
                client = Client(url)
                await client.request("GET", "/", timeout_s=60)
                with pytest.raises(BrokenReply):
                    await client.request("GET", "/", timeout_s=60)
                assert requests == 2
                client.close()

        run(main())

    def test_it_can_be_turned_off(self, run: Run) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(OK)
                await read_request(reader)

            async with engine(script) as url:
                client = Client(url, retry_stale=False)
                await client.request("GET", "/", timeout_s=60)
                with pytest.raises(BrokenReply):
                    await client.request("GET", "/", timeout_s=60)
                client.close()

        run(main())

    def test_bytes_nobody_asked_for_end_the_connection(self, run: Run) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(OK)
                await asyncio.sleep(0.01)
                writer.write(OK)
                await reader.read()

            async with engine(script) as url:
                client = Client(url)
                await client.request("GET", "/", timeout_s=60)
                await until(lambda: client.connections == 0)
                client.close()

        run(main())


class TestReplies:
    @pytest.mark.parametrize(
        ("reply", "body", "kept"),
        [
            (OK, b"ok", 1),
            (OK + b"extra", b"ok", 0),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", b"ok", 1),
            (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", 0),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", 0),
            (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok", 1),
            (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 1),
        ],
    )
    def test_framings(self, run: Run, reply: bytes, body: bytes, kept: int) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(reply)
                await reader.read()

            async with engine(script) as url:
                client = Client(url)
                assert (await client.request("GET", "/", timeout_s=60)).body == body
                assert client.connections == kept
                client.close()

        run(main())

    def test_to_the_end_of_the_connection(self, run: Run) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(b"HTTP/1.1 200 OK\r\n\r\nok")

            async with engine(script) as url:
                client = Client(url)
                assert (await client.request("GET", "/", timeout_s=60)).body == b"ok"
                assert await (await client.stream("GET", "/", timeout_s=60)).read() == b"ok"
                client.close()

        run(main())

    @pytest.mark.parametrize(
        "reply",
        [
            b"",
            b"SSH-2.0\r\n",
            OK[:-1],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_broken(self, run: Run, reply: bytes, stream: bool) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(reply)

            async with engine(script) as url:
                client = Client(url, max_reply_bytes=1000, max_header_bytes=1000)
                with pytest.raises(BrokenReply):
                    if stream:
                        await (await client.stream("GET", "/", timeout_s=60)).read()
                    else:
                        await client.request("GET", "/", timeout_s=60)
                assert client.connections == 0
                assert client.stats.failed == 1
                client.close()

        run(main())

    def test_a_hundred_mebibytes(self, run: Run) -> None:
        size = 100 << 20

        async def main() -> None:
            async with serving(lambda exchange: exchange.respond(200, bytes(size))) as served:
                client = Client(served.url)
                assert len((await client.request("GET", "/", timeout_s=60)).body) == size
                client.close()

        run(main())

    def test_a_reply_before_the_request_is_through(self, run: Run) -> None:
        async def main() -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
                await reader.read()

            async with engine(script) as url:
                client = Client(url)
                reply = await client.request("POST", "/", b"x" * 50_000_000, timeout_s=60)
                assert (reply.status, reply.body) == (413, b"no")
                client.close()

        run(main())


class TestTimeouts:
    @pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\n", OK[:-1]])
    def test_a_request(self, run: Run, reply: bytes) -> None:
        async def main() -> None:
            ended = asyncio.Event()

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                writer.write(reply)
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                ended.set()

            async with engine(script) as url:
                client = Client(url)
                with pytest.raises(Timeout):
                    await client.request("GET", "/", timeout_s=0.05)
                await ended.wait()  # the engine sees that nobody waits
                assert client.connections == 0
                client.close()

        run(main())

    def test_cancelling_ends_the_connection(self, run: Run) -> None:
        async def main() -> None:
            begun, ended = asyncio.Event(), asyncio.Event()

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
                await read_request(reader)
                begun.set()
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                ended.set()

            async with engine(script) as url:
                client = Client(url)
                task = asyncio.create_task(client.request("GET", "/", timeout_s=60))
                await begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await ended.wait()
                assert client.connections == 0
                client.close()

        run(main())

    def test_refused(self, run: Run) -> None:
        async def main() -> None:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = sock.getsockname()[1]
                client = Client(f"http://127.0.0.1:{port}")
                with pytest.raises(ConnectFailed):
                    await client.request("GET", "/", timeout_s=60)
                assert client.connections == 0

        run(main())

    def test_connecting(self, run: Run) -> None:
        async def main() -> None:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                sock.listen(0)
                full = [socket.socket() for _ in range(4)]
                for each in full:  # fill the backlog: further connections get no answer
                    each.setblocking(False)
                    each.connect_ex(sock.getsockname())
                client = Client(f"http://127.0.0.1:{sock.getsockname()[1]}", connect_timeout_s=0.05)
                with pytest.raises(ConnectFailed, match="within"):
                    await client.request("GET", "/", timeout_s=60)
                with pytest.raises(Timeout):
                    await client.request("GET", "/", timeout_s=0.02)
                assert client.connections == 0
                for each in full:
                    each.close()

        run(main())


class TestStreams:
    def test_pieces_come_as_they_are_sent(self, run: Run) -> None:
        async def main() -> None:
            go = asyncio.Event()

            async def handler(exchange: Exchange) -> None:
                exchange.start(200, b"text/event-stream")
                for n in range(3):
                    exchange.write(b"data: %d\n\n" % n)
                    await go.wait()
                    go.clear()
                exchange.finish()

            async with serving(handler) as served:
                client = Client(served.url)
                for _ in range(2):
                    pieces = []
                    async with await client.stream("POST", "/", b"{}", timeout_s=60) as reply:
                        assert reply.status == 200
                        assert reply.headers.get(b"content-type") == b"text/event-stream"
                        async for piece in reply:
                            pieces.append(piece)
                            go.set()
                    assert pieces == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]
                assert client.stats.connects == 1, "a stream read to its end gives its connection back"
                client.close()

        run(main())

    def test_a_slow_reader_slows_the_engine(self, run: Run) -> None:
        async def main() -> None:
            produced = 0

            async def handler(exchange: Exchange) -> None:
                nonlocal produced
                exchange.start(200, b"text/plain")
                while produced < 100_000_000:
                    exchange.write(b"x" * 100_000)
                    produced += 100_000
                    await exchange.drain()
                exchange.finish()

            async with serving(handler) as served:
                client = Client(served.url)
                reply = await client.stream("GET", "/", timeout_s=60)
                await until(lambda: reply._call.connection._paused)
                for _ in range(50):
                    await asyncio.sleep(0.002)
                assert produced < 100_000_000
                assert reply._call.queued < 1_000_000
                assert len(await reply.read()) == 100_000_000
                client.close()

        run(main())

    @pytest.mark.parametrize("way", ["close", "cancel", "timeout"])
    def test_giving_up_ends_the_connection(self, run: Run, way: str) -> None:
        async def main() -> None:
            gone = asyncio.Event()

            async def handler(exchange: Exchange) -> None:
                exchange.start(200, b"text/plain")
                exchange.write(b"x")
                while not exchange.gone and not exchange.input_ended:
                    exchange.write(b"y")
                    await asyncio.sleep(0.005)
                gone.set()
                exchange.finish()

            async with serving(handler) as served:
                client = Client(served.url)
                reply = await client.stream("GET", "/", timeout_s=1.0 if way == "timeout" else 10)
                if way == "close":
                    reply.close()
                elif way == "cancel":
                    task = asyncio.create_task(reply.read())
                    await asyncio.sleep(0.01)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    with pytest.raises(Timeout):
                        await reply.read()
                await gone.wait()
                assert client.connections == 0
                client.close()

        run(main())

    def test_what_came_before_the_break_is_given_first(self, run: Run) -> None:
        async def handler(exchange: Exchange) -> None:
            exchange.start(200, b"text/plain")
            exchange.write(b"abc")
            exchange.fail()

        async def main() -> None:
            async with serving(handler) as served:
                client = Client(served.url)
                reply = await client.stream("GET", "/", timeout_s=60)
                pieces = []
                with pytest.raises(BrokenReply):
                    async for piece in reply:
                        pieces.append(piece)
                assert pieces == [b"abc"]
                client.close()

        run(main())
