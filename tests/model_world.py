"""What one arena holds, as plain Python objects: the shared half of tests/model_arena.py.

A World is the mapping; handles (ModelArena) come and go. Nothing here knows which process is asking, except
where a word names its owner. Capacity is counted, not laid out: see record_cost and World.take.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from areal_fast.core.codes import (
    MAX_PROCS,
    NUM_COUNTERS,
    NUM_WORDS,
    OUTCOME_ABORTED,
    OUTCOME_COMMITTED,
    OUTCOME_PENDING,
    REC_EXPORTING,
    REC_FLAG_REMOVE,
    SESSION,
    STATE_ACTIVE,
    STATE_CLOSING,
    STATE_FREE,
    TXN_COMMITTED,
    TXN_GONE,
    TXN_OPEN,
    ArenaFull,
)

GRANULE = 4096
RECORD_HEADER = 64
GENERATION_BITS = 24


def record_cost(meta_len: int, data_len: int) -> int:
    return (RECORD_HEADER + meta_len + data_len + 15) // 16 * 16


@dataclass
class Entry:
    """One record of a log."""

    offset: int
    type: int
    flags: int
    aux: int
    meta: bytes
    data: bytes
    outcome: int = OUTCOME_PENDING


@dataclass
class Slot:
    kind: int
    state: int = STATE_FREE
    owner: int = 0
    seq: int = 0
    mask: int = 0
    id: bytes = b""
    key: bytes = b""
    created_ns: int = 0
    touched_ns: int = 0
    ordinal: int = 0
    txn: int = 0
    key_pending: bool = False  # the key moves here when the transaction finishes
    deadline_ns: int = 0
    generation: int = 0
    log: list[Entry] = field(default_factory=list)
    shard_meta: bytes = b""
    shard_data: bytearray = field(default_factory=bytearray)
    parts: int = 0
    bits: set[int] = field(default_factory=set)
    cost: int = 0

    def head_word(self) -> int:
        return (self.log[-1].offset if self.log else 0) << GENERATION_BITS | self.generation


@dataclass
class Proc:
    pid: int = 0
    incarnation: int = 0
    ticks: int = 0
    counters: list[int] = field(default_factory=lambda: [0] * NUM_COUNTERS)


@dataclass
class Txn:
    owner: int
    state: int = TXN_OPEN


class World:
    """What the mapping holds."""

    def __init__(self, max_bytes: int, session_slots: int, shard_slots: int) -> None:
        self.max_bytes = max_bytes
        self.session_slots = session_slots or min(max(max_bytes // 8192, 1024), 262144)
        self.shard_slots = shard_slots or min(2 * self.session_slots, 1048576)
        self.slots: dict[int, Slot] = {}
        self.ids: dict[bytes, int] = {}
        self.keys: dict[bytes, int] = {}
        self.shard_ids: dict[bytes, int] = {}
        self.procs = [Proc() for _ in range(MAX_PROCS)]
        self.words = [0] * NUM_WORDS
        self.txns: dict[int, Txn] = {}
        self.reservations: dict[int, tuple[int, int, int]] = {}  # handle -> (owner, slot, bytes)
        self.used = 0
        self.outside = 0
        self.serial = itertools.count(1)
        self.clock: Callable[[], int] = time.monotonic_ns

    def slot_range(self, kind: int) -> range:
        if kind == SESSION:
            return range(self.session_slots)
        return range(self.session_slots, self.session_slots + self.shard_slots)

    def take(self, cost: int, critical: bool) -> None:
        limit = self.max_bytes if critical else self.max_bytes - self.max_bytes // 16
        if self.used + self.outside + cost > limit:
            raise ArenaFull
        self.used += cost

    def free_slot(self, kind: int) -> int:
        for i in self.slot_range(kind):
            if self.slots.setdefault(i, Slot(kind)).state == STATE_FREE:
                return i
        raise ArenaFull

    def move(self, s: Slot, state: int, owner: int = 0) -> None:
        s.state, s.owner, s.seq = state, owner, s.seq + 1

    def name_in_limbo(self, name: bytes) -> bool:
        """Whether only a session that no lookup finds any more, and is not yet freed, has this id."""
        return name in self.ids and not self.live(self.ids[name])

    def choose_name(self, task: bytes) -> bytes:
        """The smallest one nobody has. (One in limbo may be given again or not: tests replace this.)"""
        return next(n for m in itertools.count() if (n := b"%s-%d" % (task, m)) not in self.ids)

    def drop_index(self, i: int) -> None:
        s = self.slots[i]
        for index, name in ((self.ids, s.id), (self.keys, s.key), (self.shard_ids, s.id)):
            if index.get(name) == i:
                del index[name]

    def free(self, i: int) -> None:
        self.drop_index(i)
        s = self.slots[i]
        self.used -= s.cost
        seq, generation = s.seq, s.generation + 1
        self.slots[i] = Slot(s.kind, seq=seq + 1, generation=generation)

    def live(self, i: int) -> bool:
        return self.slots[i].state == STATE_ACTIVE

    def visible(self, i: int) -> bool:
        s = self.slots[i]
        return s.state == STATE_ACTIVE and self.txn_state(s.txn) != TXN_OPEN

    def txn_state(self, ref: int) -> int:
        t = self.txns.get(ref)
        return t.state if t else TXN_GONE

    def outcome(self, e: Entry) -> int:
        if e.type != REC_EXPORTING or e.outcome != OUTCOME_PENDING:
            return e.outcome
        by_state = {
            TXN_OPEN: OUTCOME_PENDING,
            TXN_COMMITTED: OUTCOME_COMMITTED,
            TXN_GONE: OUTCOME_ABORTED,
        }
        return by_state[self.txn_state(e.aux)]

    def close_slot(self, i: int) -> bool:
        """ACTIVE -> CLOSING; True if nobody pinned it and it was freed."""
        s = self.slots[i]
        if s.state == STATE_ACTIVE:
            self.move(s, STATE_CLOSING)
            self.drop_index(i)
        return self.reap_closing(i)

    def reap_closing(self, i: int) -> bool:
        s = self.slots[i]
        if s.state == STATE_CLOSING and s.mask == 0:
            self.free(i)
            return True
        return False

    def settle(self, ref: int, slots: Iterable[int], committed: bool) -> int:
        """What follows a txn's end in the slots involved; returns how many slots were freed by it."""
        freed = 0
        for i in list(slots):
            s = self.slots.get(i)
            if s is None or s.state == STATE_FREE:
                continue
            remove = False
            for e in s.log:
                if e.type == REC_EXPORTING and e.aux == ref and e.outcome == OUTCOME_PENDING:
                    e.outcome = OUTCOME_COMMITTED if committed else OUTCOME_ABORTED
                    remove |= committed and bool(e.flags & REC_FLAG_REMOVE)
            if s.txn == ref:
                s.txn = 0
                remove |= not committed
                if committed and s.key_pending:
                    self.keys[s.key] = i
                s.key_pending = False
            if remove and s.state == STATE_ACTIVE:
                freed += self.close_slot(i)
        return freed
