"""The supervisor with scripted children and an arena that only keeps books.

What needs a child that SIGKILL cannot end, or a sweep that meets a taken lock, cannot be had from real ones.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from areal_fast.config import Settings
from areal_fast.core import PROC_CLEANER, IndexBusy
from areal_fast.service import processes, supervisor
from areal_fast.service.listening import StartError
from areal_fast.service.log import Log
from areal_fast.service.processes import Process, Restarts, Role
from areal_fast.service.supervisor import SPARE_PROCS, Supervisor
from tests.e2e.running import alive, wait_until

CHILD = "tests.unit.service.scripted_child"


class Books:
    """The part of an arena that the supervisor uses. Everybody's heart always beats."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("books")
        self.swept: list[int] = []
        self.busy = 0
        self.words = [0] * 64
        self.ticks = 0
        self.running: Supervisor | None = None

    def create(self, size: int, *, proc: int) -> Books:
        return self

    def proc_enter(self, pid: int) -> int:
        return 1

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        os.close(self.fd)

    def word(self, i: int) -> int:
        return self.words[i]

    def set_word(self, i: int, value: int) -> None:
        self.words[i] = value

    def add_word(self, i: int, v: int) -> int:
        self.words[i] += v
        return self.words[i]

    def lock_owner(self) -> int:
        return -1

    def proc_info(self, proc: int) -> tuple[int, int, int]:
        assert self.running is not None
        self.ticks += 1
        pids = [r.process.pid for r in self.running.roles if r.process and r.process.proc == proc]
        return (pids or [0])[0], 1, self.ticks

    def sweep(self, proc: int) -> dict[str, int]:
        if self.busy:
            self.busy -= 1
            raise IndexBusy
        self.swept.append(proc)
        return {"pins": 2, "freed": 0}


class Run:
    """A supervisor with two scripted workers and a cleaner, and its log's lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.books = Books()
        monkeypatch.setattr(supervisor, "Arena", self.books)
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        self.text = ""
        made = Settings(host="127.0.0.1", port=0, backend_addr="", workers=2, **settings)
        self.supervisor = self.books.running = Supervisor(made, Log("supervisor", "info", self.write_fd))
        monkeypatch.setattr(self.supervisor, "_roles", self._roles)
        self.failed: list[BaseException] = []

    def _roles(self) -> None:
        self.supervisor.roles = [Role(f"worker-{i}", CHILD, i, i) for i in range(2)]
        self.supervisor.roles.append(Role("cleaner", CHILD, PROC_CLEANER))

    def scenario(self, steps: Callable[[], None]) -> int:
        """Run the supervisor here and the steps beside it; then SIGTERM. Returns the exit status."""

        def beside() -> None:
            try:
                wait_until(lambda: self.log(" ready address"), "all are ready")
                steps()
            except BaseException as error:
                self.failed.append(error)
            if not self.supervisor._finished():
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=beside)
        thread.start()
        try:
            return self.supervisor.run()
        finally:
            thread.join(60)
            self.log("")
            os.close(self.read_fd)
            os.close(self.write_fd)
            if self.failed:
                raise self.failed[0]

    def log(self, pattern: str) -> list[str]:
        try:
            self.text += os.read(self.read_fd, 1 << 16).decode()
        except OSError:
            pass  # nothing new, or the run is over and everything has been read
        return re.findall(pattern, self.text)

    def process(self, index: int) -> Process:
        return wait_until(
            lambda: (p := self.supervisor.roles[index].process) and p.ready_at and p, "it is ready"
        )


def test_start_restart_and_an_orderly_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, dump_path="/nowhere")

    def steps() -> None:
        first = run.process(0)
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: run.log("restarting role=worker-0"), "it is restarted")
        assert run.process(0).pid != first.pid
        assert run.books.swept == [0]

    assert run.scenario(steps) == 0
    assert "dumped_sessions=2" in run.text, "once while draining, once at the end"
    assert sorted(run.books.swept) == [0, 0, 1, PROC_CLEANER]


def test_a_sweep_waits_for_the_index_lock_and_the_successor_for_the_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch)

    def steps() -> None:
        victim = run.process(1)
        run.books.busy = 3
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: run.books.busy == 0, "it was tried again")
        assert run.supervisor.roles[1].process is None or run.books.swept == [1]
        assert run.process(1).pid != victim.pid

    assert run.scenario(steps) == 0


@pytest.mark.parametrize("index", [0, 2])
def test_a_spare_number_stands_in_for_one_that_cannot_be_killed(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    monkeypatch.setattr(processes, "STUCK_TICKS", 2)
    run = Run(monkeypatch)
    home = (0, 1, PROC_CLEANER)[index]

    def steps() -> None:
        victim = run.process(index)
        with victim_is_immortal(victim):
            wait_until(lambda: run.supervisor.parked == [victim], "it is parked")
            stand_in = wait_until(
                lambda: (p := run.supervisor.roles[index].process) and p.ready_at and p, "a stand-in works"
            )
            assert stand_in.proc == SPARE_PROCS[0] and alive(victim.pid)
            assert run.books.swept == [], "nothing is swept before its death is certain"
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: run.supervisor.parked == [], "it is gone at last")
        assert run.books.swept[0] == home
        if index == 2:  # the cleaner's number matters: what it owned is resumed under the same one
            wait_until(
                lambda: run.supervisor.roles[2].proc == PROC_CLEANER, "the number is the old one again"
            )
            assert run.process(2).proc == PROC_CLEANER
            assert run.supervisor.spares[-1] == SPARE_PROCS[0]
        else:
            assert run.supervisor.spares[-1] == home

    assert run.scenario(steps) == 0


class victim_is_immortal:
    """While inside, the supervisor believes to have killed it, and it lives on."""

    def __init__(self, victim: Process) -> None:
        victim.kill_reason, victim.killed_tick = "it hung", 0

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def test_a_change_is_confirmed_when_every_worker_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    heard: list[Any] = []
    real = Process.send

    def send(self: Process, message: dict[str, Any]) -> None:
        if message["do"] in ("shared", "changed"):
            heard.append((self.role.name, message["do"]))
        real(self, message)

    monkeypatch.setattr(Process, "send", send)

    def steps() -> None:
        run.process(0)
        run.process(1)
        run.supervisor.cleanup = {"ask": True}
        run.supervisor._dirty = True
        wait_until(lambda: ("worker-0", "changed") in heard and ("worker-1", "changed") in heard, "confirmed")
        run.supervisor.cleanup = {}
        assert run.supervisor.settings.backend_addr == "http://new"
        first = heard.index(("worker-0", "changed"))
        assert {name for name, what in heard[:first] if what == "shared"} == {"worker-0", "worker-1"}

    assert run.scenario(steps) == 0


def test_what_cannot_stay_up_is_given_up_and_what_lives_is_dumped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restarts, "LONGEST_S", 0.01)
    run = Run(monkeypatch, dump_path="/nowhere")

    def steps() -> None:
        run.process(1)
        run.supervisor.roles[1].module = "tests.unit.service.short_lived_child"
        process = run.supervisor.roles[1].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: run.log("giving_up"), "it is given up")
        wait_until(lambda: run.supervisor._finished(), "it ends by itself")

    assert run.scenario(steps) == 1
    assert run.log(
        r"ERROR \S+ giving_up why=\"worker-1 cannot stay up \(10 times in a row\), last: .*status 7"
    )
    assert run.log("stopped status=1 .*dumped_sessions=2")


def test_what_never_becomes_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)

    def roles() -> None:
        run.supervisor.roles = [Role("worker-0", "no_such_module_at_all", 0), Role("cleaner", CHILD, 30)]

    monkeypatch.setattr(run.supervisor, "_roles", roles)
    with pytest.raises(StartError, match="worker-0 cannot stay up"):
        run.supervisor.run()
    os.close(run.read_fd)
    os.close(run.write_fd)
