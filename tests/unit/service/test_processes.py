"""When a child is started again, when it is given up, and when silence means that it hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from areal_fast.config import Settings
from areal_fast.service.processes import LOCK_TICKS, STUCK_TICKS, TICK_S, Process, Restarts, Role


def test_the_back_off_doubles_up_to_its_limit() -> None:
    restarts = Restarts()
    delays = [restarts.after_death(0.1) for _ in range(Restarts.BAD_RUNS - 1)]
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert restarts.after_death(0.1) is None


def test_a_good_run_begins_the_back_off_anew() -> None:
    restarts = Restarts()
    for _ in range(100):
        for _ in range(Restarts.BAD_RUNS - 2):
            assert restarts.after_death(0.0) is not None
        assert restarts.after_death(Restarts.GOOD_RUN_S) == Restarts.FIRST_S
    assert restarts.total == 100 * (Restarts.BAD_RUNS - 1)


def test_what_was_never_ready_is_given_up_soon() -> None:
    restarts = Restarts()
    starts = 1
    while restarts.after_death(None) is not None:
        starts += 1
    assert starts == Restarts.BAD_STARTS


def test_what_was_ready_once_gets_more_tries() -> None:
    restarts = Restarts()
    assert restarts.after_death(5.0) is not None
    starts = 1
    while restarts.after_death(None) is not None:
        starts += 1
    assert starts == Restarts.BAD_RUNS - 1


@pytest.fixture
def process() -> Iterator[Process]:
    """A real child that waits for its stdin to end, watched as worker 0."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    popen = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    ours.setblocking(False)
    made = Process(Role("worker-0", "none", 0), popen, ours, 0)
    yield made
    theirs.close()
    if popen.returncode is None:
        popen.kill()
        made.reap()
    assert popen.stdin is not None
    popen.stdin.close()


SETTINGS = Settings(hang_timeout_s=10.0, start_timeout_s=60.0)
PATIENCE = int(SETTINGS.hang_timeout_s / TICK_S)


def judge(process: Process, beat: int, tick: int, *, holds_lock: bool = False) -> str:
    return process.verdict(beat, holds_lock=holds_lock, tick=tick, settings=SETTINGS)


def test_silence_is_counted_in_the_supervisors_own_ticks(process: Process) -> None:
    process.ready_at = 1.0
    assert judge(process, 7, 1) == ""
    assert judge(process, 7, PATIENCE) == ""
    assert "no heartbeat" in judge(process, 7, PATIENCE + 1)
    assert judge(process, 8, PATIENCE + 2) == ""


def test_a_process_that_never_gets_ready(process: Process) -> None:
    limit = int(SETTINGS.start_timeout_s / TICK_S)
    assert judge(process, -1, limit - 1) == ""
    assert "not ready" in judge(process, -1, limit)


def test_a_silent_holder_of_the_index_lock_gets_no_patience(process: Process) -> None:
    process.ready_at = 1.0
    assert judge(process, 7, 1, holds_lock=True) == ""
    assert judge(process, 7, LOCK_TICKS + 1, holds_lock=True) == ""
    assert "index lock" in judge(process, 7, LOCK_TICKS + 2, holds_lock=True)


def test_holding_the_lock_by_chance_is_no_crime(process: Process) -> None:
    process.ready_at = 1.0
    for tick in range(1, 50):
        assert judge(process, tick, tick, holds_lock=True) == ""
    for tick in range(50, 50 + PATIENCE, 2):
        assert judge(process, 50, tick, holds_lock=True) == ""
        assert judge(process, 50, tick + 1, holds_lock=False) == "", "not held at two ticks in a row"
        if tick + 3 - 50 >= PATIENCE:
            break


def test_the_cleaner_may_be_silent_longer(process: Process) -> None:
    process.role.name = "cleaner"
    process.ready_at = 1.0
    assert judge(process, 7, 1) == ""
    assert judge(process, 7, 3 * PATIENCE) == ""
    assert "no heartbeat" in judge(process, 7, 10 * PATIENCE)


def test_a_stopped_cleaner_gets_no_more_patience_than_a_worker(process: Process) -> None:
    process.role.name = "cleaner"
    process.ready_at = 1.0
    assert judge(process, 7, 1) == ""
    assert judge(process, 7, PATIENCE + 1) == ""
    process.popen.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert judge(process, 7, PATIENCE) == ""
    assert "no heartbeat" in judge(process, 7, PATIENCE + 1)
    process.popen.send_signal(signal.SIGCONT)


def test_a_kill_is_certain_and_says_why(process: Process) -> None:
    process.kill("it hung", 5)
    process.kill("another reason", 6)
    assert process.popen.wait(90) == -9
    assert process.reap() == "killed: it hung"


def test_a_death_by_itself_says_how(process: Process) -> None:
    assert process.popen.stdin is not None
    process.popen.stdin.close()
    assert process.popen.wait(90) == 1
    process.last_words = "no tokenizer"
    assert process.reap() == "exited with status 1: no tokenizer"


def test_a_kill_without_effect_is_noticed(process: Process) -> None:
    assert not process.stuck(10_000)
    process.killed_tick = 100  # as if SIGKILL had been sent to a process that sits in the kernel
    assert not process.stuck(100 + STUCK_TICKS - 1)
    assert process.stuck(100 + STUCK_TICKS)


def test_last_words_are_heard_although_ours_were_not() -> None:
    """A child that dies with our messages unread resets its end; what it said before is still there."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    popen = subprocess.Popen([sys.executable, "-c", ""], stderr=subprocess.DEVNULL)
    ours.setblocking(False)
    process = Process(Role("worker-0", "none", 0), popen, ours, 0)
    process.send({"do": "board", "board": {}})
    theirs.send(b'{"is":"fatal","why":"no tokenizer"}')
    theirs.close()
    assert process.receive() == [{"is": "fatal", "why": "no tokenizer"}]
    process.reap()


def test_a_full_control_line_never_blocks_and_keeps_the_latest_of_each_kind() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    popen = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    ours.setblocking(False)
    theirs.setblocking(False)
    process = Process(Role("worker-0", "none", 0), popen, ours, 0)
    try:
        for n in range(10_000):
            process.send({"do": "board", "n": n})
        process.send({"do": "drain", "seconds": 1})
        got: list[bytes] = []
        while True:
            try:
                got.append(theirs.recv(65536))
            except BlockingIOError:
                before = len(got)
                process.flush()
                try:
                    got.append(theirs.recv(65536))
                except BlockingIOError:
                    break
                assert len(got) > before
        assert len(got) < 10_000
        assert b'{"do":"drain","seconds":1}' in got
        assert b'{"do":"board","n":9999}' in got
    finally:
        process.kill("done", 0)
        process.reap()
        theirs.close()
        assert popen.stdin is not None
        popen.stdin.close()
