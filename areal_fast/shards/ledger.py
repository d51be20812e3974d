"""Who has which bytes of one GPU's pool: the keeper's book-keeping, without a driver, a socket or a clock.

Theory. Truth is in the arena (gpu_records.py); this is a table over it that can be rebuilt at any time, so
a keeper may be killed between any two lines:

  RESERVE   the extent is taken here, then the hold is written. Killed between: nobody was told, nothing is
            held.
  COMMIT    the shard's record is written (the commit point: from here it is found), then the hold goes.
            Killed between: a shard and a hold of one generation; the successor keeps the shard.
  LEASE     the hold is written before the answer, so a successor knows who may still be reading.
  RELEASE   the hold goes, then, if its shard is gone, the extent.

A shard is removed by whoever removes its record (a worker's clear, the cleaner's expiry, a PUT of the same
id); nobody has to tell the keeper. `reclaim` finds such extents by looking: when room is short, and now and
then. An extent is free only if no record, no reservation and no lease names it.

Generations are `incarnation << 32 | n`: the incarnation is this keeper's in the arena's process table, so
none is ever given twice, and a lease of one that is gone is known to be stale. A hold is its process's
(Holder), not its connection's: after a keeper's death the same process may commit or release over a new
connection.

A record of another pool of this GPU names memory that died with its keeper: `adopt` removes it and counts it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from areal_fast.protocol.gpu import tensor_bytes
from areal_fast.shards.description import own_form
from areal_fast.shards.extents import Extents
from areal_fast.shards.gpu_records import GpuHold, GpuMeta, GpuRecords, Holder

if TYPE_CHECKING:
    from areal_fast.shards.store import ShardStore

MAX_HOLDS: Final = 4096


class PoolFull(Exception):
    """No extent is long enough. str() says how much there is."""


class NotHeld(Exception):
    """No such reservation of this process (or it is gone)."""


@dataclass(slots=True)
class Block:
    """An extent in use. slot: of the shard's record, -1 while it is a reservation. gone: its shard was
    removed, and it waits for its last lease."""

    offset: int
    nbytes: int
    slot: int = -1
    gone: bool = False
    leases: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Adopted:
    """What `adopt` found. lost: shards of a pool that is no more; clashing: records that claimed taken
    bytes."""

    shards: int = 0
    holds: int = 0
    lost: int = 0
    clashing: int = 0


class Ledger:
    """See the top of the file. `incarnation`: this keeper's number in the arena's process table."""

    def __init__(self, store: ShardStore, gpu: bytes, pool: bytes, nbytes: int, incarnation: int) -> None:
        self._store = store
        self._records = GpuRecords(store)
        self.gpu = gpu
        self.pool = pool
        self.extents = Extents(nbytes)
        self.blocks: dict[int, Block] = {}
        self.reservations: dict[int, Holder] = {}
        self.leases: dict[int, tuple[int, Holder]] = {}
        """By lease: generation, and who has it."""
        self._next = (incarnation & 0x7FFFFFFF) << 32

    def _number(self) -> int:
        """A new generation or lease."""
        self._next += 1
        return self._next

    # -- producing ---------------------------------------------------------------------------------------
    def reserve(self, nbytes: int, holder: Holder) -> int:
        """Room for `nbytes`; its generation. PoolFull, ArenaFull, IndexBusy: nothing is reserved then."""
        self._check_holds()
        offset = self.extents.take(nbytes)
        if offset is None:
            self.reclaim()
            offset = self.extents.take(nbytes)
        if offset is None:
            free, largest, size = self.extents.free_bytes, self.extents.largest, self.extents.size
            raise PoolFull(
                f"the GPU pool has no room for {nbytes} bytes: {free} of {size} are free, "
                f"at most {largest} in one piece"
            )
        generation = self._number()
        try:
            self._hold(offset, nbytes, generation, 0, holder)
        except BaseException:
            self.extents.give(offset, nbytes)
            raise
        self.blocks[generation] = Block(offset, nbytes)
        self.reservations[generation] = holder
        return generation

    def commit(
        self, generation: int, holder: Holder, shard_id: str, dtype: str, shape: tuple[int, ...]
    ) -> Block:
        """The reservation becomes the shard. NotHeld; Malformed, ShardRejected, ArenaFull, IndexBusy: it is
        still reserved."""
        if self.reservations.get(generation) != holder:
            raise NotHeld("no such reservation: the keeper that gave it is gone, and so is its pool")
        block = self.blocks[generation]
        nbytes = tensor_bytes(dtype, shape)
        if nbytes != block.nbytes:
            raise ValueError(f"a tensor of {nbytes} bytes in a reservation of {block.nbytes}")
        kept = own_form(dtype)
        where = (self.gpu, self.pool, block.offset, nbytes, generation)
        block.slot = self._store.put_elsewhere(
            shard_id, GpuMeta(*where, dtype, list(shape), kept)
        )  # COMMIT POINT
        self._unhold(generation, 0)
        del self.reservations[generation]
        return block

    def abort(self, generation: int, holder: Holder) -> None:
        """NotHeld."""
        if self.reservations.get(generation) != holder:
            raise NotHeld("no such reservation")
        self._unhold(generation, 0)
        del self.reservations[generation]
        self._free(generation)

    # -- consuming ---------------------------------------------------------------------------------------
    def find(self, shard_id: str) -> GpuMeta | None:
        """The shard, if it is in this pool."""
        meta = self._records.find(shard_id)
        return (
            meta if meta is not None and meta.pool == self.pool and meta.generation in self.blocks else None
        )

    def lease(self, meta: GpuMeta, holder: Holder) -> int:
        """A lease on what `find` found just now. PoolFull, ArenaFull, IndexBusy."""
        self._check_holds()
        lease = self._number()
        block = self.blocks[meta.generation]
        self._hold(block.offset, block.nbytes, meta.generation, lease, holder)
        block.leases.add(lease)
        self.leases[lease] = meta.generation, holder
        return lease

    def release(self, lease: int, generation: int, holder: Holder) -> bool:
        """Whether the bytes were valid until now. Unknown leases are not, nor are others' leases."""
        if self.leases.get(lease) != (generation, holder):
            return False
        self._unhold(generation, lease)
        del self.leases[lease]
        block = self.blocks[generation]
        block.leases.discard(lease)
        if block.gone and not block.leases:
            self._free(generation)
        return True

    # -- ends of things ----------------------------------------------------------------------------------
    def holders(self) -> set[Holder]:
        """Every process that reserves or leases something."""
        return {*self.reservations.values(), *(holder for _, holder in self.leases.values())}

    def holds(self, generation: int, lease: int, holder: Holder) -> bool:
        """Whether this reservation (lease 0) or lease is the holder's."""
        if lease:
            return self.leases.get(lease) == (generation, holder)
        return self.reservations.get(generation) == holder

    def drop_holder(self, holder: Holder, but: Collection[tuple[int, int]] = ()) -> int:
        """Nothing that it holds is read or written any more, except `but` (generation, lease): it said so,
        or its process is dead for certain. How many holds that were."""
        leases = [
            (lease, generation)
            for lease, (generation, who) in self.leases.items()
            if who == holder and (generation, lease) not in but
        ]
        reserved = [g for g, who in self.reservations.items() if who == holder and (g, 0) not in but]
        for lease, generation in leases:
            self.release(lease, generation, holder)
        for generation in reserved:
            self.abort(generation, holder)
        return len(leases) + len(reserved)

    def reclaim(self) -> int:
        """Free the extents of shards whose records are gone; how many."""
        freed = 0
        for generation, block in list(self.blocks.items()):
            if block.slot < 0 or block.gone or self._records.generation_at(block.slot) == generation:
                continue
            block.gone = True
            if not block.leases:
                self._free(generation)
                freed += 1
        return freed

    def _free(self, generation: int) -> None:
        block = self.blocks.pop(generation)
        self.extents.give(block.offset, block.nbytes)

    # -- holds in the arena ------------------------------------------------------------------------------
    def _check_holds(self) -> None:
        """Each is a granule and a shard slot of the arena, which sessions need too."""
        if len(self.reservations) + len(self.leases) >= MAX_HOLDS:
            raise PoolFull(f"{MAX_HOLDS} reservations and leases are held already")

    def _hold(self, offset: int, nbytes: int, generation: int, lease: int, holder: Holder) -> None:
        hold = GpuHold(self.gpu, self.pool, offset, nbytes, generation, lease, holder)
        self._records.put_hold(hold)

    def _unhold(self, generation: int, lease: int) -> None:
        self._records.drop_hold(generation, lease)

    # -- after a death -----------------------------------------------------------------------------------
    def adopt(self) -> Adopted:
        """Rebuild everything from the arena. Call once, before anything else."""
        found = Adopted()
        metas: list[tuple[int, GpuMeta]] = []
        holds: list[GpuHold] = []
        for slot, meta in self._records.of_gpu(self.gpu):
            if meta.pool != self.pool:
                found.lost += isinstance(meta, GpuMeta)
                self._store.remove_slot(slot)
            elif isinstance(meta, GpuMeta):
                metas.append((slot, meta))
            else:
                holds.append(meta)
        for slot, meta in metas:
            if not self.extents.occupy(meta.offset, meta.nbytes):
                found.clashing += 1
                self._store.remove_slot(slot)
                continue
            self.blocks[meta.generation] = Block(meta.offset, meta.nbytes, slot)
            found.shards += 1
        for hold in sorted(holds, key=lambda hold: hold.lease):
            found.clashing += not self._adopt_hold(hold)
        found.holds = len(self.reservations) + len(self.leases)
        return found

    def _adopt_hold(self, hold: GpuHold) -> bool:
        block = self.blocks.get(hold.generation)
        if hold.lease == 0 and block is not None:
            self._unhold(hold.generation, 0)  # committed, and killed before the hold went
            return True
        if block is None:
            if not self.extents.occupy(hold.offset, hold.nbytes):
                self._unhold(hold.generation, hold.lease)
                return False
            block = self.blocks[hold.generation] = Block(hold.offset, hold.nbytes, gone=hold.lease != 0)
        if hold.lease:
            block.leases.add(hold.lease)
            self.leases[hold.lease] = hold.generation, hold.holder
        else:
            self.reservations[hold.generation] = hold.holder
        return True
