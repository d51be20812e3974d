"""The contracts of _client.pyx; its theory stands at its top."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeAlias, final

from typing_extensions import disjoint_base

from areal_fast.http.client_connection import Call, EngineConnection
from areal_fast.http.errors import Timeout
from areal_fast.http.head import ReplyHead
from areal_fast.http.headers import HeaderPairs
from areal_fast.http.parser import ReplyParser
from areal_fast.http.wheel import Wheel

_Message: TypeAlias = bytes | list[bytes]

@final
class Request:
    """One request under way (`Pool.begin`). When it has ended, `error` says why it failed, or is None and the
    reply is there. Times are those of time.monotonic()."""

    way: asyncio.Task[None] | None
    """What finds it a connection, as long as it has none."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def began(self) -> float: ...
    @property
    def ends(self) -> float:
        """When its time is over."""

    @property
    def sent(self) -> float:
        """When it had a connection, the last one."""

    @property
    def ended(self) -> float:
        """When its reply was whole."""

    @property
    def connection(self) -> EngineConnection | None: ...
    @property
    def touched(self) -> bool:
        """A byte of the reply has arrived."""

    @property
    def error(self) -> Exception | None: ...
    @property
    def status(self) -> int: ...
    @property
    def head(self) -> ReplyHead | None:
        """Of the reply. Not after `take_body`."""

    def take_body(self) -> bytes:
        """Once."""

    def cancel(self) -> None:
        """Give it up, unless it has ended: `done` is not called any more, its connection is closed."""

    def begin(self, head: ReplyHead) -> None:
        """For the connection, as what follows: the reply's head has come."""

    def piece(self, data: bytes) -> None: ...
    def take_start(self) -> bytes | bytearray:
        """What has come of the body so far, to be given back as one piece with the rest."""

    def finish(self) -> None: ...
    def late(self) -> Timeout:
        """The error of a request whose time is over."""

    def fail(self, error: Exception) -> None:
        """The connection failed: once more on another one if that is allowed (client.py), else the end."""

    def settle(self, error: Exception) -> None:
        """It has failed for good."""

@disjoint_base
class Pool:
    """A client's part that ordinary requests need. What begins with an underscore is between it and
    client.Client, which inherits it and provides `_find_way`, `_start`, `_released` and `may_retry`.

    Counters, since the client was made: requests … retries; waited_s, engine_s: seconds, summed."""

    requests: int
    failed: int
    connects: int
    reused: int
    retries: int
    waited_s: float
    engine_s: float
    _wheel: Wheel
    _idle: dict[EngineConnection, float]
    _waiting: deque[asyncio.Future[None]]
    _closed: bool
    _reaper: asyncio.TimerHandle | None
    _starts: dict[tuple[str, str, bool], bytes]

    def begin(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        timeout_s: float,
        headers: HeaderPairs = (),
        done: Callable[[Request], None],
    ) -> Request:
        """Send, and call `done(request)` once, when it has ended: the whole reply is there, or
        `request.error` is why there is none (as `Client.request` raises). Never before this has returned.
        `path` is raw, with its query; the body goes as JSON unless `headers` say otherwise. ValueError for
        what cannot be sent."""

    def _take_idle(self) -> EngineConnection: ...
    def _send(self, connection: EngineConnection, request: Request) -> None:
        """On an idle connection, some time after its beginning."""

    def _encode(self, method: str, path: str, body: bytes, headers: HeaderPairs) -> _Message: ...

@disjoint_base
class Link:
    """A connection's part that ordinary requests need. client_connection.EngineConnection inherits it and
    provides `_received` and `abandon`.

    `_clean`: a Request is here of whose reply the parser has seen nothing. used: requests sent so far."""

    due: int
    filed: int
    parser: ReplyParser
    _call: Call | None
    _clean: bool

    def __init__(self, pool: Pool, parser: ReplyParser, max_body: int, max_header: int) -> None: ...
    @property
    def used(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def _transport(self) -> asyncio.Transport: ...
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def send(self, call: Call, method: str, message: _Message) -> None:
        """Put a call that is no Request on the idle connection. Its bytes are written at once."""

    def data_received(self, data: bytes) -> None: ...
    def close(self) -> None:
        """End at once. A call on it must have been ended before."""
