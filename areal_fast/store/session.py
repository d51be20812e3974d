"""A session as a request holds it: pinned, touched, and asked to do what the rules allow.

`Session` holds one pin from the lookup until `release`; while it does, the cleaner leaves the session alone.
`Turn` is one chat in flight: its ordinal and trajectory are taken when it begins, the room it may need is set
aside before the engine is asked, and `commit` appends its record, which is the commit point of the chat. What
every turn does of this is in _folds.pyx.

Rule-checked appends carry the head word the rule was checked against; on HeadMoved the log is folded on and
the rule asked again. A turn's commit does the same for one reason: the record may refer to an earlier
interaction only if that one is still there.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from areal_fast.core import Gone, HeadMoved, Trimmed
from areal_fast.protocol import records as rec
from areal_fast.protocol import retries
from areal_fast.protocol.wire import IntArray
from areal_fast.shards.routed import RoutedIntake
from areal_fast.store._folds import Begun, Fate, Pinned
from areal_fast.store.couriers import lives


class Parent(NamedTuple):
    """The interaction a turn goes on from: its ids int32 [T], of which `prompt_len` are its prompt."""

    ordinal: int
    ids: IntArray
    prompt_len: int
    stop_reason: str


class Twin(NamedTuple):
    """A recorded answer: ids int32 [T], of which `prompt_len` are the prompt. place: trajectory, ordinal."""

    interaction_id: str
    ids: IntArray
    prompt_len: int
    stop_reason: str
    place: tuple[int, int]


class RewardResult(NamedTuple):
    """The answer of set_reward. trajectory_id None: not ready yet."""

    session_id: str
    interaction_count: int
    trajectory_id: int | None
    ready_transition: bool

    @property
    def trajectory_ready(self) -> bool:
        return self.trajectory_id is not None


class Session(Pinned):
    """A pinned session. Use as a context manager, or `release()` it.

    `counts`: this use is an access, which keeps the session from going stale. An export is none, as in the
    original: a trainer that polls does not keep an abandoned session alive. A turn or a reward always is.
    """

    __slots__ = ()

    def begin_turn(self, *, reserve_tokens: int, store: bool = True) -> Turn:
        """A chat starts: its place in the session is taken, and room for `reserve_tokens` prompt and output
        tokens. `store` False: the turn is not recorded. ArenaFull: answer 507 before asking the engine."""
        return Turn(self, reserve_tokens, store)

    def twin(self, one: retries.Asked) -> Twin | None:
        """The recorded answer that a request is after whose first reply was lost (retries.py), or None."""
        while True:
            ordinal = self.twin_ordinal(one.body, one.key)
            if ordinal < 0:
                return None
            fold = self._store.folds.refresh(self.slot)
            found = fold.interaction(ordinal)
            if found is None or found.meta is None:
                continue  # exported since
            try:
                ids = self._store.folds.full_ids(self.slot, fold, ordinal)
            except Trimmed:
                continue
            place = (found.trajectory, ordinal)
            return Twin(found.interaction_id, ids, found.meta.prompt_len, found.meta.stop_reason, place)

    def lives(self, process: int) -> bool:
        return lives(self._store.arena, process)

    def fate(self, place: tuple[int, int]) -> Fate:
        """To be called with what becomes of the reply of (trajectory, ordinal): True when it is on its way or
        arrived, False when it is lost; the last word counts. It may be called after `release`."""
        return Fate(self, place)

    def set_reward(self, reward: float, interaction_id: str | None = None) -> RewardResult:
        """Set a reward on an active interaction (null or "": the newest).

        With finish timeout 0 the trajectory is ready at once, in the same record; else after the timeout,
        which every call restarts. A repeat on the newest ready trajectory changes nothing. NoInteractions,
        InteractionNotFound; Gone if the session is removed meanwhile."""
        self.access()
        store = self._store
        while True:
            state = self.state
            timeout_ns = store.finish_timeout_ns
            deadline_ns = store.now_ns() + timeout_ns if timeout_ns > 0 else 0
            meta, trajectory_id, count, ready = state.reward(
                reward, interaction_id, deadline_ns, store.courier
            )
            if meta is not None:
                index = state.active_index
                try:
                    head = store.arena.append(self.slot, rec.REWARD, meta, expect=state.head, critical=True)
                except HeadMoved:
                    continue
                state.append_reward(head, meta)
                if deadline_ns:
                    store.deadline_set(self.slot, deadline_ns, hint=not state.has_untold)
                else:
                    store.became_ready(self.slot, self.session_id, index)
                store.compact(self.slot, state)
            return RewardResult(self.session_id, count, trajectory_id, ready)


class Turn(Begun):
    """One chat in flight. Exactly one of commit, commit_string and abandon ends it; as a context manager it
    is abandoned unless committed."""

    __slots__ = ()

    def routed_intake(self) -> RoutedIntake | None:
        """Where this turn's routed experts go until its commit; None if nothing is recorded."""
        if self.ordinal < 0:
            return None
        return RoutedIntake(self.session._store.arena, self.session.slot)

    def follow(self, prefixes: Sequence[bytes]) -> None:
        """Take the parent: the interaction whose messages and answer are the longest of these prefixes
        (concat.prefix_hashes). Call it at once after begin_turn: it belongs to the turn's place."""
        folds, slot = self.session._store.folds, self.session.slot
        while self.ordinal >= 0 and self.parent is None:
            fold = folds.refresh(slot)
            if not fold.may_refer(self.trajectory):
                return
            ordinal = fold.parent_of(self.trajectory, prefixes)
            found = fold.interaction(ordinal) if ordinal >= 0 else None
            if found is None or found.meta is None:
                return
            try:
                ids = folds.full_ids(slot, fold, ordinal)
            except Trimmed:
                continue
            self.parent = Parent(ordinal, ids, found.meta.prompt_len, found.meta.stop_reason)

    def commit_string(self, messages_json: bytes, response_text: str) -> None:
        """Record an interaction without tokens: an external model's. Its id is a uuid. Gone, ArenaFull."""
        if not self.open:
            raise ValueError("the turn has ended")
        try:
            if self.ordinal < 0:
                return
            self.interaction_id = str(uuid.uuid4())
            meta = rec.pack_string(self.ordinal, self.trajectory, self.interaction_id, len(messages_json))
            data = (messages_json, response_text.encode("utf-8", "surrogatepass"))
            arena, slot = self.session._store.arena, self.session.slot
            arena.append(slot, rec.STRING, meta, data, reservation=self.reservation)
            self.reservation = 0
        finally:
            self.end()


__all__ = ["Gone", "RewardResult", "Session", "Turn"]
