"""ModelArena: the arena's whole surface over plain dicts, in one process.

Job: the oracle of the property tests, and an arena for testing the layers above without a built extension.
Theory: one `World` is the shared mapping; a ModelArena is one process's handle on it with its own pin counts,
as in the C core. `create` makes a world, `attach(fd, proc)` gives another "process" a handle on it; the fd is
made up. Dropping a handle without closing anything is that process's kill -9: its bits, reservations, INIT
slots and transactions stay until `sweep`.
What the model fixes: results, errors, states, which pins and records exist, log generations, transactions.
What it leaves open, so tests must not compare it: numbers of slots, head words, offsets, refs and
reservations (opaque), exact capacity, times beyond their order.
Capacity is counted, not laid out: a record or shard costs its bytes rounded up to 16 plus a header, a
reservation its bytes rounded up to a granule; normal allocations stop at 15/16 of `max_bytes`.
"""

from __future__ import annotations

import itertools
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence

from areal_fast.core.codes import (
    LOG_ANY,
    MAX_NAME_BYTES,
    MAX_PROCS,
    REC_CHECKPOINT,
    SESSION,
    SHARD,
    STATE_ACTIVE,
    STATE_CLOSING,
    STATE_DETACHED,
    STATE_DUMPED,
    STATE_INIT,
    TXN_COMMITTED,
    TXN_OPEN,
    ArenaFull,
    BadArgument,
    Exists,
    Gone,
    HeadMoved,
    IndexBusy,
    Record,
    SlotInfo,
    Trimmed,
)
from tests.model_world import GENERATION_BITS, GRANULE, RECORD_HEADER, Entry, Slot, Txn, World, record_cost

Buffer = bytes | bytearray | memoryview


def as_bytes(data: Sequence[Buffer]) -> bytes:
    return b"".join(bytes(memoryview(part)) for part in data)


_worlds: weakref.WeakValueDictionary[int, World] = weakref.WeakValueDictionary()
_fds = itertools.count(1000)


class Histogram:
    def __init__(self, arena: ModelArena, first: int, bounds: Sequence[int]) -> None:
        if len(bounds) > 32 or list(bounds) != sorted(bounds):
            raise BadArgument("at most 32 bounds, in order")
        self._arena, self._first, self._bounds = arena, first, bounds

    def observe(self, value: int, beside: int) -> None:
        if self._arena.closed:
            raise BadArgument("the arena is closed")
        after = self._first + len(self._bounds)
        self._arena.count(self._first + bisect_left(self._bounds, value))
        self._arena.count(after + 1, value)
        self._arena.count(after + 2 + beside)


class ModelArena:
    """One process's handle on a World. See areal_fast/core/_core.pyi for what each call promises."""

    def __init__(self, world: World, proc: int, fd: int) -> None:
        if not 0 <= proc < MAX_PROCS:
            raise BadArgument(f"proc {proc}")
        self.world = world
        self.proc = proc
        self.closed = False
        self._fd = fd
        self._pins: dict[int, int] = {}

    @staticmethod
    def create(max_bytes: int, *, session_slots: int = 0, shard_slots: int = 0, proc: int = 31) -> ModelArena:
        world, fd = World(max_bytes, session_slots, shard_slots), next(_fds)
        _worlds[fd] = world
        return ModelArena(world, proc, fd)

    @staticmethod
    def attach(fd: int, proc: int) -> ModelArena:
        return ModelArena(_worlds[fd], proc, fd)

    @property
    def session_slots(self) -> int:
        return self.world.session_slots

    @property
    def shard_slots(self) -> int:
        return self.world.shard_slots

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> ModelArena:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- processes -------------------------------------------------------------------------------------
    def proc_enter(self, pid: int) -> int:
        p = self.world.procs[self.proc]
        if p.pid not in (0, pid):
            raise IndexBusy
        p.pid, p.incarnation = pid, p.incarnation + 1
        return p.incarnation

    def proc_leave(self) -> None:
        self.world.procs[self.proc].pid = 0

    def heartbeat(self) -> None:
        self.world.procs[self.proc].ticks += 1

    def proc_info(self, proc: int) -> tuple[int, int, int]:
        p = self.world.procs[proc]
        return p.pid, p.incarnation, p.ticks

    def lock_owner(self) -> int:
        return -1

    def sweep(self, proc: int) -> dict[str, int]:
        w = self.world
        done = dict.fromkeys(
            ("pins", "freed", "committed", "inits", "txns_aborted", "txns_finished", "reaped"), 0
        )
        for handle, (owner, _, size) in list(w.reservations.items()):
            if owner == proc:
                del w.reservations[handle]
                w.used -= size
                done["freed"] += 1
        for i, s in list(w.slots.items()):
            if s.mask >> proc & 1:
                s.mask &= ~(1 << proc)
                s.seq += 1
                done["pins"] += 1
            if s.state == STATE_INIT and s.owner == proc:
                w.free(i)
                done["inits"] += 1
            elif s.state == STATE_DUMPED and s.owner == proc:
                w.free(i)
                done["reaped"] += 1
        for ref, t in list(w.txns.items()):
            if t.owner == proc:
                committed = t.state == TXN_COMMITTED
                done["reaped"] += w.settle(ref, list(w.slots), committed)
                del w.txns[ref]
                done["txns_finished" if committed else "txns_aborted"] += 1
        done["reaped"] += sum(w.reap_closing(i) for i in list(w.slots))
        w.procs[proc].pid = 0
        return done

    def owned_slots(self, state: int, proc: int) -> list[int]:
        slots = self.world.slots.items()
        return [i for i, s in sorted(slots) if s.kind == SESSION and s.state == state and s.owner == proc]

    # -- words and counters ----------------------------------------------------------------------------
    def word(self, i: int) -> int:
        return self.world.words[i]

    def set_word(self, i: int, v: int) -> None:
        self.world.words[i] = v

    def add_word(self, i: int, v: int) -> int:
        self.world.words[i] += v
        return self.world.words[i]

    def cas_word(self, i: int, old: int, new: int) -> bool:
        if self.world.words[i] != old:
            return False
        self.world.words[i] = new
        return True

    def histogram(self, first: int, bounds: Sequence[int]) -> Histogram:
        return Histogram(self, first, bounds)

    def count(self, counter: int, delta: int = 1) -> None:
        self.world.procs[self.proc].counters[counter] += delta

    def counters(self) -> list[int]:
        return [sum(column) for column in zip(*(p.counters for p in self.world.procs), strict=True)]

    def now_ns(self) -> int:
        return self.world.clock()

    # -- sessions --------------------------------------------------------------------------------------
    def _make(self, kind: int, name: bytes, state: int, cost: int = 0) -> tuple[int, Slot]:
        w = self.world
        i = w.free_slot(kind)
        s = w.slots[i]
        s.id, s.cost, s.created_ns = name, cost, self.now_ns()
        s.touched_ns = s.created_ns
        w.move(s, state, self.proc if state == STATE_INIT else 0)
        return i, s

    def _check_name(self, name: bytes, empty_ok: bool = False) -> None:
        if len(name) > MAX_NAME_BYTES or not (name or empty_ok):
            raise BadArgument(f"a name of {len(name)} bytes")

    def start(self, task: bytes, key: bytes, *, txn: int = 0, rebind_from: int = -1) -> tuple[int, bytes]:
        w = self.world
        self._check_name(task, empty_ok=True)
        self._check_name(key, empty_ok=True)
        holder = w.keys.get(key, -1) if key else -1
        if holder >= 0 and holder != rebind_from and w.live(holder):
            raise Exists(slot=holder)
        name = w.choose_name(task)
        i, s = self._make(SESSION, name, STATE_ACTIVE)
        s.key, s.txn = key, txn
        w.ids[name] = i
        s.key_pending = bool(txn) and holder >= 0 and w.live(holder)
        if key and not s.key_pending:
            w.keys[key] = i
        return i, name

    def open_named(self, session_id: bytes) -> int:
        self._check_name(session_id)
        i = self.pin_id(session_id)
        if i < 0:
            i, _ = self._make(SESSION, session_id, STATE_ACTIVE)
            self.world.ids[session_id] = i
            self.pin_slot(i)
        return i

    def _pin_if_visible(self, i: int) -> int:
        if i < 0 or not self.world.visible(i):
            return -1
        return i if self.pin_slot(i) else -1

    def pin_id(self, session_id: bytes) -> int:
        return self._pin_if_visible(self.world.ids.get(session_id, -1))

    def pin_key(self, key: bytes) -> int:
        return self._pin_if_visible(self.world.keys.get(key, -1))

    def pin_slot(self, slot: int) -> bool:
        s = self._slot(slot)
        if not self.world.visible(slot):
            return False
        self._pins[slot] = self._pins.get(slot, 0) + 1
        s.mask |= 1 << self.proc
        return True

    def unpin(self, slot: int) -> None:
        n = self._pins.get(slot, 0)
        if n == 0:
            raise BadArgument(f"slot {slot} is not pinned")
        if n > 1:
            self._pins[slot] = n - 1
            return
        del self._pins[slot]
        s = self._slot(slot)
        s.mask &= ~(1 << self.proc)
        s.seq += 1
        self.world.reap_closing(slot)

    def touch(self, slot: int) -> None:
        if slot not in self._pins:
            raise BadArgument(f"slot {slot} is not pinned")
        self._slot(slot).touched_ns = self.now_ns()

    def _slot(self, slot: int) -> Slot:
        w = self.world
        if self.closed:
            raise BadArgument("the arena is closed")
        if not 0 <= slot < w.session_slots + w.shard_slots:
            raise BadArgument(f"slot {slot}")
        return w.slots.setdefault(slot, Slot(SESSION if slot < w.session_slots else SHARD))

    def slot_info(self, slot: int) -> SlotInfo:
        s = self._slot(slot)
        return SlotInfo(
            s.state, s.owner, s.seq, s.mask, s.kind, s.id, s.key, s.created_ns, s.touched_ns,
            s.cost, s.ordinal, s.head_word(), s.txn, s.deadline_ns,
        )  # fmt: skip

    def slot_id(self, slot: int) -> bytes:
        return self._slot(slot).id

    def slot_created_ns(self, slot: int) -> int:
        return self._slot(slot).created_ns

    def next_ordinal(self, slot: int) -> int:
        s = self._slot(slot)
        s.ordinal += 1
        return s.ordinal - 1

    def deadline(self, slot: int) -> int:
        return self._slot(slot).deadline_ns

    def set_deadline(self, slot: int, ns: int) -> None:
        self._slot(slot).deadline_ns = ns

    def close_session(self, slot: int) -> None:
        if self._slot(slot).state != STATE_ACTIVE:
            raise Gone
        self.world.close_slot(slot)

    # -- log -------------------------------------------------------------------------------------------
    @staticmethod
    def record_of(head: int) -> int:
        return head >> GENERATION_BITS

    def head(self, slot: int) -> int:
        return self._slot(slot).head_word()

    def _writable(self, slot: int) -> Slot:
        s = self._slot(slot)
        if s.state == STATE_ACTIVE or (s.state == STATE_DETACHED and s.owner == self.proc):
            return s
        raise Gone

    def append(
        self,
        slot: int,
        type: int,
        meta: Buffer,
        data: Sequence[Buffer] = (),
        *,
        expect: int = LOG_ANY,
        aux: int = 0,
        flags: int = 0,
        critical: bool = False,
        reservation: int = 0,
    ) -> int:
        w, s, body = self.world, self._writable(slot), as_bytes(data)
        if expect not in (LOG_ANY, s.head_word()):
            raise HeadMoved
        cost = record_cost(len(meta), len(body))
        if reservation:
            size = self._reserved(reservation, slot)
            if cost > size:
                w.take(cost - size, critical)
                size = cost
            w.used -= size - cost
            del w.reservations[reservation]
        else:
            w.take(cost, critical)
        s.cost += cost
        s.log.append(Entry(next(w.serial), type, flags, aux, bytes(meta), body))
        return s.head_word()

    def read(self, slot: int, since: int = 0) -> tuple[int, bool, list[Record]]:
        s = self._slot(slot)
        generation, offset = since & ((1 << GENERATION_BITS) - 1), since >> GENERATION_BITS
        cut = since != 0 and generation != s.generation
        entries = s.log if cut else [e for e in s.log if e.offset > offset]
        return (
            s.head_word(),
            cut,
            [(e.offset, e.type, e.flags, e.aux, self.world.outcome(e), e.meta, len(e.data)) for e in entries],
        )

    def _entry(self, slot: int, head: int, offset: int) -> Entry:
        s = self._slot(slot)
        if head & ((1 << GENERATION_BITS) - 1) != s.generation:
            raise Trimmed
        for e in s.log:
            if e.offset == offset:
                return e
        raise Trimmed

    def record_data(self, slot: int, head: int, offset: int, start: int = 0, length: int = -1) -> bytes:
        data = self._entry(slot, head, offset).data
        if start < 0 or start > len(data) or (length >= 0 and start + length > len(data)):
            raise BadArgument(f"bytes {start}+{length} of a record of {len(data)}")
        return data[start:] if length < 0 else data[start : start + length]

    def record_outcome(self, slot: int, head: int, offset: int) -> int:
        return self.world.outcome(self._entry(slot, head, offset))

    def compact(self, slot: int, expect: int, checkpoint: Buffer, keep: Sequence[int]) -> int:
        w, s = self.world, self._writable(slot)
        if s.head_word() != expect:
            raise HeadMoved
        by_offset = {e.offset: e for e in s.log}
        if any(o not in by_offset for o in keep):
            raise BadArgument("keep names a record that is not in the log")
        kept = [by_offset[o] for o in keep]
        cost = record_cost(len(checkpoint), 0) + sum(record_cost(len(e.meta), len(e.data)) for e in kept)
        w.take(cost, True)
        w.used -= s.cost
        s.cost = cost
        s.log = [Entry(next(w.serial), REC_CHECKPOINT, 0, 0, bytes(checkpoint), b"")]
        for e in kept:
            s.log.append(Entry(next(w.serial), e.type, e.flags, e.aux, e.meta, e.data, e.outcome))
        s.generation += 1
        return s.head_word()

    def reserve(self, slot: int, nbytes: int) -> int:
        w = self.world
        if self._slot(slot).state != STATE_ACTIVE:
            raise Gone
        size = (nbytes + RECORD_HEADER + GRANULE - 1) // GRANULE * GRANULE
        w.take(size, False)
        handle = next(w.serial)
        w.reservations[handle] = (self.proc, slot, size)
        return handle

    def _reserved(self, reservation: int, slot: int | None = None) -> int:
        owner, held_for, size = self.world.reservations.get(reservation, (-1, -1, 0))
        if owner != self.proc or slot not in (held_for, None):
            raise BadArgument(f"reservation {reservation}")
        return size

    def release(self, reservation: int) -> None:
        self.world.used -= self._reserved(reservation)
        del self.world.reservations[reservation]

    # -- transactions ----------------------------------------------------------------------------------
    def txn_begin(self) -> int:
        ref = next(self.world.serial)
        self.world.txns[ref] = Txn(self.proc)
        return ref

    def _txn(self, ref: int, state: int) -> Txn:
        t = self.world.txns.get(ref)
        if t is None or t.state != state or t.owner != self.proc:
            raise Gone
        return t

    def txn_commit(self, ref: int) -> None:
        self._txn(ref, TXN_OPEN).state = TXN_COMMITTED

    def txn_finish(self, ref: int, slots: Sequence[int]) -> None:
        self._txn(ref, TXN_COMMITTED)
        self.world.settle(ref, slots, True)
        del self.world.txns[ref]

    def txn_abort(self, ref: int, slots: Sequence[int]) -> None:
        self._txn(ref, TXN_OPEN)
        self.world.settle(ref, slots, False)
        del self.world.txns[ref]

    def txn_state(self, ref: int) -> int:
        return self.world.txn_state(ref)

    # -- cleaner ---------------------------------------------------------------------------------------
    def detach_next(self, cutoff_ns: int, cursor: int) -> tuple[int, int]:
        w = self.world
        for i in sorted(w.slots):
            if i < cursor or w.slots[i].kind != SESSION:
                continue
            w.reap_closing(i)
            if self.detach(i, cutoff_ns):
                return i, i + 1
        return -1, 0

    def detach(self, slot: int, cutoff_ns: int) -> bool:
        s = self._slot(slot)
        if s.mask or s.touched_ns >= cutoff_ns or not self.world.visible(slot):
            return False
        self.world.move(s, STATE_DETACHED, self.proc)
        return True

    def _owned(self, slot: int, state: int) -> Slot:
        s = self._slot(slot)
        if s.state != state or s.owner != self.proc:
            raise Gone
        return s

    def set_dumped(self, slot: int) -> None:
        self.world.move(self._owned(slot, STATE_DETACHED), STATE_DUMPED, self.proc)

    def reap(self, slot: int) -> None:
        self._owned(slot, STATE_DUMPED)
        self.world.free(slot)

    def punch_idle(self, max_granules: int) -> int:
        return 0

    # -- shards ----------------------------------------------------------------------------------------
    def prefault(self, nbytes: int) -> int:
        return 0

    def outside_take(self, nbytes: int) -> None:
        w, rounded = self.world, -(-nbytes // GRANULE) * GRANULE
        if nbytes > w.max_bytes or w.used + w.outside + rounded > w.max_bytes - w.max_bytes // 16:
            raise ArenaFull
        w.outside += rounded

    def outside_give(self, nbytes: int) -> None:
        self.world.outside -= -(-nbytes // GRANULE) * GRANULE

    def shard_put(
        self,
        shard_id: bytes,
        meta: Buffer,
        data: Sequence[Buffer],
        *,
        bits: int = 0,
        critical: bool = False,
    ) -> int:
        body = as_bytes(data)
        slot, view = self.shard_reserve(shard_id, meta, len(body), bits=bits, critical=critical)
        view[:] = body
        view.release()
        self.shard_publish(slot)
        return slot

    def shard_reserve(
        self, shard_id: bytes, meta: Buffer, size: int, *, bits: int = 0, critical: bool = False
    ) -> tuple[int, memoryview]:
        self._check_name(shard_id)
        cost = record_cost(len(meta), size)
        self.world.take(cost, critical)
        try:
            i, s = self._make(SHARD, shard_id, STATE_INIT, cost)
        except ArenaFull:
            self.world.used -= cost
            raise
        s.shard_meta, s.shard_data = bytes(meta), bytearray(size)
        s.bits, s.parts = set(range(bits)), bits
        return i, memoryview(s.shard_data)

    def shard_publish(self, slot: int) -> None:
        w, s = self.world, self._owned(slot, STATE_INIT)
        old = w.shard_ids.get(s.id, -1)
        w.shard_ids[s.id] = slot
        w.move(s, STATE_ACTIVE)
        if old >= 0:
            w.close_slot(old)

    def shard_succeed(self, slot: int, old: int) -> None:
        w, s = self.world, self._owned(slot, STATE_INIT)
        if w.shard_ids.get(s.id, -1) != old:
            raise Gone
        s.created_ns = self._slot(old).created_ns
        self.shard_publish(slot)

    def shard_abandon(self, slot: int) -> None:
        self._owned(slot, STATE_INIT)
        self.world.free(slot)

    def pin_shard(self, shard_id: bytes) -> int:
        return self._pin_if_visible(self.world.shard_ids.get(shard_id, -1))

    def shard_view(self, slot: int) -> tuple[bytes, memoryview]:
        s = self._slot(slot)
        if slot not in self._pins or s.kind != SHARD:
            raise BadArgument(f"slot {slot} is no pinned shard")
        return s.shard_meta, memoryview(s.shard_data).toreadonly()

    def shard_clear_bit(self, slot: int, bit: int) -> tuple[bool, bool]:
        s = self._slot(slot)
        if bit >= s.parts:
            raise BadArgument(f"bit {bit} of {s.parts}")
        was = bit in s.bits
        s.bits.discard(bit)
        return was, not s.bits

    def shard_bit(self, slot: int, bit: int) -> bool:
        s = self._slot(slot)
        if bit >= s.parts:
            raise BadArgument(f"bit {bit} of {s.parts}")
        return bit in s.bits

    def shard_close(self, slot: int) -> None:
        if self._slot(slot).state != STATE_ACTIVE:
            raise Gone
        self.world.close_slot(slot)

    # -- observation -----------------------------------------------------------------------------------
    def _page(self, kind: int, cursor: int, max: int, keep: Callable[[Slot], bool]) -> tuple[list[int], int]:
        slots = self.world.slots
        found = [
            i
            for i in sorted(slots)
            if i >= cursor and slots[i].kind == kind and slots[i].state == STATE_ACTIVE and keep(slots[i])
        ]
        return found[:max], (found[max] if len(found) > max else 0)

    def expired_shards(self, created_before_ns: int, cursor: int, max: int) -> tuple[list[int], int]:
        return self._page(SHARD, cursor, max, lambda s: s.created_ns < created_before_ns)

    def sessions(self, cursor: int, max: int) -> tuple[list[int], int]:
        return self._page(SESSION, cursor, max, lambda s: True)

    def sessions_active(self) -> int:
        return self.stats()["sessions_active"]

    def stats(self) -> dict[str, int]:
        w = self.world
        slots = list(w.slots.values())

        def n(kind: int, state: int) -> int:
            return sum(s.kind == kind and s.state == state for s in slots)

        return {
            "bytes_max": w.max_bytes,
            "granules": w.max_bytes // GRANULE,
            "granules_used": -(-w.used // GRANULE),
            "granules_ready": w.max_bytes // GRANULE,
            "granules_keep": (w.max_bytes // GRANULE) // 16,
            "granules_outside": w.outside // GRANULE,
            "sessions_active": n(SESSION, STATE_ACTIVE),
            "sessions_closing": n(SESSION, STATE_CLOSING),
            "sessions_detached": n(SESSION, STATE_DETACHED) + n(SESSION, STATE_DUMPED),
            "shards_active": n(SHARD, STATE_ACTIVE),
            "shard_bytes": sum(len(s.shard_data) for s in slots if s.state == STATE_ACTIVE),
            "txns_open": sum(t.state == TXN_OPEN for t in w.txns.values()),
        }
