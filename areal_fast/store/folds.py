"""Folded sessions, cached per process.

A fold is valid for one head word, and head words of a slot never repeat, not even when the slot is used
again. So the cache is keyed by slot alone: `refresh` reads what came after the cached head (or everything, if
the log was cut or begins anew) and folds on. Beside the state it remembers the full token ids of the last
interactions, so that a new turn can be compared with them without reading the log. Those are kept under the
interaction's own id, which is random: whatever becomes of the slot, they are never taken for another's.

Bounded: folds by the interactions they hold, ids by their bytes; least recently used ones go. Losing either
costs reading the log again, never truth.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from areal_fast.core import TXN_GONE, HeadMoved, IndexBusy, Trimmed
from areal_fast.core._core import common_prefix
from areal_fast.protocol import records as rec
from areal_fast.protocol.sessions import Interaction, SessionState, Trajectory
from areal_fast.protocol.wire import IntArray

if TYPE_CHECKING:
    from areal_fast.core._core import Arena

MAX_INTERACTIONS = 16384
MAX_IDS_BYTES = 1 << 20
COMPACT_MIN_BYTES = 32 << 10
COMPACT_DEAD_RATIO = 1.0


class Fold:
    """One session's state; `weight` is what it counts for in the cache."""

    __slots__ = ("state", "weight")

    def __init__(self) -> None:
        self.state = SessionState()
        self.weight = 1


class FoldCache:
    """All folds of this process. The slot given must be pinned or owned by the caller."""

    def __init__(self, arena: Arena, max_interactions: int = MAX_INTERACTIONS) -> None:
        self.arena = arena
        self._max = max_interactions
        self._folds: OrderedDict[int, Fold] = OrderedDict()
        self._weight = 0
        self._ids: OrderedDict[str, bytes] = OrderedDict()
        self._ids_bytes = 0

    def refresh(self, slot: int) -> Fold:
        """The fold as of now."""
        fold = self._folds.get(slot)
        if fold is None:
            fold = self._folds[slot] = Fold()
            self._weight += fold.weight
        else:
            self._folds.move_to_end(slot)
        state = fold.state
        if state.head == 0 or state.head != self.arena.head(slot):
            head, cut, records = self.arena.read(slot, state.head)
            if cut:
                state.clear()
            state.apply(records)
            state.head = head
            self._weight += state.seq + 1 - fold.weight
            fold.weight = state.seq + 1
            while self._weight > self._max and len(self._folds) > 1:
                self._weight -= self._folds.popitem(last=False)[1].weight
        if state.pending:
            self._resolve(slot, fold)
        return fold

    def appended(self, slot: int, fold: Fold, head: int, m: rec.InteractionMeta, nbytes: int) -> None:
        """This process appended the INTERACTION on condition of the fold's head: now it is in the fold."""
        fold.state.append(head, self.arena.record_of(head), m, nbytes)
        if self._folds.get(slot) is fold:
            self._weight += 1
            fold.weight += 1

    def _resolve(self, slot: int, fold: Fold) -> None:
        state = fold.state
        try:
            state.resolve(lambda offset: self.arena.record_outcome(slot, state.head, offset))
        except Trimmed:
            self.forget(slot)
            fresh = self.refresh(slot)
            fold.state = fresh.state

    def forget(self, slot: int) -> None:
        fold = self._folds.pop(slot, None)
        if fold is not None:
            self._weight -= fold.weight

    # -- tokens ----------------------------------------------------------------------------------------
    def remember(self, interaction_id: str, ids: bytes) -> None:
        """Keep the full ids (int32) of an interaction, for the turns that follow it."""
        old = self._ids.pop(interaction_id, b"")
        self._ids_bytes += len(ids) - len(old)
        self._ids[interaction_id] = ids
        while self._ids_bytes > MAX_IDS_BYTES and len(self._ids) > 1:
            self._ids_bytes -= len(self._ids.popitem(last=False)[1])

    def full_ids(self, slot: int, fold: Fold, trajectory: Trajectory, ordinal: int) -> IntArray:
        """Prompt and output ids [T] int32 of an interaction of `trajectory`. Trimmed if the log was cut."""
        return np.frombuffer(self.full_bytes(slot, fold, trajectory, ordinal), "<i4")

    def full_bytes(self, slot: int, fold: Fold, trajectory: Trajectory, ordinal: int) -> bytes:
        """As full_ids, as little-endian bytes."""
        chain: list[Interaction] = []
        base: bytes | None = None
        at = ordinal
        while True:
            interaction = trajectory.interactions[at]
            base = self._ids.get(interaction.interaction_id)
            if base is not None:
                break
            if interaction.meta is None:
                return b""
            chain.append(interaction)
            if interaction.meta.ref == rec.NO_REF:
                break
            at = interaction.meta.ref
        for interaction in reversed(chain):
            m = interaction.meta
            assert m is not None
            new = self.arena.record_data(slot, fold.state.head, interaction.offset, 0, 4 * m.new_ids)
            base = new if base is None or m.ref == rec.NO_REF else base[: 4 * m.shared] + new
        assert base is not None
        self.remember(trajectory.interactions[ordinal].interaction_id, base)
        return base

    def data_of(self, slot: int, fold: Fold, interaction: Interaction) -> bytes:
        """A record's data. Trimmed if the log was cut since the fold."""
        return self.arena.record_data(slot, fold.state.head, interaction.offset)

    # -- compaction ------------------------------------------------------------------------------------
    def compact(self, slot: int) -> bool:
        """Cut what nobody needs out of a pinned session's log, if it is worth it and no export is unsettled.

        Called after exports and rewards, so that a session that lives for weeks stays as small as what it
        keeps. Losing a race or finding no room is no failure: a later call does it."""
        state = self.refresh(slot).state
        if state.dead_bytes <= max(COMPACT_MIN_BYTES, COMPACT_DEAD_RATIO * state.live_bytes) or state.pending:
            return False
        if any(self.arena.txn_state(txn) != TXN_GONE for txn in state.exports):
            return False
        checkpoint, keep = state.checkpoint()
        try:
            self.arena.compact(slot, state.head, rec.pack(checkpoint), keep)
        except (HeadMoved, IndexBusy):
            return False
        return True


def shared_ids(a: bytes, b: bytes) -> int:
    """Length of the common prefix of two int32 id sequences, in ids."""
    return common_prefix(a, b) // 4


__all__ = ["Fold", "FoldCache", "shared_ids"]
