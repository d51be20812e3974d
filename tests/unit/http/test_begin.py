"""Client.begin: one call of `done` for every way a request can end, on both loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from areal_fast.http import BrokenReply, Client, ConnectFailed, Exchange, PoolFull, Timeout
from areal_fast.http.client import Request
from tests.unit.http.serving import serving, until
from tests.unit.http.test_client import OK, engine, read_request

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def post(client: Client, ended: list[Request], timeout_s: float = 60.0) -> Request:
    request = client.begin("POST", "/", b"{}", timeout_s=timeout_s, done=ended.append)
    assert request not in ended, "never before it returns"
    return request


def ok(exchange: Exchange) -> None:
    exchange.respond(200, exchange.body)


async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    await reader.read()


def test_whole_replies_on_new_and_on_kept_connections(run: Run) -> None:
    async def main() -> None:
        async with serving(ok) as served:
            client, ended = Client(served.url), []
            for n in range(1, 4):
                request = post(client, ended)
                await until(lambda n=n: len(ended) == n)  # type: ignore[misc]
                assert ended[-1] is request and request.error is None
                assert (request.status, request.take_body()) == (200, b"{}")
            assert (client.stats.connects, client.stats.reused, client.stats.failed) == (1, 2, 0)
            client.close()
            await asyncio.sleep(0)
            assert len(ended) == 3

    run(main())


def test_the_next_request_may_be_begun_in_done(run: Run) -> None:
    """The connection is back in the pool by then."""

    async def main() -> None:
        async with serving(ok) as served:
            client, ended = Client(served.url, max_connections=1), []

            def done(request: Request) -> None:
                ended.append(request)
                if len(ended) < 5:
                    client.begin("POST", "/", b"{}", timeout_s=60, done=done)

            client.begin("POST", "/", b"{}", timeout_s=60, done=done)
            await until(lambda: len(ended) == 5)
            assert (client.stats.connects, client.stats.reused) == (1, 4)
            client.close()

    run(main())


def test_a_stale_connection_is_replaced_once(run: Run) -> None:
    async def main() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            await read_request(reader)
            writer.write(OK)
            if number == 1:
                await read_request(reader)
                return
            await reader.read()

        async with engine(script) as url:
            client, ended = Client(url), []
            for n in (1, 2):
                post(client, ended)
                await until(lambda n=n: len(ended) == n)  # type: ignore[misc]
                assert ended[-1].error is None
            assert (client.stats.connects, client.stats.retries) == (2, 1)
            client.close()

    run(main())


@pytest.mark.parametrize("kept", [False, True])
def test_time_outs(run: Run, kept: bool) -> None:
    async def main() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            if kept:
                await read_request(reader)
                writer.write(OK)
            await reader.read()

        async with engine(script) as url:
            client, ended = Client(url), []
            if kept:
                await client.request("GET", "/", timeout_s=60)
            post(client, ended, 0.05)
            await until(lambda: bool(ended))
            assert isinstance(ended[0].error, Timeout) and client.connections == 0
            client.close()
            assert len(ended) == 1 and client.stats.failed == 1

    run(main())


def test_what_goes_wrong_before_it_is_sent(run: Run) -> None:
    async def main() -> None:
        async with engine(nothing) as url:
            client, ended = Client(url, max_connections=1, max_waiting=1), []
            post(client, ended)
            await until(lambda: client.connections == 1)
            waiting, refused = post(client, ended), post(client, ended)
            await until(lambda: bool(ended))
            assert ended == [refused] and isinstance(refused.error, PoolFull)
            client.close()
            await until(lambda: len(ended) == 3)
            assert isinstance(waiting.error, ConnectFailed)
            late = post(client, ended)
            await until(lambda: len(ended) == 4)
            assert isinstance(late.error, ConnectFailed)
            with pytest.raises(ValueError):
                client.begin("POST", "nowhere", timeout_s=60, done=ended.append)
        refusing, failed = Client(url), []
        post(refusing, failed)
        await until(lambda: bool(failed))
        assert isinstance(failed[0].error, ConnectFailed)

    run(main())


@pytest.mark.parametrize("where", ["sent", "in line", "connecting"])
def test_a_cancelled_one_says_nothing_and_leaves_nothing(run: Run, where: str) -> None:
    async def main() -> None:
        async with engine(nothing) as url:
            client, ended = Client(url, max_connections=1), []
            first = post(client, ended)
            if where != "connecting":
                await until(lambda: first.connection is not None)
            request = post(client, ended) if where == "in line" else first
            if where == "in line":
                await until(lambda: client.waiting == 1)
            request.cancel()
            request.cancel()
            left = 1 if where == "in line" else 0
            await until(lambda: client.connections == left and client.waiting == 0)
            assert not ended and client.stats.failed == 1
            client.close()
            await asyncio.sleep(0)
            assert ended == ([first] if where == "in line" else [])
            assert all(isinstance(request.error, BrokenReply) for request in ended)

    run(main())


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_reply_that_broke_off_is_not_asked_for_again(run: Run, method: str) -> None:
    """Whatever the method, and though the connection was a kept one."""

    async def main() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            await read_request(reader)
            writer.write(OK)
            await read_request(reader)
            writer.write(OK[:12])

        async with engine(script) as url:
            client, ended = Client(url), []
            await client.request("GET", "/", timeout_s=60)
            request = client.begin(method, "/", timeout_s=60, done=ended.append)
            await until(lambda: bool(ended))
            assert request.touched and isinstance(request.error, BrokenReply)
            assert (client.stats.connects, client.stats.retries) == (1, 0)
            client.close()

    run(main())
