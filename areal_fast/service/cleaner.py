"""The cleaner: stale sessions, expired shards, idle memory. Nice 10, so that workers never wait for it.

The work itself is the store's (store/cleanup.py): it survives being killed at any point, and resumes what a
predecessor under the same process number left behind. Here is when it is done, and that everybody hears of
it:

* A run at the start, then one an interval. While a dump is waiting to be tried again, the store is asked more
  often; it keeps a back-off a session.
* What went wrong is in the log (a session's first failure, a reminder now and then, its recovery; a folder
  that cannot be written to, already at the start), and, over the supervisor, in every worker's /health: which
  sessions cannot be written, and why. Ten thousand of them are not ten thousand lines.
* Heartbeats come from the loop, between sessions; one that blocks in a disk for long is a hung one.
* At the end of service it dumps what is left, in portions, most valuable first: a kill loses as little as
  can be.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import Any, Final

from areal_fast.core import STATE_DETACHED, STATE_DUMPED, CoreError, IndexBusy
from areal_fast.protocol.records import NO_COURIER, UNCLAIMED
from areal_fast.service import child, words
from areal_fast.service.child import HEARTBEAT_S, Child
from areal_fast.shards.store import COUNTS_CHANGED, DEATHS
from areal_fast.store import CleanupReport, SessionStore
from areal_fast.store.dump import unusable

NICENESS: Final = 10
RETRY_S: Final = 1.0
"""How often the store is asked while a dump is waiting: its back-off decides which is tried."""
HOUSEKEEPING_S: Final = 5.0
PUNCH_GRANULES: Final = 16384
STOCK_BYTES: Final = 8 << 20
LOOK_S: Final = 10.0  # between two looks for routed experts that nobody refers to
"""Memory kept backed ahead of use, as much as `punch_idle` leaves: a worker that met unbacked memory would
pay 0.5 ms for its next 2 MiB."""
RECOUNT_S: Final = 0.05
"""Between the two counts of shards that must agree."""
PORTION_S: Final = 2.0
MAX_FAILURES_TOLD: Final = 20
"""Sessions named one by one: in /health, and in the log a run."""
REMIND_S: Final = 600.0
"""How often the log repeats that dumps are still failing."""
NEVER_S: Final = 1e9


class Cleaner:
    """One cleaner's life. `run` returns the exit status."""

    def __init__(self, me: Child) -> None:
        self._me = me
        self._settings = me.settings
        self._arena = me.arena
        self._log = me.log
        self.store = SessionStore(
            me.arena,
            finish_timeout_s=me.settings.set_reward_finish_timeout_s,
            serving_addr=me.settings.serving_addr,
            courier=UNCLAIMED if me.settings.callback_server_addr else NO_COURIER,
        )
        self.store.cleaner.on_freed = self._freed
        self.failing: dict[str, str] = {}
        self.folder_trouble = ""
        self._remind_at = 0.0
        self._counted = (0, 0)
        self._orders: list[dict[str, Any]] = []
        self._status: dict[str, Any] = {}
        self._next_look = 0.0
        self._poll = select.poll()
        self._poll.register(me.control, select.POLLIN)

    # -- the loop --------------------------------------------------------------------------------------
    def run(self) -> int:
        next_run = next_housekeeping = time.monotonic()
        self._me.send({"is": "ready"})
        while True:
            self._beat()
            while self._orders:
                if self._obey(self._orders.pop(0)):
                    return 0
            now = time.monotonic()
            if now >= next_run:
                waiting = self._clean()
                interval = self._settings.cleanup_interval_s
                next_run = time.monotonic() + (min(RETRY_S, interval) if waiting else interval)
            if now >= next_housekeeping:
                self._keep_house()
                next_housekeeping = time.monotonic() + HOUSEKEEPING_S
            self._keep_stock()
            pause = min(HEARTBEAT_S, next_run - time.monotonic())
            if pause > 0 and not self._orders:
                self._poll.poll(int(pause * 1000) + 1)

    def _beat(self) -> bool:
        """A heartbeat, and a look at the control line; True if there is an order to obey."""
        self._arena.heartbeat()
        while (message := self._me.receive()) is not None:
            if message["do"] in ("dump", "retire"):
                self._orders.append(message)
        return bool(self._orders)

    # -- stale sessions --------------------------------------------------------------------------------
    def _clean(self) -> bool:
        """One run; True if something is waiting to be tried again soon."""
        settings, begun = self._settings, time.time()
        error = None
        self._look_at_folder()
        try:
            report = self.store.cleanup_stale(
                settings.session_timeout_s,
                settings.dump_path or None,
                drop_without_path=settings.session_timeout_given,
                stop=self._beat,
            )
        except Exception as fault:
            error = f"{type(fault).__name__}: {fault}"
            self._log.error("cleanup_failed", why=error)
            report = CleanupReport()
        self._count(report)
        self._note_failures(report)
        self._tell(
            last_run=round(begun, 3),
            last_run_s=round(time.time() - begun, 3),
            last_sessions=report.sessions,
            kept_for_want_of_a_dump_path=report.kept,
            waiting=report.waiting,
            error=error,
            dump_path_error=self.folder_trouble or None,
        )
        if report.sessions or report.failures:
            self._log.info(
                "cleanup",
                sessions=report.sessions,
                files=len(report.files),
                bytes=report.nbytes,
                dropped=report.dropped,
                failures=len(report.failures),
                waiting=report.waiting,
                seconds=time.time() - begun,
            )
        return bool(error or report.waiting or report.failures)

    def _freed(self, session_id: str, interactions: int, files: list[str]) -> None:
        """What became of one session, for who follows it in the log."""
        event = "dumped" if files else "dropped" if interactions else "expired"
        self._log.info(event, session=session_id, interactions=interactions or None, files=files or None)

    def _count(self, report: CleanupReport) -> None:
        for counter, amount in (
            (words.CLEANUPS, 1),
            (words.SESSIONS_CLEANED, report.sessions),
            (words.SESSIONS_DROPPED, report.dropped),
            (words.DUMP_FILES, len(report.files)),
            (words.DUMP_BYTES, report.nbytes),
            (words.DUMP_FAILURES, len(report.failures)),
        ):
            if amount:
                self._arena.count(counter, amount)

    def _look_at_folder(self) -> None:
        """Say early, not when the first session goes stale, that the folder takes no dumps."""
        path = self._settings.dump_path
        trouble = unusable(path) if path else ""
        if trouble and trouble != self.folder_trouble:
            self._log.warning(
                "dump_path_unusable", path=path, why=trouble, hint="stale sessions are kept until it is"
            )
        elif self.folder_trouble and not trouble:
            self._log.notice("dump_path_usable", path=path)
        self.folder_trouble = trouble

    def _note_failures(self, report: CleanupReport) -> None:
        """Keep `failing` true: what failed now or earlier and is still detached. Tell what is new."""
        detached = self._detached()
        known, self.failing = self.failing, {s: why for s, why in self.failing.items() if s in detached}
        recovered = [session_id for session_id in known if session_id not in detached]
        failed = [f for f in report.failures if known.get(f.session_id) != f.reason]
        self.failing |= {failure.session_id: failure.reason for failure in report.failures}
        path, now = self._settings.dump_path, time.monotonic()
        for failure in failed[:MAX_FAILURES_TOLD]:
            self._log.warning("dump_failed", session=failure.session_id, why=failure.reason, path=path)
        if len(failed) > MAX_FAILURES_TOLD:
            more = len(failed) - MAX_FAILURES_TOLD
            self._log.warning("dump_failed", more_sessions=more, why=failed[-1].reason, path=path)
        for session_id in recovered[:MAX_FAILURES_TOLD]:
            self._log.notice("dump_recovered", session=session_id)
        if len(recovered) > MAX_FAILURES_TOLD:
            self._log.notice("dump_recovered", more_sessions=len(recovered) - MAX_FAILURES_TOLD)
        if failed or not self.failing:
            self._remind_at = now + REMIND_S
        elif now >= self._remind_at:
            self._remind_at = now + REMIND_S
            last = next(reversed(self.failing.values()))
            self._log.warning("dumps_still_failing", sessions=len(self.failing), why=last, path=path)

    def _detached(self) -> set[str]:
        arena = self._arena
        slots = arena.owned_slots(STATE_DETACHED, arena.proc)
        return {arena.slot_info(slot).id.decode("utf-8", "replace") for slot in slots}

    def _tell(self, **news: Any) -> None:
        """Publish the status: to the supervisor, and so to every /health."""
        counters = self._arena.counters()
        failures = [{"session_id": s, "reason": why[:500]} for s, why in self.failing.items()]
        self._status |= news
        self._status |= {
            "failing": len(failures),
            "failures": failures[:MAX_FAILURES_TOLD],
            "totals": {name: counters[index] for name, index in words.CLEANUP_COUNTERS.items()},
        }
        self._me.send({"is": "status", "status": self._status})

    # -- shards and memory -----------------------------------------------------------------------------
    def _keep_house(self) -> None:
        """Late rewards of dead workers, expired shards, their totals, memory nobody uses."""
        try:
            doubt = (self._arena.word(COUNTS_CHANGED), self._arena.word(DEATHS))
            if doubt != self._counted and self.store.shards.recount(lambda: time.sleep(RECOUNT_S)):
                self._counted = doubt
            if self._settings.set_reward_finish_timeout_s > 0:
                self.store.fire_due(self.store.now_ns(), scan=True)
            if self._settings.shard_ttl_s > 0:
                before = max(0, self.store.now_ns() - round(self._settings.shard_ttl_s * 1e9))
                expired = self.store.shards.sweep_expired(before)
                if expired:
                    self._arena.count(words.SHARDS_EXPIRED, expired)
                    self._log.info("shards_expired", shards=expired)
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_S
                if freed := self.store.routed_garbage.look():
                    self._log.info("routed_experts_freed", shards=freed)
            self._arena.punch_idle(PUNCH_GRANULES)
        except IndexBusy:
            pass  # next time
        except CoreError as error:
            self._log.warning("housekeeping_failed", why=repr(error))

    def _keep_stock(self) -> None:
        """Back memory for the turns to come. What the system refuses here, a worker in need is told."""
        with contextlib.suppress(CoreError):
            self._arena.prefault(STOCK_BYTES)

    # -- orders ----------------------------------------------------------------------------------------
    def _obey(self, order: dict[str, Any]) -> bool:
        """True: done for ever."""
        if order["do"] == "retire":
            return self._retire()
        return self._dump_live(float(order["seconds"]), final=bool(order["final"]))

    def _dump_live(self, seconds: float, *, final: bool) -> bool:
        """Dump live sessions, in portions so that a pulse is felt. Not final: what is in use is left."""
        until = time.monotonic() + seconds
        files = sessions = 0
        while True:
            portion_s = min(PORTION_S, until - time.monotonic())
            deadline_ns = self.store.now_ns() + round(max(0.0, portion_s) * 1e9)
            report = self.store.dump_all(self._settings.dump_path, deadline_ns)
            self._count(report)
            files += len(report.files)
            sessions += report.sessions
            self._beat()
            if not report.left or time.monotonic() >= until or (not final and self._orders):
                break
            self._log.notice("dumping", sessions=sessions, left=len(report.left))
        self._note_failures(report)
        missing = report.left + [failure.session_id for failure in report.failures]
        self._me.send({"is": "dumped", "dumped": sessions, "left": len(missing)})
        if final:
            for failure in report.failures:
                self._log.error("not_dumped", session=failure.session_id, why=failure.reason)
            if report.left:
                listed = report.left[:MAX_FAILURES_TOLD]
                self._log.error("not_dumped", sessions=len(report.left), why="no time left", first=listed)
        return final

    def _retire(self) -> bool:
        """Finish what this process number owns: another one takes over. False while something is left."""
        arena = self._arena
        while True:
            self.store.cleanup_stale(NEVER_S, self._settings.dump_path or None, stop=self._beat)
            left = [arena.owned_slots(state, arena.proc) for state in (STATE_DETACHED, STATE_DUMPED)]
            if not any(left):
                return True
            self._beat()
            self._poll.poll(int(RETRY_S * 1000))


def main() -> None:
    me = child.start()
    os.nice(NICENESS)
    os._exit(Cleaner(me).run())


if __name__ == "__main__":
    main()
