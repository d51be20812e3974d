"""A client for the inference engine: HTTP/1.1 over a bounded pool of kept connections.

Pool. The most recently used idle connection is taken first; fewer than `max_connections` are open: a new one;
else the request waits in line, first come first served, at most `max_waiting` of them. Time in line (and
connecting) is `waited_s`, time from sending to the last byte `engine_s`: the one is this process's affair,
the other the engine's.

Retry. A server may close a kept connection just as a request is sent on it; what then comes is an end or a
reset with not one byte of reply. A request for which that happens, on a connection that had been used before,
is sent once more on another connection; the second time is final. The server closed without reading it, or so
late into it that it said nothing: the case every HTTP client repeats (RFC 9112 9.3.1). Nothing else is ever
repeated here: not a time-out, not a reply that broke off, not a failure on a fresh connection.
`retry_stale=False` turns it off.

A request ends in a call (`begin`, in _client.pyx) or is awaited (`request`, built on that); one that finds no
idle connection has a task for as long as it waits for one.

Cancelling a request, or its time-out, closes its connection, which is how an engine learns that nobody waits.

Everything belongs to one event loop's thread.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Self
from urllib.parse import urlsplit

import msgspec

from areal_fast.http._client import Pool, Request
from areal_fast.http._native import Headers
from areal_fast.http.client_connection import EngineConnection, StreamCall
from areal_fast.http.errors import BrokenReply, ConnectFailed, PoolFull, Timeout
from areal_fast.http.headers import HeaderPairs, encode_headers
from areal_fast.http.wheel import Wheel

_TARGET = re.compile(r"/[\x21-\x7e]*")
_KEPT_STARTS = 64
_TICK_S = 0.05


class BaseUrl(msgspec.Struct, frozen=True):
    """Where an engine is. `prefix` is the base path without its last slash; `host_header` goes out as
    Host."""

    host: str
    port: int
    prefix: str
    host_header: str


def parse_base_url(url: str) -> BaseUrl:
    """`http://host[:port][/path]`; IPv6 in brackets. ValueError for anything else, https included."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {url!r}: {error}") from None
    if parts.scheme == "https":
        raise ValueError(
            f"{url!r}: https is not spoken here; what needs TLS goes through a maintained client"
        )
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"not an http URL: {url!r}")
    if parts.username is not None or parts.query or parts.fragment or port == 0:
        raise ValueError(f"an engine's URL has a host, a port and a path, nothing else: {url!r}")
    host = parts.hostname
    prefix = parts.path.rstrip("/")
    shown = f"[{host}]" if ":" in host else host
    header = shown if port in (None, 80) else f"{shown}:{port}"
    if not re.fullmatch(r"[\x21-\x7e]+", header) or (prefix and not _TARGET.fullmatch(prefix)):
        raise ValueError(f"not an http URL: {url!r}")
    return BaseUrl(host, port or 80, prefix, header)


class ClientStats(msgspec.Struct):
    """Counters since the client was made; times in seconds, summed."""

    requests: int = 0
    failed: int = 0
    connects: int = 0
    reused: int = 0
    retries: int = 0
    waited_s: float = 0.0
    engine_s: float = 0.0


class Reply(msgspec.Struct, gc=False):
    """A whole reply, whatever its status."""

    status: int
    headers: Headers
    body: bytes
    waited_s: float = 0.0
    engine_s: float = 0.0


class _Deadline:
    """One timer for all that a request waits for in turn."""

    __slots__ = ("_future", "_handle", "_loop", "_what", "ends", "expired")

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float, what: str) -> None:
        self._loop = loop
        self._what = what
        self._future: asyncio.Future[None] | None = None
        self.expired = False
        self.ends = loop.time() + timeout_s
        self._handle = loop.call_later(timeout_s, self._expire)

    def future(self) -> asyncio.Future[None]:
        """What the request waits for next."""
        self._future = future = self._loop.create_future()
        if self.expired:
            future.set_exception(self.error())
        return future

    def error(self) -> Timeout:
        return Timeout(f"{self._what}: no whole reply in time")

    def cancel(self) -> None:
        self._handle.cancel()

    def _expire(self) -> None:
        self.expired = True
        if self._future is not None and not self._future.done():
            self._future.set_exception(self.error())


class Client(Pool):
    """Requests to one base URL. Made anywhere, used on one event loop."""

    def __init__(
        self,
        base_url: str,
        *,
        max_connections: int = 256,
        connect_timeout_s: float = 5.0,
        max_waiting: int = 16384,
        max_reply_bytes: int = 1 << 30,
        max_header_bytes: int = 65536,
        idle_timeout_s: float = 60.0,
        retry_stale: bool = True,
    ) -> None:
        """ValueError if `base_url` is not a plain http URL."""
        self.url = parse_base_url(base_url)
        self._max_connections = max_connections
        self._connect_timeout_s = connect_timeout_s
        self._max_waiting = max_waiting
        self._max_reply_bytes = max_reply_bytes
        self._max_header_bytes = max_header_bytes
        self._idle_timeout_s = idle_timeout_s
        self._retry_stale = retry_stale
        self._starts = {}  # heads that callers repeat
        self._idle = {}  # since when; the last one was used last
        self._open: set[EngineConnection] = set()
        self._connecting = 0
        self._waiting = deque()
        self._handed: dict[asyncio.Future[None], EngineConnection | None] = {}
        self._wheel = Wheel(_TICK_S)  # deadlines of what is under way
        self._reaper = None
        self._closed = False

    @property
    def stats(self) -> ClientStats:
        return ClientStats(
            self.requests,
            self.failed,
            self.connects,
            self.reused,
            self.retries,
            self.waited_s,
            self.engine_s,
        )

    @property
    def connections(self) -> int:
        return len(self._open) + self._connecting

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection."""
        return len(self._waiting)

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        timeout_s: float,
        headers: HeaderPairs = (),
    ) -> Reply:
        """`begin`, and wait for the whole reply. Raises ConnectFailed (PoolFull), Timeout, BrokenReply;
        ValueError for what cannot be sent."""
        future = asyncio.get_running_loop().create_future()

        def done(_: Request) -> None:
            if not future.done():
                future.set_result(None)

        request = self.begin(method, path, body, timeout_s=timeout_s, headers=headers, done=done)
        try:
            await future
        except BaseException:
            request.cancel()
            raise
        if request.error is not None:
            raise request.error
        head = request.head
        assert head is not None
        waited_s, engine_s = request.sent - request.began, request.ended - request.sent
        return Reply(head.status, head.headers, request.take_body(), waited_s, engine_s)

    async def stream(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        timeout_s: float,
        headers: HeaderPairs = (),
    ) -> StreamReply:
        """Send and wait for the reply's head; the body comes as it arrives. `timeout_s` bounds the whole. The
        caller iterates to the end or closes it. Raises as `request`; iterating may raise Timeout or
        BrokenReply, too."""
        message = self._encode(method, path, body, headers)
        deadline = self._deadline(method, path, timeout_s)
        self.requests += 1
        began = time.monotonic()
        try:
            for attempt in (0, 1):
                connection = await self._acquire(deadline, fresh=attempt > 0)
                sent = time.monotonic()
                call = StreamCall(deadline.future(), connection)
                reused = connection.used > 0
                try:
                    connection.send(call, method, message)
                    await call.done
                except BrokenReply:
                    if attempt or not self.may_retry(call, reused):
                        raise
                    self.retries += 1
                    continue
                except BaseException:
                    connection.abandon(call)
                    raise
                break
        except BaseException:
            self.failed += 1
            deadline.cancel()
            raise
        self.waited_s += sent - began
        return StreamReply(call, deadline, self, sent - began, sent)

    def close(self) -> None:
        """Close every connection; what is under way fails with BrokenReply, what waits with ConnectFailed."""
        self._closed = True
        self._wheel.stop()
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(ConnectFailed("the client was closed"))
        self._waiting.clear()
        for connection in list(self._open):
            connection.fail(BrokenReply("the client was closed"))

    # Messages

    def _start(self, method: str, path: str, has_body: bool, headers: HeaderPairs) -> bytes:
        """The head up to the body's length; kept where a caller adds nothing of its own."""
        if not _TARGET.fullmatch(path):
            raise ValueError(f"not a request target: {path!r}")
        if not re.fullmatch(r"[A-Z]{1,32}", method):
            raise ValueError(f"not a method: {method!r}")
        lines = [f"{method} {self.url.prefix}{path} HTTP/1.1\r\nhost: {self.url.host_header}\r\n".encode()]
        own_type = False
        for name, value in headers:
            if name.lower() == b"content-type":
                own_type = True
                lines.append(encode_headers([(b"x", value)]).replace(b"x", b"content-type", 1))
            else:
                lines.append(encode_headers([(name, value)]))
        if has_body and not own_type:
            lines.append(b"content-type: application/json\r\n")
        start = b"".join(lines)
        if headers == () and len(self._starts) < _KEPT_STARTS:
            self._starts[method, path, has_body] = start
        return start

    def _deadline(self, method: str, path: str, timeout_s: float) -> _Deadline:
        return _Deadline(asyncio.get_running_loop(), timeout_s, f"{method} {path}")

    def _find_way(self, request: Request, fresh: bool) -> None:
        """Send once there is a connection for it."""
        request.way = asyncio.get_running_loop().create_task(self._found_way(request, fresh))

    async def _found_way(self, request: Request, fresh: bool) -> None:
        try:
            left = request.ends - time.monotonic()
            connection = await self._acquire_within(request.method, request.path, left, fresh=fresh)
        except BaseException as error:
            request.way = None
            request.settle(error if isinstance(error, Exception) else BrokenReply("given up"))
            if not isinstance(error, Exception):
                raise
        else:
            request.way = None
            self._send(connection, request)

    def may_retry(self, call: Request | StreamCall, reused: bool) -> bool:
        return self._retry_stale and reused and not call.touched and not self._closed

    # The pool

    async def _acquire_within(
        self, method: str, path: str, timeout_s: float, *, fresh: bool
    ) -> EngineConnection:
        deadline = self._deadline(method, path, timeout_s)
        try:
            return await self._acquire(deadline, fresh=fresh)
        finally:
            deadline.cancel()

    async def _acquire(self, deadline: _Deadline, *, fresh: bool) -> EngineConnection:
        """A connection for one request: to be sent on before anything else is awaited."""
        if self._closed:
            raise ConnectFailed("the client was closed")
        if self._idle and not fresh and not self._waiting:
            return self._take_idle()
        if self.connections >= self._max_connections:
            if fresh and self._idle:
                next(iter(self._idle)).close()
            else:
                handed = await self._wait_in_line(deadline)
                if handed is not None:
                    return handed
                return await self._connect(deadline)  # the right to open one was handed over, and counted
        self._connecting += 1
        return await self._connect(deadline)

    async def _wait_in_line(self, deadline: _Deadline) -> EngineConnection | None:
        if len(self._waiting) >= self._max_waiting:
            raise PoolFull(f"{len(self._waiting)} requests wait for the engine already")
        future = deadline.future()
        self._waiting.append(future)
        try:
            await future
        except BaseException:
            if future in self._handed:
                self._give_back(self._handed.pop(future))
            else:
                try:
                    self._waiting.remove(future)
                except ValueError:
                    pass  # close() emptied the line
            raise
        handed = self._handed.pop(future)
        if handed is not None and handed.closed:
            self._connecting += 1  # it broke on the way here; its place is free
            return None
        return handed

    def _give_back(self, connection: EngineConnection | None) -> None:
        if connection is None:
            self._connecting -= 1
            self._hand_on()
        elif not connection.closed:
            self._released(connection, True)

    def _hand_on(self) -> None:
        """Let the first in line go on, with an idle connection or the right to open one."""
        while self._waiting:
            if not self._idle and self.connections >= self._max_connections:
                return
            future = self._waiting.popleft()
            if future.done():
                continue
            if self._idle:
                self._handed[future] = self._take_idle()
            else:
                self._connecting += 1
                self._handed[future] = None
            future.set_result(None)

    def _released(self, connection: EngineConnection, reusable: bool) -> None:
        if not reusable or self._closed:
            self._open.discard(connection)
            self._idle.pop(connection, None)
            if not connection.closed:
                connection.close()
        else:
            self._idle[connection] = time.monotonic()
            if self._reaper is None:
                self._reaper = asyncio.get_running_loop().call_later(self._idle_timeout_s, self._reap)
        if not self._closed:
            self._hand_on()

    def _reap(self) -> None:
        """Close what has been idle for long; one timer for all."""
        self._reaper = None
        now = time.monotonic()
        for connection, since in list(self._idle.items()):
            if now - since >= self._idle_timeout_s:
                connection.close()
        if self._idle:
            oldest = next(iter(self._idle.values()))
            self._reaper = asyncio.get_running_loop().call_later(
                max(0.01, oldest + self._idle_timeout_s - now), self._reap
            )

    async def _connect(self, deadline: _Deadline) -> EngineConnection:
        """Open a connection; the caller has counted it in `_connecting`."""
        loop = asyncio.get_running_loop()
        where = f"{self.url.host}:{self.url.port}"
        left = min(self._connect_timeout_s, deadline.ends - loop.time())
        connection: EngineConnection | None = None
        try:
            async with asyncio.timeout(left):
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(self, self._max_reply_bytes, self._max_header_bytes),
                    self.url.host,
                    self.url.port,
                )
        except TimeoutError:
            if left < self._connect_timeout_s:
                raise deadline.error() from None
            raise ConnectFailed(f"{where}: no connection within {self._connect_timeout_s:g} s") from None
        except OSError as error:
            raise ConnectFailed(f"{where}: {error.strerror or error}") from error
        finally:
            self._connecting -= 1
            if connection is not None:
                self._open.add(connection)
            else:
                self._hand_on()
        self.connects += 1
        if connection.closed or self._closed:
            connection.close()
            self._open.discard(connection)
            raise ConnectFailed(f"{where}: closed at once")
        return connection


class StreamReply:
    """A reply whose body comes piece by piece: iterate once, to the end, or `close` (also as `async
    with`)."""

    def __init__(
        self, call: StreamCall, deadline: _Deadline, client: Client, waited_s: float, sent: float
    ) -> None:
        head = call.head
        assert head is not None
        self.status: int = head.status
        self.headers: Headers = head.headers
        self.waited_s = waited_s
        self._call = call
        self._deadline = deadline
        self._client = client
        self._sent = sent
        self._over = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Pieces as they come. Raises Timeout or BrokenReply, when all that came before was given."""
        call = self._call
        while not self._over:
            if self._deadline.expired and not call.ended:
                self._client.failed += 1
                self.close()
                raise self._deadline.error()
            piece = call.take()
            if piece is not None:
                yield piece
            elif call.ended:
                self._end()
            elif call.error is not None:
                self._end()
                self._client.failed += 1
                raise call.error
            else:
                call.waiter = self._deadline.future()
                try:
                    await call.waiter
                except BaseException:
                    self._client.failed += 1
                    self.close()
                    raise

    async def read(self) -> bytes:
        """All that is still to come."""
        return b"".join([piece async for piece in self])

    def close(self) -> None:
        """Give up what is still to come: ends the connection unless the reply is whole."""
        if not self._over:
            self._end()
            self._call.connection.abandon(self._call)

    def _end(self) -> None:
        self._over = True
        self._deadline.cancel()
        self._client.engine_s += time.monotonic() - self._sent

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
