"""Folded sessions, cached per process.

A fold is valid for one head word, and head words of a slot never repeat, not even when the slot is used
again. So the cache is keyed by slot alone: `refresh` reads what came after the cached head (or everything, if
the log was cut or begins anew) and folds on. Beside the state it remembers the full token ids of the last
interactions, so that a new turn can be compared with them without reading the log. Those are kept under the
interaction's own id, which is random: whatever becomes of the slot, they are never taken for another's.

Bounded, both by their bytes; least recently used ones go. Losing either costs reading the log again, never
truth. What every turn does with them is in _folds.pyx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from areal_fast.core import TXN_GONE, HeadMoved, IndexBusy, Trimmed
from areal_fast.protocol import records as rec
from areal_fast.protocol.sessions import Interaction, SessionState
from areal_fast.protocol.wire import IntArray
from areal_fast.store._folds import Folds

if TYPE_CHECKING:
    from areal_fast.core._core import Arena

MAX_FOLD_BYTES = 64 << 20
MAX_IDS_BYTES = 1 << 20
COMPACT_MIN_BYTES = 32 << 10
COMPACT_DEAD_RATIO = 1.0


class FoldCache(Folds):
    """All folds of this process. The slot given must be pinned or owned by the caller."""

    def __init__(self, arena: Arena, max_bytes: int = MAX_FOLD_BYTES) -> None:
        super().__init__(arena, SessionState, max_bytes, MAX_IDS_BYTES)

    def resolve(self, slot: int, fold: SessionState) -> None:
        while fold.pending:
            try:
                fold.resolve(lambda offset: self.arena.record_outcome(slot, fold.head, offset))
                return
            except Trimmed:
                fold.clear()
                self.read_on(slot, fold)

    def full_ids(self, slot: int, fold: SessionState, ordinal: int) -> IntArray:
        """Prompt and output ids [T] int32 of an interaction. Trimmed if the log was cut since the fold."""
        return np.frombuffer(self.full_bytes(slot, fold, ordinal), "<i4")

    def data_of(self, slot: int, fold: SessionState, interaction: Interaction) -> bytes:
        """A record's data. Trimmed if the log was cut since the fold."""
        return self.arena.record_data(slot, fold.head, interaction.offset)

    def compact(self, slot: int) -> bool:
        """Cut what nobody needs out of a pinned session's log, if it is worth it and no export is unsettled.

        Called after exports and rewards, so that a session that lives for weeks stays as small as what it
        keeps. Losing a race or finding no room is no failure: a later call does it."""
        state = self.refresh(slot)
        if not worth_compacting(state) or state.pending:
            return False
        if any(self.arena.txn_state(txn) != TXN_GONE for txn in state.exports):
            return False
        checkpoint, keep = state.checkpoint()
        try:
            self.arena.compact(slot, state.head, rec.pack(checkpoint), keep)
        except (HeadMoved, IndexBusy):
            return False
        return True


def worth_compacting(state: SessionState) -> bool:
    """Whether enough of the log is dead."""
    dead = state.dead_bytes
    return dead > COMPACT_MIN_BYTES and dead > COMPACT_DEAD_RATIO * state.live_bytes


__all__ = ["FoldCache", "worth_compacting"]
