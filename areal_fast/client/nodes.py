"""What is known of a node that keeps shards, and the line to it if it is on this host.

Whether a node is on this host is found out by trying its local socket (shards/local.py). One that cannot be
reached is somewhere else, and is not tried again; one that could be and broke may have been started anew,
under a new name: then the node is asked again. `NotHere` says: take another way this time.

The line is a connection of its own, used by one thread at a time, and never by a forked child.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import msgspec

from areal_fast.shards.description import Description
from areal_fast.shards.local import LocalRefused, LocalShards, Mapped, NotLocal

T = TypeVar("T")


class NotHere(Exception):
    """This way does not serve now."""


class Offer(msgspec.Struct):
    """The answer of GET /data/ways. raw: the media type of raw bytes; local: how to come by its socket."""

    raw: str | None = None
    local: dict[str, Any] | None = None


class Node:
    """A node as it described itself. `broken`: it may have been started anew, ask it again."""

    def __init__(self, offer: Offer, key: str, timeout_s: float) -> None:
        self.offers_raw = offer.raw is not None
        self._local = offer.local
        self._key = key
        self._timeout_s = timeout_s
        self._line: LocalShards | None = None
        self._pid = os.getpid()
        self._lock = Lock()
        self.broken = False

    @property
    def may_be_here(self) -> bool:
        return self._local is not None

    def map(self, shard_ids: Sequence[str]) -> list[Mapped]:
        """The shards, mapped, in order. NotHere; areal_fast.errors.ShardsNotFound."""
        return self._over_the_line(lambda line: line.map(shard_ids))

    def put(self, shard_id: str, what: Description, data: memoryview) -> bool:
        """True: it is stored. NotHere."""
        self._over_the_line(lambda line: line.put_bytes(shard_id, what, data))
        return True

    def close(self) -> None:
        with self._lock:
            line, self._line = self._line, None
            if line is not None:
                line.close()

    def _over_the_line(self, call: Callable[[LocalShards], T]) -> T:
        with self._lock:
            if self._pid != os.getpid():
                self._line, self._pid = None, os.getpid()
            if self._line is None:
                self._line = self._connected()
            try:
                return call(self._line)
            except NotLocal as error:
                self._line.close()
                self._line, self._local, self.broken = None, None, True
                raise NotHere from error
            except (LocalRefused, OSError) as error:  # full, busy, no descriptors: HTTP may do, or says why
                raise NotHere from error

    def _connected(self) -> LocalShards:
        if self._local is None:
            raise NotHere
        try:
            return LocalShards(self._local, self._key, self._timeout_s)
        except (NotLocal, LocalRefused, OSError) as error:
            self._local = None
            raise NotHere from error
