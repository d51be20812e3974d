"""The engine adapter over real sockets: the HTTP layer's client on this side, its server on the other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from areal_fast.engine.errors import EngineError, EngineTimeout, EngineUnreachable
from areal_fast.engine.generate import Engine, Generation
from areal_fast.engine.sampling import Sampling
from areal_fast.engine.segments import Prompt
from areal_fast.http import Client, Exchange, Limits, Server

WATCHDOG_S = 90
PROMPT = Prompt.of([1, 2, 3])
SAMPLING = Sampling(max_new_tokens=8, stop_token_ids=(9,))


class State:
    def paused(self) -> bool:
        return False

    def version(self) -> int:
        return 5


def _listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def meta(count: int, stop: str | None) -> bytes:
    rows = [[-1.0, 5, None]] * (count - 1) + [[-1.0, 9 if stop else 5, None]]
    info = {
        "finish_reason": stop and {"type": stop},
        "completion_tokens": count,
        "output_token_logprobs": rows,
    }
    return msgspec.json.encode({"meta_info": info})


def ask(
    handler: Callable[[Exchange], Awaitable[None] | None], timeout_s: float = WATCHDOG_S, stream: bool = False
) -> tuple[Generation, list[int]]:
    async def main() -> tuple[Generation, list[int]]:
        server = Server(handler, Limits())
        with _listening() as sock:
            await server.serve(sock)
            address = f"http://127.0.0.1:{sock.getsockname()[1]}"
            client = Client(address, max_connections=4, connect_timeout_s=WATCHDOG_S)
            engine = Engine(client, State(), request_timeout_s=timeout_s, address=address)
            shown: list[int] = []
            try:
                got = await engine.generate(PROMPT, SAMPLING, on_tokens=shown.extend if stream else None)
                return got, shown
            finally:
                client.close()
                await server.drain(0.1)

    return asyncio.run(asyncio.wait_for(main(), WATCHDOG_S))


def test_an_answer() -> None:
    def handler(exchange: Exchange) -> None:
        asked: dict[str, Any] = msgspec.json.decode(exchange.body)
        assert (exchange.method, exchange.path) == ("POST", "/generate") and asked["input_ids"] == [1, 2, 3]
        assert exchange.headers.get(b"content-type") == b"application/json"
        exchange.respond(200, meta(3, "stop"))

    got, _ = ask(handler)
    assert list(got.output_ids) == [5, 5, 9] and got.version_runs == [(5, 3)]


def test_a_stream() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.start(200, b"text/event-stream")
        for count in (1, 2, 3):
            exchange.write(b"data: " + meta(count, "stop" if count == 3 else None) + b"\n\n")
            await asyncio.sleep(0)
        exchange.write(b"data: [DONE]\n\n")
        exchange.finish()

    got, shown = ask(handler, stream=True)
    assert list(got.output_ids) == [5, 5, 9] == shown and got.stop_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_faults(stream: bool) -> None:
    with pytest.raises(EngineError, match="Engine returned 503: overloaded"):
        ask(lambda exchange: exchange.respond(503, b"overloaded"), stream=stream)

    async def never(exchange: Exchange) -> None:
        gone = asyncio.Event()
        exchange.on_gone(gone.set)
        await gone.wait()

    with pytest.raises(EngineTimeout):
        ask(never, timeout_s=0.05, stream=stream)

    async def breaks_off(exchange: Exchange) -> None:
        exchange.start(200, b"text/event-stream")
        exchange.write(b"data: " + meta(1, None) + b"\n\n")
        exchange.fail()

    with pytest.raises(EngineUnreachable, match="broke off"):
        ask(breaks_off, stream=stream)


def test_nobody_there() -> None:
    with _listening() as sock:
        port = sock.getsockname()[1]

    async def main() -> None:
        client = Client(f"http://127.0.0.1:{port}", max_connections=1, connect_timeout_s=WATCHDOG_S)
        try:
            with pytest.raises(EngineUnreachable, match=f"Cannot reach engine http://127.0.0.1:{port}"):
                await Engine(client, State(), address=f"http://127.0.0.1:{port}").generate(PROMPT, SAMPLING)
        finally:
            client.close()

    asyncio.run(asyncio.wait_for(main(), WATCHDOG_S))


def test_the_embedded_engine_says_the_same_streamed_or_not() -> None:
    from areal_fast.embedded.answers import TokenRange
    from areal_fast.embedded.engine import EmbeddedEngine
    from areal_fast.embedded.server import EmbeddedServer

    def fresh() -> Any:
        return EmbeddedServer(EmbeddedEngine(TokenRange(0, 256), 9)).handle

    whole, _ = ask(fresh())
    streamed, shown = ask(fresh(), stream=True)
    assert list(whole.output_ids) == list(streamed.output_ids) == shown
    assert list(whole.logprobs) == list(streamed.logprobs)
    assert whole.stop_reason == streamed.stop_reason and 0 < len(shown) <= SAMPLING.max_new_tokens
