"""Plain HTTP/1.1 for the blocking client: http.client over a small pool of kept connections.

Why the standard library: requests are few kinds, to known nodes, over plain HTTP; nothing of what larger
libraries add is used, and a reply's body can be read by the kernel into the memory that tensors will lie in.

A kept connection on which something is to be read has ended, and is not used. Threads may share a pool: each
request has a connection of its own. A child made by fork starts with an empty pool: a connection that two
processes read is worth nothing.

Time. `timeout_s` bounds the whole: what is left is set on the socket before the head and before each
STRIDE_BYTES of the body.
"""

from __future__ import annotations

import http.client
import os
import select
import socket
import time
from threading import Lock

import numpy as np

from areal_fast.client.errors import BadReply, TimedOut, Unreachable
from areal_fast.client.steps import Answer, Ask
from areal_fast.http.client import BaseUrl, parse_base_url

STRIDE_BYTES = 4 << 20
MAX_IDLE = 8
"""Kept connections a node."""
CONNECT_TIMEOUT_S = 10.0


class Connections:
    """See the top of the file."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: dict[str, list[http.client.HTTPConnection]] = {}
        self._urls: dict[str, BaseUrl] = {}
        self._lock = Lock()
        self._pid = os.getpid()

    def send(self, ask: Ask) -> Answer:
        """One request, one whole reply. Unreachable, TimedOut, BadReply; ValueError for a URL that
        is not plain http."""
        deadline = time.monotonic() + self._timeout_s
        where = self._where(ask.url)
        connection = self._take(ask.url) or self._connect(ask, where)
        reusable = False
        try:
            whole = self._send(connection, ask, where, deadline)
            connection.sock.settimeout(_left(deadline))
            reply = connection.getresponse()
            body = self._read(connection, reply, deadline)
            reusable = whole and not reply.will_close
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, body)
        except TimeoutError:
            raise TimedOut(ask.what, self._timeout_s) from None
        except (http.client.IncompleteRead, http.client.RemoteDisconnected, OSError) as error:
            raise Unreachable(ask.what, f"the connection broke ({error!r})", sent=True) from error
        except http.client.HTTPException as error:
            raise BadReply(f"{ask.what}: what came is not HTTP ({error!r})") from error
        finally:
            if not (reusable and self._keep(ask.url, connection)):
                connection.close()

    def check(self, url: str) -> None:
        """ValueError unless it is a plain http URL."""
        self._where(url)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _where(self, url: str) -> BaseUrl:
        found = self._urls.get(url)
        if found is None:
            found = self._urls[url] = parse_base_url(url)
        return found

    # -- connections ---------------------------------------------------------------------------------------
    def _take(self, url: str) -> http.client.HTTPConnection | None:
        """A kept connection that still stands."""
        while True:
            with self._lock:
                if self._pid != os.getpid():
                    self._idle, self._pid = {}, os.getpid()
                idle = self._idle.get(url)
                if not idle:
                    return None
                connection = idle.pop()
            if not _readable(connection.sock):
                return connection
            connection.close()

    def _keep(self, url: str, connection: http.client.HTTPConnection) -> bool:
        with self._lock:
            idle = self._idle.setdefault(url, [])
            if len(idle) >= MAX_IDLE:
                return False
            idle.append(connection)
            return True

    def _connect(self, ask: Ask, where: BaseUrl) -> http.client.HTTPConnection:
        timeout_s = min(self._timeout_s, CONNECT_TIMEOUT_S)
        connection = http.client.HTTPConnection(where.host, where.port, timeout=timeout_s)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            why = error.strerror or f"no connection within {timeout_s:g} s"
            raise Unreachable(ask.what, why, sent=False) from error
        return connection

    # -- one exchange --------------------------------------------------------------------------------------
    def _send(
        self, connection: http.client.HTTPConnection, ask: Ask, where: BaseUrl, deadline: float
    ) -> bool:
        """Send the request. False: the server stopped reading in the middle. One that refuses a body early
        has answered already; if it has not, reading the reply will say so."""
        connection.sock.settimeout(_left(deadline))
        connection.putrequest(ask.method, where.prefix + ask.path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", where.host_header)
        for name, value in ask.headers:
            connection.putheader(name, value.encode())
        pieces = [memoryview(piece).cast("B") for piece in ask.body]
        if pieces or ask.method in ("POST", "PUT"):
            connection.putheader("Content-Length", str(sum(len(piece) for piece in pieces)))
        try:
            connection.endheaders()
            for piece in pieces:
                connection.sock.settimeout(_left(deadline))
                connection.send(piece)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def _read(
        self, connection: http.client.HTTPConnection, reply: http.client.HTTPResponse, deadline: float
    ) -> memoryview:
        """The body, in memory of its own, which the kernel fills where the length is known."""
        length = reply.length
        if length is None:
            return memoryview(bytearray(reply.read()))
        body = np.empty(length, np.uint8).data
        sock, have = connection.sock, 0
        while have < length:
            if sock is not None:  # None: the last reply on it, which holds the socket by itself
                sock.settimeout(_left(deadline))
            read = reply.readinto(body[have : have + STRIDE_BYTES])
            if not read:
                raise http.client.IncompleteRead(b"", length - have)
            have += read
        if not length:
            reply.read()
        return body


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
