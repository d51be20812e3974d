"""The cleaner killed with SIGKILL at every step of a dump, and its successor at every step again.

A first run writes down the steps. Then, for each of them, a forked cleaner kills itself there; the dead
process is swept and a successor under the same process number goes on. Whatever happened, the directory must
end up with each file once, whole, under its right name, nothing else in it, and the arena empty.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from areal_fast.core import PROC_CLEANER, Arena
from areal_fast.store import SessionStore, dump
from tests.unit.store.turns import commit, export, started, take

FOREIGN = "b-0-active.json"


def populate(store: SessionStore) -> None:
    """Three sessions: two files, one file under a name that is taken, none at all."""
    with started(store, "a") as session:
        slow = session.begin_turn(reserve_tokens=8)
        take(session, [1] * 40, [2])
        session.set_reward(1.0)
        take(session, [3] * 40, [4])
        session.set_reward(0.5)
        export(store, session.session_id)
        commit(slow, [5], [6])
        take(session, [7], [8])
    with started(store, "b") as session:
        take(session, [1] * 5000, [2])
    started(store, "c").release()


def in_child(fd: int, folder: Path, on_step: Callable[[str], None]) -> int:
    """Clean up in a forked process; its exit status (negative: the signal)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with Arena.attach(fd, PROC_CLEANER) as arena:
                arena.proc_enter(os.getpid())
                store = SessionStore(arena)
                store.cleaner.on_step = on_step
                report = store.cleanup_stale(0.0, str(folder))
                status = 2 if report.failures or report.waiting else 0
                arena.proc_leave()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killing_at(n: int) -> Callable[[str], None]:
    """Kill this process at its n-th step (0, 1, …)."""
    left = [n]

    def on_step(_: str) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    return on_step


class Scene:
    """A populated arena and an output directory with somebody else's file in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / FOREIGN).write_text("somebody's")
        self.arena = Arena.create(8 << 20, proc=0)
        populate(SessionStore(self.arena))

    def run(self, on_step: Callable[[str], None]) -> int:
        status = in_child(self.arena.fileno(), self.folder, on_step)
        if status < 0:
            self.arena.sweep(PROC_CLEANER)
        return status

    def files(self) -> dict[str, int]:
        return {name: (self.folder / name).stat().st_size for name in sorted(os.listdir(self.folder))}

    def end(self, want: dict[str, int]) -> None:
        assert self.files() == want
        assert (self.folder / FOREIGN).read_text() == "somebody's"
        stats = self.arena.stats()
        assert stats["sessions_active"] + stats["sessions_detached"] + stats["sessions_dumped"] == 0
        assert self.arena.consistency() == ""
        self.arena.close()


def steps_and_files(folder: Path) -> tuple[list[str], dict[str, int]]:
    scene = Scene(folder)
    log = folder.parent / (folder.name + ".steps")
    log.write_text("")

    def write_down(step: str) -> None:
        with log.open("a") as file:
            file.write(step + "\n")

    assert scene.run(write_down) == 0
    files = scene.files()
    scene.end(files)
    return log.read_text().split(), files


@pytest.fixture(params=["rename", "link"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of giving a file its name without replacing another."""
    if request.param == "link":
        monkeypatch.setattr(dump, "_renameat2", None)
    return str(request.param)


def test_killed_at_every_step(tmp_path: Path, way: str) -> None:
    steps, want = steps_and_files(tmp_path / "first")
    assert set(steps) == {
        "detached",
        "named",
        "opened",
        "writing",
        "written",
        "synced",
        "published",
        "directory",
        "dumped",
        "reaped",
    }
    assert sorted(want) == [
        "a-0-active.json",
        "a-0-trajectory-0.json",
        FOREIGN,
        f"{FOREIGN}.1",
    ]
    for n in range(len(steps)):
        scene = Scene(tmp_path / f"at-{n}")
        assert scene.run(killing_at(n)) == -signal.SIGKILL, steps[n]
        assert scene.run(killing_at(1000)) == 0, steps[n]
        scene.end(want)


def test_killed_again_and_again(tmp_path: Path, seed: int) -> None:
    """Up to four cleaners in a row, each killed somewhere."""
    steps, want = steps_and_files(tmp_path / "first")
    rng = random.Random(seed)
    for round_ in range(40):
        scene = Scene(tmp_path / f"round-{round_}")
        for _ in range(rng.randint(2, 4)):
            if scene.run(killing_at(rng.randrange(len(steps)))) == 0:
                break
        else:
            assert scene.run(killing_at(1000)) == 0
        scene.end(want)


def test_a_file_with_both_names_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between link and unlink a file has both names; the successor drops the temporary one."""
    monkeypatch.setattr(dump, "_renameat2", None)
    _, want = steps_and_files(tmp_path / "first")
    remove = dump.DumpDir.remove
    scene = Scene(tmp_path / "killed")

    def die_on_second(self: dump.DumpDir, name: str) -> None:
        if self.exists(name):
            os.kill(os.getpid(), signal.SIGKILL)
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(dump.DumpDir, "remove", die_on_second)
        assert scene.run(killing_at(1000)) == -signal.SIGKILL
    assert sum(name.endswith(".tmp") for name in scene.files()) == 1
    assert scene.run(killing_at(1000)) == 0
    scene.end(want)
