"""Cleanup: stale sessions are detached, dumped, made durable, and freed; nobody waits for it.

One session goes through: detach (from here on it does not exist for clients, and only this process touches
it) → choose the file names and append them to the log → write each file, sync it, give it its name → sync the
directory → DUMPED → free. Killed anywhere, a successor under the same process number finds it by its owner
number and goes on:

  killed before the names were recorded   nothing is on disk: start again
  a file half written                     its temporary name is in the log: written anew
  a file has its name                     the name is taken by exactly these bytes: done
  the name is taken by other bytes        another's file, kept: the next free name is chosen and recorded
  all named, not yet DUMPED               all found done, directory synced, freed
  DUMPED                                  freed

The bytes depend on the log alone, so two tries write the same. A session that cannot be written stays
detached, is reported, and tried again with back-off; the others are not held up. Without a dump path stale
sessions are dropped, or, if the caller says so, only those that hold nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from areal_fast.core import (
    STATE_DETACHED,
    STATE_DUMPED,
    HeadMoved,
    IndexBusy,
)
from areal_fast.protocol import names
from areal_fast.protocol import records as rec
from areal_fast.protocol.sessions import SessionState
from areal_fast.shards import routed
from areal_fast.store.dump import DumpDir, Part, Step, part_json, parts_of

if TYPE_CHECKING:
    from areal_fast.store.store import SessionStore

EVER_NS = (1 << 63) - 1
BACKOFF_FIRST_NS = 1_000_000_000
BACKOFF_MAX_NS = 60_000_000_000
REAP_TRIES = 200
REAP_PAUSE_S = 0.001
SCAN_PAGE = 1024


class CleanupFailure(NamedTuple):
    """A session that is still there, and why."""

    session_id: str
    reason: str


class CleanupReport:
    """What one call did. sessions: freed; dropped: of those, freed without a file though they held something;
    files: names written; nbytes: their size; kept: stale, but left alone for want of a dump path;
    waiting: detached sessions not tried again yet; left: live sessions that dump_all had no time for."""

    def __init__(self) -> None:
        self.sessions = 0
        self.dropped = 0
        self.interactions = 0
        self.files: list[str] = []
        self.nbytes = 0
        self.failures: list[CleanupFailure] = []
        self.kept = 0
        self.waiting = 0
        self.left: list[str] = []


class Cleaner:
    """The cleaner's side of a store. `on_step` is called between the steps above (tests kill it there)."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._backoff: dict[int, tuple[int, int]] = {}
        self.on_step: Step = _no_step
        self.on_freed: Callable[[str, int, list[str]], None] = _nobody
        """Told of every session freed: its id, how many interactions it held, the files they are in now."""

    # -- entry points ----------------------------------------------------------------------------------
    def cleanup_stale(
        self,
        timeout_s: float,
        dump_path: str | None,
        *,
        drop_without_path: bool,
        stop: Callable[[], bool] | None,
    ) -> CleanupReport:
        """See SessionStore.cleanup_stale. `stop` is asked between sessions."""
        report = CleanupReport()
        arena = self._store.arena
        cutoff_ns = max(self._store.now_ns() - round(timeout_s * 1e9) + 1, 0)
        with _Directory(dump_path, drop_without_path) as directory:
            self._resume(directory, report, stop)
            if dump_path is None and not drop_without_path:
                slots = self._detach_empty(cutoff_ns, report)
            else:
                slots = self._detach_stale(cutoff_ns)
            if not (stop and stop()):
                for slot in slots:
                    self._finish(slot, directory, report)
                    if stop and stop():
                        break
        report.waiting = len(arena.owned_slots(STATE_DETACHED, arena.proc))
        return report

    def dump_all(self, dump_path: str | None, deadline_ns: int) -> CleanupReport:
        """See SessionStore.dump_all. Sessions with ready trajectories first, of those and of the rest the
        ones with most interactions."""
        report = CleanupReport()
        if dump_path is None:
            return report
        store, arena = self._store, self._store.arena
        with _Directory(dump_path, False) as directory:
            self._backoff.clear()
            self._resume(directory, report, lambda: store.now_ns() >= deadline_ns)
            for slot, session_id in self._by_value():
                if store.now_ns() >= deadline_ns:
                    report.left.append(session_id)
                elif not arena.detach(slot, EVER_NS):
                    report.failures.append(CleanupFailure(session_id, "still in use"))
                else:
                    self._finish(slot, directory, report)
        return report

    # -- which sessions --------------------------------------------------------------------------------
    def _resume(self, directory: _Directory, report: CleanupReport, stop: Callable[[], bool] | None) -> None:
        """What this process number left from before."""
        arena = self._store.arena
        for slot in arena.owned_slots(STATE_DUMPED, arena.proc):
            self._reap(slot, report)
        now_ns = self._store.now_ns()
        for slot in arena.owned_slots(STATE_DETACHED, arena.proc):
            if stop and stop():
                return
            if self._backoff.get(slot, (0, 0))[0] <= now_ns:
                self._finish(slot, directory, report)

    def _detach_stale(self, cutoff_ns: int) -> Iterator[int]:
        cursor = 0
        while True:
            slot, cursor = self._store.arena.detach_next(cutoff_ns, cursor)
            if slot >= 0:
                self.on_step("detached")
                yield slot
            if cursor == 0:
                return

    def _detach_empty(self, cutoff_ns: int, report: CleanupReport) -> Iterator[int]:
        """Only sessions that hold nothing; the others are counted and left alone."""
        store, arena = self._store, self._store.arena
        for slot in self._live():
            if arena.slot_info(slot).touched_ns >= cutoff_ns or not arena.pin_slot(slot):
                continue
            try:
                empty = store.folds.refresh(slot).is_empty
            finally:
                arena.unpin(slot)
            if not empty:
                report.kept += 1
            elif arena.detach(slot, cutoff_ns) and store.folds.refresh(slot).is_empty:
                yield slot
                # else: used in between; it stays detached and is dumped once there is a path

    def _live(self) -> Iterator[int]:
        cursor = 0
        while True:
            slots, cursor = self._store.arena.sessions(cursor, SCAN_PAGE)
            yield from slots
            if cursor == 0:
                return

    def _by_value(self) -> list[tuple[int, str]]:
        """Live sessions that hold something, most valuable first."""
        store, arena = self._store, self._store.arena
        found: list[tuple[bool, int, int, str]] = []
        for slot in self._live():
            if not arena.pin_slot(slot):
                continue
            try:
                session_id = _session_id(store, slot)
                state = store.fold(slot, session_id)
                if not state.is_empty:
                    found.append((state.has_ready, state.interaction_count(), slot, session_id))
            finally:
                arena.unpin(slot)
        found.sort(reverse=True)
        return [(slot, session_id) for _, _, slot, session_id in found]

    # -- one session -----------------------------------------------------------------------------------
    def _finish(self, slot: int, directory: _Directory, report: CleanupReport) -> None:
        """Dump and free one detached session. Whatever goes wrong is reported; the session then stays."""
        store = self._store
        session_id = _session_id(store, slot)
        before = len(report.files)
        try:
            fold = self._settled(slot)
            count = fold.interaction_count()
            if directory.path is None:
                if count and not directory.may_drop:
                    report.kept += 1
                    return
                report.dropped += bool(count)
            elif count:
                self._dump(slot, session_id, fold, directory.get(), report)
                report.interactions += count
            store.arena.set_dumped(slot)
            self.on_step("dumped")
            routed.drop(store.arena, fold.routed())
        except Exception as exc:
            report.failures.append(CleanupFailure(session_id, f"{type(exc).__name__}: {exc}"))
            _, delay_ns = self._backoff.get(slot, (0, 0))
            not_before_ns = store.now_ns() + delay_ns
            self._backoff[slot] = (not_before_ns, min(max(2 * delay_ns, BACKOFF_FIRST_NS), BACKOFF_MAX_NS))
            return
        self._backoff.pop(slot, None)
        self._reap(slot, report)
        self.on_freed(session_id, count, report.files[before:])

    def _settled(self, slot: int) -> SessionState:
        """The fold to dump. A reward whose timeout has passed makes its trajectory ready first, by a record,
        so that every try sees the same; once names are chosen nothing is added but names."""
        store = self._store
        fold = store.folds.refresh(slot)
        if fold.dump_names is None and fold.is_due(store.now_ns()):
            ready = rec.pack_ready(fold.active_index, store.courier)
            store.arena.append(slot, rec.READY, ready, expect=fold.head, critical=True)
            fold = store.folds.refresh(slot)
        return fold

    def _dump(
        self, slot: int, session_id: str, fold: SessionState, directory: DumpDir, report: CleanupReport
    ) -> None:
        parts = parts_of(fold)
        earlier = fold.dump_names
        token = earlier.token if earlier else secrets.token_hex(8)
        chosen = dict(earlier.names) if earlier else {}
        if not earlier:
            for part in parts:
                chosen[part.trajectory] = _free_name(directory, session_id, part.trajectory, set())
            fold = self._record_names(slot, fold, token, chosen)
        written: list[str] = []
        for i, part in enumerate(parts):
            temporary = names.temporary(token, i)
            name = chosen[part.trajectory]
            if earlier and directory.holds(name, self._json(slot, fold, part)):
                directory.remove(temporary)
                written.append(name)
                continue
            report.nbytes += directory.write(temporary, self._json(slot, fold, part), self.on_step)
            while not directory.publish(temporary, name):
                name = _free_name(directory, session_id, part.trajectory, set(chosen.values()))
                chosen[part.trajectory] = name
                fold = self._record_names(slot, fold, token, chosen)
            self.on_step("published")
            written.append(name)
        directory.sync()
        self.on_step("directory")
        report.files += written

    def _json(self, slot: int, fold: SessionState, part: Part) -> Iterator[bytes]:
        return part_json(self._store.folds, slot, fold, part)

    def _record_names(
        self, slot: int, fold: SessionState, token: str, chosen: dict[int, str]
    ) -> SessionState:
        store = self._store
        meta = rec.pack(rec.DumpNames(token, sorted(chosen.items())))
        try:
            store.arena.append(slot, rec.DUMP_NAMES, meta, expect=fold.head, critical=True)
        except HeadMoved:
            raise RuntimeError("the log of a detached session has moved") from None
        self.on_step("named")
        return store.folds.refresh(slot)

    def _reap(self, slot: int, report: CleanupReport) -> None:
        """Free a DUMPED session. A busy index only puts it off: the next call finds it."""
        store = self._store
        for _ in range(REAP_TRIES):
            try:
                store.arena.reap(slot)
            except IndexBusy:
                time.sleep(REAP_PAUSE_S)
                continue
            store.folds.forget(slot)
            self.on_step("reaped")
            report.sessions += 1
            return


class _Directory:
    """The dump directory, opened when first needed, so that what is wrong with it is a session's failure."""

    def __init__(self, path: str | None, may_drop: bool) -> None:
        self.path = path
        self.may_drop = may_drop
        self._open: DumpDir | None = None

    def __enter__(self) -> _Directory:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._open is not None:
            self._open.close()

    def get(self) -> DumpDir:
        assert self.path is not None
        if self._open is None:
            self._open = DumpDir(self.path)
        return self._open


def _free_name(directory: DumpDir, session_id: str, trajectory: int, taken: set[str]) -> str:
    n = 0
    while (name := names.dump_name(session_id, trajectory, n)) in taken or directory.exists(name):
        n += 1
    return name


def _session_id(store: SessionStore, slot: int) -> str:
    return store.arena.slot_info(slot).id.decode("utf-8", "replace")


def _no_step(_: str) -> None:
    return


def _nobody(session_id: str, interactions: int, files: list[str]) -> None:
    return
