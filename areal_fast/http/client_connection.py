"""One connection to the engine: at most one request on it at a time.

Theory. The connection is idle (in the pool), or a call is on it. What arrives goes through the parser to
the call; anything that arrives while idle, EOF included, takes the connection out of the pool, so a request
is seldom sent on a dead one. A call ends in exactly one of: its reply is whole, or it failed. A connection is
used again only if the reply was whole, nothing follows it, the request was sent to its end and both sides
mean to keep it.

An ordinary reply to a `Request`, whole and in one piece, never comes here (_client.pyx). A request's time is
one deadline of its connection in the pool's wheel: one store a request, no timer.

A `Request` gathers its reply; a streamed one (`StreamCall`) queues pieces and pauses reading beyond
`STREAM_HIGH_WATER`, so that a slow reader slows the engine, not fills this process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, TypeAlias, cast

from areal_fast.http._client import Link, Request
from areal_fast.http.errors import BrokenReply
from areal_fast.http.fill import WORTH_FILLING, Fill
from areal_fast.http.head import ProtocolError, ReplyHead
from areal_fast.http.parser import END, ReplyParser

if TYPE_CHECKING:
    from areal_fast.http.client import Client

STREAM_HIGH_WATER = 262144

Call: TypeAlias = "Request | StreamCall"


class StreamCall:
    """A reply given out as it comes. `done` is settled by its head; the end stands in the queue."""

    __slots__ = ("connection", "done", "ended", "error", "head", "pieces", "queued", "touched", "waiter")

    def __init__(self, done: asyncio.Future[None], connection: EngineConnection) -> None:
        self.done = done
        self.connection = connection
        self.head: ReplyHead | None = None
        self.touched = False  # a byte of the reply has arrived
        self.pieces: deque[bytes] = deque()
        self.queued = 0
        self.ended = False
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    def begin(self, head: ReplyHead) -> None:
        self.head = head
        if not self.done.done():
            self.done.set_result(None)

    def piece(self, data: bytes) -> None:
        self.pieces.append(data)
        self.queued += len(data)
        if self.queued > STREAM_HIGH_WATER:
            self.connection.pause()
        self._wake()

    def finish(self) -> None:
        self.ended = True
        self._wake()

    def fail(self, error: Exception) -> None:
        if self.head is None:
            if not self.done.done():
                self.done.set_exception(error)
        elif not self.ended and self.error is None:
            self.error = error
        self._wake()

    def take(self) -> bytes | None:
        """Everything queued, as one piece; None: nothing is."""
        if not self.pieces:
            return None
        taken = self.pieces.popleft() if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.queued = 0
        if not self.ended:
            self.connection.resume()
        return taken

    def _wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class EngineConnection(Link, asyncio.Protocol):
    """The protocol object: what `Link` does not do. It says `_released` to its pool after every call, and at
    the end."""

    def __init__(self, client: Client, max_body_bytes: int, max_header_bytes: int) -> None:
        super().__init__(
            client, ReplyParser(max_body_bytes, max_header_bytes), max_body_bytes, max_header_bytes
        )
        self._client = client
        self._paused = False

    def pause(self) -> None:
        if not self._paused and not self.closed:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.closed:
            self._paused = False
            self._transport.resume_reading()

    def _received(self, data: bytes) -> None:
        call = self._call
        if call is None:  # nobody asked: not a connection to trust
            self.close()
            return
        if type(call) is StreamCall:
            call.touched = True
        self.parser.feed(data)
        self._take_events(call)

    def _take_events(self, call: Call) -> None:
        try:
            while (event := self.parser.next()) is not None:
                if type(event) is bytes:
                    call.piece(event)
                elif event is END:
                    self._end_call(call)
                    return
                else:
                    call.begin(cast(ReplyHead, event))
            left = self.parser.counted_left
            if left > WORTH_FILLING and type(call) is Request and not self._transport.is_closing():
                start = call.take_start()
                Fill(self, self._transport, start, len(start) + left)
        except ProtocolError as error:
            self.fail(BrokenReply(error.detail))

    def filling(self, nbytes: int) -> None:
        """A piece of a large body has come (fill.py)."""

    def filled(self, body: bytes) -> None:
        """A large body is whole."""
        call = self._call
        if call is not None and not self.closed:
            call.piece(body)
            self.parser.skip_body()
            self._take_events(call)

    def _end_call(self, call: Call) -> None:
        head = call.head
        reusable = (
            head is not None
            and head.keep_alive
            and not self.closed
            and not self.parser.buffered
            and not self._transport.is_closing()
            and not self._transport.get_write_buffer_size()
        )
        self._call = None
        self.due = 0
        if reusable:
            self.resume()
            self._client._released(self, True)
        else:
            self.close()
        call.finish()

    def eof_received(self) -> bool:
        self._ended("the engine closed the connection before its reply was whole")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        why = f"the connection broke: {error}" if error else "the connection was closed"
        self._ended(why)

    def _ended(self, why: str) -> None:
        call = self._call
        if call is not None:
            try:
                self.parser.feed_eof()
                self._take_events(call)
            except ProtocolError as error:
                why = error.detail
            if self._call is call:
                self.fail(BrokenReply(why))
        self.close()

    def fail(self, error: Exception) -> None:
        """End the call with `error`, and the connection."""
        call, self._call = self._call, None
        self.due = 0
        self.close()
        if call is not None:
            call.fail(error)

    def expired(self) -> None:
        """The wheel: the request's time is over."""
        if type(self._call) is Request:
            self.fail(self._call.late())

    def abandon(self, call: Call) -> None:
        """Nobody waits for `call` any more: end the connection, unless the call has left it already."""
        if self._call is call:
            self.fail(BrokenReply("given up"))
