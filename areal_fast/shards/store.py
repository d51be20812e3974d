"""Host shards in the arena: put, get, batch, clear, expiry.

A put shard is one arena shard: its meta says dtype, shape and form, its data are the bytes to keep. A bundle
(bundles.py) is one arena shard for all parts of an export. An id that looks like a bundle's part is looked up
there first; a put under such an id is stored as itself and then takes the part's place by clearing its bit,
so a reader sees the old tensor or the new one.

`num_tensors` and `total_bytes` (the answer of clear) are two words of the arena, kept beside the shards: a
process killed between the two, or two puts of one id at the same moment, leave them a little off.

A shard may also live elsewhere (gpu_records.py): then its record here has no data bytes, and it is nobody's
to fetch through this class, but it is counted, replaced, cleared and expired like any other.

Runs on the loop's thread. Raises the arena's ArenaFull and IndexBusy as they come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from areal_fast.core import MAX_NAME_BYTES, Gone
from areal_fast.errors import ShardRejected, ShardsNotFound
from areal_fast.protocol import export, wire
from areal_fast.protocol.wire import Form, Kept
from areal_fast.shards import bundles, json_codec
from areal_fast.shards.bundles import Bundle, BundleMeta
from areal_fast.shards.gpu_records import GpuHold, GpuMeta

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

    from areal_fast.core._core import Arena

WORD_SHARD_TENSORS = 62
WORD_SHARD_BYTES = 63
SWEEP_PAGE = 256


class TensorMeta(msgspec.Struct, array_like=True, tag_field="form", tag="tensor"):
    """Meta of a put shard."""

    dtype: str
    shape: list[int]
    kept: Form
    nbytes: int


Meta = TensorMeta | BundleMeta | GpuMeta | GpuHold

_meta_decoder: msgspec.msgpack.Decoder[Meta] = msgspec.msgpack.Decoder(Meta)
_encode = msgspec.msgpack.Encoder().encode


class ShardStore:
    """See the top of the file. `serving_addr` HOST:PORT is written into references."""

    def __init__(self, arena: Arena, serving_addr: str = "") -> None:
        self.arena = self._arena = arena
        self.serving_addr = serving_addr
        self._addr_json = json.dumps(serving_addr, ensure_ascii=False)

    # -- put -------------------------------------------------------------------------------------------
    def put_json(self, shard_id: str, body: bytes) -> None:
        """Store the tensor or array in `body` under `shard_id`, replacing any other. ShardRejected (nothing
        is stored then); ArenaFull."""
        name = _checked_name(shard_id)
        replaced = self._sizes(name)
        kept = json_codec.store(self._arena, name, body, _meta_of)
        self._replaced(shard_id, replaced, kept.nbytes)

    def put_elsewhere(self, shard_id: str, meta: GpuMeta) -> int:
        """Store the record of a shard whose bytes are on a GPU, replacing any other shard of this id; its
        slot. ShardRejected, ArenaFull, IndexBusy."""
        name = _checked_name(shard_id)
        replaced = self._sizes(name)
        slot = self._arena.shard_put(name, _encode(meta), ())
        self._replaced(shard_id, replaced, meta.nbytes)
        return slot

    def _replaced(self, shard_id: str, before: tuple[int, int], nbytes: int) -> None:
        """A put is done: account for it, and for what was there `before` (tensors, bytes)."""
        self._account(1 - before[0], nbytes - before[1])
        if (split := bundles.split_id(shard_id)) is not None:
            self._clear_part(*split)

    def put_bundle(self, prefix: str, meta: BundleMeta, data: Sequence[Buffer]) -> None:
        """Store an export's bundle. `data`: the rows' record data, in order. ArenaFull only when even the
        reserve kept for exports is used up."""
        self._arena.shard_put(bundles.arena_name(prefix), _encode(meta), data, bits=meta.parts, critical=True)
        self._account(meta.parts, meta.total_bytes())

    def drop_bundle(self, prefix: str) -> None:
        """Remove a bundle whose export was undone."""
        slot = self._arena.pin_shard(bundles.arena_name(prefix))
        if slot < 0:
            return
        try:
            self._remove(slot)
        finally:
            self._arena.unpin(slot)

    # -- get -------------------------------------------------------------------------------------------
    def get_json(self, shard_id: str) -> bytes | None:
        """The shard as JSON, or None."""
        opened: dict[bytes, tuple[int, Bundle]] = {}
        try:
            return self._get(shard_id, opened)
        finally:
            self._close_all(opened)

    def batch_json(self, shard_ids: Sequence[str], elsewhere: Mapping[str, bytes] | None = None) -> bytes:
        """A JSON list of the shards in order. `elsewhere`: the JSON of those that were fetched from a GPU.
        ShardsNotFound names all that are missing."""
        opened: dict[bytes, tuple[int, Bundle]] = {}
        out: list[bytes] = [b"["]
        missing: list[str] = []
        try:
            for shard_id in shard_ids:
                found = elsewhere.get(shard_id) if elsewhere else None
                if found is None:
                    found = self._get(shard_id, opened)
                if found is None:
                    missing.append(shard_id)
                elif not missing:
                    out += (found, b",")
        finally:
            self._close_all(opened)
        if missing:
            raise ShardsNotFound(missing)
        out[max(len(out) - 1, 1) :] = [b"]"]
        return b"".join(out)

    def _get(self, shard_id: str, opened: dict[bytes, tuple[int, Bundle]]) -> bytes | None:
        """`opened`: bundles the batch has pinned already, with what they have computed."""
        if (split := bundles.split_id(shard_id)) is not None:
            name, part = split
            if (known := opened.get(name)) is not None:
                if self._arena.shard_bit(known[0], part):
                    return known[1].part_json(part)
            elif (found := self._get_part(name, part, opened)) is not None:
                return found
        slot = self._arena.pin_shard(_name(shard_id))
        if slot < 0:
            return None
        try:
            raw, view = self._arena.shard_view(slot)
            with view:
                meta = _meta_decoder.decode(raw)
                if not isinstance(meta, TensorMeta):
                    return None
                return json_codec.encode(meta.dtype, tuple(meta.shape), view, meta.kept)
        finally:
            self._arena.unpin(slot)

    def _close_all(self, opened: dict[bytes, tuple[int, Bundle]]) -> None:
        # Cleared, not just left behind: a view holds a pin of its own, and a traceback may outlive the call.
        while opened:
            _, (slot, bundle) = opened.popitem()
            del bundle
            self._arena.unpin(slot)

    def _get_part(self, name: bytes, part: int, opened: dict[bytes, tuple[int, Bundle]]) -> bytes | None:
        slot = self._arena.pin_shard(name)
        if slot < 0:
            return None
        raw, view = self._arena.shard_view(slot)
        meta = _meta_decoder.decode(raw)
        if not isinstance(meta, BundleMeta) or part >= meta.parts or not self._arena.shard_bit(slot, part):
            view.release()
            self._arena.unpin(slot)
            return None
        bundle = Bundle(meta, view)
        opened[name] = (slot, bundle)
        return bundle.part_json(part)

    # -- clear -----------------------------------------------------------------------------------------
    def clear(self, shard_ids: Sequence[str]) -> tuple[int, int, int]:
        """Remove shards; unknown ids count for nothing -> (removed, shards left, their bytes)."""
        removed = 0
        for shard_id in shard_ids:
            split = bundles.split_id(shard_id)
            if split is not None and self._clear_part(*split):
                removed += 1
                continue
            name = _name(shard_id)
            slot = self._arena.pin_shard(name) if name and name[0] else -1
            if slot < 0:
                continue
            try:
                removed += self._remove(slot)
            finally:
                self._arena.unpin(slot)
        return (removed, *self.totals())

    def _clear_part(self, name: bytes, part: int) -> bool:
        arena = self._arena
        slot = arena.pin_shard(name)
        if slot < 0:
            return False
        try:
            meta = self.meta(slot)
            if not isinstance(meta, BundleMeta) or part >= meta.parts:
                return False
            was, empty = arena.shard_clear_bit(slot, part)
            if was:
                self._account(-1, -meta.part_bytes(part))
            if empty:
                _close(arena, slot)
            return was
        finally:
            arena.unpin(slot)

    # -- expiry ----------------------------------------------------------------------------------------
    def sweep_expired(self, created_before_ns: int) -> int:
        """Remove every shard older than this (monotonic ns); how many arena shards went. For the cleaner."""
        removed, cursor = 0, 0
        created_before_ns = max(created_before_ns, 0)
        while True:
            slots, cursor = self._arena.expired_shards(created_before_ns, cursor, SWEEP_PAGE)
            for slot in slots:
                removed += self.remove_slot(slot, but=GpuHold)  # those end with their process
            if cursor == 0:
                return removed

    def remove_slot(self, slot: int, *, but: type[Meta] | None = None) -> bool:
        """Remove the shard in `slot`, if there is one and its record is not of the kind `but`."""
        if not self._arena.pin_slot(slot):
            return False
        try:
            return not (but and isinstance(self.meta(slot), but)) and self._remove(slot)
        finally:
            self._arena.unpin(slot)

    # -- counts ----------------------------------------------------------------------------------------
    def totals(self) -> tuple[int, int]:
        """(tensors, bytes) that can be fetched now."""
        arena = self._arena
        return max(0, arena.word(WORD_SHARD_TENSORS)), max(0, arena.word(WORD_SHARD_BYTES))

    def _account(self, tensors: int, nbytes: int) -> None:
        self._arena.add_word(WORD_SHARD_TENSORS, tensors)
        self._arena.add_word(WORD_SHARD_BYTES, nbytes)

    def meta(self, slot: int) -> Meta:
        """A pinned shard's record."""
        raw, view = self._arena.shard_view(slot)
        view.release()
        return _meta_decoder.decode(raw)

    def close(self, slot: int) -> bool:
        """Close a pinned shard that is not counted; False if another did."""
        return _close(self._arena, slot)

    def _sizes(self, name: bytes) -> tuple[int, int]:
        slot = self._arena.pin_shard(name)
        if slot < 0:
            return 0, 0
        try:
            return self._left(slot, self.meta(slot))
        finally:
            self._arena.unpin(slot)

    def _left(self, slot: int, meta: Meta) -> tuple[int, int]:
        if isinstance(meta, TensorMeta | GpuMeta):
            return 1, meta.nbytes
        if isinstance(meta, GpuHold):
            return 0, 0
        left = [p for p in range(meta.parts) if self._arena.shard_bit(slot, p)]
        return len(left), sum(meta.part_bytes(p) for p in left)

    def _remove(self, slot: int) -> bool:
        """Close a pinned shard; False if another did."""
        tensors, nbytes = self._left(slot, self.meta(slot))
        if not _close(self._arena, slot):
            return False
        self._account(-tensors, -nbytes)
        return True

    # -- references ------------------------------------------------------------------------------------
    def tensor_dict_json(self, prefix: str, meta: BundleMeta, row: int = 0) -> str:
        """`{name: RTensor, …}` of one row of a bundle, or of a batch."""
        first = row * len(meta.names) if meta.kind == "each" else 0
        if meta.kind == "each":
            tokens, rewards = f"[1,{meta.rows[row].length}]", "[1]"
        else:
            width = max((r.length for r in meta.rows), default=0)
            tokens, rewards = f"[{len(meta.rows)},{width}]", f"[{len(meta.rows)}]"
        parts = [
            f'"{name}":'
            + wire.rtensor_json(
                bundles.part_id(prefix, first + i),
                self._addr_json,
                rewards if name in export.PER_ROW else tokens,
                export.DTYPES[name],
            )
            for i, name in enumerate(meta.names)
        ]
        return "{" + ",".join(parts) + "}"


def _meta_of(kept: Kept) -> bytes:
    return _encode(TensorMeta(kept.dtype, list(kept.shape), kept.form, kept.nbytes))


def _name(shard_id: str) -> bytes:
    return shard_id.encode("utf-8", "surrogatepass")


def _checked_name(shard_id: str) -> bytes:
    name = _name(shard_id)
    if not name or len(name) > MAX_NAME_BYTES or name[0] == 0:
        raise ShardRejected("A shard id is 1 to 1024 bytes of text")
    return name


def _close(arena: Arena, slot: int) -> bool:
    try:
        arena.shard_close(slot)
    except Gone:
        return False
    return True
