"""What the HTTP tests share: both event loops, a server on a free port, raw clients, and a watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple

import uvloop

from areal_fast.http import Exchange, Limits, Server
from areal_fast.http.server import Handler

WATCHDOG_S = 90.0
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run_on(factory: Callable[[], asyncio.AbstractEventLoop], work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(asyncio.wait_for(work, WATCHDOG_S))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, looking again each time the loop has done something; the watchdog ends it."""
    while not condition():
        await asyncio.sleep(0.002)


class Raw:
    """A client that sends what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @property
    def sock(self) -> socket.socket:
        return self.writer.get_extra_info("socket")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, *, head_only: bool = False) -> RawReply:
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(b": ")
            assert name not in headers, f"{name!r} twice"
            headers[name] = value
        body = b""
        if head_only or first.split(b" ")[1] in (b"100", b"204", b"304"):
            pass
        elif b"content-length" in headers:
            body = await self.reader.readexactly(int(headers[b"content-length"]))
        elif b"transfer-encoding" in headers:
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
        else:
            body = await self.reader.read()
        return RawReply(int(first.split(b" ")[1]), headers, body)

    async def ended(self) -> bytes:
        """What is still read until the other side closes."""
        return await self.reader.read()

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close without waiting for what is unsent."""
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class RawReply(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes


class Serving:
    def __init__(self, server: Server, sock: socket.socket, errors: list[tuple[str, Exception]]) -> None:
        self.server = server
        self.sock = sock
        self.errors = errors
        self.port: int = sock.getsockname()[1]
        self._raw: list[Raw] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self, rcvbuf: int = 0) -> Raw:
        sock = socket.socket()
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        raw = Raw(*await asyncio.open_connection(sock=sock, limit=1 << 20))
        self._raw.append(raw)
        return raw

    async def ask(self, data: bytes) -> RawReply:
        raw = await self.connect()
        await raw.send(data)
        return await raw.reply()

    async def stop(self) -> None:
        for raw in self._raw:
            await raw.close()
        await self.server.drain(10.0)
        self.sock.close()


@contextlib.asynccontextmanager
async def serving(handler: Handler, limits: Limits | None = None, **more: Any) -> AsyncIterator[Serving]:
    errors: list[tuple[str, Exception]] = []
    server = Server(handler, limits, on_error=lambda what, error: errors.append((what, error)), **more)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await server.serve(sock)
    served = Serving(server, sock, errors)
    try:
        yield served
    finally:
        await served.stop()


def echo(exchange: Exchange) -> None:
    """Answers with what it understood."""
    seen = f"{exchange.method} {exchange.path} {exchange.query} {len(exchange.body)}\n".encode()
    exchange.respond(200, seen + exchange.body, b"text/plain")


def get(path: str = "/", *more: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: a", *more, "", ""]).encode()


def post(body: bytes, path: str = "/", *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *more, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(*pieces: bytes, trailers: bytes = b"") -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n%b\r\n" % (
        framed,
        trailers,
    )
