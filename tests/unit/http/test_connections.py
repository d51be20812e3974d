"""Connections that end, stall, wait or come in numbers: time-outs, half close, resets, drain, descriptors,
sharing."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest

from areal_fast.http import Exchange, Limits, Server
from tests.unit.http.serving import Raw, chunked, echo, get, post, serving, until

Run = Callable[[Coroutine[Any, Any, Any]], Any]

QUICK = Limits(
    header_timeout_s=0.05,
    body_timeout_s=0.05,
    idle_timeout_s=0.05,
    write_timeout_s=0.05,
    linger_timeout_s=0.05,
)


class Gate:
    """A handler that tells when it was reached, and answers when it is let."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.exchange: Exchange | None = None
        self.gone: list[bool] = []
        self.sent: list[bool] = []

    async def __call__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        exchange.on_gone(lambda: self.gone.append(True))
        exchange.on_sent(self.sent.append)
        self.begun.set()
        await self.go.wait()
        exchange.respond(200, b"x" * self.size)


class TestTimeouts:
    @pytest.mark.parametrize(
        "data",
        [
            b"G",
            b"GET / HTTP/1.1\r\nHo",
            post(b"abc")[:-1],
            post(b"abc")[:-3],
            chunked(b"abc")[:-8],
            chunked(b"abc")[:-1],
            get() + b"GET",
        ],
    )
    def test_an_unfinished_request_is_408(self, run: Run, data: bytes) -> None:
        async def main() -> None:
            async with serving(echo, QUICK) as served:
                raw = await served.connect()
                await raw.send(data)
                if data.startswith(get()):
                    assert (await raw.reply()).status == 200
                assert (await raw.reply()).status == 408
                assert await raw.ended() == b""

        run(main())

    def test_a_head_that_drips_is_cut_though_bytes_come(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo, QUICK) as served:
                raw = await served.connect()

                async def drip() -> None:
                    await raw.send(b"GET / HTTP/1.1\r\nX: ")
                    while True:
                        await raw.send(b"y")
                        await asyncio.sleep(0.005)

                dripping = asyncio.create_task(drip())
                assert (await raw.reply()).status == 408
                dripping.cancel()

        run(main())

    def test_a_body_that_keeps_coming_is_not_cut(self, run: Run) -> None:
        async def main() -> None:
            limits = Limits(body_timeout_s=0.2, header_timeout_s=0.05, min_body_bytes_s=50)
            async with serving(echo, limits) as served:
                raw = await served.connect()
                data = post(b"z" * 100)
                await raw.send(data[:-100])
                began = asyncio.get_running_loop().time()
                for _ in range(100):
                    await raw.send(b"z")
                    await asyncio.sleep(0.005)
                assert asyncio.get_running_loop().time() - began > 0.4
                assert (await raw.reply()).status == 200

        run(main())

    @pytest.mark.parametrize("first", [b"", get(), b"\r\n"])
    def test_an_idle_connection_is_closed_silently(self, run: Run, first: bytes) -> None:
        async def main() -> None:
            async with serving(echo, QUICK) as served:
                raw = await served.connect()
                await raw.send(first)
                if first == get():
                    assert (await raw.reply()).status == 200
                assert await raw.ended() == b""
                await until(lambda: served.server.connections == 0)

        run(main())

    def test_a_handler_may_take_longer_than_any_of_them(self, run: Run) -> None:
        async def slow(exchange: Exchange) -> None:
            await asyncio.sleep(0.4)
            exchange.respond(200, b"")

        async def main() -> None:
            async with serving(slow, QUICK) as served:
                assert (await served.ask(get())).status == 200

        run(main())

    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_client_that_does_not_read_is_cut(self, run: Run, streamed: bool) -> None:
        sent: list[bool] = []

        async def handler(exchange: Exchange) -> None:
            exchange.on_sent(sent.append)
            if not streamed:
                exchange.respond(200, b"x" * 40_000_000)
                return
            exchange.start(200, b"text/plain")
            while not exchange.gone:
                exchange.write(b"x" * 100_000)
                await exchange.drain()
            exchange.finish()

        async def main() -> None:
            async with serving(handler, QUICK) as served:
                raw = await served.connect(rcvbuf=65536)
                raw.writer.transport.pause_reading()
                await raw.send(get())
                await until(lambda: served.server.accepted == 1 and served.server.connections == 0)
                await until(lambda: sent == [False])

        run(main())

    def test_a_slow_but_steady_reader_is_not(self, run: Run) -> None:
        async def main() -> None:
            limits = Limits(write_timeout_s=0.3, idle_timeout_s=0.3)
            async with serving(lambda ex: ex.respond(200, b"x" * 12_000_000), limits) as served:
                raw = await served.connect(rcvbuf=65536)
                await raw.send(get())
                read = 0
                began = asyncio.get_running_loop().time()
                while read < 12_000_000:
                    read += len(await raw.reader.read(200_000))
                    await asyncio.sleep(0.01)
                assert asyncio.get_running_loop().time() - began > 0.4

        run(main())


class TestSent:
    @pytest.mark.parametrize("size", [2, 100_000, 20_000_000])
    def test_true_when_all_was_taken(self, run: Run, size: int) -> None:
        async def main() -> None:
            gate = Gate(size)
            gate.go.set()
            async with serving(gate) as served:
                raw = await served.connect()
                await raw.send(get() + get("/", "Connection: close"))
                for n in range(2):
                    assert len((await raw.reply()).body) == size
                    await until(lambda n=n: len(gate.sent) > n)  # type: ignore[misc]
                assert await raw.ended() == b""
                assert not gate.gone and gate.sent == [True, True]

        run(main())

    def test_not_before_the_last_byte_left(self, run: Run) -> None:
        async def main() -> None:
            gate = Gate(40_000_000)
            gate.go.set()
            async with serving(gate) as served:
                raw = await served.connect(rcvbuf=65536)
                raw.writer.transport.pause_reading()
                await raw.send(get() + get())
                await until(lambda: gate.exchange is not None and gate.exchange.finished)
                for _ in range(20):
                    await asyncio.sleep(0.002)
                assert gate.sent == []
                first = gate.exchange
                raw.writer.transport.resume_reading()
                await raw.reply()
                assert gate.sent[0] is True
                await raw.reply()
                assert gate.exchange is not first, "the second request ran after the first reply was sent"

        run(main())

    def test_false_when_the_client_breaks_in_the_middle(self, run: Run) -> None:
        async def main() -> None:
            gate = Gate(40_000_000)
            gate.go.set()
            async with serving(gate) as served:
                raw = await served.connect(rcvbuf=65536)
                await raw.send(get())
                await raw.reader.read(1000)
                raw.reset()
                await until(lambda: gate.sent == [False])

        run(main())

    def test_false_when_the_client_is_gone_before(self, run: Run) -> None:
        async def main() -> None:
            gate = Gate()
            async with serving(gate) as served:
                raw = await served.connect()
                await raw.send(get())
                await gate.begun.wait()
                raw.reset()
                await until(lambda: gate.gone == [True])
                assert gate.exchange is not None and gate.exchange.gone
                assert gate.sent == [False]
                gate.go.set()
                await until(lambda: gate.exchange is not None and gate.exchange.finished)
                assert not served.errors

        run(main())

    def test_streams_and_callbacks_that_fail(self, run: Run) -> None:
        sent: list[bool] = []

        def handler(exchange: Exchange) -> None:
            def note(arrived: bool) -> None:
                sent.append(arrived)
                raise ValueError

            exchange.on_sent(note)
            exchange.start(200, b"text/plain")
            exchange.write(b"x")
            exchange.fail() if exchange.path == "/fail" else exchange.finish()
            with pytest.raises(RuntimeError):
                exchange.on_sent(note)

        async def main() -> None:
            async with serving(handler) as served:
                raw = await served.connect()
                await raw.send(get() + get("/fail"))
                assert (await raw.reply()).body == b"x"
                await raw.ended()
                assert sent == [True, False]
                assert len(served.errors) == 2

        run(main())


class TestHalfClose:
    @pytest.mark.parametrize("count", [1, 3])
    def test_what_was_asked_is_answered(self, run: Run, count: int) -> None:
        async def main() -> None:
            gate = Gate()
            async with serving(gate) as served:
                raw = await served.connect()
                await raw.send(get() * count)
                raw.writer.write_eof()
                await gate.begun.wait()
                await until(lambda: gate.exchange is not None and gate.exchange.input_ended)
                assert not gate.gone
                gate.go.set()
                for _ in range(count):
                    assert (await raw.reply()).status == 200
                assert await raw.ended() == b""
                assert gate.sent == [True] * count

        run(main())

    def test_a_large_reply_too(self, run: Run) -> None:
        async def main() -> None:
            async with serving(lambda ex: ex.respond(200, b"x" * 20_000_000)) as served:
                raw = await served.connect(rcvbuf=65536)
                await raw.send(get() * 2)
                raw.writer.write_eof()
                for _ in range(2):
                    assert len((await raw.reply()).body) == 20_000_000
                assert await raw.ended() == b""

        run(main())

    @pytest.mark.parametrize("data", [b"", b"GET", post(b"abc")[:-1], chunked(b"abc")[:-2]])
    def test_an_unfinished_request_just_ends(self, run: Run, data: bytes) -> None:
        async def main() -> None:
            async with serving(echo) as served:
                raw = await served.connect()
                await raw.send(data)
                raw.writer.write_eof()
                assert await raw.ended() == b""
                await until(lambda: served.server.connections == 0)

        run(main())


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize(
    "data", [b"", b"GET / HT", post(b"x" * 100)[:-50], post(b"x" * 100), chunked(b"x")[:-1], get() * 3, b"\0"]
)
def test_a_client_that_leaves_at_any_stage_leaves_nothing_behind(run: Run, data: bytes, how: str) -> None:
    async def main() -> None:
        async def handler(exchange: Exchange) -> None:
            exchange.start(200, b"text/plain")
            for _ in range(50):
                exchange.write(b"y" * 1000)
                await exchange.drain()
                await asyncio.sleep(0)
            exchange.finish()

        async with serving(handler) as served:
            raw = await served.connect()
            await raw.send(data)
            await until(lambda: served.server.accepted == 1)
            raw.reset() if how == "reset" else raw.writer.close()
            await until(lambda: served.server.connections == 0)
            await until(lambda: not served.server._tasks)
            assert not served.errors
            assert (await served.ask(get())).status == 200

    run(main())


class TestDrain:
    def test_idle_ones_close_busy_ones_finish(self, run: Run) -> None:
        async def main() -> None:
            gate = Gate()
            async with serving(gate) as served:
                idle, busy, half = [await served.connect() for _ in range(3)]
                await busy.send(get())
                await half.send(post(b"abc")[:-1])
                await gate.begun.wait()
                await until(lambda: served.server.connections == 3)
                draining = asyncio.create_task(served.server.drain(20.0))
                assert await idle.ended() == b""
                assert not draining.done()
                gate.go.set()
                reply = await busy.reply()
                assert (reply.status, reply.headers[b"connection"]) == (200, b"close")
                await half.send(b"c")
                assert (await half.reply()).headers[b"connection"] == b"close"
                assert await draining == 0
                assert served.server.connections == 0

        run(main())

    def test_it_is_bounded(self, run: Run) -> None:
        async def main() -> None:
            gate = Gate()
            async with serving(gate) as served:
                raw = await served.connect()
                await raw.send(get())
                await gate.begun.wait()
                assert await served.server.drain(0.05) == 1
                assert await raw.ended() == b""
                assert gate.sent == [False]
                gate.go.set()

        run(main())

    def test_streams_are_finished(self, run: Run) -> None:
        async def main() -> None:
            go = asyncio.Event()

            async def handler(exchange: Exchange) -> None:
                exchange.start(200, b"text/event-stream")
                exchange.write(b"a")
                await go.wait()
                exchange.write(b"b")
                exchange.finish()

            async with serving(handler) as served:
                raw = await served.connect()
                await raw.send(get())
                assert await raw.reader.readuntil(b"a\r\n")
                draining = asyncio.create_task(served.server.drain(20.0))
                await until(lambda: served.server.draining)
                go.set()
                assert (await raw.ended()).endswith(b"b\r\n0\r\n\r\n")
                assert await draining == 0

        run(main())

    def test_others_keep_the_listening_socket(self, run: Run) -> None:
        async def main() -> None:
            async with serving(echo) as served:
                other = Server(lambda ex: ex.respond(202, b""))
                with served.sock.dup() as shared:
                    await other.serve(shared)
                    await served.server.drain(10.0)
                    for _ in range(5):
                        assert (await served.ask(get())).status == 202
                    await other.drain(10.0)

        run(main())


@pytest.fixture
def many_files() -> Iterator[int]:
    """Room for 2,000 connections, both ends; how many there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY and hard < 8192 else 8192
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield min(2000, (max(soft, wanted) - 200) // 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_two_thousand_idle_connections(run: Run, many_files: int) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(echo, Limits(accept_batch=64)) as served:
            clients = []
            for _ in range(many_files):
                sock = socket.socket()
                sock.setblocking(False)
                await loop.sock_connect(sock, ("127.0.0.1", served.port))
                clients.append(sock)
            await until(lambda: len(served.server._connections) == many_files)
            assert sum(len(bucket) for bucket in served.server.wheel._buckets.values()) == many_files
            assert len(getattr(loop, "_scheduled", [])) < 20, "one timer, not one a connection"
            for sock in clients[:: max(1, many_files // 50)]:
                await loop.sock_sendall(sock, get("/x"))
                assert (await loop.sock_recv(sock, 1000)).startswith(b"HTTP/1.1 200")
            for sock in clients:
                sock.close()
            await until(lambda: served.server.connections == 0)

    run(main())


def test_at_most_so_many_connections(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(echo, Limits(max_connections=2)) as served:
            first, second = await served.connect(), await served.connect()
            for raw in (first, second):
                await raw.send(get())
                await raw.reply()
            third = await served.connect()
            await third.send(get())
            await until(lambda: not served.server._watched)
            assert served.server.connections == 2
            await first.close()
            assert (await third.reply()).status == 200

    run(main())


class NoDescriptors:
    """A listening socket whose accept fails for want of descriptors while `full`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.full = True
        self.tries = 0

    def accept(self) -> Any:
        self.tries += 1
        if self.full:
            raise OSError(errno.EMFILE, "Too many open files")
        return self._sock.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_without_descriptors_clients_wait_in_the_backlog(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = Server(echo)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            listener = NoDescriptors(sock)
            await server.serve(listener)  # type: ignore[arg-type]
            raw = Raw(*await asyncio.open_connection(*sock.getsockname()))
            await raw.send(get())
            await until(lambda: not server._watched)
            for _ in range(20):
                await asyncio.sleep(0.002)
            assert listener.tries == 1, "it goes round in circles"
            server._watch()
            await until(lambda: not server._watched)
            assert [r.levelno for r in caplog.records] == [logging.WARNING], "logged once"
            listener.full = False
            server._watch()
            assert (await raw.reply()).status == 200
            await raw.close()
            await server.drain(10.0)

    run(main())


def test_two_servers_share_one_socket(run: Run) -> None:
    """Whichever accepts, everything is answered; a burst does not all go to the one that wakes first."""

    async def main() -> None:
        async with serving(echo, Limits(accept_batch=2)) as served:
            other = Server(echo, Limits(accept_batch=2))
            with served.sock.dup() as shared:
                await other.serve(shared)
                raws = await asyncio.gather(*[served.connect() for _ in range(60)])
                for raw in raws:
                    await raw.send(get())
                    assert (await raw.reply()).status == 200
                assert served.server.accepted + other.accepted == 60
                assert min(served.server.accepted, other.accepted) >= 10
                await other.drain(10.0)

    run(main())


def test_ended_connections_are_freed_without_the_collector(run: Run) -> None:
    def later(exchange: Exchange) -> Awaitable[None]:
        async def answer() -> None:
            await asyncio.sleep(0)
            exchange.respond(200, b"")

        return answer()

    async def main() -> None:
        async with serving(later) as served:
            gc.collect()
            gc.disable()
            try:
                for _ in range(20):
                    raw = await served.connect()
                    await raw.send(get())
                    await raw.reply()
                    await raw.close()
                    await until(lambda: served.server.connections == 0)
                served.server.wheel.stop()  # entries of ended connections stay until their tick, else
                await asyncio.sleep(0)
                left = sum(isinstance(thing, Exchange) for thing in gc.get_objects())
            finally:
                gc.enable()
            assert left <= 2

    run(main())
