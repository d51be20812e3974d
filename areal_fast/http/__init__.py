"""HTTP/1.1, server and client, over httptools on asyncio or uvloop. Knows nothing of sessions.

Server(handler, limits).serve(sock): `handler(exchange)` gets each whole request and answers it at once,
returns an awaitable that does, or defers its answer to a callback. Client(base_url).request(...), .begin(...)
and .stream(...): a pool of kept connections to one engine. Plain HTTP only: TLS, proxies and other people's
services go through a maintained client elsewhere.
"""

from areal_fast.http._native import Exchange, Headers
from areal_fast.http.client import BaseUrl, Client, ClientStats, Reply, StreamReply, parse_base_url
from areal_fast.http.errors import BrokenReply, ClientError, ConnectFailed, PoolFull, Timeout
from areal_fast.http.head import ProtocolError
from areal_fast.http.limits import Limits
from areal_fast.http.server import Handler, Server

__all__ = [
    "BaseUrl",
    "BrokenReply",
    "Client",
    "ClientError",
    "ClientStats",
    "ConnectFailed",
    "Exchange",
    "Handler",
    "Headers",
    "Limits",
    "PoolFull",
    "ProtocolError",
    "Reply",
    "Server",
    "StreamReply",
    "Timeout",
    "parse_base_url",
]
