"""What can go wrong with a request to another server. None of them says that the request was not processed,
but for ConnectFailed and PoolFull, which are raised before a byte of it was sent."""

from __future__ import annotations


class ClientError(Exception):
    """Base of the four below."""


class ConnectFailed(ClientError):
    """No connection: refused, unreachable, unknown host, or not within connect_timeout_s."""


class PoolFull(ConnectFailed):
    """All connections are in use and as many requests wait as may."""


class Timeout(ClientError):
    """The whole request, waiting for a connection included, took longer than its timeout_s."""


class BrokenReply(ClientError):
    """The connection broke, or what came is not HTTP, or larger than allowed."""
