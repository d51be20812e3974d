"""A session's state: the fold of its log, and the rules that say what may be appended next.

`SessionState.apply` takes the records in log order; the state after them depends on nothing else. What is
kept, and what the records of turns and rewards do to it, stands in _fold.pyx, since every turn goes that way;
here are the other records, and the rules. Rules (`reward`, `exportable`, …) read a state and answer, or
refuse with the errors clients know; the caller appends with the head word the state was folded from, and on
HeadMoved folds on and asks again.

Trajectories are numbered 0, 1, 2…; one is active, those before it are ready, exporting, or exported (and then
forgotten). An interaction belongs to the trajectory that was active when its request started, and stands in
it by its request's ordinal, whenever its record comes. If that trajectory is already exported the interaction
is late: kept for the dump, never exported.

EXPORTING records are promises: each stays `pending` here until `resolve` tells its outcome. Committed: the
interactions that were there when it was appended are gone, those that came after it are late. Aborted: it
never happened, but for a while an identical request means the same trajectory (`lost`).

Times are monotonic nanoseconds and always an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from areal_fast.errors import (
    ExportBusy,
    InteractionNotFound,
    NoInteractions,
    NoReadyTrajectories,
    TrajectoryNotFound,
)
from areal_fast.protocol import records as rec
from areal_fast.protocol import retries
from areal_fast.protocol._fold import Folded, Interaction

OUTCOME_PENDING = 0
OUTCOME_COMMITTED = 1
OUTCOME_ABORTED = 2
FLAG_REMOVE = 1
REPLAY_NS = 60 * 10**9
"""How long an export whose reply did not arrive is given again to an identical request."""
MAX_LOST = 16

Record = tuple[int, int, int, int, int, bytes, int]


class Trajectory(msgspec.Struct, frozen=True, gc=False, eq=False):
    """A trajectory as of when it was asked for. `interactions` by ordinal, in the order their records came;
    `in_order` sorts. `reward_ordinal`: where the last reward fell, or −1. `courier`: see records.py."""

    index: int
    interactions: dict[int, Interaction]
    reward_ordinal: int = -1
    courier: int = rec.NO_COURIER

    def in_order(self) -> list[Interaction]:
        return [self.interactions[k] for k in sorted(self.interactions)]


class PendingExport(NamedTuple):
    """An EXPORTING record whose outcome is not known yet. `before`: if it commits it takes the trajectory's
    interactions whose seq is below."""

    offset: int
    txn: int
    trajectory: int
    remove: bool
    before: int
    request_hash: bytes
    at_ns: int


class RewardDecision(NamedTuple):
    """append None: a repeat, nothing to do; else meta of the REWARD record. ready: it closes the
    trajectory."""

    append: bytes | None
    trajectory_id: int | None
    interaction_count: int
    ready_transition: bool


class SessionState(Folded):
    """See the top of the file."""

    __slots__ = ()

    def clear(self) -> None:
        """Back to the empty log."""
        self.begin_anew()
        self.head = self.live_bytes = self.dead_bytes = 0
        self.member = -1
        self.pending = self.exports = ()
        self.lost = self.dump_names = None

    # -- fold ------------------------------------------------------------------------------------------
    def apply_rare(self, record: Record) -> None:
        offset, kind, flags, aux, outcome, meta, _ = record
        if kind == rec.CALLBACK:
            self.set_courier(*rec.unpack_callback(meta))
        elif kind == rec.EXPORTING:
            self._exporting(offset, aux, bool(flags & FLAG_REMOVE), outcome, rec.unpack_exporting(meta))
        elif kind == rec.DUMP_NAMES:
            self.dump_names = rec.unpack_dump_names(meta)
        elif kind == rec.MEMBER:
            self.member = rec.unpack_member(meta)
        elif kind == rec.CHECKPOINT:
            self._checkpoint(rec.unpack_checkpoint(meta))

    def _exporting(self, offset: int, txn: int, remove: bool, outcome: int, m: rec.Exporting) -> None:
        self.exports = [*self.exports, txn]
        export = PendingExport(offset, txn, m.trajectory, remove, self.seq, m.request_hash, m.at_ns)
        self.pending = (*self.pending, export)
        self._settle(export, outcome)

    def _checkpoint(self, c: rec.Checkpoint) -> None:
        # The kept records follow, and are placed by what is set here.
        couriers = dict(c.couriers)
        self.begin_anew(
            c.active,
            *(c.pending or (-1, 0)),
            [(index, ordinal, couriers.get(index, rec.NO_COURIER)) for index, ordinal in c.ready],
            dict(c.rewards),
            dict(c.fates),
        )
        self.lost = {request: (index, at_ns) for request, index, at_ns in c.lost}
        self.member = c.member

    def resolve(self, outcome_of: Callable[[int], int]) -> None:
        """Ask again for the outcome of every pending EXPORTING record (by offset)."""
        for export in reversed(self.pending):
            self._settle(export, outcome_of(export.offset))

    def _settle(self, export: PendingExport, outcome: int) -> None:
        if outcome == OUTCOME_PENDING:
            return
        self.pending = tuple(p for p in self.pending if p is not export)
        lost = self.lost if self.lost is not None else {}
        lost.pop(export.request_hash, None)
        if export.trajectory < 0:
            return
        if outcome == OUTCOME_COMMITTED:
            self.exported(export.trajectory, export.before)
        elif export.request_hash:
            lost[export.request_hash] = (export.trajectory, export.at_ns)
            if len(lost) > MAX_LOST:
                del lost[next(iter(lost))]
            self.lost = lost

    # -- questions -------------------------------------------------------------------------------------
    @property
    def active(self) -> Trajectory:
        index = self.active_index
        return Trajectory(index, self.interactions(index), self.reward_ordinal)

    @property
    def ready(self) -> dict[int, Trajectory]:
        return {
            index: Trajectory(index, self.interactions(index), ordinal, courier)
            for index, ordinal, courier in self.ready_all()
        }

    @property
    def leaving(self) -> bool:
        """A live export takes the session away. Its client may have the reply already, a moment before that
        is known here: whoever asks for the session meanwhile waits for the outcome."""
        return bool(self.pending) and any(p.remove for p in self.pending)

    def is_held(self, trajectory: int) -> bool:
        """A live export holds this trajectory. See `leaving`."""
        return bool(self.pending) and any(p.trajectory == trajectory for p in self.pending)

    def may_refer(self, index: int) -> bool:
        """Whether a new interaction of this trajectory may refer to those that are there: not if it is
        exported or being exported, since a reference must not outlive what it points to."""
        return index == self.active_index or not self.is_held(index)

    def untold(self) -> list[tuple[int, int]]:
        """(index, courier) of the ready trajectories that the callback server has not been told of."""
        return [(index, courier) for index, _, courier in self.ready_all() if courier != rec.NO_COURIER]

    # -- rules -----------------------------------------------------------------------------------------
    def reward(
        self, value: float, interaction_id: str | None, deadline_ns: int, courier: int = rec.NO_COURIER
    ) -> RewardDecision:
        """What set_reward does. `deadline_ns` 0: ready at once. NoInteractions, InteractionNotFound;
        ExportBusy where the answer hangs on an export that is under way."""
        count = self.active_count
        if not count:
            return self._repeat(interaction_id)
        ordinal = self.named(interaction_id) if interaction_id else self.newest
        if ordinal < 0:
            raise InteractionNotFound(interaction_id or "")
        index, at_once = self.active_index, deadline_ns == 0
        meta = rec.pack_reward(index, ordinal, value, deadline_ns, courier)
        return RewardDecision(meta, index if at_once else None, count, at_once)

    def _repeat(self, interaction_id: str | None) -> RewardDecision:
        """A reward where there is nothing active: on the newest ready trajectory it changes nothing."""
        if self.has_ready:
            index, ordinal, _ = max(self.ready_all())
            if self.is_held(index):
                raise ExportBusy
            rewarded = self.interaction(ordinal)
            assert rewarded is not None
            if not interaction_id or interaction_id == rewarded.interaction_id:
                return RewardDecision(None, index, len(self.ordinals(index)), False)
        raise NoInteractions

    def exportable(
        self, session_id: str, trajectory_id: int | None, request_hash: bytes = b"", now_ns: int = 0
    ) -> int:
        """The trajectory an export takes: the one named; else the one whose reply to an identical request was
        lost less than REPLAY_NS ago; else the newest ready one.

        NoReadyTrajectories, TrajectoryNotFound; ExportBusy while a live export holds it or removes the
        session."""
        if self.leaving:
            raise ExportBusy
        ready = {index for index, _, _ in self.ready_all()}
        if not ready:
            raise NoReadyTrajectories(session_id, named=trajectory_id is not None)
        index = max(ready) if trajectory_id is None else trajectory_id
        lost, at_ns = self.lost.get(request_hash, (-1, 0)) if self.lost else (-1, 0)
        if trajectory_id is None and lost in ready and now_ns - at_ns < REPLAY_NS:
            index = lost
        if index not in ready:
            raise TrajectoryNotFound(session_id, index)
        if self.is_held(index):
            raise ExportBusy
        return index

    def only(self, index: int | None) -> bool:
        """Nothing is kept but this ready trajectory."""
        rest = self.ready_count - (1 if index is not None else 0)
        return rest == 0 and not self.active_count and not self.late

    def checkpoint(self) -> tuple[rec.Checkpoint, list[int]]:
        """What a compaction writes: the checkpoint, and the offsets of the records to keep, in log order.
        Only when no export is pending."""
        kept, ready = self.all_interactions(), self.ready_all()
        indexes = {index for index, _, _ in ready}
        lost = self.lost or {}
        return (
            rec.Checkpoint(
                self.active_index,
                [(index, ordinal) for index, ordinal, _ in ready],
                [(i.ordinal, i.reward) for i in kept if i.reward is not None],
                (self.reward_ordinal, self.deadline_ns) if self.deadline_ns else None,
                self.untold(),
                self.member,
                [(i.ordinal, i.fate) for i in kept if i.fate != retries.UNKNOWN],
                [(request, *rest) for request, rest in lost.items() if rest[0] in indexes],
            ),
            self.offsets(),
        )


__all__ = ["Interaction", "SessionState", "Trajectory"]
