"""The fold in memory (_fold.pyx) against lists and dicts that say what it means, over random logs.

The records are packed here by `struct`, as records.py's table has them, so that neither side of the native
code is the judge of the other. test_store_rules.py holds the rules over it against the wire page.
"""

from __future__ import annotations

import random
import struct
from array import array
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.protocol import records as rec
from areal_fast.protocol import retries
from areal_fast.protocol.sessions import Record, SessionState
from areal_fast.store import SessionStore
from areal_fast.store.folds import FoldCache
from tests.model_arena import ModelArena

HEAD = struct.Struct("<IIIIIIIHBBBBH")
ALIVE, DEAD = 7, 8


def packed(m: rec.InteractionMeta) -> bytes:
    iid, stop = m.interaction_id.encode(), m.stop_reason.encode()
    routed = b"" if m.routed is None else struct.pack("<I", m.routed.width) + m.routed.name
    lengths = (len(iid), len(stop), len(m.messages_hash), len(routed), len(m.body_hash))
    numbers = (m.ordinal, m.trajectory, m.ref, m.shared, m.prompt_len, m.output_len, m.parent)
    runs = b"".join(struct.pack("<qI", *run) for run in m.version_runs)
    return (
        HEAD.pack(*numbers, len(m.version_runs), *lengths)
        + runs
        + iid
        + stop
        + m.messages_hash
        + m.body_hash
        + routed
        + m.extra
    )


def meta(chance: random.Random, ordinal: int, trajectory: int) -> rec.InteractionMeta:
    runs, versions = [], chance.sample(range(-3, 9), chance.randrange(0, 4))
    for version in versions:
        runs.append((version, chance.randrange(1, 2**20)))
    asked = bytes([chance.randrange(4)]) * 16 + struct.pack("<Q", chance.choice((ALIVE, DEAD)))
    key = chance.choice((b"", b"", bytes([chance.randrange(4)]) * 16))
    return rec.InteractionMeta(
        ordinal,
        trajectory,
        chance.choice((rec.NO_REF, chance.randrange(99))),
        chance.randrange(2**31),
        chance.randrange(2**32),
        sum(count for _, count in runs),
        chance.choice(("chatcmpl-", "é", "")) + str(ordinal),
        chance.choice(("stop", "length", "", "ä" * 100)),
        tuple(runs),
        chance.choice((b"", b"", bytes([chance.randrange(5)]) * 16)),
        chance.choice((b"", asked + key)),
        chance.choice((b"", chance.randbytes(chance.randrange(300)))),
        chance.choice((rec.NO_REF, chance.randrange(99))),
        chance.choice((None, rec.Routed(chance.randbytes(chance.randrange(1, 40)), 2**32 - 1))),
    )


@dataclass
class Life:
    ordinal: int
    trajectory: int
    iid: str
    offset: int
    nbytes: int
    meta: rec.InteractionMeta | None
    words: int = 0
    reward: float | None = None
    fate: int = retries.UNKNOWN

    def key(self) -> Any:
        return (self.ordinal, self.trajectory, self.iid, self.offset, self.nbytes, self.meta, self.words,
                self.reward, self.fate)  # fmt: skip


@dataclass
class Model:
    active: int = 0
    rewarded: int = -1
    due: int = 0
    lives: dict[int, Life] = field(default_factory=dict)
    ready: dict[int, list[int]] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)

    def of(self, index: int) -> list[Life]:
        return [x for x in self.lives.values() if x.trajectory == index and x.ordinal not in self.late]

    def add(self, life: Life) -> None:
        self.lives[life.ordinal] = life
        if life.trajectory != self.active and life.trajectory not in self.ready:
            self.late.add(life.ordinal)

    def close(self, courier: int) -> None:
        self.ready[self.active] = [self.rewarded, courier]
        self.active, self.rewarded, self.due = self.active + 1, -1, 0

    def exported(self, index: int, taken: set[int]) -> None:
        if index not in self.ready:
            return
        for life in self.of(index):
            if life.ordinal in taken:
                del self.lives[life.ordinal]
            else:
                self.late.add(life.ordinal)
                life.reward = None
        del self.ready[index]

    def twin(self, body: bytes, key: bytes) -> int:
        asked = [(x, x.meta.body_hash) for x in self.of(self.active) if x.meta and x.meta.body_hash]
        for life, hashed in asked:
            if key and hashed[24:] == key:
                return life.ordinal
        for life, hashed in asked:
            process = struct.unpack("<Q", hashed[16:24])[0]
            lost = life.fate == retries.LOST or (life.fate == retries.UNKNOWN and process == DEAD)
            if hashed[:16] == body and hashed[24:] == key and lost:
                return life.ordinal
        return -1

    def parent(self, index: int, prefixes: list[bytes]) -> int:
        for prefix in reversed(prefixes):
            found = [x.ordinal for x in self.of(index) if x.meta and x.meta.messages_hash == prefix]
            if found:
                return min(found)
        return -1


def seen(found: Any) -> list[Any]:
    return [
        (
            i.ordinal,
            i.trajectory,
            i.interaction_id,
            i.offset,
            i.nbytes,
            i.meta,
            i.messages_size,
            i.reward,
            i.fate,
        )
        for i in found
    ]


class Log:
    """Random records, given to both."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.model, self.state = chance, Model(), SessionState()
        self.free = list(range(200))
        self.at = 0
        self.promises: list[tuple[int, int, set[int]]] = []

    def record(self, kind: int, meta: bytes, data: int = 0, **more: int) -> Record:
        self.at += 64
        return (self.at, kind, more.get("flags", 0), more.get("aux", 0), more.get("outcome", 0), meta, data)

    def step(self) -> Record:
        chance, model = self.chance, self.model
        ordinal = self.free[0] if self.free else 0
        trajectory = max(0, model.active - chance.choice((0, 0, 0, 1, 2)))
        kind = chance.choice(
            ("turn", "turn", "turn", "words", "sent", "reward", "ready", "told", "export", "end")
        )
        if kind in ("turn", "words") and self.free:
            ordinal = self.free.pop(chance.randrange(min(3, len(self.free))))
        else:
            ordinal = chance.choice([*model.lives, ordinal])
        if kind == "turn" and ordinal not in model.lives:
            m, data = meta(chance, ordinal, trajectory), chance.randrange(1000)
            raw = packed(m)
            record = self.record(rec.INTERACTION, raw, data)
            model.add(Life(ordinal, trajectory, m.interaction_id, self.at, 64 + len(raw) + data, m))
            return record
        if kind == "words" and ordinal not in model.lives:
            iid, words, data = f"w-{ordinal}", chance.randrange(500), chance.randrange(1000)
            raw = rec.pack_string(ordinal, trajectory, iid, words)
            record = self.record(rec.STRING, raw, data)
            model.add(Life(ordinal, trajectory, iid, self.at, 64 + len(raw) + data, None, words))
            return record
        mine = model.lives.get(ordinal)
        here = mine is not None and ordinal not in model.late
        if kind == "reward":
            value, due = chance.uniform(-1, 1), chance.choice((0, 0, 5))
            if here and mine is not None and mine.trajectory == model.active == trajectory:
                mine.reward, model.rewarded, model.due = value, ordinal, due
                if not due:
                    model.close(ALIVE)
            return self.record(rec.REWARD, rec.pack_reward(trajectory, ordinal, value, due, ALIVE))
        if kind == "ready" and chance.random() < 0.2:
            if trajectory == model.active:
                model.close(DEAD)
            return self.record(rec.READY, rec.pack_ready(trajectory, DEAD))
        if kind == "told":
            if trajectory in model.ready:
                model.ready[trajectory][1] = rec.NO_COURIER
            return self.record(rec.CALLBACK, rec.pack_callback(trajectory, rec.NO_COURIER))
        if kind == "export" and trajectory in model.ready and not self.held(trajectory):
            record = self.record(rec.EXPORTING, rec.pack(rec.Exporting(trajectory)), aux=self.at)
            self.promises.append((self.at, trajectory, {x.ordinal for x in model.of(trajectory)}))
            return record
        if kind == "end" and self.promises:
            offset, index, taken = self.promises.pop(chance.randrange(len(self.promises)))
            committed = chance.random() < 0.7
            self.state.resolve(lambda at: 0 if at != offset else 1 if committed else 2)
            if committed:
                model.exported(index, taken)
            mine = model.lives.get(ordinal)
        fate = chance.choice((retries.LOST, retries.ARRIVED))
        if mine is not None and mine.trajectory == trajectory:
            mine.fate = fate
        return self.record(rec.SENT, rec.pack_sent(trajectory, ordinal, fate))

    def held(self, index: int) -> bool:
        return any(at == index for _, at, _ in self.promises)

    def agree(self) -> None:
        state, model, chance = self.state, self.model, self.chance
        assert seen(state.all_interactions()) == [x.key() for x in model.lives.values()]
        assert (state.active_index, state.reward_ordinal, state.deadline_ns) == (
            model.active, model.rewarded, model.due)  # fmt: skip
        assert seen(state.active.interactions.values()) == [x.key() for x in model.of(model.active)]
        assert {t.index: [t.reward_ordinal, t.courier] for t in state.ready.values()} == model.ready
        for index in model.ready:
            assert state.ordinals(index) == sorted(x.ordinal for x in model.of(index))
            assert state.is_held(index) == self.held(index)
        assert list(state.late) == [x for x in model.lives if x in model.late]
        active = model.of(model.active)
        assert state.active_count == len(active) and state.newest == max(
            [x.ordinal for x in active], default=-1
        )
        assert state.live_bytes == sum(x.nbytes for x in model.lives.values())
        assert state.has_untold == any(courier != rec.NO_COURIER for _, courier in model.ready.values())
        assert state.is_empty == (not model.lives and not model.ready)
        names = {x.meta.routed.name for x in model.lives.values() if x.meta and x.meta.routed}
        assert state.routed() == names
        iid = chance.choice(active).iid if active and chance.random() < 0.5 else "nobody"
        assert state.named(iid) == next((x.ordinal for x in active if x.iid == iid), -1)
        body, key = bytes([chance.randrange(4)]) * 16, chance.choice((b"", bytes([chance.randrange(4)]) * 16))
        assert state.twin_of(body, key, lambda process: process == ALIVE) == model.twin(body, key)
        prefixes = [bytes([chance.randrange(5)]) * 16 for _ in range(3)]
        for index in {model.active, *model.ready}:
            assert state.parent_of(index, prefixes) == model.parent(index, prefixes)

    def compacted(self) -> None:
        """The log is cut: what a compaction keeps is folded anew, by another reader."""
        checkpoint, keep = self.state.checkpoint()
        assert keep == [x.offset for x in self.model.lives.values()]
        fresh = SessionState()
        records = [self.record(rec.CHECKPOINT, rec.pack(checkpoint))]
        for life in self.model.lives.values():
            if life.meta is not None:
                raw, kind = packed(life.meta), rec.INTERACTION
            else:
                raw, kind = rec.pack_string(life.ordinal, life.trajectory, life.iid, life.words), rec.STRING
            records.append(self.record(kind, raw, life.nbytes - 64 - len(raw)))
            life.offset = self.at
        fresh.apply(records)
        self.state = fresh


@given(st.integers(0, 2**64))
def test_a_fold_is_what_its_log_says(seed: int) -> None:
    log = Log(random.Random(seed))
    for _ in range(250):
        log.state.apply([log.step()])
        if log.chance.random() < 0.3:
            log.agree()
        if log.chance.random() < 0.02 and not log.promises:
            log.compacted()
            log.agree()
    log.agree()


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def reference(before: list[list[int]], prompt: list[int]) -> tuple[int, int]:
    """What a turn's record refers to: the better of the last two, if it shares 16 ids."""
    best, shared = rec.NO_REF, 0
    for ordinal in range(len(before) - 1, max(-1, len(before) - 3), -1):
        n = common(before[ordinal], prompt)
        if n > shared:
            best, shared = ordinal, n
        if n in (len(prompt), len(before[ordinal])):
            break
    return (best, shared) if shared >= 16 else (rec.NO_REF, 0)


@given(st.integers(0, 2**64))
def test_a_commit_records_what_it_was_told(seed: int) -> None:
    chance = random.Random(seed)
    store = SessionStore(ModelArena.create(16 << 20, proc=0))
    session = store.by_key(store.start("t").sessions[0][1])
    assert session is not None
    said: list[list[int]] = []
    for _ in range(chance.randrange(2, 9)):
        prompt = [chance.randrange(2**31) for _ in range(chance.randrange(40))]
        if said and chance.random() < 0.8:
            old = chance.choice(said[-3:])
            prompt = old[: chance.choice((len(old), chance.randrange(len(old) + 1)))] + prompt
        parts = [(chance.randrange(-2, 2), chance.randrange(0, 4)) for _ in range(chance.randrange(4))]
        output = [chance.randrange(2**31) for _ in range(sum(n for _, n in parts))]
        logprobs = array("f", [-chance.random() for _ in output])
        turn = session.begin_turn(reserve_tokens=chance.choice((0, 50)))
        ref, shared = reference(said, prompt)
        m = meta(chance, turn.ordinal, 0)._replace(
            ref=ref, shared=shared, prompt_len=len(prompt), output_len=len(output), parent=rec.NO_REF,
            interaction_id=turn.interaction_id,
            version_runs=tuple((k, len([*run])) for k, run in groupby(v for v, n in parts for _ in range(n))),
        )  # fmt: skip
        turn.commit(
            prompt_ids=prompt, output_ids=array("i", output), logprobs=logprobs, version_runs=parts,
            stop_reason=m.stop_reason, messages_hash=m.messages_hash, body_hash=m.body_hash, extra=m.extra,
            routed=m.routed,
        )  # fmt: skip
        said.append(prompt + output)
        head, _, records = store.arena.read(session.slot)
        assert records[-1][1] == rec.INTERACTION and records[-1][5] == packed(m)
        data = store.arena.record_data(session.slot, head, records[-1][0])
        assert data == array("i", said[-1][shared:]).tobytes() + logprobs.tobytes()
        assert session.state.all_interactions()[-1].meta == m
    fresh = FoldCache(store.arena)
    for ordinal in chance.sample(range(len(said)), len(said)):
        fold = fresh.refresh(session.slot)
        assert fresh.full_ids(session.slot, fold, ordinal).tolist() == said[ordinal]


def test_what_is_too_long_for_its_field_is_refused() -> None:
    store = SessionStore(ModelArena.create(16 << 20, proc=0))
    session = store.by_key(store.start("t").sessions[0][1])
    assert session is not None
    for long in ({"stop_reason": "x" * 256}, {"messages_hash": bytes(256)}, {"body_hash": bytes(65536)}):
        whole: dict[str, Any] = {"stop_reason": "stop", **long}
        with pytest.raises(ValueError, match="too long"):
            session.begin_turn(reserve_tokens=9).commit(
                prompt_ids=[1], output_ids=[], logprobs=[], version_runs=[], **whole
            )
    assert session.state.is_empty and store.turns_open == {}


def test_a_meta_cut_short_changes_nothing() -> None:
    chance = random.Random(1)
    m = meta(chance, 1, 0)._replace(extra=b"")
    cases = [(rec.INTERACTION, packed(m)), (rec.STRING, rec.pack_string(1, 0, "iid", 3)),
             (rec.REWARD, rec.pack_reward(0, 0, 1.0, 0)), (rec.READY, rec.pack_ready(0)),
             (rec.SENT, rec.pack_sent(0, 0, 1))]  # fmt: skip
    for kind, whole in cases:
        for size in range(len(whole)):
            state = SessionState()
            with pytest.raises(ValueError):
                state.apply([(0, kind, 0, 0, 0, whole[:size], 0)])
            assert (state.interaction_count(), state.active_index, state.live_bytes) == (0, 0, 0)
