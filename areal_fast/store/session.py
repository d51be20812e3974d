"""A session as a request holds it: pinned, touched, and asked to do what the rules allow.

`Session` holds one pin from the lookup until `release`; while it does, the cleaner leaves the session alone.
`Turn` is one chat in flight: its ordinal and trajectory are taken when it begins, the room it may need is set
aside before the engine is asked, and `commit` appends its record, which is the commit point of the chat.

Rule-checked appends carry the head word the rule was checked against; on HeadMoved the log is folded on and
the rule asked again. A turn's commit does the same for one reason: the record may refer to an earlier
interaction only if that one is still there.
"""

from __future__ import annotations

import os
import sys
import uuid
from array import array
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from areal_fast.core import ArenaFull, Gone, HeadMoved, Trimmed
from areal_fast.protocol import records as rec
from areal_fast.protocol import retries
from areal_fast.protocol.sessions import SessionState
from areal_fast.protocol.wire import IntArray
from areal_fast.shards.routed import RoutedIntake
from areal_fast.store.couriers import lives

if TYPE_CHECKING:
    from areal_fast.store.store import SessionStore

BYTES_PER_TOKEN = 8
RECORD_SLACK_BYTES = 512
_LITTLE = sys.byteorder == "little"


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


class Session:
    """A pinned session. Use as a context manager, or `release()` it.

    `counts`: this use is an access, which keeps the session from going stale. An export is none, as in the
    original: a trainer that polls does not keep an abandoned session alive. A turn or a reward always is.
    """

    __slots__ = ("_counts", "_pinned", "_store", "session_id", "slot")

    def __init__(self, store: SessionStore, slot: int, session_id: str, counts: bool = True) -> None:
        self._store = store
        self._pinned = True
        self._counts = counts
        if counts:
            store.arena.touch(slot)
        self.slot = slot
        self.session_id = session_id

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Touch and unpin. Once is enough, more do nothing."""
        if self._pinned:
            self._pinned = False
            if self._counts:
                self._store.arena.touch(self.slot)
            self._store.arena.unpin(self.slot)

    def _access(self) -> None:
        if not self._counts:
            self._counts = True
            self._store.arena.touch(self.slot)

    @property
    def state(self) -> SessionState:
        """The folded state as of now (a due deadline is fired first). Read, don't change."""
        return self._store.fold(self.slot, self.session_id)

    def begin_turn(self, *, reserve_tokens: int, store: bool = True) -> Turn:
        """A chat starts: its place in the session is taken, and room for `reserve_tokens` prompt and output
        tokens. `store` False: the turn is not recorded. ArenaFull: answer 507 before asking the engine."""
        self._access()
        if not store:
            return Turn(self, -1, -1, 0)
        arena = self._store.arena
        fold = self._store.fold(self.slot, self.session_id)
        size = reserve_tokens * BYTES_PER_TOKEN + RECORD_SLACK_BYTES
        reservation = arena.reserve(self.slot, size) if reserve_tokens > 0 else 0
        self._store.turns_open[self.slot] = self._store.turns_open.get(self.slot, 0) + 1
        return Turn(self, arena.next_ordinal(self.slot), fold.active_index, reservation)

    def twin(self, one: retries.Asked) -> Twin | None:
        """The recorded answer that a request is after whose first reply was lost (retries.py), or None."""
        store = self._store
        while True:
            fold = store.fold(self.slot, self.session_id)
            ordinal = fold.twin_of(one.body, one.key, self._lives)
            found = fold.interaction(ordinal) if ordinal >= 0 else None
            if found is None or found.meta is None:
                return None
            try:
                ids = store.folds.full_ids(self.slot, fold, ordinal)
            except Trimmed:
                continue
            place = (found.trajectory, ordinal)
            return Twin(found.interaction_id, ids, found.meta.prompt_len, found.meta.stop_reason, place)

    def _lives(self, process: int) -> bool:
        return lives(self._store.arena, process)

    def fate(self, place: tuple[int, int]) -> Callable[[bool], None]:
        """To be called with what becomes of the reply of (trajectory, ordinal): True when it is on its way or
        arrived, False when it is lost; the last word counts. It may be called after `release`."""
        arena, slot = self._store.arena, self.slot
        created_ns = arena.slot_created_ns(slot)

        def note(arrived: bool) -> None:
            if self._pinned:
                self._note_sent(place, arrived)
                return
            if not arena.pin_slot(slot):
                return
            try:
                info = arena.slot_info(slot)
                if (info.id.decode(), info.created_ns) != (self.session_id, created_ns):
                    return
                self._note_sent(place, arrived)
            finally:
                arena.unpin(slot)

        return note

    def _note_sent(self, place: tuple[int, int], arrived: bool) -> None:
        try:
            self._store.folds.note_sent(self.slot, *place, retries.ARRIVED if arrived else retries.LOST)
        except (Gone, ArenaFull):
            pass  # nobody will ask, or the worst is one answer told twice

    def set_reward(self, reward: float, interaction_id: str | None = None) -> RewardResult:
        """Set a reward on an active interaction (null or "": the newest).

        With finish timeout 0 the trajectory is ready at once, in the same record; else after the timeout,
        which every call restarts. A repeat on the newest ready trajectory changes nothing. NoInteractions,
        InteractionNotFound; Gone if the session is removed meanwhile."""
        self._access()
        store = self._store
        while True:
            state = store.fold(self.slot, self.session_id)
            timeout_ns = store.finish_timeout_ns
            deadline_ns = store.now_ns() + timeout_ns if timeout_ns > 0 else 0
            decision = state.reward(reward, interaction_id, deadline_ns, store.courier)
            if decision.append is not None:
                index = state.active_index
                try:
                    head = store.arena.append(
                        self.slot, rec.REWARD, decision.append, expect=state.head, critical=True
                    )
                except HeadMoved:
                    continue
                state.append_reward(head, decision.append)
                if deadline_ns:
                    store.deadline_set(self.slot, deadline_ns, hint=not state.has_untold)
                else:
                    store.became_ready(self.slot, self.session_id, index)
                store.compact(self.slot)
            return RewardResult(
                self.session_id, decision.interaction_count, decision.trajectory_id, decision.ready_transition
            )


class Turn:
    """One chat in flight. Exactly one of commit, commit_string and abandon ends it; as a context manager it
    is abandoned unless committed."""

    __slots__ = ("_open", "_reservation", "_session", "interaction_id", "ordinal", "parent", "trajectory")

    def __init__(self, session: Session, ordinal: int, trajectory: int, reservation: int) -> None:
        self._session = session
        self._reservation = reservation
        self._open = True
        self.ordinal = ordinal
        self.trajectory = trajectory
        self.parent: Parent | None = None
        self.interaction_id = "chatcmpl-" + os.urandom(15).hex()[:29]

    @property
    def session_id(self) -> str:
        return self._session.session_id

    def __enter__(self) -> Turn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.abandon()

    def reserve(self, tokens: int) -> None:
        """Set room aside for `tokens` prompt and output tokens, where begin_turn could not know them yet: a
        turn takes its place before its prompt is encoded. ArenaFull: answer 507 before asking the engine."""
        if self._open and self.ordinal >= 0 and not self._reservation:
            size = tokens * BYTES_PER_TOKEN + RECORD_SLACK_BYTES
            self._reservation = self._session._store.arena.reserve(self._session.slot, size)

    def routed_intake(self) -> RoutedIntake | None:
        """Where this turn's routed experts go until its commit; None if nothing is recorded."""
        if self.ordinal < 0:
            return None
        return RoutedIntake(self._session._store.arena, self._session.slot)

    def follow(self, prefixes: Sequence[bytes]) -> None:
        """Take the parent: the interaction whose messages and answer are the longest of these prefixes
        (concat.prefix_hashes). Call it at once after begin_turn: it belongs to the turn's place."""
        store, slot = self._session._store, self._session.slot
        while self.ordinal >= 0 and self.parent is None:
            fold = store.folds.refresh(slot)
            if not fold.may_refer(self.trajectory):
                return
            ordinal = fold.parent_of(self.trajectory, prefixes)
            found = fold.interaction(ordinal) if ordinal >= 0 else None
            if found is None or found.meta is None:
                return
            try:
                ids = store.folds.full_ids(slot, fold, ordinal)
            except Trimmed:
                continue
            self.parent = Parent(ordinal, ids, found.meta.prompt_len, found.meta.stop_reason)

    def abandon(self) -> None:
        """Nothing is recorded, the room is given back. After a commit this does nothing."""
        if not self._open:
            return
        self._open = False
        if self.ordinal < 0:
            return
        self._end()

    def _end(self) -> None:
        store, slot = self._session._store, self._session.slot
        if self._reservation:
            store.arena.release(self._reservation)
            self._reservation = 0
        left = store.turns_open[slot] - 1
        if left:
            store.turns_open[slot] = left
        else:
            del store.turns_open[slot]

    def commit(
        self,
        *,
        prompt_ids: Any,
        output_ids: Any,
        logprobs: Any,
        version_runs: Sequence[tuple[int, int]],
        stop_reason: str,
        messages_hash: bytes = b"",
        body_hash: bytes = b"",
        extra: bytes = b"",
        routed: rec.Routed | None = None,
    ) -> None:
        """Record the interaction: the commit point of a chat, to be passed before its reply leaves.

        prompt_ids, output_ids: int32 [P], [O] (array, list, or bytes of little-endian ones); logprobs:
        float32 [O]; version_runs: (weight version, count) covering the O output tokens. Gone: the session was
        removed meanwhile, and nothing is recorded. ArenaFull cannot happen within what was reserved."""
        if not self._open:
            raise ValueError("the turn has ended")
        if self.ordinal < 0:
            self._open = False
            return
        session = self._session
        try:
            session._store.folds.commit(
                session.slot, self.ordinal, self.trajectory,
                rec.NO_REF if self.parent is None else self.parent.ordinal, self.interaction_id,
                bytes(_packed(prompt_ids, "i", "<i4")),
                _packed(output_ids, "i", "<i4"),
                _packed(logprobs, "f", "<f4"),
                version_runs, stop_reason, messages_hash, body_hash, extra, routed, self._reservation,
            )  # fmt: skip
            self._reservation = 0
        finally:
            self._open = False
            self._end()

    def commit_string(self, messages_json: bytes, response_text: str) -> None:
        """Record an interaction without tokens: an external model's. Its id is a uuid. Gone, ArenaFull."""
        if not self._open:
            raise ValueError("the turn has ended")
        self._open = False
        if self.ordinal < 0:
            return
        self.interaction_id = str(uuid.uuid4())
        meta = rec.pack_string(self.ordinal, self.trajectory, self.interaction_id, len(messages_json))
        data = (messages_json, response_text.encode("utf-8", "surrogatepass"))
        store, slot = self._session._store, self._session.slot
        try:
            while True:
                try:
                    self._append(rec.STRING, meta, data, store.arena.head(slot))
                except HeadMoved:
                    continue
                return
        finally:
            self._end()

    def _append(self, kind: int, meta: bytes, data: Sequence[Any], expect: int) -> int:
        """The log's head word, of which the record is the newest."""
        arena, slot = self._session._store.arena, self._session.slot
        head = arena.append(slot, kind, meta, data, expect=expect, reservation=self._reservation)
        self._reservation = 0
        return head


def _packed(values: Any, typecode: str, dtype: str) -> bytes | array[Any]:
    """Numbers of four bytes as little-endian bytes; what are such bytes, or such an array, stays as it is."""
    if type(values) is bytes or (_LITTLE and type(values) is array and values.typecode == typecode):
        return values
    packed: bytes = np.ascontiguousarray(values, dtype).tobytes()
    return packed


__all__ = ["Gone", "RewardResult", "Session", "Turn"]
