"""Messages from bytes: feed what arrived, take events. No I/O, no clock; pure state, as h11 has it.

    parser.feed(data)
    while (event := parser.next()) is not None: …    # a head, then pieces of body as bytes, then END

Theory. A head ends at the first CRLF CRLF. Up to there bytes are only kept (bounded), then the block is
parsed at once (head.py), so that what comes out cannot depend on how the bytes came in. Bodies are framed
here: by count, by chunks, or (replies) by the end of the connection. Events of one message are the same for
every split of the input, but for where pieces of body are cut. Nothing is read past a message's end until
`next` is called again: pipelined requests stay raw bytes, and `buffered` says how many.

Invariants: after a ProtocolError the parser is dead: it takes no more input and gives no more events. Limits
depend on positions in the stream alone, never on how much came in one piece. Each byte is copied at most
twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeAlias

from areal_fast.http._native import RequestHead
from areal_fast.http.head import (
    CHUNKED,
    UNTIL_EOF,
    ProtocolError,
    ReplyHead,
    parse_reply_head,
    parse_request_head,
)


class End:
    """The message is whole."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "END"


END: Final = End()
RequestEvent: TypeAlias = RequestHead | bytes | End
ReplyEvent: TypeAlias = ReplyHead | bytes | End

_HEAD, _COUNTED, _SIZE, _CHUNK, _CHUNK_END, _TRAILERS, _REST, _FINISHED, _DEAD = range(9)

_MAX_SIZE_LINE = 1024
_MAX_EXTENSIONS = 16384
_MAX_BLANK_LINES = 8
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
_METHOD_START = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}( |\Z)|\r?\Z")
_REPLY_START = b"HTTP/1."


class _Parser:
    """What requests and replies share: the buffer, body framing and limits."""

    def __init__(self, max_body_bytes: int, max_header_bytes: int, too_large: int) -> None:
        self._max_body = max_body_bytes
        self._max_header = max_header_bytes
        self._too_large = too_large
        self._malformed = 400 if too_large == 413 else 502
        self._buffer: bytes | bytearray = b""
        self._at = 0  # first byte of _buffer not yet consumed
        self._scanned = 0  # up to here (absolute index) no end of head or line was found
        self._state = _HEAD
        self._left = 0  # bytes of the counted body or of the chunk still to come
        self._taken = 0  # bytes of body given out
        self._extensions = 0
        self._trailers = 0

    @property
    def buffered(self) -> int:
        """Bytes fed and not yet consumed."""
        return len(self._buffer) - self._at

    @property
    def between_messages(self) -> bool:
        """Nothing of a message is here: the connection may be closed without loss."""
        return self._state == _HEAD and self._at == len(self._buffer)

    def feed(self, data: bytes) -> None:
        if self._state == _DEAD:
            return
        buffer = self._buffer
        if self._at == len(buffer):
            self._buffer = data
            self._at = self._scanned = 0
        elif isinstance(buffer, bytearray) and self._at < 65536:
            buffer += data
        else:
            self._buffer = bytearray(memoryview(buffer)[self._at :])
            self._buffer += data
            self._scanned = max(0, self._scanned - self._at)
            self._at = 0

    @property
    def counted_left(self) -> int:
        """Bytes of a counted body that are still to be fed, when all that was fed is consumed; else 0."""
        return self._left if self._state == _COUNTED and self._at == len(self._buffer) else 0

    def read_elsewhere(self, size: int, have: int) -> None:
        """To one that is fresh: a head, and `have` of its body's `size` bytes, were read past the parser, and
        more are still to be fed."""
        assert self._state == _HEAD and not self.buffered and have < size
        self._begin_body(size, size)
        self._left = size - have

    def skip_body(self) -> None:
        """The `counted_left` bytes were taken past the parser: END comes next."""
        assert self.counted_left
        self._left = 0
        self._state = _FINISHED

    def _die(self, status: int, detail: str) -> ProtocolError:
        self._state = _DEAD
        self._buffer = b""
        self._at = 0
        return ProtocolError(status, detail)

    def _head_block(self) -> bytes | None:
        """The next head with its empty line, or None: not whole yet. Raises what `_judge_partial` finds."""
        buffer = self._buffer
        start = self._at
        scanned = self._scanned - 3
        end = buffer.find(b"\r\n\r\n", scanned if scanned > start else start)
        if end < 0:
            self._scanned = len(buffer)
            self._judge_partial(len(buffer) - start)
            return None
        end += 4
        if end - start > self._max_header:
            self._judge_partial(end - start)
        self._at = end
        return buffer[start:end] if type(buffer) is bytes else bytes(memoryview(buffer)[start:end])

    def _judge_partial(self, size: int) -> None:
        """Refuse what `size` bytes of head already show to be wrong, their size above all."""
        raise NotImplementedError

    def _begin_body(self, size: int, limit: int) -> None:
        self._taken = self._extensions = self._trailers = 0
        if size > limit:
            raise self._die(self._too_large, f"Body too large: at most {limit} bytes are taken")
        if size >= 0:
            self._left = size
            self._state = _COUNTED if size else _FINISHED
        else:
            self._scanned = self._at
            self._state = _SIZE if size == CHUNKED else _REST

    def _body(self) -> bytes | None:
        """The next piece of body; b"" when the body is whole; None when bytes are missing."""
        if self._state == _COUNTED:
            piece = self._take(self._left)
            if piece is None:
                return None
            self._left -= len(piece)
            if not self._left:
                self._state = _FINISHED
            return piece
        if self._state == _REST:
            piece = self._take(self.buffered)
            self._count(piece)
            return piece
        return self._chunks()

    def _take(self, most: int) -> bytes | None:
        buffer = self._buffer
        start = self._at
        have = len(buffer) - start
        if have > most:
            self._at = end = start + most
            return buffer[start:end] if type(buffer) is bytes else bytes(memoryview(buffer)[start:end])
        if not have:
            return None
        self._buffer = b""
        self._at = self._scanned = 0
        if type(buffer) is bytes:
            return buffer[start:]  # the very object if start is 0
        return bytes(memoryview(buffer)[start:])

    def _count(self, piece: bytes | None) -> None:
        if piece is not None:
            self._taken += len(piece)
            if self._taken > self._max_body:
                raise self._die(self._too_large, f"Body too large: at most {self._max_body} bytes are taken")

    def _chunks(self) -> bytes | None:
        """Decode as many chunks as are here into one piece."""
        pieces: list[bytes] = []
        while self._state != _FINISHED:
            if self._state == _CHUNK:
                piece = self._take(self._left)
                if piece is None:
                    break
                self._left -= len(piece)
                if not self._left:
                    self._state = _CHUNK_END
                pieces.append(piece)
            elif self._state == _CHUNK_END:
                if self.buffered < 2:
                    break
                if self._buffer[self._at : self._at + 2] != b"\r\n":
                    raise self._die(self._malformed, "Chunk does not end where its size says")
                self._at += 2
                self._scanned = self._at
                self._state = _SIZE
            else:
                line = self._line()
                if line is None:
                    break
                if self._state == _SIZE:
                    self._chunk_size(line)
                elif line:
                    self._trailer(line)
                else:
                    self._state = _FINISHED
        if pieces:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return b"" if self._state == _FINISHED else None

    def _line(self) -> bytes | None:
        """The next line of a chunked body's frame, without its CRLF."""
        limit = _MAX_SIZE_LINE if self._state == _SIZE else self._max_header
        end = self._buffer.find(b"\n", max(self._at, self._scanned), self._at + limit)
        if end < 0:
            if self.buffered >= limit:
                raise self._die(
                    *((self._malformed, "Chunk size line too long") if self._state == _SIZE else self._over())
                )
            self._scanned = len(self._buffer)
            return None
        line = bytes(self._buffer[self._at : end + 1])
        self._at = self._scanned = end + 1
        if line[-2:] != b"\r\n":
            raise self._die(self._malformed, "Bare LF in a chunked body")
        return line[:-2]

    def _chunk_size(self, line: bytes) -> None:
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise self._die(self._malformed, "Malformed chunk size")
        self._extensions += len(match[2] or b"")
        if self._extensions > _MAX_EXTENSIONS:
            raise self._die(self._malformed, "Too many chunk extensions")
        self._left = int(match[1], 16)
        self._state = _CHUNK if self._left else _TRAILERS
        self._taken += self._left
        if self._taken > self._max_body:
            raise self._die(self._too_large, f"Body too large: at most {self._max_body} bytes are taken")

    def _trailer(self, line: bytes) -> None:
        """Trailers are checked and dropped: nothing here may be said after the body."""
        self._trailers += len(line) + 2
        if self._trailers > self._max_header:
            raise self._die(*self._over())
        if _TRAILER.fullmatch(line) is None:
            raise self._die(self._malformed, "Malformed trailer")

    def _over(self) -> tuple[int, str]:
        return (431 if self._malformed == 400 else 502), "Trailers too large"


class RequestParser(_Parser):
    """Requests, any number after each other. `streamed` says how large a counted body may be that nobody
    holds in memory (intake.py)."""

    def __init__(
        self,
        max_body_bytes: int,
        max_header_bytes: int,
        max_request_line_bytes: int,
        max_headers: int,
        streamed: Callable[[RequestHead], int] | None = None,
    ) -> None:
        super().__init__(max_body_bytes, max_header_bytes, 413)
        self._streamed = streamed
        self._max_line = max_request_line_bytes
        self._max_headers = max_headers
        self._blank = 0

    def next(self) -> RequestEvent | None:
        """The next event, or None: more bytes are needed. Raises ProtocolError, after which nothing comes."""
        state = self._state
        if state == _HEAD:
            return self._next_head()
        if state == _FINISHED:
            self._state = _HEAD
            self._scanned = self._at
            return END
        if state == _DEAD:
            return None
        piece = self._body()
        if piece == b"":
            self._state = _HEAD
            self._scanned = self._at
            return END
        return piece

    def _next_head(self) -> RequestHead | None:
        if self._at == len(self._buffer):
            return None
        if self._buffer[self._at] == 13:
            self._skip_blank_lines()
        start = self._at
        block = self._head_block()
        if block is None:
            return None
        line_end = block.find(b"\n", 0, self._max_line + 2)
        if line_end < 0 or block[line_end - 1] != 13 or block.count(b"\r\n") > self._max_headers + 2:
            self._at = start
            self._judge_partial(len(block))
            raise self._die(431, "Too many headers")
        if block[0] == 13:
            raise self._die(400, "Malformed request line")
        try:
            head = parse_request_head(block)
        except ProtocolError as error:
            self._die(error.status, error.detail)
            raise
        self._blank = 0
        if head.body_size:
            limit = self._max_body
            if head.body_size > limit and self._streamed is not None:
                limit = max(limit, self._streamed(head))
            self._begin_body(head.body_size, limit)
        else:
            self._state = _FINISHED
        return head

    @property
    def fresh(self) -> bool:
        """As it was made: nothing of a message is here, nor was a blank line before one."""
        return self._state == _HEAD and self._at == len(self._buffer) and not self._blank

    def _skip_blank_lines(self) -> None:
        """A few CRLFs may stand before a request (RFC 9112 2.2)."""
        while self._buffer[self._at : self._at + 2] == b"\r\n":
            self._at += 2
            self._blank += 1
            if self._blank > _MAX_BLANK_LINES:
                raise self._die(400, "Malformed request line")
            self._scanned = self._at

    def _judge_partial(self, size: int) -> None:
        """Refuse early what cannot become a request, rather than wait for its end."""
        start = self._at
        if not _METHOD_START.match(self._buffer[start : start + 33]):
            raise self._die(400, "Malformed request line")
        line_end = self._buffer.find(b"\n", start, start + self._max_line + 2)
        if line_end < 0:
            if size >= self._max_line + 2:
                raise self._die(414, "URI Too Long")
        elif self._buffer[line_end - 1] != 13:
            raise self._die(400, "Malformed request line")
        if size > self._max_header:
            raise self._die(431, "Request Header Fields Too Large")


class ReplyParser(_Parser):
    """Replies of one connection. Call `expect` with each request's method before its reply can come."""

    def __init__(self, max_body_bytes: int, max_header_bytes: int) -> None:
        super().__init__(max_body_bytes, max_header_bytes, 502)
        self._method = "GET"
        self._interim = 0

    def expect(self, method: str) -> None:
        self._method = method
        self._interim = 0

    def next(self) -> ReplyEvent | None:
        """The next event, or None. Interim replies (1xx) are skipped. Raises ProtocolError."""
        while self._state == _HEAD:
            if self._at == len(self._buffer):
                return None
            block = self._head_block()
            if block is None:
                return None
            try:
                head = parse_reply_head(block, self._method)
            except ProtocolError as error:
                self._die(error.status, error.detail)
                raise
            if head.status >= 200:
                self._begin_body(head.body_size, self._max_body)
                return head
            self._interim += 1
            if self._interim > 16:
                raise self._die(502, "Too many interim replies")
            self._scanned = self._at
        if self._state == _DEAD:
            return None
        if self._state != _FINISHED:
            piece = self._body()
            if piece != b"":
                return piece
        self._state = _HEAD
        self._scanned = self._at
        return END

    def feed_eof(self) -> None:
        """The connection ended. A body that runs to the end is then whole; anything else broke off:
        ProtocolError."""
        if self._state == _REST:
            self._state = _FINISHED
        elif not self.between_messages and self._state != _FINISHED:
            raise self._die(502, "Connection closed in the middle of a reply")

    def _judge_partial(self, size: int) -> None:
        start = bytes(self._buffer[self._at : self._at + len(_REPLY_START)])
        if not _REPLY_START.startswith(start):
            raise self._die(502, "Reply is not HTTP/1")
        if size > self._max_header:
            raise self._die(502, "Reply header too large")


__all__ = [
    "CHUNKED",
    "END",
    "UNTIL_EOF",
    "End",
    "ProtocolError",
    "ReplyEvent",
    "ReplyHead",
    "ReplyParser",
    "RequestEvent",
    "RequestHead",
    "RequestParser",
]
