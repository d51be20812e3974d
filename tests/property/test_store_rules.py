"""The store against a plain model of WIRE's rules: random lives of a few sessions, seen by two processes.

The model below knows nothing of logs, records or folds: it keeps lists and follows the wire page's sentences.
After every step both must have given the same answer; at the end every session is dumped and the files must
hold what the model still has. Compaction is made eager so that every life is cut several times.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from areal_fast.core import Gone
from areal_fast.errors import ArealFastError, ExportBusy, KeyBound
from areal_fast.store import SessionStore, Turn, folds
from tests.model_arena import ModelArena
from tests.unit.store.turns import Clock, ask, decode, fetch

FINISH_S = 2.0


@dataclass
class Life:
    """One interaction as the model sees it."""

    iid: str
    ordinal: int
    ids: list[int]
    reward: float | None = None


@dataclass
class Model:
    """One session: active and ready interactions by ordinal, late ones, when the active one becomes ready."""

    key: str
    active: dict[int, Life] = field(default_factory=dict)
    ready: dict[int, dict[int, Life]] = field(default_factory=dict)
    rewarded: dict[int, str] = field(default_factory=dict)
    late: dict[int, Life] = field(default_factory=dict)
    index: int = 0
    last: str = ""
    due_ns: int = 0
    exporting: dict[int, set[int]] = field(default_factory=dict)
    lost: dict[Any, tuple[int, int]] = field(default_factory=dict)
    removing: bool = False
    turns: int = 0

    def tick(self, now_ns: int) -> None:
        if self.due_ns and now_ns >= self.due_ns:
            self.close()

    def close(self) -> None:
        self.ready[self.index] = self.active
        self.rewarded[self.index] = self.last
        self.active, self.index, self.due_ns = {}, self.index + 1, 0

    def add(self, trajectory: int, life: Life) -> None:
        if trajectory == self.index:
            self.active[life.ordinal] = life
        elif trajectory in self.ready:
            self.ready[trajectory][life.ordinal] = life
        else:
            self.late[life.ordinal] = life

    def reward(self, value: float, iid: str | None, due_ns: int) -> Any:
        if not self.active:
            if self.ready:
                newest = max(self.ready)
                if newest in self.exporting:
                    return None
                if not iid or iid == self.rewarded[newest]:
                    return newest, len(self.ready[newest]), False
            return "No interactions in session"
        by_id = {life.iid: life for life in self.active.values()}
        chosen = by_id.get(iid) if iid else self.active[max(self.active)]
        if chosen is None:
            return f"Interaction {iid} not found"
        count = len(self.active)
        chosen.reward, self.last = value, chosen.iid
        if due_ns:
            self.due_ns = due_ns
            return None, count, False
        self.close()
        return self.index - 1, count, True

    def choose(self, trajectory_id: int | None, asked: Any, now_ns: int) -> int | str | None:
        if self.removing:
            return None
        if not self.ready:
            return "No ready trajectories"
        index = max(self.ready) if trajectory_id is None else trajectory_id
        lost, since_ns = self.lost.get(asked, (-1, 0))
        if trajectory_id is None and lost in self.ready and now_ns - since_ns < 60 * 10**9:
            index = lost
        if index not in self.ready:
            return f"Trajectory {index} not found"
        return None if index in self.exporting else index

    def exported(self, index: int) -> None:
        taken = self.exporting.pop(index)
        for ordinal, life in self.ready.pop(index).items():
            if ordinal not in taken:
                life.reward = None
                self.late[ordinal] = life
        del self.rewarded[index]

    @property
    def empty(self) -> bool:
        return not (self.active or self.ready or self.late)


def discounted(lives: list[Life], discount: float) -> list[float]:
    out, following = [], 0.0
    for life in reversed(lives):
        following = following * discount + (life.reward or 0.0)
        out.append(following)
    return out[::-1]


def lives_in(lives: dict[int, Life]) -> dict[int, tuple[str, float | None]]:
    return {k: (life.iid, life.reward) for k, life in lives.items()}


def seen_in(interactions: Any) -> dict[int, tuple[str, float | None]]:
    return {k: (i.interaction_id, i.reward) for k, i in interactions.items()}


@dataclass
class Open:
    """A turn or an export that has not ended."""

    sid: str
    store: SessionStore
    what: Any
    index: int = 0
    removes: bool = False


class StoreMachine(RuleBasedStateMachine):
    """Two processes over one arena, and the model. `delayed` decides whether rewards wait."""

    turns = Bundle("turns")
    exports = Bundle("exports")

    @initialize(delayed=st.booleans())
    def begin(self, delayed: bool) -> None:
        self.clock = Clock()
        self.delay_ns = round(FINISH_S * 1e9) if delayed else 0
        self.world = self.make_arena()
        self.clock.ns = self.world.now_ns() + 10**12
        arenas = (self.world, self.attach(1))
        timeout = FINISH_S if delayed else 0.0
        self.stores = [SessionStore(a, finish_timeout_s=timeout, clock=self.clock) for a in arenas]
        self.models: dict[str, Model] = {}
        self.by_key: dict[str, str] = {}
        self.pinned: list[Open] = []
        self.seen: dict[str, list[int]] = {}
        self.salt = 0

    def make_arena(self) -> Any:
        return ModelArena.create(64 << 20, proc=0)

    def attach(self, proc: int) -> Any:
        return ModelArena.attach(self.world.fileno(), proc)

    def model(self, sid: str) -> Model | None:
        found = self.models.get(sid)
        if found:
            found.tick(self.clock.ns)
        return found

    def session(self, store: SessionStore, sid: str) -> Any:
        found = store.by_id(sid)
        assert (found is None) == (sid not in self.models)
        return found

    # -- sessions --------------------------------------------------------------------------------------
    def pick(self, n: int) -> str:
        """A live session; there are at most three."""
        if not self.models:
            self.start(0)
        return list(self.models)[n % len(self.models)]

    @precondition(lambda self: len(self.models) < 2)
    @rule(which=st.integers(0, 1))
    def start(self, which: int) -> None:
        n = 0
        while f"t-{n}" in self.models:
            n += 1
        ((sid, key),) = self.stores[which].start("t").sessions
        assert sid == f"t-{n}"
        self.models[sid] = Model(key)
        self.by_key[key] = sid

    @precondition(lambda self: len(self.models) < 3)
    @rule(which=st.integers(0, 1), n=st.integers(0, 2))
    def start_again_with_its_key(self, which: int, n: int) -> None:
        old = self.pick(n)
        model = self.model(old)
        assert model is not None
        if self.by_key.get(model.key) != old:
            return
        held = model.removing or (bool(model.ready) and model.ready.keys() <= model.exporting.keys())
        try:
            ((sid, key),) = self.stores[which].start("k", model.key).sessions
        except KeyBound:
            assert not model.ready and not held
            return
        except ExportBusy:
            assert held
            return
        assert model.ready and not held
        assert key == model.key
        self.models[sid] = Model(key)
        self.by_key[key] = sid

    # -- turns -----------------------------------------------------------------------------------------
    @precondition(lambda self: len(self.pinned) < 6)
    @rule(target=turns, which=st.integers(0, 1), n=st.integers(0, 2))
    def begin_turn(self, which: int, n: int) -> Open:
        sid = self.pick(n)
        session, model = self.session(self.stores[which], sid), self.model(sid)
        assert model is not None
        turn = session.begin_turn(reserve_tokens=64)
        assert turn.trajectory == model.index
        model.turns += 1
        opened = Open(sid, self.stores[which], (session, turn, model))
        self.pinned.append(opened)
        return opened

    @rule(which=st.integers(0, 1), n=st.integers(0, 2), cut=st.integers(0, 60), output=st.integers(1, 4))
    def whole_turn(self, which: int, n: int, cut: int, output: int) -> None:
        self.end_turn(self.begin_turn(which, n), 0, cut, output)

    @rule(opened=consumes(turns), base=st.integers(0, 3), cut=st.integers(0, 60), output=st.integers(1, 4))
    def end_turn(self, opened: Open, base: int, cut: int, output: int) -> None:
        """Prompts share prefixes with whatever the session's older turns had."""
        session, turn, model = opened.what
        assert isinstance(turn, Turn)
        self.pinned.remove(opened)
        model.turns -= 1
        self.salt += 1
        history = self.seen.get(opened.sid, [base] * 40)
        prompt = history[:cut] + [self.salt]
        out = [1000 + self.salt] * output
        try:
            turn.commit(
                prompt_ids=prompt,
                output_ids=out,
                logprobs=[-0.5] * output,
                version_runs=[(self.salt, output)],
                stop_reason="stop",
            )
        except Gone:
            assert self.models.get(opened.sid) is not model
        else:
            assert self.models.get(opened.sid) is model
            model.add(turn.trajectory, Life(turn.interaction_id, turn.ordinal, prompt + out))
            self.seen[opened.sid] = (prompt + out + history)[:60]
        session.release()

    @rule(opened=consumes(turns))
    def fail_turn(self, opened: Open) -> None:
        session, turn, model = opened.what
        self.pinned.remove(opened)
        model.turns -= 1
        turn.abandon()
        session.release()

    # -- rewards ---------------------------------------------------------------------------------------
    @rule(which=st.integers(0, 1), n=st.integers(0, 2), value=st.floats(-2, 2), pick=st.integers(0, 9))
    def set_reward(self, which: int, n: int, value: float, pick: int) -> None:
        sid = self.pick(n)
        session, model = self.session(self.stores[which], sid), self.model(sid)
        assert model is not None
        lives = [*model.active.values(), *(life for t in model.ready.values() for life in t.values())]
        iid = None if pick < 5 else "" if pick == 5 else lives[pick % len(lives)].iid if lives else "nope"
        due_ns = self.clock.ns + self.delay_ns if self.delay_ns else 0
        want = model.reward(value, iid, due_ns)
        try:
            got: Any = session.set_reward(value, iid)
        except ExportBusy:
            assert want is None
        except ArealFastError as exc:
            assert str(exc) == want
        else:
            assert (got.trajectory_id, got.interaction_count, got.ready_transition) == want
        session.release()

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.5]), which=st.integers(0, 1), scan=st.booleans())
    def wait(self, seconds: float, which: int, scan: bool) -> None:
        self.clock.forward(seconds)
        self.stores[which].fire_due(self.clock.ns, scan=scan)
        for sid in self.models:
            self.model(sid)

    # -- exports ---------------------------------------------------------------------------------------
    @rule(
        target=exports,
        which=st.integers(0, 1),
        n=st.integers(0, 2),
        named=st.none() | st.integers(0, 3),
        discount=st.sampled_from([0.0, 0.5, 1.0]),
        remove=st.booleans(),
    )
    def begin_export(self, which: int, n: int, named: int | None, discount: float, remove: bool) -> Any:
        sid = self.pick(n)
        store, model = self.stores[which], self.model(sid)
        assert model is not None
        asked = named, discount, remove
        want = model.choose(named, asked, self.clock.ns)
        try:
            export = ask(store, sid, trajectory_id=named, discount=discount, remove_session=remove)
        except ExportBusy:
            assert want is None
            return multiple()
        except ArealFastError as exc:
            assert isinstance(want, str)
            assert want in str(exc)
            return multiple()
        assert isinstance(want, int)
        in_use = model.turns or any(o.sid == sid for o in self.pinned if o.store is not store)
        if remove and named is not None:
            remove = set(model.ready) == {want} and not (model.active or model.late or in_use)
        lives = [model.ready[want][k] for k in sorted(model.ready[want])]
        got = json.loads(export.body)["interactions"]
        assert list(got) == [life.iid for life in lives]
        assert [i["reward"] for i in got.values()] == pytest.approx(discounted(lives, discount))
        for life, item in zip(lives, got.values(), strict=True):
            assert fetch(store, item["tensor_dict"]["input_ids"])[0].tolist() == life.ids
        model.exporting[want] = set(model.ready[want])
        model.removing |= remove
        opened = Open(sid, store, (export, model, asked, self.clock.ns), want, remove)
        self.pinned.append(opened)
        return opened

    @rule(which=st.integers(0, 1), n=st.integers(0, 2), named=st.none() | st.integers(0, 3))
    def whole_export(self, which: int, n: int, named: int | None) -> None:
        opened = self.begin_export(which, n, named, 0.5, False)
        if isinstance(opened, Open):
            self.end_export(opened, True)

    @rule(opened=consumes(exports), arrived=st.booleans())
    def end_export(self, opened: Open, arrived: bool) -> None:
        export, model, asked, since_ns = opened.what
        self.pinned.remove(opened)
        if opened.removes:
            model.removing = False
        if not arrived:
            export.undelivered()
            del model.exporting[opened.index]
            model.lost[asked] = opened.index, since_ns
            return
        model.lost.pop(asked, None)
        export.delivered()
        model.exported(opened.index)
        if opened.removes and self.models.get(opened.sid) is model:
            del self.models[opened.sid]
            self.seen.pop(opened.sid, None)
            if self.by_key.get(model.key) == opened.sid:
                del self.by_key[model.key]

    # -- races that chance alone would rarely make -----------------------------------------------------
    @precondition(lambda self: not self.pinned)
    @rule(which=st.integers(0, 1), n=st.integers(0, 2), cut=st.integers(0, 60), arrived=st.booleans())
    def turn_ends_during_an_export(self, which: int, n: int, cut: int, arrived: bool) -> None:
        slow = self.begin_turn(which, n)
        self.whole_turn(1 - which, n, cut, 2)
        self.set_reward(which, n, 1.0, 0)
        self.wait(2.5, which, False)
        export = self.begin_export(1 - which, n, None, 0.5, False)
        self.end_turn(slow, 0, cut, 1)
        if isinstance(export, Open):
            self.end_export(export, arrived)

    @precondition(lambda self: not self.pinned)
    @rule(which=st.integers(0, 1), turn=st.integers(0, 1), n=st.integers(0, 2), named=st.integers(0, 3))
    def named_removal_during_a_turn(self, which: int, turn: int, n: int, named: int) -> None:
        slow = self.begin_turn(turn, n)
        export = self.begin_export(which, n, named, 1.0, True)
        if isinstance(export, Open):
            self.end_export(export, True)
        self.end_turn(slow, 0, 30, 1)

    # -- cleanup ---------------------------------------------------------------------------------------
    @precondition(lambda self: not self.pinned)
    @rule(which=st.integers(0, 1), really=st.integers(0, 3))
    def cleanup(self, which: int, really: int) -> None:
        if really:
            return
        for sid in self.models:
            self.model(sid)
        with tempfile.TemporaryDirectory() as folder:
            report = self.stores[which].cleanup_stale(-1.0, folder)
            assert report.failures == []
            assert report.sessions == len(self.models)
            want = {}
            for sid, m in self.models.items():
                for index, lives in m.ready.items():
                    want[f"{sid}-trajectory-{index}.json"] = [lives[k] for k in sorted(lives)]
                rest = [m.late[k] for k in sorted(m.late)] + [m.active[k] for k in sorted(m.active)]
                if rest:
                    want[f"{sid}-active.json"] = rest
            assert sorted(os.listdir(folder)) == sorted(want)
            for name, lives in want.items():
                with open(os.path.join(folder, name)) as file:
                    got = json.load(file)
                assert sorted(got) == sorted(life.iid for life in lives)
                for life in lives:
                    assert decode(got[life.iid]["tensor_dict"]["input_ids"])[0].tolist() == life.ids
                if "-trajectory-" in name:
                    assert list(got) == [life.iid for life in lives]
                    assert [i["reward"] for i in got.values()] == pytest.approx(discounted(lives, 1.0))
        self.models.clear()
        self.by_key.clear()
        self.seen.clear()

    @invariant()
    def both_know_the_same(self) -> None:
        for k, (sid, model) in enumerate(getattr(self, "models", {}).items()):
            model.tick(self.clock.ns)
            with self.session(self.stores[k % 2], sid) as session:
                state = session.state
                assert state.active.index == model.index
                assert seen_in(state.active.interactions) == lives_in(model.active)
                assert {n: seen_in(t.interactions) for n, t in state.ready.items()} == {
                    n: lives_in(t) for n, t in model.ready.items()
                }
                assert seen_in(state.late) == lives_in(model.late)
                assert state.deadline_ns == model.due_ns

    def teardown(self) -> None:
        for opened in list(self.pinned):
            if len(opened.what) == 3:
                self.fail_turn_now(opened)
            else:
                opened.what[0].undelivered()
        assert all(store.turns_open == {} for store in self.stores)
        assert self.world.stats()["txns_open"] == 0

    def fail_turn_now(self, opened: Open) -> None:
        session, turn, _ = opened.what
        turn.abandon()
        session.release()


class CoreStoreMachine(StoreMachine):
    """The same over the real arena."""

    def make_arena(self) -> Any:
        from areal_fast.core import Arena

        return Arena.create(16 << 20, proc=0)

    def attach(self, proc: int) -> Any:
        from areal_fast.core import Arena

        return Arena.attach(self.world.fileno(), proc)

    def teardown(self) -> None:
        super().teardown()
        assert self.world.consistency() == ""
        for store in self.stores:
            store.close()


@pytest.fixture(autouse=True)
def eager_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "COMPACT_MIN_BYTES", 0)
    monkeypatch.setattr(folds, "COMPACT_DEAD_RATIO", 0.0)


TestStoreOverModel = StoreMachine.TestCase
TestStoreOverModel.settings = settings(stateful_step_count=50)
TestStoreOverCore = CoreStoreMachine.TestCase
TestStoreOverCore.settings = settings(stateful_step_count=80)
