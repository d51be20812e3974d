"""A session's state: the fold of its log, and the rules that say what may be appended next.

`SessionState.apply` takes the records in log order; the state after them depends on nothing else. Rules
(`reward`, `exportable`, …) read a state and answer, or refuse with the errors clients know; the caller
appends with the head word the state was folded from, and on HeadMoved folds on and asks again.

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

from collections.abc import Callable, Iterable, Sequence
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

OUTCOME_PENDING = 0
OUTCOME_COMMITTED = 1
OUTCOME_ABORTED = 2
FLAG_REMOVE = 1
REPLAY_NS = 60 * 10**9
"""How long an export whose reply did not arrive is given again to an identical request."""
MAX_LOST = 16
RECORD_HEADER_BYTES = 64

Record = tuple[int, int, int, int, int, bytes, int]


class Interaction(msgspec.Struct, gc=False, eq=False):
    """One recorded request and answer. `reward` is None until one is set. String interactions have no tokens:
    `meta` is None and `messages_size` tells their data apart. (Folds hold no cycles, so the collector need
    not look at what they are made of.)"""

    ordinal: int
    trajectory: int
    interaction_id: str
    offset: int
    nbytes: int
    meta: rec.InteractionMeta | None
    messages_size: int = 0
    seq: int = 0
    reward: float | None = None
    fate: int = retries.UNKNOWN


class Trajectory(msgspec.Struct, gc=False, eq=False):
    """Interactions by ordinal, in the order their records came; `in_order` sorts. `courier`: see
    records.py. `by_prefix`: the first interaction with this hash of messages and answer (concat.py).
    `by_asked`: the interactions with this hash of body or key (retries.py)."""

    index: int
    interactions: dict[int, Interaction] = {}
    by_prefix: dict[bytes, int] = {}
    by_asked: dict[bytes, list[int]] = {}
    reward_ordinal: int = -1
    courier: int = rec.NO_COURIER

    def add(self, interaction: Interaction) -> None:
        ordinal, m = interaction.ordinal, interaction.meta
        self.interactions[ordinal] = interaction
        if m is not None and m.messages_hash:
            self.by_prefix[m.messages_hash] = min(self.by_prefix.get(m.messages_hash, ordinal), ordinal)

        if m is not None and m.body_hash:
            for known in retries.told_by(m.body_hash):
                several = self.by_asked.get(known)
                if several is None:
                    self.by_asked[known] = [ordinal]
                else:
                    several.append(ordinal)

    def twin_of(self, one: retries.Asked, lives: Callable[[int], bool]) -> Interaction | None:
        """The interaction whose reply this request is after; `lives` tells of a process. See retries.py."""
        for ordinal in self.by_asked.get(one.key, ()) if one.key else ():
            return self.interactions[ordinal]
        for ordinal in self.by_asked.get(one.body, ()):
            interaction = self.interactions[ordinal]
            assert interaction.meta is not None
            other, process = retries.unpack(interaction.meta.body_hash)
            lost = interaction.fate == retries.LOST or (
                interaction.fate == retries.UNKNOWN and not lives(process)
            )
            if lost and one.key == other.key:
                return interaction
        return None

    def parent_of(self, prefixes: Sequence[bytes]) -> Interaction | None:
        """The interaction with the longest of these prefixes, given from the shortest on."""
        if self.by_prefix:
            for prefix in reversed(prefixes):
                if (ordinal := self.by_prefix.get(prefix)) is not None:
                    return self.interactions[ordinal]
        return None

    def in_order(self) -> list[Interaction]:
        return [self.interactions[k] for k in sorted(self.interactions)]

    def newest(self) -> Interaction:
        return self.interactions[max(self.interactions)]


class PendingExport(NamedTuple):
    """An EXPORTING record whose outcome is not known yet. `ordinals`: what it takes if it commits."""

    offset: int
    txn: int
    trajectory: int
    remove: bool
    ordinals: frozenset[int]
    request_hash: bytes
    at_ns: int


class RewardDecision(NamedTuple):
    """append None: a repeat, nothing to do; else meta of the REWARD record. ready: it closes the
    trajectory."""

    append: bytes | None
    trajectory_id: int | None
    interaction_count: int
    ready_transition: bool


class SessionState:
    """See the top of the file. `head` is the log's head word this state belongs to; `member`, which of its
    group the session is, or −1 (known only where members are noted, see SessionStore)."""

    __slots__ = (
        "_kept_fates",
        "_kept_rewards",
        "active",
        "dead_bytes",
        "deadline_ns",
        "dump_names",
        "exports",
        "head",
        "late",
        "live_bytes",
        "lost",
        "member",
        "pending",
        "ready",
        "seq",
    )

    def __init__(self) -> None:
        self.head = 0
        self.clear()

    def clear(self) -> None:
        """Back to the empty log."""
        self.active = Trajectory(0)
        self.ready: dict[int, Trajectory] = {}
        self.late: dict[int, Interaction] = {}
        self.lost: dict[bytes, tuple[int, int]] = {}
        self.deadline_ns = 0
        self.member = -1
        self.pending: list[PendingExport] = []
        self.exports: list[int] = []
        self.dump_names: rec.DumpNames | None = None
        self.live_bytes = 0
        self.dead_bytes = 0
        self.seq = 0
        self._kept_rewards: dict[int, float] = {}
        self._kept_fates: dict[int, int] = {}

    def routed(self) -> set[bytes]:
        """The shards of routed experts that the log names."""
        groups = [self.active.interactions, self.late, *(t.interactions for t in self.ready.values())]
        metas = [i.meta for group in groups for i in group.values()]
        return {m.routed.name for m in metas if m is not None and m.routed is not None}

    # -- fold ------------------------------------------------------------------------------------------
    def apply(self, records: Iterable[Record]) -> None:
        """Fold on. Records in log order."""
        for offset, kind, flags, aux, outcome, meta, data_len in records:
            nbytes = RECORD_HEADER_BYTES + len(meta) + data_len
            if kind == rec.INTERACTION:
                m = rec.unpack_interaction(meta)
                self._add(Interaction(m.ordinal, m.trajectory, m.interaction_id, offset, nbytes, m))
                continue
            if kind == rec.STRING:
                ordinal, trajectory, iid, size = rec.unpack_string(meta)
                self._add(Interaction(ordinal, trajectory, iid, offset, nbytes, None, size))
                continue
            self.dead_bytes += nbytes
            if kind == rec.REWARD:
                self._reward(*rec.unpack_reward(meta))
            elif kind == rec.READY:
                index, courier = rec.unpack_ready(meta)
                if index == self.active.index:
                    self._close_active(courier)
            elif kind == rec.SENT:
                index, ordinal, fate = rec.unpack_sent(meta)
                holder = self.active if index == self.active.index else self.ready.get(index)
                if holder is not None and ordinal in holder.interactions:
                    holder.interactions[ordinal].fate = fate
            elif kind == rec.CALLBACK:
                index, courier = rec.unpack_callback(meta)
                if (told := self.ready.get(index)) is not None:
                    told.courier = courier
            elif kind == rec.EXPORTING:
                self._exporting(offset, aux, bool(flags & FLAG_REMOVE), outcome, rec.unpack_exporting(meta))
            elif kind == rec.DUMP_NAMES:
                self.dump_names = rec.unpack_dump_names(meta)
            elif kind == rec.MEMBER:
                self.member = rec.unpack_member(meta)
            elif kind == rec.CHECKPOINT:
                self._checkpoint(rec.unpack_checkpoint(meta))

    def append(self, head: int, offset: int, m: rec.InteractionMeta, nbytes: int) -> None:
        """Fold on over the one INTERACTION that this process appended right behind the state's head, without
        reading it again. `head` is the log's word now, `nbytes` of meta and data."""
        nbytes += RECORD_HEADER_BYTES
        self._add(Interaction(m.ordinal, m.trajectory, m.interaction_id, offset, nbytes, m))
        self.head = head

    def append_reward(self, head: int, meta: bytes) -> None:
        """As `append`, over the one REWARD with this meta."""
        self.dead_bytes += RECORD_HEADER_BYTES + len(meta)
        self._reward(*rec.unpack_reward(meta))
        self.head = head

    def _add(self, interaction: Interaction) -> None:
        self.live_bytes += interaction.nbytes
        interaction.seq = self.seq
        self.seq += 1
        if self._kept_rewards:
            interaction.reward = self._kept_rewards.pop(interaction.ordinal, None)
        if self._kept_fates:
            interaction.fate = self._kept_fates.pop(interaction.ordinal, retries.UNKNOWN)
        index = interaction.trajectory
        if index == self.active.index:
            self.active.add(interaction)
        elif index in self.ready:
            self.ready[index].add(interaction)
        else:
            self.late[interaction.ordinal] = interaction

    def _reward(self, trajectory: int, ordinal: int, value: float, deadline_ns: int, courier: int) -> None:
        active = self.active
        if trajectory != active.index or ordinal not in active.interactions:
            return
        active.interactions[ordinal].reward = value
        active.reward_ordinal = ordinal
        self.deadline_ns = deadline_ns
        if deadline_ns == 0:
            self._close_active(courier)

    def _close_active(self, courier: int) -> None:
        closed = self.active
        closed.courier = courier
        self.ready[closed.index] = closed
        self.active = Trajectory(closed.index + 1)
        self.deadline_ns = 0

    def _exporting(self, offset: int, txn: int, remove: bool, outcome: int, m: rec.Exporting) -> None:
        self.exports.append(txn)
        taken = self.ready.get(m.trajectory)
        ordinals = frozenset(taken.interactions) if taken else frozenset()
        self.pending.append(
            PendingExport(offset, txn, m.trajectory, remove, ordinals, m.request_hash, m.at_ns)
        )
        self._settle(len(self.pending) - 1, outcome)

    def _checkpoint(self, c: rec.Checkpoint) -> None:
        # The kept records follow; `_add` places them by what is set here.
        self.active = Trajectory(c.active)
        self.ready = {}
        for index, ordinal in c.ready:
            trajectory = Trajectory(index)
            trajectory.reward_ordinal = ordinal
            self.ready[index] = trajectory
        for index, courier in c.couriers:
            self.ready[index].courier = courier
        self.late = {}
        self.lost = {request: (index, at_ns) for request, index, at_ns in c.lost}
        self.member = c.member
        if c.pending is not None:
            self.active.reward_ordinal, self.deadline_ns = c.pending
        self._kept_rewards = dict(c.rewards)
        self._kept_fates = dict(c.fates)

    def resolve(self, outcome_of: Callable[[int], int]) -> None:
        """Ask again for the outcome of every pending EXPORTING record (by offset)."""
        for i in range(len(self.pending) - 1, -1, -1):
            self._settle(i, outcome_of(self.pending[i].offset))

    def _settle(self, i: int, outcome: int) -> None:
        if outcome == OUTCOME_PENDING:
            return
        export = self.pending.pop(i)
        self.lost.pop(export.request_hash, None)
        if export.trajectory < 0:
            return
        if outcome != OUTCOME_COMMITTED:
            if export.request_hash:
                self.lost[export.request_hash] = (export.trajectory, export.at_ns)
                if len(self.lost) > MAX_LOST:
                    del self.lost[next(iter(self.lost))]
            return
        trajectory = self.ready.pop(export.trajectory, None)
        if trajectory is None:
            return
        for ordinal, interaction in trajectory.interactions.items():
            if ordinal in export.ordinals:
                self.live_bytes -= interaction.nbytes
                self.dead_bytes += interaction.nbytes
            else:
                interaction.reward = None
                self.late[ordinal] = interaction

    # -- questions -------------------------------------------------------------------------------------
    @property
    def has_ready(self) -> bool:
        return bool(self.ready)

    @property
    def leaving(self) -> bool:
        """A live export takes the session away. Its client may have the reply already, a moment before that
        is known here: whoever asks for the session meanwhile waits for the outcome."""
        return bool(self.pending) and any(p.remove for p in self.pending)

    def is_held(self, trajectory: int) -> bool:
        """A live export holds this trajectory. See `leaving`."""
        return bool(self.pending) and any(p.trajectory == trajectory for p in self.pending)

    @property
    def is_empty(self) -> bool:
        """Nothing is kept: no active, ready or late interaction."""
        return not (self.ready or self.active.interactions or self.late)

    def untold(self) -> list[Trajectory]:
        """Ready trajectories that the callback server has not been told of."""
        return [t for t in self.ready.values() if t.courier != rec.NO_COURIER]

    def interaction_count(self) -> int:
        return (
            len(self.active.interactions)
            + len(self.late)
            + sum(len(t.interactions) for t in self.ready.values())
        )

    def is_due(self, now_ns: int) -> bool:
        """The finish timeout of the last reward has passed: a READY record is to be appended."""
        return self.deadline_ns != 0 and now_ns >= self.deadline_ns

    def trajectory_for_ref(self, index: int) -> Trajectory | None:
        """The trajectory whose interactions a new one of trajectory `index` may refer to: none if it is
        exported or being exported, since a reference must not outlive what it points to."""
        if index == self.active.index:
            return self.active
        if self.is_held(index):
            return None
        return self.ready.get(index)

    # -- rules -----------------------------------------------------------------------------------------
    def reward(
        self, value: float, interaction_id: str | None, deadline_ns: int, courier: int = rec.NO_COURIER
    ) -> RewardDecision:
        """What set_reward does. `deadline_ns` 0: ready at once. NoInteractions, InteractionNotFound;
        ExportBusy where the answer hangs on an export that is under way."""
        active = self.active
        if not active.interactions:
            if self.ready:
                latest = self.ready[max(self.ready)]
                if self.is_held(latest.index):
                    raise ExportBusy
                rewarded = latest.interactions[latest.reward_ordinal].interaction_id
                if not interaction_id or interaction_id == rewarded:
                    return RewardDecision(None, latest.index, len(latest.interactions), False)
            raise NoInteractions
        if interaction_id:
            for interaction in active.interactions.values():
                if interaction.interaction_id == interaction_id:
                    break
            else:
                raise InteractionNotFound(interaction_id)
        else:
            interaction = active.newest()
        at_once = deadline_ns == 0
        return RewardDecision(
            rec.pack_reward(active.index, interaction.ordinal, value, deadline_ns, courier),
            active.index if at_once else None,
            len(active.interactions),
            at_once,
        )

    def exportable(
        self, session_id: str, trajectory_id: int | None, request_hash: bytes = b"", now_ns: int = 0
    ) -> Trajectory:
        """The trajectory an export takes: the one named; else the one whose reply to an identical request was
        lost less than REPLAY_NS ago; else the newest ready one.

        NoReadyTrajectories, TrajectoryNotFound; ExportBusy while a live export holds it or removes the
        session."""
        if self.leaving:
            raise ExportBusy
        if not self.ready:
            raise NoReadyTrajectories(session_id, named=trajectory_id is not None)
        index = max(self.ready) if trajectory_id is None else trajectory_id
        lost, at_ns = self.lost.get(request_hash, (-1, 0))
        if trajectory_id is None and lost in self.ready and now_ns - at_ns < REPLAY_NS:
            index = lost
        found = self.ready.get(index)
        if found is None:
            raise TrajectoryNotFound(session_id, index)
        if self.is_held(index):
            raise ExportBusy
        return found

    def only(self, trajectory: Trajectory | None) -> bool:
        """Nothing is kept but `trajectory`."""
        rest = len(self.ready) - (1 if trajectory is not None else 0)
        return rest == 0 and not self.active.interactions and not self.late

    def checkpoint(self) -> tuple[rec.Checkpoint, list[int]]:
        """What a compaction writes: the checkpoint, and the offsets of the records to keep, in log order.
        Only when no export is pending."""
        kept = [i for t in (*self.ready.values(), self.active) for i in t.interactions.values()]
        kept += self.late.values()
        rewards = [(i.ordinal, i.reward) for i in kept if i.reward is not None]
        pending = (self.active.reward_ordinal, self.deadline_ns) if self.deadline_ns else None
        ready = [(t.index, t.reward_ordinal) for t in self.ready.values()]
        return (
            rec.Checkpoint(
                self.active.index,
                ready,
                rewards,
                pending,
                [(t.index, t.courier) for t in self.untold()],
                self.member,
                [(i.ordinal, i.fate) for i in kept if i.fate != retries.UNKNOWN],
                [(request, *rest) for request, rest in self.lost.items() if rest[0] in self.ready],
            ),
            [i.offset for i in sorted(kept, key=lambda i: i.seq)],
        )
