"""One request and its reply, as a handler sees them.

Life: NEW → (respond) DONE, or NEW → (start) STREAMING → (finish or fail) DONE. Writing never blocks and never
raises because the client has gone: such a reply goes nowhere, `on_sent` says so. Callbacks run on the loop,
each once, at the latest when the connection is lost; one registered too late runs at once.

`gone` means that the connection is broken and nothing can be delivered any more. A client that merely closed
its sending side is not gone: it may wait for its answer (half close). `input_ended` tells that case; for an
HTTP client it nearly always means that it hung up, too, but only a write can tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from areal_fast.http.headers import JSON, HeaderPairs, Headers, encode_headers

if TYPE_CHECKING:
    from areal_fast.http.connection import Connection
    from areal_fast.http.head import RequestHead
    from areal_fast.http.intake import Sink

Buffer: TypeAlias = bytes | bytearray | memoryview

NEW, STREAMING, DONE = range(3)

_BODILESS = frozenset({204, 304})
_JOIN_BELOW = 65536  # a body up to here is copied behind its head rather than sent as a second buffer


class Exchange:
    """A request, its reply, and what became of both.

    method, path (percent-decoded), query (raw), headers, body, peer (address, port, …), http11;
    status, of the reply, 0 as long as there is none; sink, who took the body (which is empty here), or None.
    """

    __slots__ = (
        "_bare",
        "_chunked",
        "_connection",
        "_on_gone",
        "_on_sent",
        "_owed",
        "_state",
        "body",
        "gone",
        "headers",
        "held",
        "http11",
        "input_ended",
        "keep_alive",
        "method",
        "path",
        "peer",
        "query",
        "sink",
        "status",
    )

    def __init__(
        self, connection: Connection, head: RequestHead, body: bytes, peer: tuple[object, ...]
    ) -> None:
        self.method = head.method
        self.path = head.path
        self.query = head.query
        self.headers: Headers = head.headers
        self.http11 = head.http11
        self.keep_alive = head.keep_alive
        self.body = body
        self.held = 0  # bytes of body that the server counts until the reply is complete
        self.peer = peer
        self.sink: Sink | None = None
        self.status = 0
        self.gone = False
        self.input_ended = False
        self._connection = connection
        self._state = NEW
        self._chunked = False
        self._bare = False
        self._owed = -1  # bytes still to be written of a streamed reply of known size; -1: not known
        self._on_gone: Callable[[], None] | None = None
        self._on_sent: Callable[[bool], None] | None = None

    @property
    def started(self) -> bool:
        """Whether a reply was begun (it cannot be another one any more)."""
        return self._state != NEW

    @property
    def finished(self) -> bool:
        return self._state == DONE

    def respond(
        self,
        status: int,
        body: Buffer | Sequence[Buffer],
        content_type: bytes = JSON,
        headers: HeaderPairs = (),
    ) -> None:
        """The whole reply. `body` may be several buffers; none may change until it is sent.

        ValueError for a header or status that cannot be sent (nothing was then), RuntimeError for a second
        reply.
        """
        if self._state != NEW:
            raise RuntimeError("this request has been answered")
        connection = self._connection
        head = connection.heads.prefix(status, content_type)
        if headers:
            head += encode_headers(headers)
        pieces: list[Buffer] = []
        if type(body) is bytes:
            size = len(body)
            if size < _JOIN_BELOW:
                tail = body
            else:
                tail = b""
                pieces = [body]
        else:
            tail = b""
            for piece in body if isinstance(body, (list, tuple)) else (body,):
                pieces.append(piece if type(piece) is bytes else memoryview(piece).cast("B"))
            size = sum(map(len, pieces))
        if status not in _BODILESS:
            head = b"%bcontent-length: %d\r\n" % (head, size)
        head += self._persistence()
        self._state = DONE
        self.status = status
        if self.method == "HEAD" or status in _BODILESS:
            connection.send(head)
        elif pieces:
            connection.send_all([head, *pieces])
        else:
            connection.send(head + tail)
        connection.exchange_done(self)

    def start(
        self, status: int, content_type: bytes, headers: HeaderPairs = (), *, size: int | None = None
    ) -> None:
        """Begin a streamed reply: of `size` bytes where that is known, else chunked, or to the end of the
        connection for HTTP/1.0. Errors as of `respond`."""
        if self._state != NEW:
            raise RuntimeError("this request has been answered")
        head = self._connection.heads.prefix(status, content_type)
        if headers:
            head += encode_headers(headers)
        self._bare = self.method == "HEAD" or status in _BODILESS
        self._owed = -1 if size is None else size
        if size is not None and status not in _BODILESS:
            head = b"%bcontent-length: %d\r\n" % (head, size)
        if self._bare or size is not None:
            pass
        elif self.http11:
            self._chunked = True
            head += b"transfer-encoding: chunked\r\n"
        else:
            self.keep_alive = False
        head += self._persistence()
        self._state = STREAMING
        self.status = status
        self._connection.send(head)

    def write(self, data: Buffer) -> None:
        """Append to a streamed reply. `data` may not change until it is sent. See `drain`.

        Who writes without `drain` to a client that does not read loses it: once max_unsent_bytes wait, the
        connection is cut."""
        if self._state != STREAMING:
            raise RuntimeError("no reply is being streamed")
        if self._bare or not data:
            return
        self._connection.bound_unsent()
        if self._owed >= 0:
            if len(data) > self._owed:
                raise RuntimeError("the reply is longer than was announced")
            self._owed -= len(data)
        if not self._chunked:
            self._connection.send(data)
        elif len(data) < 16384:
            self._connection.send(b"%x\r\n%b\r\n" % (len(data), bytes(data)))
        else:
            view = memoryview(data).cast("B")
            self._connection.send_all([b"%x\r\n" % len(view), view, b"\r\n"])

    def write_all(self, pieces: Sequence[Buffer]) -> None:
        """The same of several buffers, which are given to the kernel together where that is possible."""
        if self._chunked or self._bare or self._state != STREAMING:
            for piece in pieces:
                self.write(piece)
            return
        self._connection.bound_unsent()
        if self._owed >= 0:
            size = sum(map(len, pieces))
            if size > self._owed:
                raise RuntimeError("the reply is longer than was announced")
            self._owed -= size
        self._connection.send_all(pieces)

    async def drain(self) -> None:
        """Wait until little enough of the reply is left in this process. Returns at once when the client is
        gone."""
        waiter = self._connection.writable()
        if waiter is not None:
            await asyncio.shield(waiter)

    def finish(self) -> None:
        """End a streamed reply."""
        if self._state != STREAMING:
            raise RuntimeError("no reply is being streamed")
        if self._owed > 0 and not self._bare:
            raise RuntimeError("the reply is shorter than was announced")
        self._state = DONE
        if self._chunked:
            self._connection.send(b"0\r\n\r\n")
        self._connection.exchange_done(self)

    def fail(self) -> None:
        """Break off: the connection ends without the reply's end, so that the client cannot take it for
        whole."""
        if self._state == DONE:
            return
        framed = self._chunked or self._owed >= 0 or self._state == NEW
        self._state = DONE
        self._connection.break_off(self, reset=not framed)

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the connection breaks before the reply is finished. One per exchange."""
        if self.gone:
            callback()
        else:
            self._on_gone = callback

    def on_sent(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(True)` once every byte of the reply was handed to the kernel, `callback(False)` if
        the connection broke first (`fail` counts). One per exchange; set it before the reply is complete.

        The connection's next request is not looked at before that is settled.
        """
        if self._state == DONE:
            raise RuntimeError("the reply is already on its way")
        self._on_sent = callback

    def _persistence(self) -> bytes:
        if self.keep_alive and self._connection.keeps_alive():
            return b"\r\n" if self.http11 else b"connection: keep-alive\r\n\r\n"
        self.keep_alive = False
        return b"connection: close\r\n\r\n"

    @property
    def wants_sent(self) -> bool:
        """Whether somebody waits for `on_sent`. For the connection."""
        return self._on_sent is not None

    def take_on_sent(self) -> Callable[[bool], None] | None:
        """The callback to call, once. For the connection."""
        callback, self._on_sent = self._on_sent, None
        return callback

    def note_gone(self) -> Callable[[], None] | None:
        """The connection is lost while the reply is unfinished. For the connection."""
        self.gone = True
        callback, self._on_gone = self._on_gone, None
        return callback
