"""What all connections together may cost: bodies against one budget, a body's rate, a stream nobody reads,
what the log is told. The real proxy over real sockets: tests/e2e/test_network.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from areal_fast.http import Exchange, Limits
from tests.unit.http.serving import chunked, echo, get, post, serving, until

Run = Callable[[Coroutine[Any, Any, Any]], Any]

KIB = 1024
TIGHT = Limits(
    max_body_bytes=1024 * KIB, max_bodies_bytes=1024 * KIB, small_body_bytes=KIB, body_timeout_s=20.0
)


class Held:
    """A handler that answers when it is let."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.waiting = 0

    async def __call__(self, exchange: Exchange) -> None:
        self.waiting += 1
        await self.go.wait()
        exchange.respond(200, b"ok")


class TestBodiesTogether:
    def test_more_than_the_budget_is_refused_with_when_to_come_back(self, run: Run) -> None:
        """By its length before it is read, by what has come when it is chunked; others are not harmed."""

        async def main() -> None:
            async with serving(echo, TIGHT) as served:
                big = post(b"a" * (800 * KIB))
                first = await served.connect()
                await first.send(big[: -100 * KIB])
                await until(lambda: served.server.body_bytes >= 600 * KIB)
                for data in (post(b"b" * (400 * KIB)), chunked(b"c" * (400 * KIB))):
                    refused = await served.ask(data)
                    assert refused.status == 503
                    assert refused.headers[b"retry-after"] == b"1"
                assert (await served.ask(post(b"small"))).status == 200
                await first.send(big[-100 * KIB :])
                assert (await first.reply()).status == 200
                assert served.server.body_bytes == 0

        run(main())

    def test_a_client_that_waits_for_100_continue_sends_nothing_for_nothing(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo, TIGHT) as served:
                first = await served.connect()
                await first.send(post(b"a" * (800 * KIB))[: -100 * KIB])
                await until(lambda: served.server.body_bytes >= 600 * KIB)
                second = await served.connect()
                await second.send(post(b"b" * (800 * KIB), "/", "Expect: 100-continue")[: -800 * KIB])
                assert (await second.reply()).status == 503

        run(main())

    def test_two_that_cross_it_together_do_not_both_lose(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo, TIGHT) as served:
                raws = [await served.connect() for _ in range(2)]
                data = post(b"a" * (700 * KIB))
                for part in (data[:4096], data[4096:-1024], data[-1024:]):
                    for raw in raws:
                        try:
                            await raw.send(part)
                        except ConnectionError:
                            pass
                statuses = sorted([(await raw.reply()).status for raw in raws])
                assert statuses in ([200, 503], [200, 200])
                await until(lambda: served.server.body_bytes == 0)

        run(main())

    def test_what_a_handler_works_on_counts_until_it_answers(self, run: Run) -> None:
        async def main() -> None:
            handler = Held()
            async with serving(handler, TIGHT) as served:
                first = await served.connect()
                await first.send(post(b"a" * (900 * KIB)))
                await until(lambda: handler.waiting == 1)
                assert served.server.body_bytes == 900 * KIB
                assert (await served.ask(post(b"b" * (200 * KIB)))).status == 503
                first.reset()
                await until(lambda: served.server.connections == 1)
                assert served.server.body_bytes == 900 * KIB, "the handler still has it"
                handler.go.set()
                await until(lambda: served.server.body_bytes == 0)

        run(main())

    @pytest.mark.parametrize("size", [300, 300 * KIB])
    @pytest.mark.parametrize("how", ["reset", "half"])
    def test_a_client_that_leaves_gives_back_what_it_held(self, run: Run, size: int, how: str) -> None:
        async def main() -> None:
            async with serving(echo, TIGHT) as served:
                raw = await served.connect()
                await raw.send(post(b"a" * size)[:-10])
                await until(lambda: served.server.body_bytes == size - 10)
                if how == "reset":
                    raw.reset()
                else:
                    raw.writer.write_eof()
                await until(lambda: served.server.connections == 0)
                assert served.server.body_bytes == 0

        run(main())


class TestRate:
    @pytest.mark.parametrize("size", [2000, 400 * KIB])
    def test_a_body_that_drips_is_cut(self, run: Run, size: int) -> None:
        """Every piece in time, and still too slow altogether: counted, and read by the kernel (fill.py)."""

        async def main() -> None:
            limits = Limits(body_timeout_s=0.1, min_body_bytes_s=10_000_000, linger_timeout_s=0.1)
            async with serving(echo, limits) as served:
                raw = await served.connect()
                await raw.send(post(b"a" * size)[: -size + 10])

                async def drip() -> None:
                    while True:
                        await raw.send(b"a")
                        await asyncio.sleep(0.02)

                dripping = asyncio.create_task(drip())
                try:
                    assert (await raw.reply()).status == 408
                    assert served.server.body_bytes == 0
                finally:
                    dripping.cancel()
                await until(lambda: served.server.connections == 0)

        run(main())


class TestUnread:
    def test_a_stream_that_nobody_reads_is_cut_and_its_handler_goes_on(self, run: Run) -> None:
        written = 0
        most = 0
        ended = asyncio.Event()

        async def stream(exchange: Exchange) -> None:
            nonlocal written, most
            exchange.start(200, b"text/plain")
            for _ in range(2000):
                exchange.write(b"x" * 8192)
                written += 8192
                most = max(most, exchange._connection._transport.get_write_buffer_size())
                await asyncio.sleep(0)
            exchange.finish()
            ended.set()

        async def main() -> None:
            limits = Limits(max_unsent_bytes=262144, write_high_water=16384)
            async with serving(stream, limits) as served:
                raw = await served.connect(rcvbuf=4096)
                raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await raw.send(get())
                await ended.wait()
                assert written == 2000 * 8192
                assert most < 262144 + 3 * 8192
                await until(lambda: served.server.connections == 0)
                assert served.errors == []

        run(main())


def test_at_the_limit_of_connections_the_log_is_told_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """However many come and go there; again only after the crowd had left."""

    async def main() -> None:
        async with serving(echo, Limits(max_connections=16)) as served:
            raws = [await served.connect() for _ in range(24)]
            for _ in range(8):
                await until(lambda: served.server.connections == 16)
                await raws.pop(0).close()
            await until(lambda: served.server.connections == 16)
            assert len(caplog.records) == 1
            while raws:
                await raws.pop().close()
            await until(lambda: served.server.connections == 0)
            raws += [await served.connect() for _ in range(17)]
            await until(lambda: len(caplog.records) == 2)
            assert {record.levelno for record in caplog.records} == {logging.WARNING}
            for raw in raws:
                await raw.close()

    run(main())


@pytest.mark.parametrize(
    "data, statuses",
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {b"400", b"501", b"505"}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)), {b"400"}),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", {b"501"}),
        (b"BREW /pot HTTP/1.1\r\nHost: a\r\n\r\n", {b"501"}),
        (b"SSH-2.0-OpenSSH_9.6\r\n", {b"400"}),
    ],
    ids=["http2", "tls", "connect", "unknown method", "ssh"],
)
def test_what_is_not_spoken_here_gets_one_clear_answer(
    run: Run, caplog: pytest.LogCaptureFixture, data: bytes, statuses: set[bytes]
) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            raw = await served.connect()
            await raw.send(data)
            answer = await raw.ended()
            assert answer.split(b" ")[1] in statuses
            assert answer.count(b"HTTP/1.1 ") == 1
            assert caplog.records == []

    run(main())
