"""The contracts of _native.pyx; its theory stands at its top."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias, final

from typing_extensions import disjoint_base

from areal_fast.http.headers import HeaderPairs, ReplyHeads
from areal_fast.http.intake import Sink, Sinks
from areal_fast.http.limits import Limits
from areal_fast.http.parser import RequestParser
from areal_fast.http.server import Handler, Server
from areal_fast.http.wheel import Wheel

WORTH_FILLING: int
"""So many bytes of a body must be still to come for fill.py to read them."""

_Buffer: TypeAlias = bytes | bytearray | memoryview

@final
class Headers:
    """The header fields of one message, in order of arrival. Names are compared in lower case; values are
    bytes without surrounding blanks."""

    def __init__(self, pairs: list[tuple[bytes, bytes]]) -> None: ...
    @property
    def repeats(self) -> bool:
        """Whether a name stands more than once."""

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """The first value of `name` (lower case), or `default`."""

    def all(self, name: bytes) -> list[bytes]: ...
    def has_token(self, name: bytes, token: bytes) -> bool:
        """Whether a comma-separated field (Connection, say) names `token` (lower case)."""

    def __contains__(self, name: object, /) -> bool: ...
    def __iter__(self) -> Iterator[tuple[bytes, bytes]]: ...
    def __len__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    __hash__ = None  # type: ignore[assignment]

@final
class RequestHead:
    """One request without its body. body_size is a count or head.CHUNKED; `path` is percent-decoded, `query`
    is not. Immutable: all requests that had the same share it."""

    def __init__(
        self,
        method: str,
        path: str,
        query: str,
        headers: Headers,
        http11: bool,
        keep_alive: bool,
        body_size: int,
        expects_continue: bool,
    ) -> None: ...
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def query(self) -> str: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def http11(self) -> bool: ...
    @property
    def keep_alive(self) -> bool: ...
    @property
    def body_size(self) -> int: ...
    @property
    def expects_continue(self) -> bool: ...
    def __eq__(self, other: object, /) -> bool: ...
    __hash__ = None  # type: ignore[assignment]

def room(size: int) -> bytes:
    """`size` bytes of anything, for who fills all of them before anybody else sees them. ValueError."""

def read_head(block: bytes) -> RequestHead | None:
    """What `block` says if it is one head of the usual form (csrc/http_head.h), and nothing else; None says
    only that it is not that."""

def read_reply(data: bytes, most: int) -> tuple[int, Headers, bool, bytes] | None:
    """Status, headers, whether the connection is kept, and body, if `data` is one whole reply of the usual
    form (csrc/http_head.h) to a request that was no HEAD, with a head of at most `most` bytes, and nothing
    else."""

@disjoint_base
class Common:
    """What the connections of one server share; the server is one.

    refused: requests refused before any handler. body_bytes: of all bodies not yet answered; written by
    connections."""

    handler: Handler
    heads: ReplyHeads
    wheel: Wheel
    sinks: Sinks | None
    draining: bool
    refused: int
    body_bytes: int
    max_bodies: int

    def bind(self, limits: Limits, idle_ticks: int) -> None:
        """To be called once, with handler, heads and wheel set, before the first connection."""

@disjoint_base
class Shortcut:
    """A connection's part that ordinary requests need. What begins with an underscore is between it and
    connection.Connection, which inherits it and provides `_received`, `_begun`, `_later`, `_failed`,
    `_exchange_done`, `_arrived`, `_send_at_once`, `_break_off`, `_bound_unsent`, `_writable` and `_call`.

    `_exchange` is being answered; `_sending` is answered, and its on_sent waits for the last byte; `_clean`:
    the parser is fresh and nothing is gathered."""

    due: int
    filed: int
    parser: RequestParser
    _transport: asyncio.Transport
    _exchange: Exchange | None
    _sending: Exchange | None
    _state: int
    _clean: bool
    _write_paused: bool
    _input_ended: bool

    def __init__(self, server: Common, peer: tuple[object, ...]) -> None: ...
    @property
    def peer(self) -> tuple[object, ...]: ...
    @property
    def _server(self) -> Server: ...
    def _bind(self, transport: asyncio.Transport) -> None:
        """The connection is made, and at rest."""

    def data_received(self, data: bytes) -> None: ...
    def _serve(self, head: RequestHead, body: bytes, held: int, sink: Sink | None) -> None:
        """Give a whole request to the handler. The server counts `held` bytes for it until it is answered;
        then `sink` is dropped."""

@final
class Exchange:
    """A request, its reply, and what became of both.

    method, path (percent-decoded), query (raw), headers, body, peer (address, port, …), http11; status, of
    the reply, 0 as long as there is none; sink, who took the body (which is empty here), or None.

    Life: NEW → (respond) DONE, or NEW → (start) STREAMING → (finish or fail) DONE. Writing never blocks and
    never raises because the client has gone: such a reply goes nowhere, `on_sent` says so. Callbacks run on
    the loop, each once, at the latest when the connection is lost; one registered too late runs at once.

    `gone` means that the connection is broken and nothing can be delivered any more. A client that merely
    closed its sending side is not gone: it may wait for its answer (half close). `input_ended` tells that
    case; for an HTTP client it nearly always means that it hung up, too, but only a write can tell."""

    input_ended: bool

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def query(self) -> str: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def body(self) -> bytes: ...
    @property
    def sink(self) -> Sink | None: ...
    @property
    def peer(self) -> tuple[object, ...]: ...
    @property
    def http11(self) -> bool: ...
    @property
    def status(self) -> int: ...
    @property
    def gone(self) -> bool: ...
    @property
    def keep_alive(self) -> bool:
        """Whether the connection goes on after the reply. Final once the reply's head is written."""

    @property
    def started(self) -> bool:
        """Whether a reply was begun (it cannot be another one any more)."""

    @property
    def finished(self) -> bool: ...
    def respond(
        self,
        status: int,
        body: _Buffer | Sequence[_Buffer],
        content_type: bytes = ...,
        headers: HeaderPairs = (),
    ) -> None:
        """The whole reply. `body` may be several buffers; none may change until it is sent.

        ValueError for a header or status that cannot be sent (nothing was then), RuntimeError for a second
        reply."""

    def start(
        self, status: int, content_type: bytes, headers: HeaderPairs = (), *, size: int | None = None
    ) -> None:
        """Begin a streamed reply: of `size` bytes where that is known, else chunked, or to the end of the
        connection for HTTP/1.0. Errors as of `respond`."""

    def write(self, data: _Buffer) -> None:
        """Append to a streamed reply. `data` may not change until it is sent. See `drain`.

        Who writes without `drain` to a client that does not read loses it: once max_unsent_bytes wait, the
        connection is cut."""

    def write_all(self, pieces: Sequence[_Buffer]) -> None:
        """`write` of several buffers, which are given to the kernel together where that is possible."""

    async def drain(self) -> None:
        """Wait until little enough of the reply is left in this process. Returns at once when the client is
        gone."""

    def finish(self) -> None:
        """End a streamed reply."""

    def fail(self) -> None:
        """Break off: the connection ends without the reply's end, so that the client cannot take it for
        whole."""

    def defer(self) -> None:
        """The handler returns None without an answer and gives it later, from a callback of the loop: it must
        end in an answer, in `go_on` or in `fault`."""

    def go_on(self, pending: Awaitable[None]) -> None:
        """As if the handler had returned `pending`; once, after `defer`."""

    def fault(self, error: Exception) -> None:
        """As if the handler had raised `error`; after `defer`, instead of an answer."""

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the reply is complete as far as the handler goes, or given up. One per
        exchange."""

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the connection breaks before the reply is finished. One per exchange."""

    def on_sent(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(True)` once every byte of the reply was handed to the kernel, `callback(False)` if
        the connection broke first (`fail` counts). One per exchange; set it before the reply is complete.

        The connection's next request is not looked at before that is settled."""

    @property
    def wants_sent(self) -> bool:
        """Whether somebody waits for `on_sent`. For the connection."""

    def take_on_sent(self) -> Callable[[bool], None] | None:
        """The callback to call, once. For the connection."""

    def note_gone(self) -> Callable[[], None] | None:
        """The connection is lost while the reply is unfinished. For the connection."""

    @property
    def _connection(self) -> Shortcut: ...
