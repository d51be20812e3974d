"""Large bodies, which are read past the parser: nothing of the rules for bodies may change for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from areal_fast.http import BrokenReply, Client, Exchange, Limits, Timeout
from areal_fast.http.fill import WORTH_FILLING, Fill
from tests.unit.http.serving import echo, get, post, serving, until

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.mark.parametrize(
    "size", [WORTH_FILLING, WORTH_FILLING + 1, WORTH_FILLING + 1000, 1 << 20, (16 << 20) + 1, 40 << 20]
)
def test_bodies_arrive_as_sent(run: Run, size: int) -> None:
    body = os.urandom(1 << 16) * (size // (1 << 16) + 1)
    body = body[:size]

    async def main() -> None:
        def handler(exchange: Exchange) -> None:
            assert type(exchange.body) is bytes
            exchange.respond(200, exchange.body)

        async with serving(handler) as served:
            client = Client(served.url)
            reply = await client.request("PUT", "/", body, timeout_s=60)
            assert type(reply.body) is bytes
            assert reply.body == body
            assert (await client.request("PUT", "/", b"x", timeout_s=60)).body == b"x"
            assert client.stats.connects == 1
            client.close()
            assert not served.errors

    run(main())


class Pretended:
    """An owner and a transport at once, for a Fill alone."""

    def __init__(self) -> None:
        self.protocol: object = None
        self.pieces = 0
        self.body: bytes | None = None

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def filling(self, nbytes: int) -> None:
        self.pieces += 1

    def filled(self, body: bytes) -> None:
        self.body = body


def test_room_grows_with_what_comes_and_the_body_is_not_copied() -> None:
    pretended = Pretended()
    size = 40 << 20
    fill = Fill(pretended, pretended, b"start", size)  # type: ignore[arg-type]
    assert len(fill.get_buffer(0)) + 5 == 16 << 20, "a length alone reserves little"
    have = 5
    while have < size:
        assert pretended.protocol is fill
        view = fill.get_buffer(0)[: 5 << 20]
        view[:] = bytes([have % 251]) * len(view)
        have += len(view)
        del view
        fill.buffer_updated(have - fill._have)
    assert pretended.protocol is pretended
    assert pretended.body is not None
    assert len(pretended.body) == size
    assert pretended.body[:6] == b"start" + bytes([5])
    assert fill._body.getvalue() is pretended.body


def test_what_follows_is_the_next_request(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            sent = asyncio.create_task(raw.send((post(b"b" * 2_000_000) + get("/x") + post(b"c")) * 3))
            for _ in range(3):
                assert (await raw.reply()).body == b"POST /  2000000\n" + b"b" * 2_000_000
                assert (await raw.reply()).body == b"GET /x  0\n"
                assert (await raw.reply()).body == b"POST /  1\nc"
            await sent

    run(main())


def test_one_that_drips_arrives(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            data = post(b"d" * 400_000)
            for start in range(0, len(data), 7919):
                await raw.send(data[start : start + 7919])
                await asyncio.sleep(0)
            assert len((await raw.reply()).body) == 400_015

    run(main())


def test_one_that_stops_is_408(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, Limits(body_timeout_s=0.05)) as served:
            raw = await served.connect()
            await raw.send(post(b"e" * 1_000_000)[:-1])
            assert (await raw.reply()).status == 408
            await raw.send(b"e" + get())  # too late
            assert await raw.ended() == b""

    run(main())


@pytest.mark.parametrize("how", ["eof", "reset"])
def test_one_that_breaks_off_leaves_nothing(run: Run, how: str) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            await raw.send(post(b"f" * 1_000_000)[:-1])
            await until(lambda: served.server.accepted == 1)
            raw.writer.write_eof() if how == "eof" else raw.reset()
            await until(lambda: served.server.connections == 0)
            assert not served.errors
            assert (await served.ask(get())).status == 200

    run(main())


def test_draining_lets_it_finish(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            data = post(b"g" * 1_000_000)
            await raw.send(data[:500_000])
            await until(lambda: served.server.accepted == 1)
            draining = asyncio.create_task(served.server.drain(20.0))
            await until(lambda: served.server.draining)
            await raw.send(data[500_000:])
            assert (await raw.reply()).headers[b"connection"] == b"close"
            assert await draining == 0

    run(main())


@pytest.mark.parametrize("way", ["broken", "timeout", "cancelled"])
def test_a_reply_that_stays_away(run: Run, way: str) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"h" * 999_999)
            if way != "broken":
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.close()
            ended.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        timeout_s = 0.1 if way == "timeout" else 20
        task = asyncio.create_task(client.request("GET", "/", timeout_s=timeout_s))
        if way == "cancelled":
            await until(lambda: any(c._call is not None and c._call.head is not None for c in client._open))
            task.cancel()
        with pytest.raises(
            {"broken": BrokenReply, "timeout": Timeout, "cancelled": asyncio.CancelledError}[way]
        ):
            await task
        await ended.wait()
        assert client.connections == 0
        client.close()
        server.close()

    run(main())
