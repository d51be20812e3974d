"""Deferred answers: given from a callback, by a coroutine after all, as a fault, or to nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from areal_fast.http import Exchange
from tests.unit.http.serving import Serving, chunked, get, post, serving, until

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Deferring:
    """A handler that keeps every exchange for the test to answer."""

    def __init__(self) -> None:
        self.held: list[Exchange] = []
        self.done: list[str] = []

    def __call__(self, exchange: Exchange) -> None:
        exchange.defer()
        exchange.on_done(lambda: self.done.append(exchange.path))
        self.held.append(exchange)

    async def next(self, count: int = 1) -> Exchange:
        await until(lambda: len(self.held) >= count)
        return self.held[count - 1]


@pytest.mark.parametrize("sent", [post(b"x" * 50, "/a"), chunked(b"x" * 20, b"x" * 30)])
def test_an_answer_from_a_callback(run: Run, sent: bytes) -> None:
    """By the shortcut and by the state machine."""

    async def main() -> None:
        handler = Deferring()
        async with serving(handler) as served:
            raw = await served.connect()
            for n in (1, 2):
                await raw.send(sent)
                exchange = await handler.next(n)
                assert not exchange.finished and served.server.body_bytes == 50 and len(handler.done) == n - 1
                asyncio.get_running_loop().call_soon(exchange.respond, 200, exchange.body)
                assert (await raw.reply()).body == b"x" * 50
                assert len(handler.done) == n and served.server.body_bytes == 0
            assert not served.errors and served.server.accepted == 1

    run(main())


def test_replies_keep_their_order(run: Run) -> None:
    """The second request is not looked at before the first is answered; what answers it may then be in the
    call that answered the first."""

    async def main() -> None:
        handler = Deferring()
        async with serving(handler) as served:
            raw = await served.connect()
            await raw.send(get("/a") + get("/b") + get("/c"))
            for n, path in enumerate(("/a", "/b", "/c"), 1):
                exchange = await handler.next(n)
                assert exchange.path == path and len(handler.held) == n
                exchange.respond(200, path.encode())
                assert (await raw.reply()).body == path.encode()
            assert handler.done == ["/a", "/b", "/c"]

    run(main())


@pytest.mark.parametrize("started", [False, True])
def test_a_fault(run: Run, started: bool) -> None:
    async def main() -> None:
        handler = Deferring()
        async with serving(handler) as served:
            raw = await served.connect()
            await raw.send(get("/a"))
            exchange = await handler.next()
            if started:
                exchange.start(200, b"text/plain")
                exchange.write(b"some")
            exchange.fault(ValueError("broken"))
            if started:
                assert not (await raw.ended()).endswith(b"0\r\n\r\n")
            else:
                assert (await raw.reply()).status == 500
            assert [str(error) for _, error in served.errors] == ["broken"] and handler.done == ["/a"]

    run(main())


@pytest.mark.parametrize("raises", [False, True])
def test_it_may_go_on_as_a_coroutine(run: Run, raises: bool) -> None:
    async def main() -> None:
        handler = Deferring()
        async with serving(handler) as served:

            async def rest(exchange: Exchange) -> None:
                await asyncio.sleep(0)
                if raises:
                    raise ValueError("broken")
                exchange.respond(200, b"late")

            raw = await served.connect()
            await raw.send(get("/a"))
            exchange = await handler.next()
            exchange.go_on(rest(exchange))
            assert (await raw.reply()).status == (500 if raises else 200)
            assert len(served.errors) == raises and handler.done == ["/a"]
            await until(lambda: not served.server._tasks)

    run(main())


@pytest.mark.parametrize("how", ["reset", "half close"])
def test_a_client_that_leaves(run: Run, how: str) -> None:
    async def main() -> None:
        handler = Deferring()
        async with serving(handler) as served:
            sent: list[bool] = []
            raw = await served.connect()
            await raw.send(get("/a"))
            exchange = await handler.next()
            exchange.on_sent(sent.append)
            if how == "reset":
                raw.reset()
                await until(lambda: exchange.gone)
            else:
                raw.writer.write_eof()
                await until(lambda: exchange.input_ended)
            exchange.respond(200, b"late")
            assert handler.done == ["/a"]
            if how == "half close":
                assert (await raw.reply()).body == b"late"
                assert await raw.ended() == b""
            await until(lambda: served.server.connections == 0)
            assert sent == [how == "half close"] and not served.errors

    run(main())


def test_an_eof_that_came_before_the_request_was_looked_at_is_told(run: Run) -> None:
    async def main() -> None:
        handler = Deferring()
        async with serving(handler) as served:
            raw = await served.connect()
            await raw.send(get("/a") + get("/b"))
            raw.writer.write_eof()
            first = await handler.next()
            await until(lambda: first.input_ended)
            first.respond(200, b"a")
            second = await handler.next(2)
            assert second.input_ended
            second.respond(200, b"b")
            assert [(await raw.reply()).body, (await raw.reply()).body] == [b"a", b"b"]

    run(main())


def test_draining_waits_for_them(run: Run) -> None:
    async def main() -> None:
        handler = Deferring()
        async with serving(handler) as served:
            raw = await served.connect()
            await raw.send(get("/a"))
            exchange = await handler.next()
            draining = asyncio.ensure_future(served.server.drain(60))
            await until(lambda: served.server.draining)
            assert not draining.done()
            exchange.respond(200, b"last")
            reply = await raw.reply()
            assert reply.headers[b"connection"] == b"close" and reply.body == b"last"
            await raw.close()
            assert await draining == 0

    run(main())


def test_no_deadline_runs_meanwhile(run: Run) -> None:
    async def main(served: Serving, handler: Deferring) -> None:
        raw = await served.connect()
        await raw.send(get("/a"))
        exchange = await handler.next()
        for _ in range(10 * served.server.ticks.idle):
            served.server.wheel.advance()
        assert not exchange.gone
        exchange.respond(200, b"still")
        assert (await raw.reply()).body == b"still"

    async def around() -> None:
        handler = Deferring()
        async with serving(handler) as served:
            await main(served, handler)

    run(around())
