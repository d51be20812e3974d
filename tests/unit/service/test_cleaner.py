"""What the cleaner says of dumps that fail: early, of each session once, again now and then, no flood."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from areal_fast.config import Settings
from areal_fast.core import PROC_CLEANER, Arena
from areal_fast.service import cleaner as module
from areal_fast.service.cleaner import MAX_FAILURES_TOLD, Cleaner
from areal_fast.service.log import Log
from areal_fast.store import SessionStore


class Run:
    """A cleaner that is told when to run, the sessions it may find, and what it says."""

    def __init__(self, folder: Path) -> None:
        self._read, self._written = os.pipe()
        os.set_blocking(self._read, False)
        self.control, self._far = socket.socketpair()
        self.arena = Arena.create(32 << 20)
        self.workers = SessionStore(Arena.attach(self.arena.fileno(), 0))
        self.status: dict[str, Any] = {}
        child = SimpleNamespace(
            settings=Settings(dump_path=str(folder), session_timeout_s=0.0, session_timeout_given=True),
            arena=Arena.attach(self.arena.fileno(), PROC_CLEANER),
            log=Log("cleaner", "warning", self._written),
            control=self.control,
            send=lambda message: self.status.update(message["status"]),
            receive=lambda: None,
        )
        self.cleaner = Cleaner(child)  # type: ignore[arg-type]

    def close(self) -> None:
        for fd in (self._read, self._written):
            os.close(fd)
        self.control.close()
        self._far.close()

    def sessions(self, count: int) -> None:
        for _ in range(count):
            started = self.workers.start("t")
            session = self.workers.by_key(started.sessions[0][1])
            assert session is not None
            with session:
                session.begin_turn(reserve_tokens=64).commit_string(b"[]", "ho")

    def clean(self) -> list[str]:
        """One run; its lines from the event on."""
        self.cleaner._clean()
        text = b""
        try:
            while piece := os.read(self._read, 65536):
                text += piece
        except BlockingIOError:
            pass
        return [re.sub(r"^.*?cleaner\[\d+\] ", "", line) for line in text.decode().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dumps"


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    made = Run(folder)
    yield made
    made.close()


def test_a_folder_that_takes_no_dumps_is_told_of_before_there_is_one(run: Run, folder: Path) -> None:
    folder.write_text("in the way")
    (line,) = run.clean()
    assert line.startswith("dump_path_unusable ") and str(folder) in line
    assert run.status["dump_path_error"]
    assert run.clean() == [], "once is enough"
    folder.unlink()
    assert run.clean() == [f"dump_path_usable path={folder}"]
    assert run.status["dump_path_error"] is None
    assert folder.is_dir(), "it was made, so that what is wrong with it shows now"


def test_hundreds_of_failures_are_some_lines_and_a_reminder(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 3 * MAX_FAILURES_TOLD
    run.sessions(count)
    folder.write_text("in the way")
    lines = [line for line in run.clean() if line.startswith("dump_failed")]
    assert len(lines) == MAX_FAILURES_TOLD + 1
    assert f"path={folder}" in lines[0] and "session=t-" in lines[0]
    assert f"more_sessions={count - MAX_FAILURES_TOLD} " in lines[-1]
    assert run.status["failing"] == count and len(run.status["failures"]) == MAX_FAILURES_TOLD
    assert run.clean() == []
    monkeypatch.setattr(module, "REMIND_S", 0.0)
    run.cleaner._remind_at = 0.0
    (line,) = run.clean()
    assert line.startswith(f"dumps_still_failing sessions={count} why=")
    folder.unlink()
    run.cleaner.store.cleaner._backoff.clear()
    lines = run.clean()
    assert sum(line.startswith("dump_recovered") for line in lines) == MAX_FAILURES_TOLD + 1
    assert run.status["failing"] == 0 and len(list(folder.iterdir())) == count
