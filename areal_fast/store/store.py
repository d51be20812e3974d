"""SessionStore: one process's way into the sessions of an arena.

Truth is in the arena; this object holds pins on behalf of requests, a cache of folds, the deadlines it set
itself, and transactions whose last step met a busy index. None of it is missed if the process dies.

Delayed readiness: a reward's deadline is in its record and, as a hint for scans, in the slot's deadline word.
Whoever touches the session after it, or `fire_due` (a timer's call), appends READY on condition that nothing
newer came. Every trajectory that becomes ready through this store is queued in `ready_events`, or told to
`on_ready` if somebody listens. Where a callback server is to be told as well, see callbacks.py.
"""

from __future__ import annotations

import heapq
import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from areal_fast.core import ArenaFull, Exists, Gone, HeadMoved, IndexBusy
from areal_fast.errors import ExportBusy, KeyBound
from areal_fast.protocol import records as rec
from areal_fast.protocol.messages import ExportRequest
from areal_fast.protocol.sessions import SessionState
from areal_fast.shards import ShardStore
from areal_fast.shards.routed import Garbage
from areal_fast.store import cleanup, exporting
from areal_fast.store._folds import open_session
from areal_fast.store.drawn import Drawn
from areal_fast.store.exporting import Export
from areal_fast.store.folds import MAX_FOLD_BYTES, FoldCache, worth_compacting
from areal_fast.store.session import Session

if TYPE_CHECKING:
    from areal_fast.core._core import Arena

HITL_SESSION_ID = "__hitl__"
SCAN_PAGE = 1024
MAX_READY_EVENTS = 65536


class StartedGroup(NamedTuple):
    """Sessions that were started together: (session id, api key) of each."""

    group_id: str
    sessions: list[tuple[str, str]]


class ReadyEvent(NamedTuple):
    """A trajectory that became ready in this process."""

    session_id: str
    trajectory_id: int


class Told(NamedTuple):
    """A ready trajectory that this process is to tell the callback server of. `created_ns` tells sessions of
    one id apart."""

    session_id: str
    trajectory_id: int
    slot: int
    created_ns: int


class SessionStore:
    """See the top of the file, and the package for an example.

    finish_timeout_s: 0, a reward makes its trajectory ready at once. serving_addr: HOST:PORT in shard
    references. courier: who tells the callback server of what becomes ready here (records.courier_word),
    UNCLAIMED to leave it to others. note_members: sessions started as a group know their place in it.
    clock: monotonic nanoseconds, the arena's own unless a test says otherwise."""

    def __init__(
        self,
        arena: Arena,
        *,
        finish_timeout_s: float = 0.0,
        serving_addr: str = "",
        courier: int = rec.NO_COURIER,
        max_fold_bytes: int = MAX_FOLD_BYTES,
        note_members: bool = False,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.arena = arena
        self.finish_timeout_ns = round(finish_timeout_s * 1e9)
        self.folds = FoldCache(arena, max_fold_bytes)
        self.shards = ShardStore(arena, serving_addr)
        self.turns_open = self.folds.turns_open
        self.courier = courier
        self.note_members = note_members
        self.ready_events: deque[ReadyEvent] = deque(maxlen=MAX_READY_EVENTS)
        self.on_ready: Callable[[Told], None] | None = None
        self._made_ready = 0
        self._drawn = Drawn()
        self.now_ns: Callable[[], int] = clock or arena.now_ns
        self._deadlines: list[tuple[int, int]] = []
        self._unsettled: list[tuple[int, bool, list[Session]]] = []
        self._unsettled_groups: list[tuple[int, bool, list[int]]] = []
        self.cleaner = cleanup.Cleaner(self)
        self.routed_garbage = Garbage(arena, self._routed_in_log, self.shards.routed_in)

    @staticmethod
    def open(
        max_bytes: int = 256 << 20, *, finish_timeout_s: float = 0.0, serving_addr: str = ""
    ) -> SessionStore:
        """A store over an arena of its own, for scripts and tests. `close` it."""
        from areal_fast.core._core import Arena

        arena = Arena.create(max_bytes)
        arena.proc_enter(os.getpid())
        return SessionStore(arena, finish_timeout_s=finish_timeout_s, serving_addr=serving_addr)

    def close(self) -> None:
        self.arena.close()

    # -- sessions --------------------------------------------------------------------------------------
    def start(self, task_id: str, api_key: str | None = None, group_size: int = 1) -> StartedGroup:
        """Start `group_size` sessions (≤ 0 means 1), all or none. The first is bound to `api_key` if given,
        the others to new keys.

        KeyBound: the key's session is live and has no ready trajectory (with one, the key moves).
        IndexBusy: nothing happened, try again a moment later. ArenaFull."""
        if self._unsettled_groups:  # a try that was given up may still hold ids that this one is to get
            self._settle_rest()
            if self._unsettled_groups:
                raise IndexBusy
        size = max(group_size, 1)
        task = task_id.encode()
        if size == 1:
            key = api_key or self._drawn.key()
            session_id = self._start_one(task, key, 0)[1]
            return StartedGroup(self._drawn.group_id(), [(session_id, key)])
        txn = self.arena.txn_begin()
        slots: list[int] = []
        started: list[tuple[str, str]] = []
        try:
            for i in range(size):
                key = (api_key if i == 0 else None) or self._drawn.key()
                slot, session_id = self._start_one(task, key, txn)
                slots.append(slot)
                if self.note_members:
                    self.arena.append(slot, rec.MEMBER, rec.pack_member(i))
                started.append((session_id, key))
        except BaseException:
            self._settle_group(txn, False, slots)
            raise
        self.arena.txn_commit(txn)
        self._settle_group(txn, True, slots)
        return StartedGroup(self._drawn.group_id(), started)

    def _start_one(self, task: bytes, key: str, txn: int) -> tuple[int, str]:
        """The new session's slot and id."""
        rebind_from = -1
        while True:
            try:
                slot, session_id = self.arena.start(task, key.encode(), txn=txn, rebind_from=rebind_from)
            except Exists as exc:
                if exc.slot == rebind_from:
                    raise IndexBusy from None
                rebind_from = self._rebindable(exc.slot)
                continue
            return slot, session_id.decode()

    def _rebindable(self, slot: int) -> int:
        """The slot, if its session has a ready trajectory, so that its key may move; -1 if it is gone."""
        if not self.arena.pin_slot(slot):
            raise IndexBusy
        try:
            session_id = self.arena.slot_id(slot).decode()
            state = self.fold(slot, session_id)
            ready = [index for index, _, _ in state.ready_all()]
            if state.leaving or (ready and all(map(state.is_held, ready))):
                raise ExportBusy
            if not ready:
                raise KeyBound(session_id)
            return slot
        finally:
            self.arena.unpin(slot)

    def by_key(self, api_key: str) -> Session | None:
        """The live session of this key, pinned and touched. ExportBusy while a live export removes it: the
        exporter's client may know already that it is gone, so wait for the outcome."""
        return open_session(self.folds, Session, self, api_key)

    def by_id(self, session_id: str) -> Session | None:
        """The live session of this id, pinned. This is the trainer's use of it, which is no access."""
        try:
            return self._session(self.arena.pin_id(session_id.encode()), counts=False)
        except (UnicodeEncodeError, ValueError):
            return None

    def hitl(self) -> Session:
        """The persistent session of the admin key, made when first needed. IndexBusy, ArenaFull; ExportBusy
        as by_key."""
        session = self._session(self.arena.open_named(HITL_SESSION_ID.encode()))
        assert session is not None
        return session

    def _session(self, slot: int, counts: bool = True) -> Session | None:
        if slot < 0:
            return None
        session = Session(self, slot, self.arena.slot_id(slot).decode(), counts)
        try:
            if counts and self.folds.refresh(slot).leaving:
                raise ExportBusy
        except BaseException:
            session.release()
            raise
        return session

    def sessions_count(self) -> int:
        """Live sessions."""
        return self.arena.sessions_active()

    # -- folds, readiness ------------------------------------------------------------------------------
    def fold(self, slot: int, session_id: str, now_ns: int = 0) -> SessionState:
        """A pinned session's fold as of now, a deadline that is due (by `now_ns`, 0: the clock) fired."""
        while True:
            state = self.folds.refresh(slot)
            if not state.deadline_ns or not state.is_due(now_ns or self.now_ns()):
                return state
            index = state.active_index
            try:
                ready = rec.pack_ready(index, self.courier)
                self.arena.append(slot, rec.READY, ready, expect=state.head, critical=True)
            except HeadMoved:
                continue
            except Gone:
                return state
            self.became_ready(slot, session_id, index)

    def became_ready(self, slot: int, session_id: str, trajectory_id: int) -> None:
        """Says so to who listens. The slot's deadline word stays set as long as there is somebody to tell:
        by it a scan finds what a dead courier left."""
        self._made_ready += 1
        if self.courier != rec.NO_COURIER:
            self.arena.set_deadline(slot, self.now_ns())
        if self.on_ready is None:
            self.ready_events.append(ReadyEvent(session_id, trajectory_id))
        else:
            created_ns = self.arena.slot_info(slot).created_ns
            self.on_ready(Told(session_id, trajectory_id, slot, created_ns))

    def deadline_set(self, slot: int, deadline_ns: int, *, hint: bool = True) -> None:
        """A reward becomes final at `deadline_ns`. `hint` False: the word says "look" already and must."""
        if hint:
            self.arena.set_deadline(slot, deadline_ns)
        heapq.heappush(self._deadlines, (deadline_ns, slot))

    def next_deadline_ns(self) -> int:
        """When `fire_due` next has something of this process's own to do; 0: nothing."""
        return self._deadlines[0][0] if self._deadlines else 0

    def fire_due(self, now_ns: int, *, scan: bool = False) -> int:
        """Make ready what is due and settle what met a busy index; how many trajectories became ready.

        Own deadlines only, unless `scan`: then all live sessions are looked at, those of dead processes
        too."""
        self._settle_rest()
        before = self._made_ready
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            self._fire(heapq.heappop(self._deadlines)[1], now_ns)
        cursor = 0
        while scan:
            slots, cursor = self.arena.sessions(cursor, SCAN_PAGE)
            for slot in slots:
                if 0 < self.arena.deadline(slot) <= now_ns:
                    self._fire(slot, now_ns)
            if cursor == 0:
                break
        return self._made_ready - before

    def _fire(self, slot: int, now_ns: int) -> None:
        if not self.arena.pin_slot(slot):
            return
        try:
            self.fold(slot, self.arena.slot_id(slot).decode(), now_ns)
            self.settle_hint(slot)
        finally:
            self.arena.unpin(slot)

    def settle_hint(self, slot: int) -> None:
        """A pinned slot's deadline word back to 0 if nothing is waiting. What comes while it is written is
        seen by looking again; what comes later writes the word itself."""
        state = self.folds.refresh(slot)
        while self.arena.deadline(slot) and not state.deadline_ns and not state.has_untold:
            self.arena.set_deadline(slot, 0)
            state = self.folds.refresh(slot)
            if state.deadline_ns or state.has_untold:
                self.arena.set_deadline(slot, state.deadline_ns or self.now_ns())

    def compact(self, slot: int, state: SessionState | None = None) -> None:
        """Shorten a pinned session's log if most of it is dead (`state`: what is known). Never fails: it is
        only worth trying."""
        if state is not None and not worth_compacting(state):
            return
        try:
            self.folds.compact(slot)
        except (Gone, ArenaFull):
            pass

    # -- export ----------------------------------------------------------------------------------------
    def begin_export(self, request: ExportRequest, *, patient: bool = False) -> Export:
        """First step of an export; see exporting.py. ExportBusy: wait a little, repeat."""
        self._settle_rest()
        return exporting.begin(self, request, patient=patient)

    def in_use_here(self, session: Session) -> bool:
        """Whether a turn of the session is in flight in this process."""
        return session.slot in self.turns_open

    def in_use_elsewhere(self, session: Session) -> bool:
        """Whether another process has the session pinned."""
        return bool(self.arena.slot_info(session.slot).pins & ~(1 << self.arena.proc))

    def settle_txn(self, txn: int, committed: bool, sessions: list[Session]) -> None:
        """Last step of an export: outcomes written, sessions flagged removed, pins given back."""
        try:
            slots = [s.slot for s in sessions]
            if committed:
                self.arena.txn_finish(txn, slots)
            else:
                self.arena.txn_abort(txn, slots)
        except IndexBusy:
            self._unsettled.append((txn, committed, sessions))
            return
        if committed:
            for session in sessions:
                self.compact(session.slot)
        self.release_all(sessions)

    def _settle_rest(self) -> None:
        waiting, self._unsettled = self._unsettled, []
        for txn, committed, sessions in waiting:
            self.settle_txn(txn, committed, sessions)
        groups, self._unsettled_groups = self._unsettled_groups, []
        for txn, committed, slots in groups:
            self._settle_group(txn, committed, slots)

    def _settle_group(self, txn: int, committed: bool, slots: list[int]) -> None:
        """As settle_txn for a group's members, which nobody has pinned."""
        for _ in range(8):
            try:
                if committed:
                    self.arena.txn_finish(txn, slots)
                else:
                    self.arena.txn_abort(txn, slots)
                return
            except IndexBusy:
                continue
        self._unsettled_groups.append((txn, committed, slots))

    def release_all(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            session.release()

    def _routed_in_log(self, slot: int) -> set[bytes]:
        return self.folds.refresh(slot).routed()

    # -- cleanup ---------------------------------------------------------------------------------------
    def cleanup_stale(
        self,
        timeout_s: float,
        dump_path: str | None,
        *,
        drop_without_path: bool = True,
        stop: Callable[[], bool] | None = None,
    ) -> cleanup.CleanupReport:
        """Detach, dump and free every session nobody used for `timeout_s`; see cleanup.py."""
        return self.cleaner.cleanup_stale(
            timeout_s, dump_path or None, drop_without_path=drop_without_path, stop=stop
        )

    def dump_all(self, dump_path: str | None, deadline_ns: int) -> cleanup.CleanupReport:
        """At the end of service: dump every live session, most valuable first, until `deadline_ns`."""
        return self.cleaner.dump_all(dump_path or None, deadline_ns)
