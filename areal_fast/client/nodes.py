"""What is known of a node that keeps shards, and the lines to it if it is on this host.

Whether a node is on this host is found out by trying its local socket (shards/local.py). One that cannot be
reached is somewhere else, and is not tried again; one that could be and broke may have been started anew,
under a new name: then the node is asked again. `NotHere` says why: take another way this time.

The local line is a connection of its own, used by one thread at a time, and never by a forked child. To the
keeper of each GPU that is used goes another one, whose copies run side by side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Final, TypeVar

import msgspec

from areal_fast.shards.description import Description
from areal_fast.shards.devices import library
from areal_fast.shards.gpu import PATIENCE_S, GpuClient
from areal_fast.shards.local import LocalRefused, LocalShards, Mapped, NotLocal, OnGpu

T = TypeVar("T")

REFUSED_S: Final = 10.0
"""After a node has said that a GPU has no keeper, it is not asked again so soon: as long as it remembers."""


class NotHere(Exception):
    """This way does not serve now. str() says why."""


class Offer(msgspec.Struct):
    """The answer of GET /data/ways. raw: the media type of raw bytes; local: how to come by its socket."""

    raw: str | None = None
    local: dict[str, Any] | None = None


class Node:
    """A node as it described itself. `broken`: it may have been started anew, ask it again. `why_not_here`:
    while it may not be."""

    def __init__(self, offer: Offer, key: str, timeout_s: float) -> None:
        self.offers_raw = offer.raw is not None
        self.why_not_here = "" if offer.local is not None else "the node offers no local socket"
        self._local = offer.local
        self._key = key
        self._timeout_s = timeout_s
        self._line: LocalShards | None = None
        self._pid = os.getpid()
        self._lock = Lock()
        self._keepers: dict[str, tuple[str, GpuClient]] = {}
        self._refused: dict[str, tuple[str, float]] = {}
        self._keepers_lock = Lock()
        self.broken = False

    @property
    def may_be_here(self) -> bool:
        return self._local is not None

    def map(self, shard_ids: Sequence[str]) -> list[Mapped]:
        """The shards, mapped, in order. NotHere; areal_fast.errors.ShardsNotFound."""
        return self._over_the_line(lambda line: line.map(shard_ids))

    def locate(self, shard_ids: Sequence[str], gpus: Sequence[str]) -> list[Mapped | OnGpu]:
        """The same, but where a shard is if it is on one of these GPUs."""
        return self._over_the_line(lambda line: line.locate(shard_ids, gpus))

    def put(self, shard_id: str, what: Description, data: memoryview) -> bool:
        """True: it is stored. NotHere."""
        self._over_the_line(lambda line: line.put_bytes(shard_id, what, data))
        return True

    def reach(self) -> bool:
        """True: the node is on this host. NotHere."""
        self._over_the_line(lambda line: line)
        return True

    def close(self) -> None:
        with self._lock:
            line, self._line = self._line, None
            if line is not None:
                line.close()
        with self._keepers_lock:
            keepers, self._keepers = self._keepers, {}
        for _, keeper in keepers.values():
            keeper.close()

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
                self.why_not_here = str(error)
                raise NotHere(str(error)) from error
            except (LocalRefused, OSError) as error:  # full, busy, no descriptors: HTTP may do, or says why
                raise NotHere(str(error)) from error

    def _connected(self) -> LocalShards:
        if self._local is None:
            raise NotHere(self.why_not_here)
        try:
            return LocalShards(self._local, self._key, self._timeout_s)
        except (NotLocal, LocalRefused, OSError) as error:
            self._local = None
            self.why_not_here = str(error)
            raise NotHere(str(error)) from error

    # -- keepers -------------------------------------------------------------------------------------------
    def keeper(self, gpu: str, socket: str) -> GpuClient:
        """The line to the keeper that listens at `socket`, and the pool mapped. GpuShardError, CudaError."""
        with self._keepers_lock:
            name, keeper = self._keepers.get(gpu, ("", None))
            if keeper is None or name != socket or keeper.is_inherited:
                patience_s = min(PATIENCE_S, self._timeout_s)
                # one that is replaced ends with the last lease that it gave
                keeper = GpuClient.connect(socket, library(), patience_s=patience_s)
                self._keepers[gpu] = socket, keeper
            return keeper

    def socket_of(self, gpu: str) -> str:
        """Where the GPU's keeper was found before, or "". NotHere: there was none a moment ago."""
        why, at = self._refused.get(gpu, ("", 0.0))
        if why and time.monotonic() - at < REFUSED_S:
            raise NotHere(why)
        name, _ = self._keepers.get(gpu, ("", None))
        return name

    def forget_keeper(self, gpu: str) -> None:
        """It does not answer: ask the node for its successor."""
        with self._keepers_lock:
            self._keepers.pop(gpu, None)

    def has_no_keeper(self, gpu: str, why: str) -> None:
        self._refused[gpu] = why, time.monotonic()
