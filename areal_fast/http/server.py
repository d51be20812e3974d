"""The server: accepts connections from a listening socket that several processes share, and ends in good
order.

Accepting. The listening socket is watched with add_reader and accepted from here, rather than by
loop.create_server: libuv accepts until the queue is empty, so the process that wakes first takes a whole
burst of connections that then live for hours (measured: 64 to 0 between two processes), and at the descriptor
limit it closes waiting clients. Here a process takes a few, steps back for a millisecond to let the others
come, and takes one more the next time (35 to 29, for 22 µs of CPU a connection instead of 14). At the
descriptor limit clients stay in the backlog: accepting pauses, and resumes when a connection has closed or a
second has passed; it is logged once until an eighth of the connections has gone.

Stopping. `stop_accepting`, then `drain`: idle connections close, every further reply says `Connection:
close`, and what is still busy at the end is cut.

Everything belongs to one event loop's thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from math import inf
from typing import Any, NamedTuple, TypeAlias

from areal_fast.http._native import Common, Exchange, RequestHead
from areal_fast.http.connection import Connection
from areal_fast.http.headers import ReplyHeads
from areal_fast.http.intake import Sinks
from areal_fast.http.limits import Limits
from areal_fast.http.wheel import Wheel

Handler: TypeAlias = Callable[[Exchange], Awaitable[None] | None]
OnError: TypeAlias = Callable[[str, Exception], None]

_log = logging.getLogger("areal_fast.http")

_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ACCEPT_PAUSE_S = 1.0
_STEP_BACK_S = 0.001
_MAX_BATCH = 64


class _Ticks(NamedTuple):
    header: int
    body: int
    idle: int
    write: int
    linger: int


def log_error(what: str, error: Exception) -> None:
    _log.error("%s failed", what, exc_info=error)


class Server(Common):
    """HTTP/1.1 on one event loop.

    `handler` gets every whole request. It answers before it returns None, or returns an awaitable that
    answers, or defers its answer (Exchange.defer). What it raises is given to `on_error` (where, exception)
    and answered with 500. `sinks` and `streamed`: who takes large bodies as they come, and how large these
    may be (intake.py).
    """

    def __init__(
        self,
        handler: Handler,
        limits: Limits | None = None,
        *,
        on_error: OnError = log_error,
        sinks: Sinks | None = None,
        streamed: Callable[[RequestHead], int] | None = None,
    ) -> None:
        self.handler = handler
        self.sinks = sinks
        self.streamed = streamed
        self.limits = limits = limits or Limits()
        self.heads = ReplyHeads()
        shortest = min(
            limits.header_timeout_s,
            limits.body_timeout_s,
            limits.idle_timeout_s,
            limits.write_timeout_s,
            limits.linger_timeout_s,
        )
        self.wheel = wheel = Wheel(min(0.5, max(0.01, shortest / 4)))
        self.ticks = _Ticks(
            wheel.ticks(limits.header_timeout_s),
            wheel.ticks(limits.body_timeout_s),
            wheel.ticks(limits.idle_timeout_s),
            wheel.ticks(limits.write_timeout_s),
            wheel.ticks(limits.linger_timeout_s),
        )
        self.bind(limits, self.ticks.idle)
        self.accepted = 0  # connections since the start
        self.max_bodies = max(limits.max_bodies_bytes, limits.max_body_bytes)
        self.ticks_a_byte = 1 / (limits.min_body_bytes_s * wheel.tick_s) if limits.min_body_bytes_s else inf
        self.ticks_a_streamed_byte = 1 / (limits.min_stream_bytes_s * wheel.tick_s)
        self._on_error = on_error
        self._connections: set[Connection] = set()
        self._parked: set[Connection] = set()  # answered, waiting only for the client to close
        self._opening = 0  # accepted, not yet connection_made
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._listeners: list[socket.socket] = []
        self._watched = False
        self._batch = limits.accept_batch
        self._retry: asyncio.TimerHandle | None = None
        self._out_of_room = False
        self._told_at = 0  # connections when the log was told that there is no room; 0: it was not
        self._quiet: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections) + self._opening

    # Accepting

    async def serve(self, sock: socket.socket) -> None:
        """Begin to accept from `sock`, which is bound, and return. The socket stays the caller's, to close at
        the end."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        sock.setblocking(False)
        sock.listen(min(4096, socket.SOMAXCONN))
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit both
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._listeners.append(sock)
        self._watch()

    def stop_accepting(self) -> None:
        """Leave the listening sockets alone from now on. What waits in them is for other processes, or
        nobody."""
        self._unwatch()
        self._listeners.clear()

    def _watch(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._loop is not None:
            for sock in self._listeners:
                self._loop.add_reader(sock.fileno(), self._accept, sock)
            self._watched = True

    def _unwatch(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._watched and self._loop is not None:
            for sock in self._listeners:
                self._loop.remove_reader(sock.fileno())
        self._watched = False

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(self._batch):
            if self.connections >= self.limits.max_connections:
                self._pause_accepting("as many connections as allowed")
                return
            try:
                accepted, peer = sock.accept()
            except (BlockingIOError, InterruptedError):
                self._batch = self.limits.accept_batch
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._pause_accepting(error.strerror or "no room")
                    return
                continue  # that client has hung up (ECONNABORTED and the like)
            self._out_of_room = False
            self.accepted += 1
            self._opening += 1
            accepted.setblocking(False)
            self.start(self._open(accepted, peer if isinstance(peer, tuple) else (peer,)))
        self._step_back()

    async def _open(self, accepted: socket.socket, peer: tuple[object, ...]) -> None:
        assert self._loop is not None
        try:
            await self._loop.connect_accepted_socket(lambda: Connection(self, peer), accepted)
        except OSError:
            self._opening -= 1
            accepted.close()
            self._check_quiet()
        finally:
            self.ended()

    def _step_back(self) -> None:
        """More may be waiting: let the other processes come first, but take one more the next time."""
        self._batch = min(self._batch + 1, max(_MAX_BATCH, self.limits.accept_batch))
        self._unwatch()
        if self._loop is not None:
            self._retry = self._loop.call_later(_STEP_BACK_S, self._watch)

    def _pause_accepting(self, why: str) -> None:
        self._unwatch()
        self._out_of_room = True
        if not self._told_at:
            self._told_at = max(1, self.connections)
            _log.warning("not accepting connections for now: %s (%d open)", why, self.connections)
        if self._loop is not None:
            self._retry = self._loop.call_later(_ACCEPT_PAUSE_S, self._watch)

    # Ending

    async def drain(self, timeout_s: float) -> int:
        """Stop accepting, let requests finish for `timeout_s` at most, then cut. Returns how many busy ones
        were cut."""
        self.stop_accepting()
        await asyncio.sleep(0)  # what the loop has read or accepted already still counts
        await asyncio.sleep(0)
        self.draining = True
        for connection in list(self._connections):
            connection.drain()
        if self._busy():
            self._quiet = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait_for(self._quiet, timeout_s)
            except TimeoutError:
                pass
            finally:
                self._quiet = None
        cut = self._busy()
        for connection in list(self._connections):
            connection.abort()
        for _ in range(100):
            if not self.connections:
                break
            await asyncio.sleep(0)  # connection_lost comes in the loop's next turns
        self.wheel.stop()
        return cut

    def _busy(self) -> int:
        return self.connections - len(self._parked)

    # What connections call

    def room_for(self, nbytes: int) -> bool:
        """Whether a body of so many bytes may come now."""
        return self.body_bytes + nbytes <= self.max_bodies

    def opened(self, connection: Connection) -> None:
        self._opening -= 1
        self._connections.add(connection)

    def parked(self, connection: Connection) -> None:
        self._parked.add(connection)
        self._check_quiet()

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._parked.discard(connection)
        if self._told_at and len(self._connections) < self._told_at - self._told_at // 8:
            self._told_at = 0
        if self._out_of_room and not self._watched and self._listeners:
            self._watch()
        self._check_quiet()

    def _check_quiet(self) -> None:
        if self._quiet is not None and not self._quiet.done() and not self._busy():
            self._quiet.set_result(None)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task, which is kept from being collected until it calls `ended` at its end. (A
        callback on the task would do that too, for another turn of the loop.)"""
        assert self._loop is not None
        self._tasks.add(self._loop.create_task(work))

    def ended(self) -> None:
        self._tasks.discard(asyncio.current_task())

    def report(self, what: str, error: Exception) -> None:
        try:
            self._on_error(what, error)
        except Exception:
            _log.exception("the error handler failed on %s", what)
