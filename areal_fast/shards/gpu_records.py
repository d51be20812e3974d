"""What the arena says of a GPU pool: one record for each shard in it, one for each piece that somebody holds.

A GPU shard is an arena shard without data bytes whose meta is a GpuMeta. A GpuHold is an arena shard under
a name that no id can be (it begins with a zero byte): a reservation that is being filled, or a lease that
is being read. Together they are the pool's whole state: a keeper's own tables are rebuilt from them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from areal_fast.protocol.wire import Form

if TYPE_CHECKING:
    from areal_fast.shards.store import ShardStore

EVER_NS: Final = (1 << 63) - 1
PAGE: Final = 256


class Holder(NamedTuple):
    """One client in a process. pid 0: in a PID namespace that we cannot see into. born: the process's start
    time as /proc has it, which tells it from a later one of the same pid. client: the number that the
    client chose."""

    pid: int
    born: int
    client: int


class GpuMeta(msgspec.Struct, array_like=True, tag_field="form", tag="gpu"):
    """Meta of a shard that lives in the pool `pool` of the GPU `gpu` (16 bytes each)."""

    gpu: bytes
    pool: bytes
    offset: int
    nbytes: int
    generation: int
    dtype: str
    shape: list[int]
    kept: Form


class GpuHold(msgspec.Struct, array_like=True, tag_field="form", tag="hold"):
    """A piece of a pool that must not be given to anybody else. lease 0: a reservation."""

    gpu: bytes
    pool: bytes
    offset: int
    nbytes: int
    generation: int
    lease: int
    holder: Holder


_HOLD_NAME = struct.Struct("<2sQQ")
_encode = msgspec.msgpack.Encoder().encode


class GpuRecords:
    """These records of a store."""

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._arena = store.arena

    def find(self, shard_id: str) -> GpuMeta | None:
        """The record of a shard on a GPU; None if there is no such shard, or it is elsewhere."""
        name = shard_id.encode("utf-8", "surrogatepass")
        slot = self._arena.pin_shard(name) if name and name[0] else -1
        if slot < 0:
            return None
        try:
            meta = self._store.meta(slot)
        finally:
            self._arena.unpin(slot)
        return meta if isinstance(meta, GpuMeta) else None

    def generation_at(self, slot: int) -> int:
        """Of the GPU shard in `slot`, or -1 if none lives there now."""
        if not self._arena.pin_slot(slot):
            return -1
        try:
            meta = self._store.meta(slot)
        finally:
            self._arena.unpin(slot)
        return meta.generation if isinstance(meta, GpuMeta) else -1

    def of_gpu(self, gpu: bytes) -> Iterator[tuple[int, GpuMeta | GpuHold]]:
        """(slot, record) of everything that this GPU's pools hold or held. O(shards)."""
        cursor = 0
        while True:
            slots, cursor = self._arena.expired_shards(EVER_NS, cursor, PAGE)
            for slot in slots:
                if not self._arena.pin_slot(slot):
                    continue
                try:
                    meta = self._store.meta(slot)
                finally:
                    self._arena.unpin(slot)
                if isinstance(meta, GpuMeta | GpuHold) and meta.gpu == gpu:
                    yield slot, meta
            if cursor == 0:
                return

    def put_hold(self, hold: GpuHold) -> None:
        """ArenaFull, IndexBusy."""
        self._arena.shard_put(_HOLD_NAME.pack(b"\0g", hold.generation, hold.lease), _encode(hold), ())

    def drop_hold(self, generation: int, lease: int) -> None:
        slot = self._arena.pin_shard(_HOLD_NAME.pack(b"\0g", generation, lease))
        if slot < 0:
            return
        try:
            self._store.close(slot)
        finally:
            self._arena.unpin(slot)
