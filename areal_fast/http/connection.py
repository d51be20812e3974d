"""One client's connection: bytes in, one request at a time to the handler, replies out.

Theory. `_pump` takes events from the parser while nothing stands in the way: no request is being answered, no
reply waits to be sent, the reader keeps up. Whatever ends such a wait calls `_pump` again. So replies leave
in the order of their requests, a pipelining client queues bytes (bounded, then reading pauses), never work,
and a client that does not read gets nothing more computed for it. A request answered within the handler's
call costs no task and no timer. One whole ordinary request that meets a connection at rest takes a shortcut
through all this (_native.pyx); `_clean` says when it may.

What waits is told apart by one deadline in the server's wheel:
  head incomplete           header_timeout_s (whole head) → 408
  body incomplete           body_timeout_s (between pieces), min_body_bytes_s (since its start) → 408
  a handler at work         none; only a client that does not take what is written is cut
  unsent bytes              write_timeout_s without progress → cut; so does max_unsent_bytes at once
  nothing                   idle_timeout_s → closed silently
  refused, draining input   linger_timeout_s or linger_bytes → closed

Ends. After the last reply the sending side is shut and input thrown away until the client closes, too, for a
bounded while: closing at once would make the kernel send a reset that can overtake the answer. A client's EOF
ends the connection only once every request that is complete has been answered (half close).

A body may have a sink (intake.py), which takes it as it arrives; reading pauses while that waits.

Bodies count against the server's budget from their arrival until their request is answered; the piece that
goes beyond it ends its own request with 503, others go on.

Invariants: server.body_bytes is the sum of `_held` here and `held` of unanswered exchanges;
no exception leaves a callback (it would kill the connection with the request's answer); exchange
callbacks run exactly once; after connection_lost nothing is written.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

from areal_fast.http._native import Exchange, RequestHead, Shortcut
from areal_fast.http.fill import WORTH_FILLING, Fill
from areal_fast.http.head import ProtocolError
from areal_fast.http.headers import JSON, error_body
from areal_fast.http.intake import Intake, Sink
from areal_fast.http.parser import END, RequestParser

if TYPE_CHECKING:
    from areal_fast.http.server import Server

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_RESET = struct.pack("ii", 1, 0)

_OPEN, _ENDING, _LOST = range(3)


class Connection(Shortcut, asyncio.Protocol):
    """The protocol object of one accepted socket. Most requests never come here but go by `Shortcut`."""

    __slots__ = (
        "_body",
        "_body_since",
        "_drainers",
        "_fill",
        "_head",
        "_held",
        "_in_head",
        "_intake",
        "_lingered",
        "_paused_reading",
        "_pumping",
        "_sink",
        "_streamed",
        "_unsent",
        "_wheel",
    )

    def __init__(self, server: Server, peer: tuple[object, ...]) -> None:
        super().__init__(server, peer)
        limits = server.limits
        self.parser = RequestParser(
            limits.max_body_bytes,
            limits.max_header_bytes,
            limits.max_request_line_bytes,
            limits.max_headers,
            server.streamed,
        )
        self._wheel = server.wheel
        self._head: RequestHead | None = None  # of the request whose body is being read
        self._in_head = False  # part of a head is here, and its deadline runs
        self._body: bytes | bytearray | memoryview = b""
        self._body_since = 0  # tick at which the body was first waited for; 0: it was not
        self._fill: Fill | None = None  # what reads the body, if that is large
        self._held = 0  # bytes of it that have come
        self._sink: Sink | None = None  # who takes it instead
        self._intake: Intake | None = None  # what reads it, then
        self._streamed = 0  # bytes of it that the sink got
        self._pumping = False
        self._paused_reading = False
        self._unsent = 0  # size of the write buffer when the write deadline was set
        self._lingered = 0
        self._drainers: asyncio.Future[None] | None = None

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._bind(cast(asyncio.Transport, transport))
        self._transport.set_write_buffer_limits(self._server.limits.write_high_water)
        self._server.opened(self)
        self._wheel.set(self, 1 if self._server.draining else self._server.ticks.idle)

    def _received(self, data: bytes) -> None:
        """What `data_received` does not do by itself."""
        if self._state != _OPEN:
            self._lingered += len(data)
            if self._lingered > self._server.limits.linger_bytes:
                self._transport.abort()
            return
        self.parser.feed(data)
        if self._exchange is None and self._sending is None and not self._write_paused:
            self._pump()
        elif self.parser.buffered > self._server.limits.max_pipelined_bytes and not self._paused_reading:
            self._paused_reading = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client sends no more. True keeps the sending side open."""
        self._input_ended = True
        if self._state != _OPEN:
            return False
        if self._exchange is not None:
            self._exchange.input_ended = True
            return True
        return self._sending is not None or self._write_paused

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._drainers is None:
            self._drainers = asyncio.get_running_loop().create_future()
        self._unsent = self._transport.get_write_buffer_size()
        self._wheel.set(self, self._server.ticks.write)

    def resume_writing(self) -> None:
        self._write_paused = False
        self._release_drainers()
        if self._state == _ENDING:
            self._park()
        elif self._state == _OPEN:
            self.due = 0
            if self._sending is not None:
                self._transport.set_write_buffer_limits(self._server.limits.write_high_water)
                self._settle(True)
            self._proceed()

    def connection_lost(self, error: Exception | None) -> None:
        self._state = _LOST
        self.due = 0
        self._server.closed(self)
        self._drop_request()
        self._write_paused = False
        self._release_drainers()
        self._settle(False)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            gone = exchange.note_gone()
            if gone is not None:
                self._call(gone)
            self._report_sent(exchange, False)

    def expired(self) -> None:
        """The wheel: a deadline has passed. What it was for follows from the state."""
        if self._state == _LOST:
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent:
            if self._write_paused and unsent < self._unsent:
                self._unsent = unsent
                self._wheel.set(self, self._server.ticks.write)
            else:
                self._transport.abort()
        elif self._state == _ENDING:
            self._transport.abort()
        elif self._exchange is not None or self._sending is not None:
            pass
        elif self.idle:
            self._close()
        else:
            self._refuse(408, "Request Timeout")

    # Requests

    def _pump(self) -> None:
        """Take what the parser has, up to a request that takes time or a reply that must be sent first."""
        parser = self.parser
        self._pumping = True
        try:
            while (
                self._exchange is None
                and self._sending is None
                and not self._write_paused
                and self._state == _OPEN
            ):
                event = parser.next()
                if event is None:
                    self._await_input()
                    break
                if event is END:
                    self._dispatch()
                elif type(event) is bytes:
                    self._gather(event)
                else:
                    head = cast(RequestHead, event)
                    if not self._begin(head):
                        break
                    if head.expects_continue and head.body_size and not parser.buffered:
                        self._send(_CONTINUE)
        except ProtocolError as error:
            self._refuse(error.status, error.detail)
        finally:
            self._pumping = False

    def _begin(self, head: RequestHead) -> bool:
        """A head is here, and its body comes. False: it may not come now, and the request is refused."""
        self._head = head
        self._in_head = False
        self._body_since = 0
        if head.body_size > self._server.limits.small_body_bytes:
            self._streamed = 0
            if self._server.sinks is not None:
                self._sink = self._server.sinks(head)
            if self._sink is None and not self._server.room_for(head.body_size):
                self._refuse_for_now()
                return False
        return True

    def _begun(self, head: RequestHead, start: memoryview) -> None:
        """The shortcut has read the head of a large body, which begins with `start` and is not whole."""
        self.parser.read_elsewhere(head.body_size, len(start))
        if self._begin(head):
            self._gather(start)
            if self._state == _OPEN:
                self._await_input()

    def _count(self, nbytes: int) -> bool:
        """More of the body is here. False: it was too much for all together, and the request is refused."""
        server = self._server
        self._held += nbytes
        server.body_bytes += nbytes
        if server.body_bytes > server.max_bodies and self._held > server.limits.small_body_bytes:
            self._refuse_for_now()
            return False
        return True

    def _gather(self, piece: bytes | memoryview) -> None:
        if self._sink is not None:
            self._streamed += len(piece)
            self._sink.feed(piece)
            return
        if not self._count(len(piece)):
            return
        body = self._body
        if not body:
            self._body = piece
        elif isinstance(body, bytearray):
            body += piece
        else:
            self._body = joined = bytearray(body)
            joined += piece

    def filling(self, nbytes: int) -> None:
        """A piece of a large body has come (fill.py)."""
        if self._count(nbytes):
            self._await_body()

    def filled(self, body: bytes) -> None:
        """A large body is whole."""
        self._fill = None
        if self._state == _OPEN:
            if not self._count(len(body) - self._held):
                return
            self._body = body
            self.parser.skip_body()
            self._pump()

    def taken(self, nbytes: int) -> None:
        """A piece of a body has gone to its sink (intake.py)."""
        self._streamed += nbytes
        self._await_sink()

    def taken_whole(self, nbytes: int) -> None:
        """The last piece has."""
        self._streamed += nbytes
        self._intake = None
        if self._state == _OPEN:
            self.parser.skip_body()
            self._pump()

    def _await_sink(self) -> None:
        """More of the body is to go to the sink, once that has room."""
        sink = self._sink
        assert sink is not None
        if sink.waiting:
            if not self._paused_reading:
                self._paused_reading = True
                self.due = 0  # it is not the client who is slow
                self._transport.pause_reading()
                sink.when_ready = self._sink_ready
            return
        if self._paused_reading:
            self._paused_reading = False
            self._transport.resume_reading()
        self._await_body()
        left = self.parser.counted_left
        if self._intake is None and left and self._state == _OPEN and not self._transport.is_closing():
            self._intake = Intake(self, self._transport, sink, left)

    def _sink_ready(self) -> None:
        if self._state == _OPEN and self._sink is not None:
            self._body_since = self._wheel.now
            self._await_sink()

    def _await_input(self) -> None:
        """Everything here is used up. Set the deadline for what comes next."""
        if self._sink is not None and not self._input_ended:
            self._await_sink()
            return
        if self._paused_reading:
            self._paused_reading = False
            self._transport.resume_reading()
        ticks = self._server.ticks
        if self._input_ended:
            self._end()
        elif self._head is not None:
            self._await_body()
            left = self.parser.counted_left
            if left > WORTH_FILLING and self._state == _OPEN and not self._transport.is_closing():
                start, self._body = self._body, b""
                self._fill = Fill(self, self._transport, start, len(start) + left)
        elif self.parser.between_messages:
            if self._server.draining:
                self._close()
                return
            self._clean = self.parser.fresh
            self.due = due = self._wheel.now + ticks.idle
            if not 0 < self.filed <= due:
                self._wheel.set(self, ticks.idle)
        elif not self._in_head:
            self._in_head = True
            self._wheel.set(self, ticks.header)

    def _await_body(self) -> None:
        """The next piece must come in time, and all so far must not have taken too long."""
        wheel, ticks = self._wheel, self._server.ticks
        if not self._body_since:
            self._body_since = wheel.now
        if self._sink is None:
            earned = self._held * self._server.ticks_a_byte
        else:
            earned = self._streamed * self._server.ticks_a_streamed_byte
        left = self._body_since + ticks.body + int(earned) - wheel.now
        if left > 0:
            wheel.set(self, min(ticks.body, left))
        else:
            self._refuse(408, "Request Timeout")

    def _dispatch(self) -> None:
        body = self._body
        if type(body) is not bytes:
            body = bytes(body)
        head, held = cast(RequestHead, self._head), self._held
        self._head = None
        self._body = b""
        self._held = 0
        sink, self._sink = self._sink, None
        self._serve(head, body, held, sink)

    def _later(self, exchange: Exchange, pending: Awaitable[None]) -> None:
        """The handler's answer takes time."""
        self._server.start(self._run(exchange, pending))

    async def _run(self, exchange: Exchange, pending: Awaitable[None]) -> None:
        try:
            await pending
            if not exchange.finished:
                raise RuntimeError("the handler ended without an answer")
        except asyncio.CancelledError:
            exchange.fail()
            raise
        except Exception as error:
            self._failed(exchange, error)
        finally:
            self._server.ended()

    def _failed(self, exchange: Exchange, error: Exception) -> None:
        """A handler's fault: the client gets a 500 if nothing was sent yet, else a visibly broken reply."""
        self._server.report(f"{exchange.method} {exchange.path}", error)
        if exchange.started:
            exchange.fail()
        else:
            exchange.respond(500, error_body("Internal Server Error"))

    # Replies (called by Exchange)

    def _bound_unsent(self) -> None:
        """Cut a client that lets a streamed reply pile up here."""
        if (
            self._write_paused
            and self._state == _OPEN
            and self._transport.get_write_buffer_size() > self._server.limits.max_unsent_bytes
        ):
            self._state = _ENDING
            self._transport.abort()

    def _writable(self) -> asyncio.Future[None] | None:
        """None, or what to wait for before writing more."""
        return self._drainers if self._write_paused and self._state == _OPEN else None

    def _exchange_done(self, exchange: Exchange) -> None:
        """The reply is complete, as far as the handler goes, and there is more to do than to wait."""
        if self._exchange is not exchange:
            self._report_sent(exchange, False)  # the connection was lost before
            return
        self._exchange = None
        if exchange.wants_sent:
            self._sending = exchange
            if self._transport.is_closing():
                self._settle(False)
            elif not self._transport.get_write_buffer_size():
                self._transport.set_write_buffer_limits(self._server.limits.write_high_water)
                self._settle(True)
                if exchange.keep_alive and not self._pumping:
                    self._proceed()
            else:
                self._transport.set_write_buffer_limits(0)  # resume_writing comes when all is sent
                return
        if not exchange.keep_alive:
            self._end()
        elif not self._pumping:
            self._proceed()

    def _break_off(self, exchange: Exchange, reset: bool) -> None:
        """End the connection so that the reply is seen to be cut; `reset` where a plain end would look
        whole."""
        if self._exchange is exchange:
            self._exchange = None
            if reset:
                sock = self._transport.get_extra_info("socket")
                if sock is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self._state = _ENDING
                self._transport.abort()
            else:
                self._close()
        self._report_sent(exchange, False)

    # Ends

    @property
    def idle(self) -> bool:
        """Nothing of a request or of a reply is here."""
        return (
            self._exchange is None
            and self._sending is None
            and self._head is None
            and self.parser.between_messages
        )

    def drain(self) -> None:
        """The server stops: close if nothing is under way; else the next reply will be the last."""
        if self._state == _OPEN and self.idle and not self._write_paused:
            self._close()

    def abort(self) -> None:
        if self._state != _LOST:
            self._transport.abort()

    def _proceed(self) -> None:
        """A reply is out of the way: on with what was received meanwhile."""
        if (
            self._state == _OPEN
            and self._exchange is None
            and self._sending is None
            and not self._write_paused
            and not self._pumping
        ):
            self._pump()

    def _send(self, data: bytes) -> None:
        if self._state == _OPEN:
            self._transport.write(data)

    def _refuse_for_now(self) -> None:
        self._refuse(503, "Too many large requests at once. Try again.", b"retry-after: 1\r\n")

    def _refuse(self, status: int, detail: str, more: bytes = b"") -> None:
        """Answer what is no request, or none that is wanted, and end."""
        body = error_body(detail)
        head = b"%bcontent-length: %d\r\n%bconnection: close\r\n\r\n" % (
            self._server.heads.prefix(status, JSON),
            len(body),
            more,
        )
        self._server.refused += 1
        self._send(head + body)
        self._end()

    def _drop_request(self) -> None:
        """Forget the request whose body was being read."""
        self._head = None
        self._body = b""
        self._server.body_bytes -= self._held
        self._held = 0
        fill, self._fill = self._fill, None
        if fill is not None and self._state != _LOST:
            fill.abandon()
        intake, self._intake = self._intake, None
        if intake is not None and self._state != _LOST:
            intake.leave()
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.drop()

    def _close(self) -> None:
        """Close as soon as what was written is sent."""
        if self._state == _OPEN:
            self._state = _ENDING
            if self._transport.get_write_buffer_size():
                self._transport.set_write_buffer_limits(0)
                self._wheel.set(self, self._server.ticks.write)
            self._transport.close()

    def _end(self) -> None:
        """No more requests: send what is left, shut the sending side, wait a little for the client to
        close."""
        if self._state != _OPEN:
            return
        self._drop_request()
        if self._input_ended or self._transport.is_closing():
            self._close()
            return
        self._state = _ENDING
        try:
            self._transport.write_eof()
        except OSError:  # not connected any more
            self._transport.abort()
            return
        if self._paused_reading:
            self._paused_reading = False
            self._transport.resume_reading()
        if self._transport.get_write_buffer_size():
            self._transport.set_write_buffer_limits(0)  # pause_writing, and resume_writing when all is sent
        else:
            self._park()

    def _park(self) -> None:
        """All is sent; the client's own end is waited for."""
        if not self._transport.is_closing():
            self._wheel.set(self, self._server.ticks.linger)
            self._server.parked(self)

    # Callbacks

    def _send_at_once(self) -> None:
        """Somebody waits for the reply's last byte to be sent: let the transport try while it is written,
        rather than in the loop's next turn. Whoever settles it puts the limit back."""
        if self._state == _OPEN and not self._transport.is_closing():
            self._transport.set_write_buffer_limits(0)

    def _arrived(self, exchange: Exchange) -> None:
        """It went out whole, and the connection is at rest."""
        self._transport.set_write_buffer_limits(self._server.limits.write_high_water)
        self._report_sent(exchange, True)

    def _settle(self, arrived: bool) -> None:
        """The reply whose last byte was waited for is out, or will never be."""
        exchange, self._sending = self._sending, None
        if exchange is not None:
            self._report_sent(exchange, arrived)
            if not exchange.keep_alive:
                self._end()

    def _report_sent(self, exchange: Exchange, arrived: bool) -> None:
        callback = exchange.take_on_sent()
        if callback is not None:
            self._call(lambda: callback(arrived))

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self._server.report("callback of an exchange", error)

    def _release_drainers(self) -> None:
        drainers, self._drainers = self._drainers, None
        if drainers is not None and not drainers.done():
            drainers.set_result(None)
