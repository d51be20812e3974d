"""The first process: owns the socket and the arena, keeps the others running, and ends the whole thing.

It never touches a request and loads no torch and no tokenizer: one poll loop over signals, pidfds and
control lines, with a tick every 0.25 s. Theory and rules:

* One listening socket, bound here without SO_REUSEPORT and inherited by every worker: a second proxy on the
  port fails at once, and a killed worker strands no waiting connection.
* What a child held is swept after its pidfd reported the death, before its process number is used again.
  A child that SIGKILL cannot end is parked; a spare number stands in for its own until it is gone.
* Stop (SIGTERM, SIGINT, SIGHUP): workers drain while the cleaner already dumps what nobody uses; when the
  workers are gone it dumps the rest; exit 0. Asked twice, or with the whole tree signalled, it hurries.
* Whatever ends this process ends the children: by the control line's EOF, by PR_SET_PDEATHSIG, or here.

Source: the design page, "Processes" and "Cleanup".
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from areal_fast import config
from areal_fast.config import Settings
from areal_fast.core import PROC_CLEANER, PROC_SUPERVISOR, Arena, CoreError, IndexBusy
from areal_fast.service.holder import Holder
from areal_fast.service.keepers import Keepers
from areal_fast.service.lifeline import Lifeline
from areal_fast.service.listening import StartError, allow_many_files, listen, listen_locally
from areal_fast.service.log import Log
from areal_fast.service.processes import TICK_S, Process, Role, spawn, spawn_engine
from areal_fast.service.words import TREE_SIGNALLED
from areal_fast.shards.store import DEATHS

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SPARE_PROCS: Final = range(24, 29)
HURRY_S: Final = 0.5
"""Time left to requests in flight after a second SIGTERM."""
TREE_HURRY_S: Final = 1.0
"""The same when children were signalled too: a guard does that, and kills the tree 3 s later."""
SIGNAL_TICKS: Final = 8
"""A signal to a child belongs to this stop if it came in these ticks (2 s) before, or after."""
DUMP_S: Final = 60.0
"""Bound for dumping live sessions at the end."""
MARGIN_S: Final = 0.5
SAFE_VOCABULARY: Final = 1000
"""Token ids the embedded engine answers with where the tokenizer is not its own: any real one has them."""
CLEANER_STOP_TRIES: Final = 3


class Death(NamedTuple):
    """A death that is certain, and not yet swept. `done`: it had done its part of the stop."""

    role: Role
    proc: int
    why: str
    ready_for_s: float | None
    done: bool


class Change(NamedTuple):
    """A change of shared settings that not every worker has yet; `asker` waits to hear of it."""

    revision: int
    token: int
    asker: Process


class Stop:
    """The stop in progress: drain, then dump, then end. Times are monotonic seconds."""

    def __init__(self, now: float, drain_s: float) -> None:
        self.phase = "drain"
        self.begun = now
        self.drain_until = now + drain_s
        self.dump_until = 0.0
        self.cleaner_tries = 0
        self.unfinished = 0
        self.dumped = 0
        self.left = 0


class Supervisor:
    """One run of the proxy. `run` returns the exit status."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.settings = settings
        self.log = log
        self.status = 0
        self.start_failure = ""
        self.tick = 0
        self.begun = time.monotonic()
        self.announced = False
        self.stop: Stop | None = None
        self.cleanup: dict[str, Any] = {}
        self.roles: list[Role] = []
        self.parked: list[Process] = []
        self.spares = list(SPARE_PROCS)
        self.unswept: list[Death] = []
        self.shared: dict[str, Any] = {}
        self.revision = 0
        self.changes: list[Change] = []
        self.signals = deque([0], maxlen=SIGNAL_TICKS)
        self.keepers = Keepers(self.roles, log, self._free_numbers)
        self._lifeline: Lifeline | None = None
        self._dirty = False
        self._by_fd: dict[int, tuple[str, Process]] = {}
        self._poll = select.poll()

    # -- running ---------------------------------------------------------------------------------------
    def run(self) -> int:
        """Bind, start, watch, stop. StartError if it cannot even begin."""
        allow_many_files()
        if (fd := self.settings.lifeline_fd) >= 0:
            try:
                self._lifeline = Lifeline(fd)
            except OSError as error:
                raise StartError(f"argument --lifeline-fd: {fd}: {error.strerror or error}") from None
        self._listener = listen(self.settings.host, self.settings.port)
        self._engine_listener = listen("127.0.0.1", 0) if self.settings.backend_embedded else None
        port = self._listener.getsockname()[1]
        changes: dict[str, Any] = {
            "port": port,
            "serving_addr": config.hostport(config.reachable_host(self.settings.host), port),
        }
        if self._engine_listener is not None:
            changes["backend_addr"] = f"http://127.0.0.1:{self._engine_listener.getsockname()[1]}"
        self.settings = msgspec.structs.replace(self.settings, **changes)
        try:
            self._arena = Arena.create(self.settings.arena_max_bytes, proc=PROC_SUPERVISOR)
        except (CoreError, OSError) as error:
            size = self.settings.arena_max_bytes
            raise StartError(f"cannot create an arena of {size} bytes: {error}") from None
        self._arena.proc_enter(os.getpid())
        self._holder = Holder(self._arena)
        self._local_listener = listen_locally()
        self._wake_r, wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        wake_w.setblocking(False)
        before = signal.set_wakeup_fd(wake_w.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        try:
            self._poll.register(self._wake_r, select.POLLIN)
            if self._lifeline is not None:
                self._poll.register(self._lifeline, select.POLLIN)
            self._roles()
            self._loop()
        finally:
            self._kill_all()
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._holder.close()
            for sock in (self._wake_r, wake_w, self._listener, self._engine_listener, self._local_listener):
                if sock is not None:
                    sock.close()
            self.keepers.close()
            self._arena.close()
            if self._lifeline is not None:
                self._lifeline.close()  # last: who sees its end knows that nothing is left
        if self.start_failure:
            raise StartError(self.start_failure)
        self._farewell()
        return self.status

    def _roles(self) -> None:
        if self._engine_listener is not None:
            self.roles.append(Role("engine", "areal_fast.service.engine", -1))
        self.roles += [
            Role(f"worker-{i}", "areal_fast.service.worker", i, i) for i in range(self.settings.workers)
        ]
        self.roles.append(Role("cleaner", "areal_fast.service.cleaner", PROC_CLEANER))

    def _free_numbers(self) -> Iterator[int]:
        """Process numbers that neither workers nor stand-ins need."""
        return iter(range(self.settings.workers, SPARE_PROCS.start))

    def _loop(self) -> None:
        next_tick = time.monotonic() + TICK_S
        while not self._finished():
            self._start_due(time.monotonic())
            wait = max(0.0, next_tick - time.monotonic())
            for role in self.roles:
                if role.start_at is not None and self._may_start(role):
                    wait = min(wait, max(0.0, role.start_at - time.monotonic()))
            for fd, _ in self._poll.poll(int(wait * 1000) + 1):
                self._event(fd)
            now = time.monotonic()
            if now >= next_tick:
                self.tick += 1
                next_tick = now + TICK_S  # no catching up: a pause of the tree must not count as silence
                self._judge()
            if self.stop is not None:
                self._go_on_stopping(self.stop, now)
            if self._dirty:
                self._publish()

    def _finished(self) -> bool:
        return self.stop is not None and self.stop.phase == "end"

    @property
    def _workers(self) -> list[Role]:
        return [role for role in self.roles if role.name.startswith("worker")]

    @property
    def _cleaner(self) -> Role:
        return self.roles[-1]

    def _event(self, fd: int) -> None:
        if fd == self._wake_r.fileno():
            try:
                numbers = self._wake_r.recv(4096)
            except BlockingIOError:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._stop_asked(signal.Signals(number).name)
            return
        if self._lifeline is not None and fd == self._lifeline.fileno():
            if self._lifeline.ended():
                self._poll.unregister(fd)
                self._stop_asked("the end of its lifeline", HURRY_S)
            return
        kind, process = self._by_fd.get(fd, ("", None))
        if process is None:
            return
        for message in process.receive():
            self._heard(process, message)
        if kind == "pidfd":
            self._died(process)
        elif process.line_ended:
            self._forget_fd(fd)

    # -- starting --------------------------------------------------------------------------------------
    def _may_start(self, role: Role) -> bool:
        """At the start one worker goes ahead: what is wrong with the settings is then said once."""
        if self.stop is not None:
            return role is self._cleaner and self._wants_dump()
        return role.index == 0 or self._served()

    def _start_due(self, now: float) -> None:
        for role in list(self.roles):  # one that cannot be started may leave the list
            if role.start_at is not None and role.start_at <= now and self._may_start(role):
                self._start(role)

    def _start(self, role: Role) -> None:
        try:
            if self.keepers.is_keeper(role):
                process = self.keepers.spawn(role, self.settings, self.tick, self._arena.fileno())
            elif role.beats:
                worker = role.name != "cleaner"
                process = spawn(
                    role,
                    self.settings,
                    self.tick,
                    arena_fd=self._arena.fileno(),
                    listen_fd=self._listener.fileno() if worker else -1,
                    local_fd=self._local_listener.fileno() if worker else -1,
                )
            else:
                assert self._engine_listener is not None
                builtin = self.settings.tokenizer_path == config.BYTE_TOKENIZER
                arguments = () if builtin else ("--vocab-size", str(SAFE_VOCABULARY))
                process = spawn_engine(role, self._engine_listener.fileno(), arguments, self.tick)
        except OSError as error:
            self._schedule(role, f"cannot be started: {error}", None)
            return
        role.process, role.start_at = process, None
        process.applied = self.revision
        for kind, fd in (("pidfd", process.pidfd), ("control", process.control.fileno())):
            self._by_fd[fd] = (kind, process)
            self._poll.register(fd, select.POLLIN)
        self.keepers.tell(process)
        self._dirty = True
        self.log.info("started", role=role.name, pid=process.pid, proc=process.proc)

    def _schedule(self, role: Role, why: str, ready_for_s: float | None, **fields: object) -> None:
        """Log a death and plan the next start, or give up."""
        if self.stop is not None:
            if not self.start_failure:
                self.log.warning("died_while_stopping", role=role.name, why=why, **fields)
            role.start_at = time.monotonic()  # only the cleaner may start now, see _may_start
            if role is self._cleaner:
                self.stop.cleaner_tries += 1
            return
        delay = role.restarts.after_death(ready_for_s)
        if self.keepers.is_keeper(role) and (delay is None or not role.restarts.ever_ready):
            if self.keepers.gave_up(role, why):
                return
            delay = role.restarts.LONGEST_S
        if delay is None:
            self._give_up(
                f"{role.name} cannot stay up ({role.restarts.bad_runs} times in a row), last: {why}"
            )
            return
        role.start_at = time.monotonic() + delay
        self.log.warning(
            "restarting", role=role.name, why=why, in_s=delay, restarts=role.restarts.total, **fields
        )

    def _give_up(self, why: str) -> None:
        if self.stop is not None:
            return
        self.status = 1
        if not self._served():
            self.start_failure = why
            self.stop = Stop(time.monotonic(), 0.0)
            self.stop.phase = "end"
            return
        self.log.error("giving_up", why=why)
        self._begin_stop(HURRY_S)

    def _served(self) -> bool:
        """Whether a worker was ever ready, so that there may be sessions to keep."""
        return any(role.restarts.ever_ready for role in self._workers)

    # -- what children say and do ----------------------------------------------------------------------
    def _heard(self, process: Process, message: dict[str, Any]) -> None:
        said = message.get("is")
        if said == "ready":
            process.note_ready()
            process.role.restarts.ever_ready = True
            self._dirty = True
            self._announce()
            if self.stop is not None:
                self._order(process, self.stop)
        elif said == "fatal":
            process.last_words = str(message.get("why"))
            if not self.keepers.is_keeper(process.role) and not self._served():
                self._give_up(process.last_words)
        elif said == "status":
            self.cleanup = message.get("status") or {}
            self._dirty = True
        elif said in ("hold", "placed", "dropped"):
            self._holder.heard(process, message)
        elif said == "change":
            self._change(process, int(message["token"]), message["values"])
        elif said == "keeper" and self.keepers.is_keeper(process.role):
            self.keepers.heard(process, message)
        elif said == "keeper":
            self.keepers.ask(process, int(message["token"]), str(message["gpu"]), self.settings)
        elif said == "applied":
            process.applied = int(message["revision"])
            self._settle_changes()
        elif said == "drained" and self.stop is not None:
            self.stop.unfinished += int(message.get("unfinished", 0))
        elif said == "dumped" and self.stop is not None:
            self.stop.dumped += int(message.get("dumped", 0))
            self.stop.left = int(message.get("left", 0))

    def _change(self, asker: Process, token: int, values: dict[str, Any]) -> None:
        """Shared settings change: every worker is told, those to come are started with them."""
        if "external_models" in values:  # one is named, the others stay; null drops one
            models = {**self.settings.external_models, **values["external_models"]}
            values = {**values, "external_models": {n: m for n, m in models.items() if m is not None}}
        self.shared |= values
        self.settings = msgspec.structs.replace(self.settings, **self.shared)
        self.revision += 1
        self.changes.append(Change(self.revision, token, asker))
        for role in self._workers:
            if role.process is not None:
                role.process.send({"do": "shared", "revision": self.revision, "values": self.shared})
        self.log.info("settings_changed", revision=self.revision, what=",".join(values))

    def _settle_changes(self) -> None:
        """Tell who asked for a change once every worker that lives has it."""
        have = min((role.process.applied for role in self._workers if role.process), default=self.revision)
        for change in self.changes:
            if change.revision <= have:
                change.asker.send({"do": "changed", "token": change.token})
        self.changes = [change for change in self.changes if change.revision > have]

    def _announce(self) -> None:
        if not self.announced and all(r.process and r.process.ready_at for r in self.roles):
            self.announced = True
            self.log.notice(
                "ready",
                address=f"http://{config.hostport(self.settings.host, self.settings.port)}",
                workers=self.settings.workers,
                backend=self.settings.backend_addr or "none",
                arena_bytes=self.settings.arena_max_bytes,
                dump_path=self.settings.dump_path or "none",
                seconds=time.monotonic() - self.begun,
            )
            if self._lifeline is not None:
                self._lifeline.say_ready(self.settings.serving_addr, self.log)
            if self.settings.admin_api_key == config.DEFAULT_ADMIN_KEY:
                self.log.warning("default_admin_key", hint="change it before others can reach this address")

    def _died(self, process: Process) -> None:
        """The pidfd says that it is over: collect it, sweep what it held, plan its successor."""
        self._forget_fd(process.pidfd)
        self._forget_fd(process.control.fileno())
        self.changes = [change for change in self.changes if change.asker is not process]
        self.keepers.forget_asker(process)
        ready_for = process.ready_for_s(time.monotonic())
        why = process.reap()
        self._holder.died(process)
        role = process.role
        self._dirty = True
        if process in self.parked:
            self.parked.remove(process)
            self.log.warning("stuck_process_gone", role=role.name, pid=process.pid, why=why)
            self._sweep_parked(role, process)
            return
        if process.retiring and process.popen.returncode == 0:
            self.spares.append(role.proc)
            role.proc = role.home_proc
        done = self.stop is not None and process.popen.returncode == 0
        self._bury(Death(role, process.proc, f"pid {process.pid} {why}", ready_for, done))

    def _bury(self, death: Death) -> None:
        """Sweep, then plan the successor. Tried again at the next tick while the index lock is taken."""
        death.role.process = None
        self._settle_changes()
        swept: dict[str, int] = {}
        try:
            if death.role.beats:
                swept = {name: count for name, count in self._arena.sweep(death.proc).items() if count}
                self._arena.add_word(DEATHS, 1)
        except IndexBusy:
            self.unswept.append(death)
            return
        if death.done:
            death.role.start_at = None
        else:
            self._schedule(death.role, death.why, death.ready_for_s, swept=swept or None)

    def _sweep_parked(self, role: Role, process: Process) -> None:
        try:
            swept = self._arena.sweep(process.proc)
        except IndexBusy:
            # Nobody uses this number: leaving its pins for the next sweep costs memory, not truth.
            swept = {}
        self.log.info("swept", role=role.name, proc=process.proc, **swept)
        if role.name != "cleaner":
            self.spares.append(process.proc)
        elif role.process is not None:
            role.process.retiring = True  # its stand-in makes room for a successor under the old number
            role.process.send({"do": "retire"})

    def _judge(self) -> None:
        """One tick: hung, stopped and unkillable children; sweeps that had to wait; unsent messages."""
        unswept, self.unswept = self.unswept, []
        for death in unswept:
            self._bury(death)
        if self.stop is None:
            self.signals.append(self._arena.word(TREE_SIGNALLED))
        self._holder.reconcile()
        lock_owner = self._arena.lock_owner()
        for role in self.roles:
            process = role.process
            if process is None:
                continue
            process.flush()
            if role.beats:
                pid, _, ticks = self._arena.proc_info(process.proc)
                reason = process.verdict(
                    ticks if pid == process.pid else -1,
                    holds_lock=lock_owner == process.proc,
                    tick=self.tick,
                    settings=self.settings,
                )
                if reason and process.killed_tick < 0:
                    self.log.warning("killing", role=role.name, pid=process.pid, why=reason)
                    process.kill(reason, self.tick)
            if process.stuck(self.tick) and (self.spares or not role.beats):
                self._park(role, process)

    def _park(self, role: Role, process: Process) -> None:
        self.log.error("cannot_be_killed", role=role.name, pid=process.pid, proc=process.proc)
        self.parked.append(process)
        role.process = None
        if role.beats:
            role.proc = self.spares.pop(0)
        role.start_at = time.monotonic()
        self._dirty = True

    def _forget_fd(self, fd: int) -> None:
        if self._by_fd.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _publish(self) -> None:
        """Tell every worker how things stand: its /health answers from this."""
        self._dirty = False

        def row(role: Role) -> dict[str, Any]:
            p = role.process
            return {
                "pid": p.pid if p else None,
                "proc": role.proc,
                "state": p.state if p else "restarting",
                "since": p.ready_since if p else None,
                "restarts": role.restarts.total,
            }

        workers = self._workers
        board = {
            "workers": [row(role) for role in workers],
            **{role.name: row(role) for role in self.roles if role not in workers},
            "stuck": [p.pid for p in self.parked],
            "cleanup": self.cleanup,
        }
        for role in workers:
            if role.process is not None:
                role.process.send({"do": "board", "board": board})

    # -- stopping --------------------------------------------------------------------------------------
    def _stop_asked(self, by: str, within_s: float = config.FOR_EVER_S) -> None:
        now = time.monotonic()
        if self.stop is None:
            drain_s = min(self.settings.drain_s, within_s)
            self.log.notice("stopping", by=by, drain_s=drain_s)
            self._begin_stop(drain_s)
        else:
            self._hurry(self.stop, now + HURRY_S)

    def _begin_stop(self, drain_s: float) -> None:
        """Nobody new is let in; workers finish what they have, the cleaner dumps what nobody uses."""
        self.stop = Stop(time.monotonic(), drain_s)
        self._listener.close()
        for role in self.roles:
            role.start_at = time.monotonic() if role is self._cleaner and role.process is None else None
            if role.process is not None:
                self._order(role.process, self.stop)

    def _hurry(self, stop: Stop, until: float) -> None:
        if until < stop.drain_until:
            stop.drain_until = until
            for role in self._workers:
                if role.process is not None:
                    self._order(role.process, stop)

    def _order(self, process: Process, stop: Stop) -> None:
        """Tell a child its part in the stop."""
        if process.role.name.startswith("worker"):
            if process.ready_at is None:
                process.kill("was not ready yet", self.tick)
                return
            process.state = "draining"
            process.send({"do": "drain", "seconds": max(0.0, stop.drain_until - time.monotonic())})
        elif process.role is self._cleaner and self._wants_dump() and process.ready_at is not None:
            process.send({"do": "dump", "seconds": DUMP_S, "final": stop.phase == "dump"})

    def _wants_dump(self) -> bool:
        stop = self.stop
        return bool(
            stop and self.settings.dump_path and self._served() and stop.cleaner_tries < CLEANER_STOP_TRIES
        )

    def _go_on_stopping(self, stop: Stop, now: float) -> None:
        if self._arena.word(TREE_SIGNALLED) != self.signals[0]:
            self._hurry(stop, stop.begun + TREE_HURRY_S)
        cleaner = self._cleaner
        if stop.phase == "drain":
            workers = [role.process for role in self._workers if role.process is not None]
            for process in workers:
                if now > stop.drain_until + MARGIN_S:
                    process.kill("did not finish in time", self.tick)
            if workers or self.unswept:
                return
            stop.phase, stop.dump_until = "dump", now + DUMP_S
            if cleaner.process is not None:
                self._order(cleaner.process, stop)
        if not self._wants_dump() or (cleaner.process is None and cleaner.start_at is None):
            stop.phase = "end"
        elif now > stop.dump_until:
            self.log.error("dump_unfinished", seconds=DUMP_S)
            stop.phase = "end"

    def _kill_all(self) -> None:
        """End every child and wait for it, except those that SIGKILL cannot end."""
        processes = [role.process for role in self.roles if role.process] + self.parked
        for process in processes:
            process.kill("the proxy ends", self.tick)
        deadline = time.monotonic() + 5
        for process in processes:
            poll = select.poll()
            poll.register(process.pidfd, select.POLLIN)
            if poll.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                process.reap()
        for role in self.roles:
            role.process = None

    def _farewell(self) -> None:
        if self.stop is not None:
            self.log.notice(
                "stopped",
                status=self.status,
                seconds=time.monotonic() - self.stop.begun,
                unfinished_requests=self.stop.unfinished,
                dumped_sessions=self.stop.dumped,
                not_dumped_sessions=self.stop.left,
            )
