"""Bodies that a sink takes as they arrive: never gathered, always dropped, and slow ones are cut."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from areal_fast.http import Exchange, Limits
from areal_fast.http._native import RequestHead
from tests.unit.http.serving import get, post, serving, until

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Hashing:
    """A sink that keeps a digest. wait_at: bytes after which it waits once, until `go_on`."""

    def __init__(self, wait_at: int = -1) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.drops = 0
        self.waiting = False
        self.asked_while_waiting = 0
        self.when_ready: Callable[[], None] = lambda: None
        self._wait_at = wait_at
        self._room = memoryview(bytearray(50_000))

    def feed(self, data: bytes) -> None:
        self.digest.update(data)
        self.size += len(data)
        if 0 <= self._wait_at <= self.size:
            self._wait_at, self.waiting = -1, True

    def buffer(self) -> memoryview:
        self.asked_while_waiting += self.waiting
        return self._room

    def took(self, nbytes: int) -> None:
        self.feed(bytes(self._room[:nbytes]))

    def drop(self) -> None:
        self.drops += 1

    def go_on(self) -> None:
        self.waiting = False
        self.when_ready()


class Sinks:
    def __init__(self, wait_at: int = -1) -> None:
        self.made: list[Hashing] = []
        self._wait_at = wait_at

    def __call__(self, head: RequestHead) -> Hashing | None:
        if head.method != "POST" or head.path == "/whole":
            return None
        self.made.append(Hashing(self._wait_at))
        return self.made[-1]


def tell(exchange: Exchange) -> None:
    sink = exchange.sink
    text = "none" if sink is None else sink.digest.hexdigest()  # type: ignore[attr-defined]
    exchange.respond(200, f"{text} {len(exchange.body)}".encode(), b"text/plain")


BODY = bytes(range(256)) * 12_000


def test_a_sink_gets_every_byte_and_the_connection_goes_on(run: Run) -> None:
    async def main() -> None:
        sinks = Sinks()
        async with serving(tell, sinks=sinks) as served:
            client = await served.connect()
            for size in (20_000, 200_000, len(BODY)):
                await client.send(post(BODY[:size]) + get("/between"))
                expected = hashlib.sha256(BODY[:size]).hexdigest()
                assert (await client.reply()).body == f"{expected} 0".encode()
                assert (await client.reply()).body == b"none 0"
            await client.send(post(BODY[:200_000], "/whole"))
            assert (await client.reply()).body == b"none 200000"
            assert [sink.drops for sink in sinks.made] == [1, 1, 1]
            assert served.server.body_bytes == 0 and not served.errors

    run(main())


def test_bytes_one_by_one_are_the_same(run: Run) -> None:
    async def main() -> None:
        sinks = Sinks()
        async with serving(tell, sinks=sinks) as served:
            client = await served.connect()
            request = post(BODY[:17_000])
            for at in range(0, len(request), 97):
                await client.send(request[at : at + 97])
                await asyncio.sleep(0)
            expected = hashlib.sha256(BODY[:17_000]).hexdigest()
            assert (await client.reply()).body == f"{expected} 0".encode()

    run(main())


@pytest.mark.parametrize("wait_at", [0, 1, 60_000, 1_000_000])
def test_a_sink_that_waits_is_not_asked_and_nothing_is_read_meanwhile(run: Run, wait_at: int) -> None:
    async def main() -> None:
        sinks = Sinks(wait_at)
        async with serving(tell, Limits(body_timeout_s=0.3), sinks=sinks) as served:
            client = await served.connect()
            sending = asyncio.get_running_loop().create_task(client.send(post(BODY)))
            await until(lambda: bool(sinks.made) and sinks.made[0].waiting)
            sink, size = sinks.made[0], sinks.made[0].size
            await asyncio.sleep(0.8)  # more than the body's timeout: it is not the client who is slow
            assert sink.size == size and not sink.drops
            sink.go_on()
            await sending
            assert (await client.reply()).body == f"{hashlib.sha256(BODY).hexdigest()} 0".encode()
            assert not sink.asked_while_waiting and sink.drops == 1

    run(main())


def test_a_client_that_goes_away_drops_the_sink(run: Run) -> None:
    async def main() -> None:
        sinks = Sinks()
        async with serving(tell, sinks=sinks) as served:
            for size in (300, 300_000):
                for reset in (True, False):
                    client = await served.connect()
                    await client.send(post(BODY)[:size])
                    await until(lambda: bool(sinks.made) and sinks.made[-1].size > 0)
                    if reset:
                        client.reset()
                    else:
                        client.writer.write_eof()
                    await until(lambda: sinks.made[-1].drops == 1)
                    sinks.made.clear()

    run(main())


def test_a_slow_one_is_cut(run: Run) -> None:
    async def main() -> None:
        sinks = Sinks()
        limits = Limits(body_timeout_s=0.4, min_stream_bytes_s=1 << 20)
        async with serving(tell, limits, sinks=sinks) as served:
            client = await served.connect()
            await client.send(post(BODY)[:20_000])

            async def drip() -> None:
                while True:
                    await client.send(b"x")
                    await asyncio.sleep(0.05)

            dripping = asyncio.get_running_loop().create_task(drip())
            reply = await client.reply()
            dripping.cancel()
            assert reply.status == 408 and sinks.made[0].drops == 1

    run(main())


def test_how_large_a_streamed_body_may_be_is_asked(run: Run) -> None:
    async def main() -> None:
        sinks = Sinks()
        limits = Limits(max_body_bytes=100_000)
        async with serving(
            tell, limits, sinks=sinks, streamed=lambda head: 0 if head.path == "/whole" else 200_000
        ) as served:
            answers = [
                await served.ask(post(BODY[:size], path))
                for size, path in ((150_000, "/"), (150_000, "/whole"), (200_001, "/"))
            ]
            assert [answer.status for answer in answers] == [200, 413, 413]
            assert b"at most 100000 bytes" in answers[1].body
            assert b"at most 200000 bytes" in answers[2].body

    run(main())
