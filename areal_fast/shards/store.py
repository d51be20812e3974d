"""Host shards in the arena: put, get, batch, clear, expiry.

A put shard is one arena shard: its meta says dtype, shape and form, its data are the bytes to keep. A bundle
(bundles.py) is one arena shard for all parts of an export. A file (sealed.py) has a record here, without
data. An id that looks like a bundle's part is looked up
there first; a put under such an id is stored as itself and then takes the part's place by clearing its bit,
so a reader sees the old tensor or the new one.

`num_tensors` and `total_bytes` (the answer of clear) are two words of the arena, kept beside the shards: a
process killed between the two, or two puts of one id at the same moment, leave them a little off. `recount`
makes them exact again at the next quiet moment; the cleaner calls it.

A shard may also be on a GPU (gpu_records.py): its record here has no data bytes and is no Part, but it is
counted, replaced, cleared and expired like any other; a reply gets it from its keeper, as a file
(`elsewhere`).

Runs on the loop's thread. Raises the arena's ArenaFull and IndexBusy as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from areal_fast.core import MAX_NAME_BYTES, ArenaFull, Gone, IndexBusy
from areal_fast.errors import ShardRejected, ShardsNotFound
from areal_fast.protocol import export, wire
from areal_fast.protocol.wire import Form, Kept
from areal_fast.shards import bundles, json_codec, routed
from areal_fast.shards.bundles import Bundle, BundleMeta
from areal_fast.shards.description import Description
from areal_fast.shards.gpu_records import GpuHold, GpuMeta
from areal_fast.shards.outgoing import Outgoing, Part, RawOutgoing
from areal_fast.shards.routed import RoutedMeta
from areal_fast.shards.sealed import MAPPED_FROM_BYTES, SealedFile

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

    from areal_fast.core._core import Arena

FILE_COUNT = 55
"""Word: shards that are files. Written by the supervisor alone, as FILE_BYTES."""
FILES_SEEN = 56
"""Word: FILES_CHANGED as of the supervisor's last look: what was removed until then is not counted any
more."""
FILES_CHANGED = 57
"""Word: counts removals of shards that are files."""
COUNTS_CHANGED = 58
"""Word: how often the two words of the totals were changed."""
DEATHS = 59
"""Word: processes that died, counted by the supervisor once they are swept."""
FILE_BYTES = 60
"""Word: bytes of all shards that are files. Written by the supervisor alone."""
WORD_SHARD_TENSORS = 62
WORD_SHARD_BYTES = 63
SWEEP_PAGE = 256
EVER_NS = (1 << 63) - 1
FILE_TRIES = 3
"""Looks at an id whose file went between the record and its opening: the shard was replaced, and is there."""


class TensorMeta(msgspec.Struct, array_like=True, tag_field="form", tag="tensor"):
    """Meta of a put shard."""

    dtype: str
    shape: list[int]
    kept: Form
    nbytes: int


class FileMeta(msgspec.Struct, array_like=True, tag_field="form", tag="file"):
    """Meta of a shard whose bytes are a sealed file (sealed.py) that the supervisor holds, as its descriptor
    `fd`. The record has no data."""

    dtype: str
    shape: list[int]
    kept: Form
    nbytes: int
    fd: int
    inode: int


class Reserved(NamedTuple):
    """A shard that nobody can see yet. view: its `nbytes` bytes, writable."""

    shard_id: str
    name: bytes
    slot: int
    nbytes: int
    view: memoryview


Meta = TensorMeta | BundleMeta | RoutedMeta | FileMeta | GpuMeta | GpuHold

Elsewhere = Mapping[str, Part]

_meta_decoder: msgspec.msgpack.Decoder[Meta] = msgspec.msgpack.Decoder(Meta)
_encode = msgspec.msgpack.Encoder().encode


class ShardStore:
    """See the top of the file. `serving_addr` HOST:PORT is written into references. holder_pid: who holds the
    shards that are files; 0, they cannot be read here."""

    def __init__(self, arena: Arena, serving_addr: str = "") -> None:
        self.arena = self._arena = arena
        self.serving_addr = serving_addr
        self.holder_pid = 0
        self._addr_json = json.dumps(serving_addr, ensure_ascii=False)

    # -- put -------------------------------------------------------------------------------------------
    def put_json(self, shard_id: str, body: bytes) -> None:
        """Store the tensor or array in `body` under `shard_id`, replacing any other. ShardRejected (nothing
        is stored then); ArenaFull."""
        name = checked_name(shard_id)
        replaced = self._sizes(name)
        with self._patience():
            kept = json_codec.store(self._arena, name, body, _tensor_meta)
        self._replaced(shard_id, replaced, kept.nbytes)

    def put(self, shard_id: str, what: Description, data: Buffer) -> None:
        """Store `data`, the bytes of what `what` describes, replacing any other shard of this id.
        ShardRejected, ArenaFull, IndexBusy: nothing was stored."""
        name = checked_name(shard_id)
        if memoryview(data).nbytes != what.nbytes:
            raise ShardRejected(f"{what.nbytes} bytes are described, {memoryview(data).nbytes} came")
        replaced = self._sizes(name)
        with self._patience():
            self._arena.shard_put(name, _tensor_meta(what), (data,))
        self._replaced(shard_id, replaced, what.nbytes)

    def check_room(self, nbytes: int) -> None:
        """ArenaFull or IndexBusy (again in a moment) if a shard of so many bytes cannot be stored now."""
        with self._patience():
            if not self.has_room_for(nbytes):
                raise ArenaFull

    def reserve(self, shard_id: str, what: Description) -> Reserved:
        """Room for a shard, to be filled, its view released, and then published or abandoned; this process's,
        with which it dies. ShardRejected, ArenaFull, IndexBusy."""
        name = checked_name(shard_id)
        with self._patience():
            slot, view = self._arena.shard_reserve(name, _tensor_meta(what), what.nbytes)
        return Reserved(shard_id, name, slot, what.nbytes, view)

    def publish(self, room: Reserved) -> None:
        """Let it take the place of any other shard of its id. IndexBusy: nothing has changed."""
        replaced = self._sizes(room.name)
        self._arena.shard_publish(room.slot)
        self._replaced(room.shard_id, replaced, room.nbytes)

    def abandon(self, room: Reserved) -> None:
        self._arena.shard_abandon(room.slot)

    def put_file(self, shard_id: str, name: bytes, meta: FileMeta) -> int:
        """Publish a shard whose file the supervisor holds; its slot. ArenaFull, IndexBusy."""
        replaced = self._sizes(name)
        slot = self._arena.shard_put(name, _encode(meta), ())
        self._replaced(shard_id, replaced, meta.nbytes)
        return slot

    def turn_into_file(self, name: bytes, slot: int, meta: FileMeta) -> int | None:
        """Publish a file of the same bytes in the place of the shard in the pinned `slot`, as old as that;
        the record's slot. None: another shard, or none, has that id now. ArenaFull, IndexBusy."""
        record, view = self._arena.shard_reserve(name, _encode(meta), 0)
        view.release()
        try:
            self._arena.shard_succeed(record, slot)
        except Gone:
            self._arena.shard_abandon(record)
            return None
        except BaseException:
            self._arena.shard_abandon(record)
            raise
        return record

    def put_elsewhere(self, shard_id: str, meta: GpuMeta) -> int:
        """Publish a shard whose bytes are on a GPU; its slot. ShardRejected, ArenaFull, IndexBusy."""
        name = checked_name(shard_id)
        replaced = self._sizes(name)
        slot = self._arena.shard_put(name, _encode(meta), ())
        self._replaced(shard_id, replaced, meta.nbytes)
        return slot

    def has_room_for(self, nbytes: int) -> bool:
        """Whether a file or a shard of so many bytes would fit the budget now."""
        stats = self._arena.stats()
        free = stats["granules"] - stats.get("granules_keep", 0)
        free -= stats["granules_used"] + stats["granules_outside"]
        return nbytes <= free * (stats["bytes_max"] // stats["granules"])

    def file_at(self, slot: int) -> FileMeta | None:
        """The record of the file shard in this slot, if there is one. For the supervisor."""
        if not self._arena.pin_slot(slot):
            return None
        try:
            meta = self.meta(slot)
            return meta if isinstance(meta, FileMeta) else None
        finally:
            self._arena.unpin(slot)

    def file_records(self) -> Iterator[tuple[int, FileMeta]]:
        """(slot, record) of every file shard. O(shards)."""
        for slot in self._slots():
            if (meta := self.file_at(slot)) is not None:
                yield slot, meta

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """A full arena is a busy one as long as files were removed that the supervisor has not looked at."""
        try:
            yield
        except ArenaFull:
            if self._arena.word(FILES_CHANGED) == self._arena.word(FILES_SEEN):
                raise
            raise IndexBusy("removed files are about to be closed") from None

    def _open_file(self, meta: FileMeta) -> SealedFile | None:
        """The file, by way of its holder; None if it is not there any more (its shard was removed)."""
        if not self.holder_pid:
            return None
        try:
            fd = os.open(f"/proc/{self.holder_pid}/fd/{meta.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        file = SealedFile(fd, meta.nbytes)
        found = os.fstat(fd)
        return file if (found.st_ino, found.st_size) == (meta.inode, meta.nbytes) else None

    def _replaced(self, shard_id: str, before: tuple[int, int], nbytes: int) -> None:
        """A shard of `nbytes` now stands where one of sizes `before` did."""
        self._account(1 - before[0], nbytes - before[1])
        if before[0] and before[1] >= MAPPED_FROM_BYTES:
            self._arena.add_word(FILES_CHANGED, 1)
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
    def get_json(self, shard_id: str, elsewhere: Elsewhere | None = None) -> Outgoing | None:
        """The shard as JSON, or None. To be closed. elsewhere: as in `find`, here and below."""
        try:
            return Outgoing(self.find([shard_id], elsewhere), listed=False)
        except ShardsNotFound:
            return None

    def batch_json(self, shard_ids: Sequence[str], elsewhere: Elsewhere | None = None) -> Outgoing:
        """A JSON list of the shards in order, to be closed. ShardsNotFound names all that are missing."""
        return Outgoing(self.find(shard_ids, elsewhere), listed=True)

    def raw(self, shard_ids: Sequence[str], elsewhere: Elsewhere | None = None) -> RawOutgoing:
        """The shards as one safetensors file, to be closed. ShardsNotFound as above; ShardRejected."""
        names = list(dict.fromkeys(shard_ids))
        return RawOutgoing(dict(zip(names, self.find(names, elsewhere), strict=True)))

    def find(self, shard_ids: Sequence[str], elsewhere: Elsewhere | None = None) -> list[Part]:
        """The shards in order. Each part keeps its shard's memory until it is let go. elsewhere: parts, by
        shard id, that were fetched from a GPU. ShardsNotFound."""
        opened: dict[bytes, tuple[int, Bundle]] = {}
        parts: list[Part] = []
        missing: list[str] = []
        try:
            for shard_id in shard_ids:
                found = elsewhere.get(shard_id) if elsewhere else None
                if found is None:
                    found = self._get(shard_id, opened)
                if found is None:
                    missing.append(shard_id)
                elif not missing:
                    parts.append(found)
            if missing:
                parts.clear()
                raise ShardsNotFound(missing)
            return parts
        finally:
            self._close_all(opened)

    def _get(self, shard_id: str, opened: dict[bytes, tuple[int, Bundle]]) -> Part | None:
        """`opened`: bundles the batch has pinned already, with what they have computed."""
        if (split := bundles.split_id(shard_id)) is not None:
            name, part = split
            if (known := opened.get(name)) is not None:
                if part < known[1].meta.parts and self._arena.shard_bit(known[0], part):
                    return known[1].part(part)
            elif (found := self._get_part(name, part, opened)) is not None:
                return found
        for _ in range(FILE_TRIES):
            slot = self._arena.pin_shard(_name(shard_id))
            if slot < 0:
                return None
            found = self._part_at(slot)
            if found is not None:
                return found
        return None

    def _part_at(self, slot: int) -> Part | None:
        """A pinned slot's shard, unpinned; None if it is none that has bytes (any more)."""
        try:
            raw, view = self._arena.shard_view(slot)
            meta = _meta_decoder.decode(raw)
            if isinstance(meta, FileMeta):
                view.release()
                file = self._open_file(meta)
                if file is None:
                    return None
                return Part(meta.dtype, tuple(meta.shape), meta.kept, meta.nbytes, file)
            if not isinstance(meta, TensorMeta):
                view.release()
                return None
            return Part(meta.dtype, tuple(meta.shape), meta.kept, meta.nbytes, view, slot)
        finally:
            self._arena.unpin(slot)

    def _close_all(self, opened: dict[bytes, tuple[int, Bundle]]) -> None:
        # Cleared, not just left behind: a view holds a pin of its own, and a traceback may outlive the call.
        while opened:
            _, (slot, bundle) = opened.popitem()
            del bundle
            self._arena.unpin(slot)

    def _get_part(self, name: bytes, part: int, opened: dict[bytes, tuple[int, Bundle]]) -> Part | None:
        slot = self._arena.pin_shard(name)
        if slot < 0:
            return None
        raw, view = self._arena.shard_view(slot)
        meta = _meta_decoder.decode(raw)
        if not isinstance(meta, BundleMeta) or part >= meta.parts or not self._arena.shard_bit(slot, part):
            view.release()
            self._arena.unpin(slot)
            return None
        bundle = Bundle(meta, view, self._arena)
        opened[name] = (slot, bundle)
        return bundle.part(part)

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
                routed.drop(arena, [shard for _, shard, _ in meta.routed_of(part)])
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
                # Routed experts live as long as what refers to them.
                if not routed.is_routed(self._arena.slot_info(slot).id):
                    removed += self.remove_slot(slot, but=GpuHold)  # holds end with their process
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

    def recount(self, pause: Callable[[], object]) -> bool:
        """Set the totals to what is there. False, and nothing done, if shards came or went meanwhile.

        Between two equal counts `pause` passes: who had changed the shards and not yet the words, has then.
        O(shards)."""
        arena = self._arena
        changed = arena.word(COUNTS_CHANGED)
        found = self._count()
        pause()
        if self._count() != found or arena.word(COUNTS_CHANGED) != changed:
            return False
        arena.add_word(WORD_SHARD_TENSORS, found[0] - arena.word(WORD_SHARD_TENSORS))
        arena.add_word(WORD_SHARD_BYTES, found[1] - arena.word(WORD_SHARD_BYTES))
        return True

    def _count(self) -> tuple[int, int]:
        tensors = nbytes = 0
        for slot in self._slots():
            if self._arena.pin_slot(slot):
                try:
                    more = self._left(slot, self.meta(slot))
                finally:
                    self._arena.unpin(slot)
                tensors += more[0]
                nbytes += more[1]
        return tensors, nbytes

    def _slots(self) -> Iterator[int]:
        """Of every shard in the arena."""
        cursor = 0
        while True:
            slots, cursor = self._arena.expired_shards(EVER_NS, cursor, SWEEP_PAGE)
            yield from slots
            if cursor == 0:
                return

    def _account(self, tensors: int, nbytes: int) -> None:
        self._arena.add_word(WORD_SHARD_TENSORS, tensors)
        self._arena.add_word(WORD_SHARD_BYTES, nbytes)
        self._arena.add_word(COUNTS_CHANGED, 1)

    def close(self, slot: int) -> bool:
        """Close a pinned shard that is not counted; False if another did."""
        return _close(self._arena, slot)

    def meta(self, slot: int) -> Meta:
        """A pinned shard's record."""
        raw, view = self._arena.shard_view(slot)
        view.release()
        return _meta_decoder.decode(raw)

    def routed_in(self, slot: int) -> set[bytes]:
        """Routed experts that a pinned shard refers to: if it is a bundle, of parts that are not cleared."""
        meta = self.meta(slot)
        if not isinstance(meta, BundleMeta) or not meta.routed:
            return set()
        left = [p for p in range(meta.own_parts, meta.parts) if self._arena.shard_bit(slot, p)]
        return {shard for p in left for _, shard, _ in meta.routed_of(p)}

    def _sizes(self, name: bytes) -> tuple[int, int]:
        slot = self._arena.pin_shard(name)
        if slot < 0:
            return 0, 0
        try:
            return self._left(slot, self.meta(slot))
        finally:
            self._arena.unpin(slot)

    def _left(self, slot: int, meta: Meta) -> tuple[int, int]:
        if isinstance(meta, GpuHold | RoutedMeta):
            return 0, 0
        if not isinstance(meta, BundleMeta):
            return 1, meta.nbytes
        left = [p for p in range(meta.parts) if self._arena.shard_bit(slot, p)]
        return len(left), sum(meta.part_bytes(p) for p in left)

    def _remove(self, slot: int) -> bool:
        """Close a pinned shard; False if another did."""
        meta = self.meta(slot)
        tensors, nbytes = self._left(slot, meta)
        if not _close(self._arena, slot):
            return False
        self._account(-tensors, -nbytes)
        if isinstance(meta, FileMeta):
            self._arena.add_word(FILES_CHANGED, 1)
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
        for part in range(meta.own_parts, meta.parts):
            of, _, width = meta.routed_of(part)[0]
            if meta.kind == "batch" or of == row:
                shape = f"{tokens[:-1]},{width}]"
                reference = wire.rtensor_json(bundles.part_id(prefix, part), self._addr_json, shape, "int32")
                parts.append(f'"{export.ROUTED}":{reference}')
        return "{" + ",".join(parts) + "}"


def _tensor_meta(what: Description | Kept) -> bytes:
    return _encode(TensorMeta(what.dtype, list(what.shape), what.form, what.nbytes))


def checked_name(shard_id: str) -> bytes:
    """The arena's name for an id under which something may be put. ShardRejected."""
    name = _name(shard_id)
    if not name or len(name) > MAX_NAME_BYTES or name[0] == 0:
        raise ShardRejected("A shard id is 1 to 1024 bytes of text")
    return name


def _name(shard_id: str) -> bytes:
    return shard_id.encode("utf-8", "surrogatepass")


def _close(arena: Arena, slot: int) -> bool:
    try:
        arena.shard_close(slot)
    except Gone:
        return False
    return True
