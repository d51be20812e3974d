"""The arena against its model: any sequence of calls by several processes has the same results.

Theory: every rule makes one call on a process's handle of the real arena and on the model's, and compares
results and errors. What the model leaves open (numbers of slots, heads, offsets, refs) is kept as a pair
(real, model) and handed on as such. Processes are handles in this one process: a kill is dropping a handle
and its pins, a successor is a new handle under the same number after the sweep. Between rules the whole
visible state is compared. At the end everything is removed, and the real arena must be consistent and empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from areal_fast.core import (
    LOG_ANY,
    OUTCOME_PENDING,
    REC_EXPORTING,
    REC_FLAG_REMOVE,
    STATE_ACTIVE,
    STATE_CLOSING,
    STATE_DETACHED,
    STATE_DUMPED,
    STATE_FREE,
    TXN_OPEN,
    Arena,
    CoreError,
    Exists,
    Gone,
    SlotInfo,
)
from tests.model_arena import ModelArena

NEVER = 2**62
PROCS = (0, 1, 30)
procs = st.sampled_from(PROCS)
tasks = st.sampled_from([b"a", b"b", b"long" * 60, b"a-0"])
keys = st.sampled_from([b"", b"k1", b"k2", b"key" * 100])
sizes = st.sampled_from([0, 1, 30, 500, 4000, 4096, 12_000, 40_000])
picks = st.integers(0, 2**16)


@dataclass
class Handles:
    """One process, twice. `exporting`: model slots it may not unpin, their export being undecided."""

    real: Arena
    model: ModelArena
    exporting: list[int] = field(default_factory=list)
    reservations: list[tuple[tuple[int, int], int, int]] = field(default_factory=list)


@dataclass
class Head:
    """A head word that was seen: of which life of which slot, and its two words."""

    slot: tuple[int, int]
    words: tuple[int, int]


class ArenaMachine(RuleBasedStateMachine):
    @initialize()
    def create(self) -> None:
        real = Arena.create(64 << 20, proc=31)
        model = ModelArena.create(64 << 20, proc=31)
        self.watcher = Handles(real, model)
        self.procs = {n: self.enter(n) for n in PROCS}
        self.slots: dict[int, int] = {}  # model slot -> real slot, while not FREE
        self.heads: list[Head] = []
        self.txns: dict[
            int, tuple[int, int, list[tuple[int, int]]]
        ] = {}  # model ref -> proc, real ref, slots
        self.names: list[bytes] = []
        self.serial = 0

    def enter(self, n: int) -> Handles:
        real = Arena.attach(self.watcher.real.fileno(), n)
        model = ModelArena.attach(self.watcher.model.fileno(), n)
        return Handles(real, model)

    # -- comparing -------------------------------------------------------------------------------------
    def both(
        self, proc: int, name: str, args: tuple[Any, ...] = (), model_args: Any = None, **kw: Any
    ) -> Any:
        """Make one call on both; (real, model) results, or the class of the error that both raised.
        A keyword argument that is a tuple is a (real, model) pair."""
        h = self.procs.get(proc, self.watcher)
        results = kw.pop("_seen", [])
        for at, arena, a in ((0, h.real, args), (1, h.model, args if model_args is None else model_args)):
            kwargs = {k: v[at] if isinstance(v, tuple) else v for k, v in kw.items()}
            results.append(self.outcome(lambda arena=arena, a=a, k=kwargs: getattr(arena, name)(*a, **k)))
        real, model = results
        note(f"{proc}: {name}{args} {kw} -> {real!r} / {model!r}")
        if isinstance(real, CoreError) or isinstance(model, CoreError):
            assert type(real) is type(model), f"{name}: {real!r}, but the model says {model!r}"
            if isinstance(real, Exists):
                assert isinstance(model, Exists) and self.slots[model.slot] == real.slot
            return type(real)
        return real, model

    @staticmethod
    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except CoreError as e:
            return e

    def same(
        self, proc: int, name: str, args: tuple[Any, ...] = (), model_args: Any = None, **kw: Any
    ) -> Any:
        """As `both`, for calls whose results must be equal; the result or the error's class."""
        answer = self.both(proc, name, args, model_args, **kw)
        if isinstance(answer, tuple):
            assert answer[0] == answer[1], f"{name}{args}: {answer[0]!r}, but the model says {answer[1]!r}"
            return answer[0]
        return answer

    def at(self, proc: int, name: str, slot: tuple[int, int], *args: Any, **kw: Any) -> Any:
        """`same` for a call whose first argument is a slot."""
        return self.same(proc, name, (slot[0], *args), (slot[1], *args), **kw)

    def choose(self, pick: int, *states: int, pinned_by: int | None = None) -> tuple[int, int] | None:
        """One (real, model) slot that is in one of the states (and pinned by that process)."""
        world = self.watcher.model.world
        fit = sorted(
            m
            for m, s in world.slots.items()
            if s.state in states and (pinned_by is None or m in self.procs[pinned_by].model._pins)
        )
        if not fit:
            return None
        m = fit[pick % len(fit)]
        return self.slots[m], m

    def add(self, real: int, model: int) -> None:
        assert real not in self.slots.values() or self.slots.get(model) == real
        self.slots[model] = real

    def forget_freed(self) -> None:
        for m in [m for m in self.slots if self.watcher.model.world.slots[m].state == STATE_FREE]:
            del self.slots[m]

    # -- sessions --------------------------------------------------------------------------------------
    @rule(proc=procs, task=tasks, key=keys, rebind=st.booleans(), pick=picks, grouped=st.booleans())
    def start(self, proc: int, task: bytes, key: bytes, rebind: bool, pick: int, grouped: bool) -> None:
        mine = [
            m
            for m, (p, _, _) in self.txns.items()
            if p == proc and self.watcher.model.txn_state(m) == TXN_OPEN
        ]
        txn = (0, 0)
        if grouped and mine:
            m = mine[pick % len(mine)]
            txn = (self.txns[m][1], m)
        holder = self.watcher.model.world.keys.get(key, -1) if rebind and key else -1
        pair = (self.slots.get(holder, -1), holder)
        world = self.watcher.model.world
        started: list[Any] = []

        def same_name(task: bytes) -> bytes:
            """The name the real one chose, which must be the smallest but for those in limbo."""
            name = started[0][1]
            prefix, _, n = name.rpartition(b"-")
            assert prefix == task and (name not in world.ids or world.name_in_limbo(name))
            for m in range(int(n)):
                smaller = b"%s-%d" % (task, m)
                assert smaller in world.ids, f"{name!r}, but {smaller!r} is free"
            return name

        world.choose_name = same_name
        answer = self.both(proc, "start", (task, key), txn=txn, rebind_from=pair, _seen=started)
        if isinstance(answer, tuple):
            (real, real_id), (model, _) = answer
            self.add(real, model)
            self.names.append(real_id)
            if txn[1]:
                self.txns[txn[1]][2].append((real, model))

    @rule(proc=procs, name=st.sampled_from([b"__hitl__", b"a-1", b"other"]))
    def open_named(self, proc: int, name: bytes) -> None:
        if self.watcher.model.world.ids.get(name) is not None and self.choose_hidden(name):
            return
        answer = self.both(proc, "open_named", (name,))
        assert isinstance(answer, tuple)
        self.add(*answer)
        self.names.append(name)

    def choose_hidden(self, name: bytes) -> bool:
        """Whether the id belongs to a member of an open group: then open_named is not called in practice."""
        world = self.watcher.model.world
        i = world.ids[name]
        return world.live(i) and not world.visible(i)

    @rule(proc=procs, pick=picks)
    @precondition(lambda self: self.names)
    def pin_id(self, proc: int, pick: int) -> None:
        self.found(self.both(proc, "pin_id", (self.names[pick % len(self.names)],)))

    @rule(proc=procs, key=keys)
    def pin_key(self, proc: int, key: bytes) -> None:
        self.found(self.both(proc, "pin_key", (key,)))

    def found(self, answer: Any) -> None:
        real, model = answer
        assert real == self.slots.get(model, -1)

    @rule(proc=procs, pick=picks)
    def pin_slot(self, proc: int, pick: int) -> None:
        slot = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, STATE_DETACHED)
        if slot:
            self.at(proc, "pin_slot", slot)

    @rule(proc=procs, pick=picks)
    def unpin(self, proc: int, pick: int) -> None:
        slot = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, pinned_by=proc)
        h = self.procs[proc]
        if slot and h.model._pins[slot[1]] > h.exporting.count(slot[1]):
            self.at(proc, "unpin", slot)

    @rule(proc=procs, pick=picks)
    def unpin_what_is_not_pinned(self, proc: int, pick: int) -> None:
        slot = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, STATE_DETACHED)
        if slot and slot[1] not in self.procs[proc].model._pins:
            self.at(proc, "unpin", slot)

    @rule(proc=procs, pick=picks, ns=st.integers(0, 2**62))
    def small_words(self, proc: int, pick: int, ns: int) -> None:
        slot = self.choose(pick, STATE_ACTIVE, pinned_by=proc)
        if slot:
            self.at(proc, "next_ordinal", slot)
            self.at(proc, "set_deadline", slot, ns)
            self.at(proc, "deadline", slot)
            self.at(proc, "touch", slot)

    @rule(proc=procs, pick=picks)
    def close_session(self, proc: int, pick: int) -> None:
        slot = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, pinned_by=proc)
        if slot and slot[1] < self.watcher.model.session_slots:
            self.at(proc, "close_session", slot)

    # -- log -------------------------------------------------------------------------------------------
    @rule(
        proc=procs,
        pick=picks,
        size=sizes,
        meta=st.binary(max_size=40),
        expect=st.sampled_from(["any", "now", "stale"]),
        critical=st.booleans(),
        reserved=st.booleans(),
    )
    def append(
        self, proc: int, pick: int, size: int, meta: bytes, expect: str, critical: bool, reserved: bool
    ) -> None:
        slot = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, STATE_DETACHED)
        if slot is None or slot[1] >= self.watcher.model.session_slots:
            return
        state = self.watcher.model.world.slots[slot[1]].state
        if state != STATE_DETACHED and slot[1] not in self.procs[proc].model._pins:
            return
        words = (LOG_ANY, LOG_ANY)
        if expect == "now":
            words = (self.watcher.real.head(slot[0]), self.watcher.model.head(slot[1]))
        elif expect == "stale":
            seen = [h for h in self.heads if h.slot == slot]
            if seen:
                words = seen[pick % len(seen)].words
        self.serial += 1
        data = self.serial.to_bytes(4, "big") * (size // 4 + 1)
        reservations = self.procs[proc].reservations
        fit = [(r, m) for s, r, m in reservations if s == slot] if reserved else []
        reservation = fit[pick % len(fit)] if fit else (0, 0)
        answer = self.both(
            proc,
            "append",
            (slot[0], 2, meta, [data[: size // 3], data[size // 3 : size]]),
            (slot[1], 2, meta, [data[: size // 3], data[size // 3 : size]]),
            expect=words,
            aux=self.serial,
            critical=critical,
            reservation=reservation,
        )
        if isinstance(answer, tuple):
            self.heads.append(Head(slot, answer))
            if reservation[1]:
                reservations.remove((slot, *reservation))

    @rule(proc=procs, pick=picks, size=sizes)
    def reserve(self, proc: int, pick: int, size: int) -> None:
        slot = self.choose(pick, STATE_ACTIVE, pinned_by=proc)
        if slot and slot[1] < self.watcher.model.session_slots:
            answer = self.both(proc, "reserve", (slot[0], size), (slot[1], size))
            assert isinstance(answer, tuple)
            self.procs[proc].reservations.append((slot, *answer))

    @rule(proc=procs, pick=picks)
    def release(self, proc: int, pick: int) -> None:
        reservations = self.procs[proc].reservations
        if reservations:
            _, real, model = reservations.pop(pick % len(reservations))
            self.same(proc, "release", (real,), (model,))

    @rule(proc=procs, pick=picks, keep=st.integers(0, 2**20), checkpoint=st.binary(max_size=30))
    def compact(self, proc: int, pick: int, keep: int, checkpoint: bytes) -> None:
        slot = self.choose(pick, STATE_ACTIVE, pinned_by=proc)
        if slot is None or slot[1] >= self.watcher.model.session_slots:
            return
        real, model = (
            h.read(s)[2] for h, s in zip((self.watcher.real, self.watcher.model), slot, strict=True)
        )
        log = self.watcher.model.world.slots[slot[1]].log
        if any(e.type == REC_EXPORTING and e.outcome == OUTCOME_PENDING for e in log):
            return  # an export is not finished: the core may refuse for now
        kept = [i for i in range(len(model)) if keep >> i & 1]
        answer = self.both(
            proc,
            "compact",
            (slot[0], self.watcher.real.head(slot[0]), checkpoint, [real[i][0] for i in kept]),
            (slot[1], self.watcher.model.head(slot[1]), checkpoint, [model[i][0] for i in kept]),
        )
        assert isinstance(answer, tuple)
        self.heads.append(Head(slot, answer))

    @rule(pick=picks)
    @precondition(lambda self: self.heads)
    def read_on(self, pick: int) -> None:
        """Read from an earlier head of a slot that is still the same session."""
        head = self.heads[pick % len(self.heads)]
        if self.slots.get(head.slot[1]) == head.slot[0]:
            self.compare_log(head.slot, head.words)

    # -- transactions ----------------------------------------------------------------------------------
    @rule(proc=procs)
    def begin(self, proc: int) -> None:
        real, model = self.both(proc, "txn_begin")
        self.txns[model] = (proc, real, [])

    @rule(proc=procs, pick=picks, remove=st.booleans())
    def export(self, proc: int, pick: int, remove: bool) -> None:
        """An EXPORTING record in a pinned session, under a transaction of this process."""
        mine = [
            m
            for m, (p, _, _) in self.txns.items()
            if p == proc and self.watcher.model.txn_state(m) == TXN_OPEN
        ]
        slot = self.choose(pick, STATE_ACTIVE, pinned_by=proc)
        if not mine or slot is None or slot[1] >= self.watcher.model.session_slots:
            return
        log = self.watcher.model.read(slot[1])[2]
        if any(r[1] == REC_EXPORTING and r[4] == 0 for r in log):
            return  # one export of a session at a time: the store's rule
        m = mine[pick % len(mine)]
        answer = self.both(
            proc,
            "append",
            (slot[0], REC_EXPORTING, b"e"),
            (slot[1], REC_EXPORTING, b"e"),
            aux=(self.txns[m][1], m),
            flags=REC_FLAG_REMOVE if remove else 0,
            critical=True,
        )
        assert isinstance(answer, tuple)
        # The exporter keeps this session pinned until the transaction has ended.
        assert self.procs[proc].real.pin_slot(slot[0]) and self.procs[proc].model.pin_slot(slot[1])
        self.procs[proc].exporting.append(slot[1])
        self.txns[m][2].append(slot)

    @rule(pick=picks, end=st.sampled_from(["commit", "finish", "abort"]))
    @precondition(lambda self: self.txns)
    def end_txn(self, pick: int, end: str) -> None:
        m = sorted(self.txns)[pick % len(self.txns)]
        proc, real, slots = self.txns[m]
        if end == "commit":
            self.same(proc, "txn_commit", (real,), (m,))
            return
        slots = [s for s in slots if self.slots.get(s[1]) == s[0]]
        answer = self.same(proc, f"txn_{end}", (real, [s[0] for s in slots]), (m, [s[1] for s in slots]))
        if answer is None:
            exporting = self.procs[proc].exporting
            for slot in [s for s in slots if s[1] in exporting]:
                exporting.remove(slot[1])
                self.at(proc, "unpin", slot)
            del self.txns[m]
        self.same(proc, "txn_state", (real,), (m,))

    # -- cleaner ---------------------------------------------------------------------------------------
    @rule(pick=picks, cutoff=st.sampled_from([1, NEVER]))
    def detach(self, pick: int, cutoff: int) -> None:
        slot = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, STATE_DETACHED)
        if slot and slot[1] < self.watcher.model.session_slots:
            self.at(30, "detach", slot, cutoff)

    @rule(proc=procs, pick=picks)
    def dumped(self, proc: int, pick: int) -> None:
        slot = self.choose(pick, STATE_DETACHED, STATE_DUMPED, STATE_ACTIVE)
        if slot:
            self.at(proc, "set_dumped", slot)

    @rule(proc=procs, pick=picks)
    def reap(self, proc: int, pick: int) -> None:
        slot = self.choose(pick, STATE_DUMPED, STATE_DETACHED)
        if slot:
            self.at(proc, "reap", slot)

    @rule(proc=procs)
    def kill(self, proc: int) -> None:
        """The process is gone with all its pins; swept twice; its successor attaches."""
        old = self.procs[proc]
        old.real.close()
        answer = self.both(31, "sweep", (proc,))
        real, model = answer
        for name in ("pins", "inits", "txns_aborted", "txns_finished", "reaped"):
            assert real[name] == model[name], f"swept {name}: {real}, but the model says {model}"
        again = self.watcher.real.sweep(proc)
        assert not any(v for k, v in again.items() if k != "detached"), f"a second sweep found {again}"
        self.txns = {m: t for m, t in self.txns.items() if t[0] != proc}
        self.procs[proc] = self.enter(proc)

    # -- shards ----------------------------------------------------------------------------------------
    @rule(proc=procs, name=st.sampled_from([b"s1", b"s2", b"a-0"]), size=sizes, bits=st.integers(0, 70))
    def shard_put(self, proc: int, name: bytes, size: int, bits: int) -> None:
        self.serial += 1
        data = self.serial.to_bytes(4, "big") * (size // 4)
        self.add(*self.both(proc, "shard_put", (name, b"meta", [data]), bits=bits))

    @rule(proc=procs, name=st.sampled_from([b"s1", b"s2"]), size=sizes, publish=st.booleans())
    def shard_fill(self, proc: int, name: bytes, size: int, publish: bool) -> None:
        (real, real_view), (model, model_view) = self.both(proc, "shard_reserve", (name, b"", size))
        self.add(real, model)
        for view in (real_view, model_view):
            view[:] = bytes([self.serial % 256]) * size
            view.release()
        self.at(proc, "shard_publish" if publish else "shard_abandon", (real, model))

    @rule(proc=procs, pick=picks, size=sizes)
    def shard_succeed(self, proc: int, pick: int, size: int) -> None:
        """Of any shard that is pinned, be it still the one of its name or not."""
        old = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, pinned_by=proc)
        if old is None or old[1] < self.watcher.model.session_slots:
            return
        name = self.watcher.model.slot_info(old[1]).id
        (real, real_view), (model, model_view) = self.both(proc, "shard_reserve", (name, b"", size))
        self.add(real, model)
        for view in (real_view, model_view):
            view[:] = bytes(size)
            view.release()
        if self.both(proc, "shard_succeed", (real, old[0]), (model, old[1])) is Gone:
            self.at(proc, "shard_abandon", (real, model))

    @rule(proc=procs, name=st.sampled_from([b"s1", b"s2", b"a-0", b"none"]))
    def pin_shard(self, proc: int, name: bytes) -> None:
        self.found(self.both(proc, "pin_shard", (name,)))

    @rule(proc=procs, pick=picks, bit=st.integers(0, 70), close=st.booleans())
    def use_shard(self, proc: int, pick: int, bit: int, close: bool) -> None:
        slot = self.choose(pick, STATE_ACTIVE, STATE_CLOSING, pinned_by=proc)
        if slot is None or slot[1] < self.watcher.model.session_slots:
            return
        if self.watcher.model.world.slots[slot[1]].state == STATE_ACTIVE:
            (meta, view), (model_meta, model_view) = self.both(proc, "shard_view", (slot[0],), (slot[1],))
            assert meta == model_meta and view == model_view
            view.release()
        self.at(proc, "shard_clear_bit", slot, bit)
        self.at(proc, "shard_bit", slot, bit)
        if close:
            self.at(proc, "shard_close", slot)

    # -- what must hold after every rule ---------------------------------------------------------------
    def compare_log(self, slot: tuple[int, int], since: tuple[int, int] = (0, 0)) -> None:
        real_head, real_cut, real = self.watcher.real.read(slot[0], since[0])
        model_head, model_cut, model = self.watcher.model.read(slot[1], since[1])
        assert real_cut == model_cut

        def plain(records: list[Any]) -> list[Any]:
            return [(t, f, None if t == REC_EXPORTING else aux, *rest) for _, t, f, aux, *rest in records]

        assert plain(real) == plain(model)
        for r, m in zip(real[-2:], model[-2:], strict=True):
            assert self.watcher.real.record_data(slot[0], real_head, r[0]) == self.watcher.model.record_data(
                slot[1], model_head, m[0]
            )

    @staticmethod
    def plain(info: SlotInfo) -> tuple[Any, ...]:
        txn = bool(info.txn) if info.state == STATE_ACTIVE else 0  # means nothing in any other state
        hidden = {"seq": 0, "created_ns": 0, "touched_ns": 0, "nbytes": 0, "head": 0, "txn": txn}
        return tuple(info._replace(**hidden))

    @invariant()
    def same_state(self) -> None:
        self.forget_freed()
        for model, real in self.slots.items():
            a, b = self.watcher.real.slot_info(real), self.watcher.model.slot_info(model)
            assert self.plain(a) == self.plain(b)
            if model < self.watcher.model.session_slots and a.state != STATE_FREE:
                self.compare_log((real, model))
        real_slots, _ = self.watcher.real.sessions(0, 1000)
        model_slots, _ = self.watcher.model.sessions(0, 1000)
        assert sorted(real_slots) == sorted(self.slots[m] for m in model_slots)
        a, b = self.watcher.real.stats(), self.watcher.model.stats()
        for name in ("sessions_active", "sessions_closing", "shards_active", "txns_open"):
            assert a[name] == b[name], name

    def teardown(self) -> None:
        if not hasattr(self, "watcher"):
            return
        real = self.watcher.real
        for n, h in self.procs.items():
            h.real.close()
            real.sweep(n)
        for proc in PROCS:
            owner = Arena.attach(real.fileno(), proc)
            for slot in owner.owned_slots(STATE_DETACHED, proc):
                owner.set_dumped(slot)
            for slot in owner.owned_slots(STATE_DUMPED, proc):
                owner.reap(slot)
            owner.close()
        for slot in real.sessions(0, 1000)[0]:
            assert real.pin_slot(slot)
            real.close_session(slot)
            real.unpin(slot)
        for slot in real.expired_shards(NEVER, 0, 1000)[0]:
            assert real.pin_slot(slot)
            real.shard_close(slot)
            real.unpin(slot)
        assert real.consistency() == ""
        assert real.stats()["granules_used"] == 0, "something leaked"
        real.close()


TestArena = ArenaMachine.TestCase
